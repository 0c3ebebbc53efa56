// The kernels of fusion on small shapes, for the sanitizers; their numbers are tested through the operators.

#include "fusion/bilinear_cuda.h"
#include "tests/device_on_host/values.h"

using namespace velm::cuda;
using namespace velm::device;
using namespace testing;

namespace {

template <class T>
void check_bilinear(Dtype dtype, int64_t rows, int64_t dx, int64_t dy, int64_t out) {
  auto x = random_values<T>(rows * dx), y = random_values<T>(rows * dy), weight = random_values<T>(out * dx * dy);
  auto bias = random_values<T>(out), grad = random_values<T>(rows * out);
  std::vector<T> z(grad.size()), grad_x(x.size()), grad_y(y.size()), grad_weight(weight.size()), grad_bias(bias.size());
  Bilinear p{};
  p.rows = rows;
  p.dx = p.x_stride = dx;
  p.dy = p.y_stride = p.row_stride = dy;
  p.out = p.grad_stride = out;
  p.out_stride = dx * dy;
  p.dtype = dtype;
  p.x = span(x);
  p.y = span(y);
  p.weight = span(weight);
  p.bias = span(bias);
  p.grad = span(grad);
  p.z = span(z);
  p.grad_x = span(grad_x);
  p.grad_y = span(grad_y);
  p.grad_weight = span(grad_weight);
  p.grad_bias = span(grad_bias);
  std::vector<float> partials(static_cast<size_t>(bilinear_forward_partials(p)));
  p.partials = span(partials);
  options().bank_conflicts = true;
  device_on_host::take_launches();
  bilinear_forward(p, nullptr);
  std::vector<float> more(static_cast<size_t>(bilinear_backward_partials(p, true, true)));
  p.partials = span(more);
  bilinear_backward(p, nullptr);
  for (const auto& launch : device_on_host::take_launches()) CHECK(launch.counters.bank_conflicts == 0);
  options().bank_conflicts = false;

  const auto at = [](const std::vector<T>& values, int64_t i) {
    return double{to_float(values[static_cast<size_t>(i)])};
  };
  std::vector<double> to_z(z.size()), to_x(x.size()), to_y(y.size()), to_weight(weight.size()), to_bias(bias.size());
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t k = 0; k < out; ++k) {
      const double g = at(grad, b * out + k);
      to_bias[static_cast<size_t>(k)] += g;
      double sum = at(bias, k);
      for (int64_t i = 0; i < dx; ++i)
        for (int64_t j = 0; j < dy; ++j) {
          const int64_t n = (k * dx + i) * dy + j;
          const double w = at(weight, n), of_x = at(x, b * dx + i), of_y = at(y, b * dy + j);
          sum += of_x * w * of_y;
          to_x[static_cast<size_t>(b * dx + i)] += g * w * of_y;
          to_y[static_cast<size_t>(b * dy + j)] += g * w * of_x;
          to_weight[static_cast<size_t>(n)] += g * of_x * of_y;
        }
      to_z[static_cast<size_t>(b * out + k)] = sum;
    }
  const auto compare = [&](const std::vector<T>& found, const std::vector<double>& expected) {
    for (size_t i = 0; i < found.size(); ++i) CHECK(close(to_float(found[i]), expected[i]));
  };
  compare(z, to_z);
  compare(grad_x, to_x);
  compare(grad_y, to_y);
  compare(grad_weight, to_weight);
  compare(grad_bias, to_bias);
}

}  // namespace

TEST(kernels_bilinear) {
  // Rows in three pieces and i in two; outputs and y in two, rows of the weight at odd elements.
  check_bilinear<float>(Dtype::float32, 65, 17, 5, 3);
  check_bilinear<__half>(Dtype::float16, 5, 3, 71, 67);
}
