// SPDX-License-Identifier: Apache-2.0
// dalpha_i = p_i (G_i - sum_j p_j G_j), G_j = <grad_output, o_j>: one pass over grad_output and the outputs.
#include <torch/library.h>

#include "../check.h"
#include "dispatch.h"
#include "flat.h"

namespace fastnas {

at::Tensor gate_gradient_cpu(const at::Tensor& grad_output, at::TensorList outputs,
                             const at::Tensor& probs, at::IntArrayRef present) {
  const char* op = "gate_gradient";
  check_floating(op, "grad_output", grad_output);
  check_weights(op, probs, present.size(), grad_output);
  const int64_t given =
                    std::count_if(present.begin(), present.end(), [](int64_t p) { return p != 0; }),
                K = present.size();
  TORCH_CHECK_VALUE(given == static_cast<int64_t>(outputs.size()), op, ": expected ", given,
                    " outputs, as many as present says, but got ", outputs.size());
  std::vector<double> big_g(K), p = to_doubles(probs);
  if (given && grad_output.numel()) {
    check_inputs(op, outputs, grad_output);
    TORCH_CHECK_VALUE(outputs[0].sizes() == grad_output.sizes(), op, ": expected outputs of shape ",
                      grad_output.sizes(), " like grad_output, but got ", outputs[0].sizes());
    const at::ScalarType dtype =
        c10::promoteTypes(grad_output.scalar_type(), result_dtype(outputs));
    const at::MemoryFormat format = memory_format(grad_output);
    const at::Tensor g = as_operand(grad_output, dtype, format);
    const std::vector<at::Tensor> operands = as_operands(outputs, dtype, format);
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      const std::vector<double> dots =
          dot_products<T>(const_pointer<T>(g), const_pointers<T>(operands), g.numel());
      for (int64_t k = 0, i = 0; k < K; ++k)
        if (present[k]) big_g[k] = dots[i++];
    });
  }
  double mean = 0;
  for (int64_t k = 0; k < K; ++k) mean += p[k] * big_g[k];
  for (int64_t k = 0; k < K; ++k) big_g[k] = p[k] * (big_g[k] - mean);
  return from_doubles(big_g, {K}, probs.options());
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) { m.impl("gate_gradient", &fastnas::gate_gradient_cpu); }
