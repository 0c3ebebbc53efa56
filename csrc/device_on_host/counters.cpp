// What launches counted, for Python: ctypes.CDLL(path).velm_device_on_host_launches.

#include <string>

#include "device_on_host/runtime.h"

// A line for each launch since the last call: kernel, then name=value, separated by tabs.
extern "C" __attribute__((visibility("default"))) const char* velm_device_on_host_launches() {
  static std::string text;
  text.clear();
  for (const device_on_host::LaunchRecord& l : device_on_host::take_launches()) {
    const auto number = [&](const char* name, uint64_t value) {
      text += std::string("\t") + name + "=" + std::to_string(value);
    };
    text += l.kernel;
    number("blocks", uint64_t{l.grid.x} * l.grid.y * l.grid.z);
    number("threads", uint64_t{l.block.x} * l.block.y * l.block.z);
    number("shared_bytes", l.shared_bytes);
    number("global_bytes_read", l.counters.global_bytes_read);
    number("global_bytes_written", l.counters.global_bytes_written);
    number("matrix_instructions", l.counters.matrix_instructions);
    number("bank_conflicts", l.counters.bank_conflicts);
    text += "\n";
  }
  return text.c_str();
}
