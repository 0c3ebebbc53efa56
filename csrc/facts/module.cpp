// velm_kernels._facts: what is known about the build and the processor. Independent of torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "facts/cpu.h"
#include "facts/peaks.h"

namespace py = pybind11;
namespace facts = velm::facts;

namespace {

void require_positive(const char* name, double value) {
  if (!(value > 0))
    throw py::value_error(std::string(name) + " must be positive, got " +
                          py::str(py::float_(value)).cast<std::string>());
}

int resolve_threads(std::optional<int> threads) {
  if (!threads) return facts::available_threads();
  require_positive("threads", *threads);
  return *threads;
}

py::dict build() {
  py::dict d;
  d["version"] = VELM_VERSION;
#if defined(__clang__)
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["isas"] = py::cast(std::string(VELM_ISAS)).attr("split")(",");
  d["torch"] = VELM_TORCH_VERSION;
  return d;
}

py::dict cpu() {
  const facts::Cpu& c = facts::cpu();
  py::dict d;
  d["vendor"] = c.vendor;
  d["model"] = c.model;
  d["family"] = c.family;
  d["model_number"] = c.model_number;
  d["features"] = c.features;
  d["isas"] = c.isas;
  d["threads"] = facts::available_threads();
  return d;
}

}  // namespace

PYBIND11_MODULE(_facts, m) {
  m.doc() = "Facts about the build and the processor.";
  m.def("build", &build,
        "Return {version, compiler, isas, torch}: what the libraries were built from, with and for; "
        "torch is the version whose headers were used.");
  m.def("cpu", &cpu,
        "Return {vendor, model, family, model_number, features, isas, threads}: family and model number as cpuid has "
        "them, "
        "instruction sets that processor and operating system support, the CPU libraries that can run here (simplest "
        "first), and the processors this process may use.");
  m.def(
      "peak_fp32",
      [](std::optional<int> threads, double seconds) {
        require_positive("seconds", seconds);
        const int n = resolve_threads(threads);
        py::gil_scoped_release release;
        return facts::peak_fp32(n, seconds);
      },
      py::arg("threads") = py::none(), py::arg("seconds") = 0.5,
      "Measure the fp32 multiply-add peak of `threads` threads (default: all) in floating-point operations per "
      "second.");
  m.def(
      "peak_bf16",
      [](std::optional<int> threads, double seconds) {
        require_positive("seconds", seconds);
        const int n = resolve_threads(threads);
        py::gil_scoped_release release;
        return facts::peak_bf16(n, seconds);
      },
      py::arg("threads") = py::none(), py::arg("seconds") = 0.5,
      "Measure the peak of bf16 pair products with fp32 sums (AVX512-BF16) in floating-point operations per second, or "
      "return None on a processor without them.");
  m.def(
      "copy_bandwidth",
      [](std::optional<int> threads, std::size_t bytes, double seconds) {
        require_positive("seconds", seconds);
        require_positive("bytes", static_cast<double>(bytes));
        const int n = resolve_threads(threads);
        py::gil_scoped_release release;
        return facts::copy_bandwidth(n, bytes, seconds);
      },
      py::arg("threads") = py::none(), py::arg("bytes") = std::size_t{256} << 20, py::arg("seconds") = 0.5,
      "Measure the bandwidth of a memory copy in bytes read plus bytes written a second.");
}
