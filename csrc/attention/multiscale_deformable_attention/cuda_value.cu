// The gradient of value: a sum at places that only the numbers know. Atomic additions would give other bits in every
// run. The samples of a head are brought into the order of their cells by counting, within a cell in their own order;
// then each token adds up those of the four cells around it.

#include "attention/multiscale_deformable_attention/cuda_samples.h"

namespace velm::cuda {
namespace {

// A warp has a run of the samples of one head that read one level.
struct Chunk {
  int64_t of_level, batch, head, chunk, first, last;
  int number;
  Level level;

  DEVICE_INLINE Chunk(const Shape& shape, int64_t chunks, int64_t warp) {
    chunk = warp % chunks;
    of_level = warp / chunks;
    number = static_cast<int>(of_level % shape.levels);
    head = of_level / shape.levels % shape.heads;
    batch = of_level / shape.levels / shape.heads;
    const int64_t samples = shape.queries * shape.points;
    first = samples * chunk / chunks;
    last = samples * (chunk + 1) / chunks;
    level = level_of(shape, number);
  }

  DEVICE_INLINE Sample sample(const Shape& shape, int64_t i) const {
    const int64_t row = shape.row(batch, i / shape.points, head);
    return Sample(shape, (row * shape.levels + number) * shape.points + i % shape.points, level);
  }
  // In counts (batch, heads, cells, chunks); -1 for a sample that reads nothing.
  DEVICE_INLINE int64_t count(const Sample& sample, const Shape& shape, int64_t cells, int64_t chunks) const {
    const int64_t cell = sample.cell(level);
    // Only of sizes that do not fit the tokens there are more cells than there is room for.
    if (cell < 0 || level.first_cell + cell >= cells) return -1;
    return ((batch * shape.heads + head) * cells + level.first_cell + cell) * chunks + chunk;
  }
};

__global__ void __launch_bounds__(kThreads)
    deformable_count_kernel(Global<int32_t> counts, Shape shape, int64_t cells, int64_t chunks, int64_t warps) {
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (warp >= warps) return;
  const Chunk chunk(shape, chunks, warp);
  for (int64_t i = chunk.first + threadIdx.x; i < chunk.last; i += 32) {
    const int64_t at = chunk.count(chunk.sample(shape, i), shape, cells, chunks);
    if (at >= 0) atomicAdd(counts + at, 1);
  }
}

constexpr int kScanThreads = 512, kScanWarps = kScanThreads / 32;

struct ScanStorage {
  SharedArray<int32_t, kScanWarps> of_warp;
};

// From the numbers of samples of each cell and chunk to how many of the level lie before them. A block has a level of a
// head, a thread a cell.
__global__ void __launch_bounds__(kScanThreads)
    deformable_scan_kernel(Global<int32_t> counts, Shape shape, int64_t cells, int64_t chunks) {
  auto& shared = static_shared<ScanStorage>();
  const int64_t head = blockIdx.x / shape.levels;
  const Level level = level_of(shape, static_cast<int>(blockIdx.x % shape.levels));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t last = level.cells();
  if (last > cells - level.first_cell) last = cells - level.first_cell;
  int32_t before = 0;
  for (int64_t first = 0; first < last; first += kScanThreads) {
    const int64_t cell = first + threadIdx.x;
    const auto of_cell = counts + (head * cells + level.first_cell + cell) * chunks;
    int32_t own = 0;
    if (cell < last)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) own += int32_t{of_cell[chunk]};
    int32_t sum = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t other = __shfl_up_sync(kAll, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (lane == 31) shared.of_warp[warp] = sum;
    __syncthreads();
    int32_t start = before + sum - own;
    for (int w = 0; w < kScanWarps; ++w) {
      const int32_t of_warp = shared.of_warp[w];
      if (w < warp) start += of_warp;
      before += of_warp;
    }
    // The next cells write there.
    __syncthreads();
    if (cell >= last) continue;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int32_t count = of_cell[chunk];
      of_cell[chunk] = start;
      start += count;
    }
  }
}

// A sample in the order of cells: the number of its query, its weight, and where it lies between its corners.
constexpr int kPlaced = 4;

// Leaves in counts how many samples of the level lie up to the end of each cell and chunk.
__global__ void __launch_bounds__(kThreads)
    deformable_place_kernel(Global<int32_t> counts, Global<float> placed, Shape shape, int64_t cells, int64_t chunks,
                            int64_t warps) {
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  // Whole warps leave.
  if (warp >= warps) return;
  const int lane = threadIdx.x;
  const Chunk chunk(shape, chunks, warp);
  const auto to = placed + chunk.of_level * shape.queries * shape.points * kPlaced;
  for (int64_t first = chunk.first; first < chunk.last; first += 32) {
    const bool exists = first + lane < chunk.last;
    const int64_t i = exists ? first + lane : first;
    const Sample sample = chunk.sample(shape, i);
    const int64_t at = exists ? chunk.count(sample, shape, cells, chunks) : -1;
    // Those of the same cell are placed behind each other; the first of them has the count, which no other warp has.
    const unsigned same = __match_any_sync(kAll, at);
    const int leader = __ffs(same) - 1;
    int32_t start = 0;
    if (at >= 0 && lane == leader) {
      start = counts[at];
      counts[at] = start + __popc(same);
    }
    start = __shfl_sync(kAll, start, leader);
    // Another lane may have the same cell next.
    __syncwarp();
    if (at < 0) continue;
    const int64_t place = start + __popc(same & ((1u << lane) - 1));
    Vector<float, kPlaced> kept;
    kept[0] = __int_as_float(static_cast<int>(i / shape.points));
    kept[1] = sample.weight;
    kept[2] = sample.right;
    kept[3] = sample.lower;
    store(to + place * kPlaced, kept);
  }
}

// A warp has a token of a head. Some neighbouring lanes have a sample, each some columns; the sums of these are added
// at last.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 6)
    deformable_tokens_kernel(ReadOnly<T> grad, ReadOnly<int32_t> counts, ReadOnly<float> placed, Global<T> grad_value,
                             Shape shape, int64_t cells, int64_t chunks, int64_t rows, int lanes) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  // Whole warps leave.
  if (row >= rows) return;
  const int64_t of_head = row / shape.tokens, token = row % shape.tokens;
  const int64_t batch = of_head / shape.heads, head = of_head % shape.heads;
  Level level;
  int l = 0;
  for (; l < shape.levels; ++l) {
    level.step(shape, l);
    if (token < level.first_token + level.tokens()) break;
  }
  const bool inside = l < shape.levels;
  const int64_t x = inside ? (token - level.first_token) % level.width : 0;
  const int64_t y = inside ? (token - level.first_token) / level.width : 0;
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = 32 / lanes;
  const auto from = placed + (of_head * shape.levels + (inside ? l : 0)) * (shape.queries * shape.points) * kPlaced;
  const auto of_row = grad + shape.row(batch, 0, head) * shape.d;
  // How many samples of the level lie up to the end of a cell.
  const auto end_of = [&](int64_t cell) -> int64_t {
    if (cell < 0) return 0;
    const int64_t at = level.first_cell + cell < cells ? level.first_cell + cell : cells - 1;
    return counts[((of_head * cells + at) + 1) * chunks - 1];
  };
  for (int64_t begin = 0; begin < shape.d; begin += lanes * Width) {
    const int64_t c = begin + lane * Width;
    float sum[Width] = {};
    for (int below = inside ? 0 : 2; below < 2; ++below) {
      // Of the cell to the left of the token this is the corner at its right, of the next one that at its left.
      const int64_t cell = (y + 1 - below) * (level.width + 1) + x;
      const int64_t first = end_of(cell - 1), middle = end_of(cell), last = end_of(cell + 1);
#pragma unroll 4
      for (int64_t i = first + group; i < last; i += groups) {
        const auto sample = load<kPlaced>(from + i * kPlaced);
        const float along = i < middle ? sample[2] : 1.0f - sample[2];
        const float share = sample[1] * (along * (below ? sample[3] : 1.0f - sample[3]));
        float g[Width] = {};
        if (c < shape.d) load_floats(of_row + (int64_t{__float_as_int(sample[0])} * shape.heads * shape.d + c), g);
#pragma unroll
        for (int k = 0; k < Width; ++k) sum[k] = fmaf(share, g[k], sum[k]);
      }
    }
    for (int distance = lanes; distance < 32; distance *= 2)
#pragma unroll
      for (int k = 0; k < Width; ++k) sum[k] += __shfl_xor_sync(kAll, sum[k], distance);
    if (group == 0 && c < shape.d)
      store_floats<T>(grad_value + (((batch * shape.tokens + token) * shape.heads + head) * shape.d + c), sum);
  }
}

}  // namespace

void deformable_value_backward(const Deformable& p, Stream stream) {
  const int64_t heads = p.batch * p.heads, rows = heads * p.tokens;
  if (rows * p.d == 0) return;
  const Shape shape = shape_of(p);
  const int64_t cells = p.cells(), chunks = p.chunks();
  const auto counts = global<int32_t>(p.counts);
  const auto placed = global<float>(p.placed);
  if (const int64_t warps = p.of_level() != 0 ? heads * p.levels * chunks : 0; warps != 0) {
    const dim3 threads(32, kWarps);
    launch<deformable_count_kernel>(divide_up(warps, kWarps), threads, 0, stream, counts, shape, cells, chunks, warps);
    launch<deformable_scan_kernel>(static_cast<unsigned>(heads * p.levels), kScanThreads, 0, stream, counts, shape,
                                   cells, chunks);
    launch<deformable_place_kernel>(divide_up(warps, kWarps), threads, 0, stream, counts, placed, shape, cells, chunks,
                                    warps);
  }
  with_type(p.grad_value.dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>(p, {&p.grad, &p.grad_value}, [&](auto width) {
      launch<deformable_tokens_kernel<T, width>>(divide_up(rows, kWarps), dim3(32, kWarps), 0, stream,
                                                 global<const T>(p.grad), global<const int32_t>(p.counts),
                                                 global<const float>(p.placed), global<T>(p.grad_value), shape, cells,
                                                 chunks, rows, lanes_of(p.d, width));
    });
  });
}

}  // namespace velm::cuda
