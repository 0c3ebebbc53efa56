// The instructions that a warp executes together, and the banks of shared memory.

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <unordered_map>

#include "device_on_host/block.h"
#include "device_on_host/collectives.h"
#include "device_on_host/numbers.h"
#include "device_on_host/tensor_core.h"

namespace device_on_host {
namespace {

template <class T>
T& payload(Warp& warp, unsigned lane) {
  return *static_cast<T*>(warp.threads[lane]->payload);
}

template <class F>
void for_lanes(uint32_t mask, const F& f) {
  for (; mask; mask &= mask - 1) f(static_cast<unsigned>(__builtin_ctz(mask)));
}

std::string lanes_disagree(const char* what) {
  return std::string("the lanes of one instruction differ in ") + what;
}

// Which lane a lane reads, as PTX defines shfl.sync.
unsigned source_of(const Shuffle& s, int lane) {
  const int first = lane & ~(s.width - 1), last = first + s.width - 1;
  switch (s.kind) {
    case ShuffleKind::up:
      return static_cast<unsigned>(lane - s.operand >= first ? lane - s.operand : lane);
    case ShuffleKind::down:
      return static_cast<unsigned>(lane + s.operand <= last ? lane + s.operand : lane);
    case ShuffleKind::butterfly:
      return static_cast<unsigned>((lane ^ s.operand) <= last ? lane ^ s.operand : lane);
    default:
      return static_cast<unsigned>(first | (s.operand & (s.width - 1)));
  }
}

std::string shuffle(Warp& warp, uint32_t mask) {
  std::string wrong;
  const ShuffleKind kind = payload<Shuffle>(warp, static_cast<unsigned>(__builtin_ctz(mask))).kind;
  for_lanes(mask, [&](unsigned lane) {
    auto& s = payload<Shuffle>(warp, lane);
    if (s.kind != kind) wrong = lanes_disagree("the kind of __shfl_sync");
    const unsigned source = source_of(s, static_cast<int>(lane));
    if (source >= kLanes || !(mask >> source & 1))
      wrong = "lane " + std::to_string(lane) + " reads from lane " + std::to_string(source) +
              ", which takes no part in the __shfl_sync";
    else
      s.result = payload<Shuffle>(warp, source).value;
  });
  return wrong;
}

std::string vote(Warp& warp, uint32_t mask) {
  std::string wrong;
  const VoteKind kind = payload<Vote>(warp, static_cast<unsigned>(__builtin_ctz(mask))).kind;
  uint32_t ballot = 0;
  for_lanes(mask, [&](unsigned lane) {
    if (payload<Vote>(warp, lane).kind != kind) wrong = lanes_disagree("the kind of vote");
    ballot |= uint32_t{payload<Vote>(warp, lane).predicate} << lane;
  });
  const uint32_t result = kind == VoteKind::ballot ? ballot : kind == VoteKind::all ? ballot == mask : ballot != 0;
  for_lanes(mask, [&](unsigned lane) { payload<Vote>(warp, lane).result = result; });
  return wrong;
}

std::string match(Warp& warp, uint32_t mask) {
  for_lanes(mask, [&](unsigned lane) {
    auto& mine = payload<Match>(warp, lane);
    mine.result = 0;
    for_lanes(mask, [&](unsigned other) {
      mine.result |= uint32_t{payload<Match>(warp, other).value == mine.value} << other;
    });
    if (mine.all && mine.result != mask) mine.result = 0;
  });
  return "";
}

uint32_t combine(ReduceKind kind, uint32_t a, uint32_t b) {
  const auto i = static_cast<int32_t>(a), j = static_cast<int32_t>(b);
  switch (kind) {
    case ReduceKind::add:
      return a + b;
    case ReduceKind::minimum:
      return std::min(a, b);
    case ReduceKind::maximum:
      return std::max(a, b);
    case ReduceKind::minimum_signed:
      return static_cast<uint32_t>(std::min(i, j));
    case ReduceKind::maximum_signed:
      return static_cast<uint32_t>(std::max(i, j));
    case ReduceKind::bit_and:
      return a & b;
    case ReduceKind::bit_or:
      return a | b;
    default:
      return a ^ b;
  }
}

std::string reduce(Warp& warp, uint32_t mask) {
  std::string wrong;
  const auto first = static_cast<unsigned>(__builtin_ctz(mask));
  const ReduceKind kind = payload<Reduce>(warp, first).kind;
  uint32_t total = payload<Reduce>(warp, first).value;
  for_lanes(mask & (mask - 1), [&](unsigned lane) {
    if (payload<Reduce>(warp, lane).kind != kind) wrong = lanes_disagree("the kind of __reduce_sync");
    total = combine(kind, total, payload<Reduce>(warp, lane).value);
  });
  for_lanes(mask, [&](unsigned lane) { payload<Reduce>(warp, lane).result = total; });
  return wrong;
}

// Element `i` of the 16-bit elements in consecutive registers.
uint16_t half_of_registers(const uint32_t* registers, unsigned i) {
  return static_cast<uint16_t>(registers[i / 2] >> (i % 2 * 16));
}

float tf32(uint32_t bits) {
  // "the lower 13 bits are ignored": a kernel that forgot to round loses them here as well
  return std::bit_cast<float>(bits & 0xffffe000u);
}

// PTX ISA, "Matrix Fragments for mma": with group = lane / 4 and member = lane % 4, element i of the 16-bit A is in row
// group (+ 8 for i / 2 odd) and column 2 * member + i % 2 (+ 8 for i >= 4), of B in row 2 * member + i % 2 (+ 8 for
// i >= 2) and column group; of the 32-bit A in row group (+ 8 for odd i) and column member (+ 4 for i >= 2), of B in
// row member (+ 4 for i = 1) and column group; of C and D in row group (+ 8 for i >= 2) and column 2 * member + i % 2.
template <unsigned K, class Decode>
void multiply(Warp& warp, bool is_tf32, const Decode& decode) {
  float a[16][K], b[K][8], d[16][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const auto& m = payload<Matrix>(warp, lane);
    const unsigned group = lane / 4, member = lane % 4;
    for (unsigned i = 0; i < K / 2; ++i) {
      const unsigned row = group + (is_tf32 ? i % 2 : i / 2 % 2) * 8;
      const unsigned column = is_tf32 ? member + i / 2 * 4 : 2 * member + i % 2 + i / 4 * 8;
      a[row][column] = decode(m.a, i);
    }
    for (unsigned i = 0; i < K / 4; ++i)
      b[is_tf32 ? member + i * 4 : 2 * member + i % 2 + i / 2 * 8][group] = decode(m.b, i);
    for (unsigned i = 0; i < 4; ++i) d[group + i / 2 * 8][2 * member + i % 2] = m.d[i];
  }
  const unsigned block = is_tf32 ? kBlockTf32 : kBlock16;
  for (unsigned row = 0; row < 16; ++row)
    for (unsigned column = 0; column < 8; column += columns::kWidth)
      for (unsigned k = 0; k < K; k += block)
        columns::add_block(&d[row][column], &a[row][k], &b[k][column], 8, static_cast<int>(block));
  for (unsigned lane = 0; lane < kLanes; ++lane)
    for (unsigned i = 0; i < 4; ++i) payload<Matrix>(warp, lane).d[i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

std::string mma(Warp& warp, uint32_t mask) {
  if (mask != ~0u) return "mma.sync needs all 32 lanes";
  const MatrixShape shape = payload<Matrix>(warp, 0).shape;
  for (unsigned lane = 1; lane < kLanes; ++lane)
    if (payload<Matrix>(warp, lane).shape != shape) return lanes_disagree("the shape or type of mma.sync");
  const auto f16 = [](const uint32_t* r, unsigned i) { return half_to_float(half_of_registers(r, i)); };
  const auto bf16 = [](const uint32_t* r, unsigned i) { return bfloat16_to_float(half_of_registers(r, i)); };
  const auto word = [](const uint32_t* r, unsigned i) { return tf32(r[i]); };
  switch (shape) {
    case MatrixShape::m16n8k16_f16:
      multiply<16>(warp, false, f16);
      break;
    case MatrixShape::m16n8k16_bf16:
      multiply<16>(warp, false, bf16);
      break;
    case MatrixShape::m16n8k8_f16:
      multiply<8>(warp, false, f16);
      break;
    case MatrixShape::m16n8k8_bf16:
      multiply<8>(warp, false, bf16);
      break;
    case MatrixShape::m16n8k8_tf32:
      multiply<8>(warp, true, word);
      break;
    case MatrixShape::m16n8k4_tf32:
      multiply<4>(warp, true, word);
      break;
  }
  ++warp.threads[0]->counters->matrix_instructions;
  return "";
}

uint64_t passes_over_banks(const uint64_t* offsets, unsigned lanes, unsigned bytes);

// Matrix j is 8 rows of 8 elements of 16 bits, at the addresses of lanes 8 j to 8 j + 7. Lane i gets the elements
// 2 * (i % 4) and the next of row i / 4; transposed, of column i / 4.
std::string ldmatrix(Warp& warp, uint32_t mask) {
  if (mask != ~0u) return "ldmatrix.sync needs all 32 lanes";
  const auto& first = payload<LoadMatrix>(warp, 0);
  const unsigned count = first.count;
  const bool transposed = first.transposed;
  for (unsigned lane = 1; lane < kLanes; ++lane) {
    const auto& other = payload<LoadMatrix>(warp, lane);
    if (other.count != count || other.transposed != transposed) return lanes_disagree("the form of ldmatrix");
  }
  for (unsigned j = 0; j < count; ++j) {
    uint16_t matrix[8][8];
    for (unsigned row = 0; row < 8; ++row) std::memcpy(matrix[row], payload<LoadMatrix>(warp, 8 * j + row).row, 16);
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const unsigned major = lane / 4, minor = lane % 4 * 2;
      const uint32_t low = transposed ? matrix[minor][major] : matrix[major][minor];
      const uint32_t high = transposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
      payload<LoadMatrix>(warp, lane).result[j] = low | high << 16;
    }
  }
  Counters& counters = *warp.threads[0]->counters;
  ++counters.ldmatrix_instructions;
  const Block& block = *warp.threads[0]->block;
  if (block.launch.options.bank_conflicts) {
    ++counters.shared_accesses;
    for (unsigned j = 0; j < count; ++j) {
      uint64_t offsets[8];
      for (unsigned row = 0; row < 8; ++row)
        offsets[row] = block.shared.offset(payload<LoadMatrix>(warp, 8 * j + row).row);
      const uint64_t passes = passes_over_banks(offsets, 8, 16);
      counters.shared_passes += passes;
      counters.bank_conflicts += passes - 1;
    }
  }
  return "";
}

// Shared memory has 32 banks of 4 bytes. Lanes that want the same word of a bank are served together, different words
// of one bank one after the other.
uint64_t passes_over_banks(const uint64_t* offsets, unsigned lanes, unsigned bytes) {
  std::array<std::vector<uint64_t>, 32> words;
  for (unsigned i = 0; i < lanes; ++i)
    for (uint64_t word = offsets[i] / 4; word <= (offsets[i] + bytes - 1) / 4; ++word) {
      auto& bank = words[word % 32];
      if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
    }
  std::size_t most = 1;
  for (const auto& bank : words) most = std::max(most, bank.size());
  return most;
}

}  // namespace

std::string perform(Collective kind, Warp& warp, uint32_t mask) {
  switch (kind) {
    case Collective::shuffle:
      return shuffle(warp, mask);
    case Collective::vote:
      return vote(warp, mask);
    case Collective::match:
      return match(warp, mask);
    case Collective::reduce:
      return reduce(warp, mask);
    case Collective::mma:
      return mma(warp, mask);
    case Collective::ldmatrix:
      return ldmatrix(warp, mask);
    default:
      return "";
  }
}

void settle_shared_accesses(Warp& warp, Counters& counters) {
  // Lanes run one after the other here; what the device would have done at once is the same place in the code reached
  // for the same time since the lanes last met.
  struct Access {
    std::vector<uint64_t> offsets;
    unsigned bytes = 0;
  };
  std::map<std::pair<const void*, unsigned>, Access> together;
  for_lanes(warp.existing, [&](unsigned lane) {
    std::unordered_map<const void*, unsigned> times;
    for (const SharedAccess& access : warp.threads[lane]->accesses) {
      Access& one = together[{access.site, times[access.site]++}];
      one.offsets.push_back(access.offset);
      one.bytes = access.bytes;
    }
    warp.threads[lane]->accesses.clear();
  });
  for (const auto& entry : together) {
    const Access& access = entry.second;
    // 8 bytes per lane are served to half a warp at a time, 16 to a quarter.
    const auto lanes = static_cast<unsigned>(access.offsets.size());
    const unsigned share = access.bytes <= 4 ? kLanes : kLanes * 4 / access.bytes;
    ++counters.shared_accesses;
    for (unsigned begin = 0; begin < lanes; begin += share) {
      const uint64_t passes = passes_over_banks(&access.offsets[begin], std::min(share, lanes - begin), access.bytes);
      counters.shared_passes += passes;
      counters.bank_conflicts += passes - 1;
    }
  }
}

}  // namespace device_on_host
