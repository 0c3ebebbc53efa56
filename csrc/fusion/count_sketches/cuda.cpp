// Count sketches as a torch operator on a CUDA kernel.

#include "fusion/count_sketches/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

// `order` is not the index of each feature, but what the operator makes of them for gathering.
void count_sketches_forward_op(Tensor x, Tensor order_x, Tensor sign_x, Tensor y, Tensor order_y, Tensor sign_y,
                               int64_t, Tensor out) {
  const Current current(x);
  const auto add = [&](const Tensor& rows, const Tensor& order, const Tensor& sign, const Tensor& to) {
    count_sketch({view_of(rows), view_of(order), view_of(sign), view_of(to)}, current.stream());
  };
  add(x, order_x, sign_x, torch::stable::narrow(out, 0, 0, x.size(0)));
  add(y, order_y, sign_y, torch::stable::narrow(out, 0, x.size(0), y.size(0)));
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "count_sketches_forward", count_sketches_forward_op);
}

}  // namespace
}  // namespace velm::cuda
