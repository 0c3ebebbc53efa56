#include <cstdlib>
#include <deque>
#include <mutex>

#include "device_on_host/block.h"

namespace device_on_host {
namespace {

constexpr std::size_t kMostRecords = 4096;

std::mutex records_mutex;
std::deque<LaunchRecord> records;

int from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

Options initial_options() {
  Options o;
  o.host_threads = std::max(1, from_environment("DEVICE_ON_HOST_THREADS", 1));
  o.reverse = from_environment("DEVICE_ON_HOST_REVERSE", 0);
  o.bank_conflicts = from_environment("DEVICE_ON_HOST_BANK_CONFLICTS", 0);
  return o;
}

// "void f(...) [with auto kernel = name<float>; ...]" -> "name<float>"
std::string short_name(const char* signature) {
  std::string text = signature;
  const std::string mark = "kernel = ";
  const std::size_t begin = text.find(mark);
  if (begin == std::string::npos) return text;
  text = text.substr(begin + mark.size());
  for (const std::string unnamed = "{anonymous}::"; text.find(unnamed) != std::string::npos;)
    text.erase(text.find(unnamed), unnamed.size());
  int depth = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '<' || text[i] == '(') ++depth;
    if (text[i] == '>' || text[i] == ')') --depth;
    if (depth < 0 || (depth == 0 && (text[i] == ';' || text[i] == ']' || text[i] == ','))) return text.substr(0, i);
  }
  return text;
}

void check(const Launch& launch) {
  const auto refuse = [&](const std::string& what) { throw Fault(launch.kernel + ": " + what); };
  const dim3 &g = launch.grid, &b = launch.block;
  const auto triple = [](const dim3& d) {
    return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
  };
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
    refuse("a grid of " + triple(g) + ": expected 1 to 2^31 - 1, 65535 and 65535");
  if (!b.x || !b.y || !b.z || b.x > 1024 || b.y > 1024 || b.z > 64 || uint64_t{b.x} * b.y * b.z > kMaxThreads)
    refuse("a block of " + triple(b) + ": expected at most 1024 threads, and 64 in z");
  if (launch.dynamic_bytes > launch.options.shared_limit)
    refuse(std::to_string(launch.dynamic_bytes) + " bytes of shared memory, and a block can have " +
           std::to_string(launch.options.shared_limit));
}

}  // namespace

Options& options() {
  static Options current = initial_options();
  return current;
}

void Counters::operator+=(const Counters& other) {
  global_bytes_read += other.global_bytes_read;
  global_bytes_written += other.global_bytes_written;
  matrix_instructions += other.matrix_instructions;
  ldmatrix_instructions += other.ldmatrix_instructions;
  block_barriers += other.block_barriers;
  shared_accesses += other.shared_accesses;
  shared_passes += other.shared_passes;
  bank_conflicts += other.bank_conflicts;
}

std::vector<LaunchRecord> take_launches() {
  const std::lock_guard<std::mutex> guard(records_mutex);
  std::vector<LaunchRecord> taken(records.begin(), records.end());
  records.clear();
  return taken;
}

void run(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Call call, const void* arguments,
         bool real_threads) {
  Launch launch{short_name(kernel), grid, block, shared_bytes, call, arguments, options()};
  launch.options.real_threads |= real_threads;
  if (self) fail("launches a kernel from a kernel");
  check(launch);
  Counters total;
  (launch.options.real_threads ? run_real_threads : run_fibers)(launch, total);
  const std::lock_guard<std::mutex> guard(records_mutex);
  records.push_back({launch.kernel, grid, block, shared_bytes, total});
  if (records.size() > kMostRecords) records.pop_front();
}

}  // namespace device_on_host
