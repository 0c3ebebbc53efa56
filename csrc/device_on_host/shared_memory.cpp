#include <cstring>
#include <new>

#include "device_on_host/block.h"

extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* p, std::size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* p, std::size_t bytes);
}

namespace device_on_host {
namespace {

constexpr std::size_t kRedZone = 128, kAlignment = 128;
constexpr unsigned char kRed = 0xa5;
// All bits set is a NaN in float, double, half and bfloat16, and -1 as an index.
constexpr unsigned char kPoison = 0xff;
// Static memory is found while the block runs; CUDA allows 48 KiB of it.
constexpr std::size_t kMostStatic = 48 * 1024;

// ThreadSanitizer would take memset for a write by the thread that happens to come first.
__attribute__((optimize("no-tree-loop-distribute-patterns"))) void fill(char* p, unsigned char value,
                                                                        std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; ++i) p[i] = static_cast<char>(value);
}

std::size_t rounded(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

SharedMemory::SharedMemory(std::size_t capacity)
    : capacity_(rounded(capacity) + 2 * rounded(kMostStatic) + 2 * kRedZone),
      memory_(static_cast<char*>(::operator new(capacity_, std::align_val_t{kAlignment}))) {
  std::memset(memory_, kRed, capacity_);
  if (__asan_poison_memory_region) __asan_poison_memory_region(memory_, capacity_);
}

SharedMemory::~SharedMemory() {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory_, capacity_);
  ::operator delete(memory_, std::align_val_t{kAlignment});
}

char* SharedMemory::data() const {
  return memory_ + kRedZone;
}

void SharedMemory::begin(std::size_t dynamic_bytes) {
  for (const Area& area : areas_) {
    std::memset(data() + area.begin, kRed, area.bytes);
    if (__asan_poison_memory_region) __asan_poison_memory_region(data() + area.begin, area.bytes);
  }
  areas_.clear();
  dynamic_bytes_ = dynamic_bytes;
  used_ = end_ = 0;
  add(nullptr, dynamic_bytes);
}

void* SharedMemory::add(const void* key, std::size_t bytes) {
  if (end_ + rounded(bytes) + 2 * kRedZone > capacity_) throw std::bad_alloc();
  char* begin = data() + end_;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(begin, bytes);
  fill(begin, kPoison, bytes);
  areas_.push_back({key, end_, bytes});
  end_ += rounded(bytes) + kRedZone;
  used_ += bytes;
  return begin;
}

void* SharedMemory::find_static(const void* key, std::size_t bytes) {
  for (const Area& area : areas_)
    if (area.key == key) return data() + area.begin;
  return add(key, bytes);
}

bool SharedMemory::contains(const void* p, std::size_t bytes) const {
  const auto at = static_cast<std::size_t>(static_cast<const char*>(p) - data());
  for (const Area& area : areas_)
    if (at >= area.begin && at + bytes <= area.begin + area.bytes) return true;
  return false;
}

std::string SharedMemory::damage() const {
  // AddressSanitizer guards the red zones itself, and would object to this.
  if (__asan_poison_memory_region) return "";
  const auto check = [&](const char* begin, const char* end) -> const char* {
    for (const char* p = begin; p < end; ++p)
      if (static_cast<unsigned char>(*p) != kRed) return p;
    return nullptr;
  };
  const char* found = check(memory_, data());
  for (const Area& area : areas_) {
    const char* end = data() + area.begin + area.bytes;
    if (!found) found = check(end, data() + area.begin + rounded(area.bytes) + kRedZone);
  }
  if (!found) return "";
  return "a raw pointer wrote outside of shared memory, at byte " + std::to_string(found - data());
}

}  // namespace device_on_host
