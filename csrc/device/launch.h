// launch<kernel>(grid, block, shared_bytes, stream, arguments...) in place of kernel<<<...>>>(...).
#pragma once

#include "device/language.h"
#include "device/view.h"

namespace velm::device {

#if defined(__CUDACC__)

// The name of the error tells velm_kernels/backends/failures.py whether this kernel could not start, so that another
// backend serves the call, or an earlier one ruined the context.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // Reported here: the next one to ask, which is torch, would take it for its own.
  cudaGetLastError();
  throw std::runtime_error(std::string("velm: ") + what + ": " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

template <auto kernel>
struct Kernel;

template <class... Parameters, void (*kernel)(Parameters...)>
struct Kernel<kernel> {
  static void launch(dim3 grid, dim3 block, std::size_t shared_bytes, Stream stream, Parameters... parameters) {
    const void* function = reinterpret_cast<const void*>(kernel);
    // More than 48 KiB has to be asked for.
    if (shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
            "shared memory of a kernel");
    void* pointers[] = {static_cast<void*>(&parameters)...};
    check(cudaLaunchKernel(function, grid, block, pointers, shared_bytes, static_cast<cudaStream_t>(stream)),
          "launch of a kernel");
  }
};

template <auto kernel, class... Arguments>
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, Stream stream, const Arguments&... arguments) {
  Kernel<kernel>::launch(grid, block, shared_bytes, stream, arguments...);
}

#else

// The stream is ignored: a launch has ended when it returns.
template <auto kernel, class... Arguments>
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, Stream, const Arguments&... arguments) {
  device_on_host::launch(__PRETTY_FUNCTION__, grid, block, shared_bytes, [&] { kernel(arguments...); });
}

#endif

}  // namespace velm::device
