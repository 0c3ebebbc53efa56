// gather_rows as a torch operator on CUDA kernels.

#include "pooling/gather_rows/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

void gather_rows_op(Tensor x, Tensor index, std::optional<Tensor> offsets, std::optional<Tensor> weight, Tensor,
                    std::optional<Tensor>, std::optional<Tensor>, Tensor out) {
  const Current current(x);
  GatherRows p{};
  p.batch = x.size(0);
  p.rows = x.size(1);
  p.dim = x.size(2);
  p.entries = index.size(1);
  p.out_rows = out.size(1);
  p.dtype = dtype_of(x);
  p.x = view_of(x);
  p.batch_stride = x.stride(0);
  p.row_stride = x.stride(1);
  p.index = view_of(index);
  p.offsets = view_of(offsets);
  p.weight = view_of(weight);
  p.out = view_of(out);
  gather_rows(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  m.impl("gather_rows_forward", TORCH_BOX(&gather_rows_op));
}

}  // namespace
}  // namespace velm::cuda
