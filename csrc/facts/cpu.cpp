#include "facts/cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace velm::facts {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// Which register files the operating system saves. Only valid where OSXSAVE is set.
uint64_t xcr0() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

std::string trimmed(std::string text) {
  text = text.substr(0, std::strlen(text.c_str()));
  const auto first = text.find_first_not_of(' ');
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(' ') - first + 1);
}

Cpu detect() {
  Cpu result;
  const Registers identity = cpuid(0);
  char vendor[13] = {};
  std::memcpy(vendor, &identity.ebx, 4);
  std::memcpy(vendor + 4, &identity.edx, 4);
  std::memcpy(vendor + 8, &identity.ecx, 4);
  result.vendor = vendor;
  if (cpuid(0x80000000).eax >= 0x80000004) {
    char model[49] = {};
    for (uint32_t part = 0; part < 3; ++part) {
      const Registers r = cpuid(0x80000002 + part);
      std::memcpy(model + 16 * part, &r, 16);
    }
    result.model = trimmed(model);
  }

  const Registers leaf1 = cpuid(1), leaf7 = cpuid(7), leaf7_1 = cpuid(7, 1), extended = cpuid(0x80000001);
  const int base_family = leaf1.eax >> 8 & 0xf;
  result.family = base_family + (base_family == 0xf ? leaf1.eax >> 20 & 0xff : 0);
  result.model_number = (leaf1.eax >> 4 & 0xf) + (base_family >= 6 ? (leaf1.eax >> 16 & 0xf) << 4 : 0);
  const bool osxsave = leaf1.ecx >> 27 & 1;
  const uint64_t saved = osxsave ? xcr0() : 0;
  const bool ymm = (saved & 0x6) == 0x6;            // SSE and AVX state
  const bool zmm = ymm && (saved & 0xe0) == 0xe0;   // mask registers and both halves of the upper state
  const bool tiles = (saved & 0x60000) == 0x60000;  // tile configuration and data
  const auto add = [&](const char* name, uint32_t reg, int bit, bool usable) {
    if (usable && (reg >> bit & 1)) result.features.emplace_back(name);
  };
  add("sse4.2", leaf1.ecx, 20, true);
  add("popcnt", leaf1.ecx, 23, true);
  add("movbe", leaf1.ecx, 22, true);
  add("lzcnt", extended.ecx, 5, true);
  add("bmi", leaf7.ebx, 3, true);
  add("bmi2", leaf7.ebx, 8, true);
  add("avx", leaf1.ecx, 28, ymm);
  add("f16c", leaf1.ecx, 29, ymm);
  add("fma", leaf1.ecx, 12, ymm);
  add("avx2", leaf7.ebx, 5, ymm);
  add("avxvnni", leaf7_1.eax, 4, ymm);
  add("avx512f", leaf7.ebx, 16, zmm);
  add("avx512dq", leaf7.ebx, 17, zmm);
  add("avx512cd", leaf7.ebx, 28, zmm);
  add("avx512bw", leaf7.ebx, 30, zmm);
  add("avx512vl", leaf7.ebx, 31, zmm);
  add("avx512vnni", leaf7.ecx, 11, zmm);
  add("avx512bf16", leaf7_1.eax, 5, zmm);
  add("avx512fp16", leaf7.edx, 23, zmm);
  add("amx-tile", leaf7.edx, 24, tiles);
  add("amx-bf16", leaf7.edx, 22, tiles);
  add("amx-int8", leaf7.edx, 25, tiles);

  const auto all = [&](std::initializer_list<const char*> names) {
    return std::all_of(names.begin(), names.end(), [&](const char* name) { return result.has(name); });
  };
  result.isas.emplace_back("baseline");
  if (all({"sse4.2", "popcnt", "movbe", "lzcnt", "bmi", "bmi2", "avx", "f16c", "fma", "avx2"})) {
    result.isas.emplace_back("avx2");
    if (all({"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"})) {
      result.isas.emplace_back("avx512");
      if (result.has("avx512bf16")) result.isas.emplace_back("avx512_bf16");
    }
  }
  return result;
}

#else

Cpu detect() {
  Cpu result;
  result.isas.emplace_back("baseline");
  return result;
}

#endif

}  // namespace

bool Cpu::has(const std::string& feature) const {
  return std::find(features.begin(), features.end(), feature) != features.end();
}

const Cpu& cpu() {
  static const Cpu detected = detect();
  return detected;
}

int available_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace velm::facts
