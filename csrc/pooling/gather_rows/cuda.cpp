// gather_rows as a torch operator on CUDA kernels.

#include "pooling/gather_rows/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

void gather_rows_op(Tensor x, Tensor index, std::optional<Tensor> offsets, std::optional<Tensor> weight, Tensor,
                    std::optional<Tensor>, std::optional<Tensor>, Tensor out) {
  const Current current(x);
  gather_rows({view_of(x), view_of(index), view_of(offsets), view_of(weight), view_of(out)}, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "gather_rows_forward", gather_rows_op);
}

}  // namespace
}  // namespace velm::cuda
