// SPDX-License-Identifier: Apache-2.0
// Gradient of the gate logits of one mixed op, on CUDA: one pass over grad_output and the outputs, one tiny kernel.
#include "gate_gradient.h"

#include <torch/library.h>

#include <algorithm>

#include "host.h"

namespace fastnas::cuda {

at::Tensor gate_gradient(const at::Tensor& grad_output, at::TensorList outputs,
                         const at::Tensor& probs, at::IntArrayRef present) {
  const char* op = "gate_gradient";
  check_floating(op, "grad_output", grad_output);
  check_weights(op, probs, present.size(), grad_output);
  const int64_t K = present.size();
  const int64_t given =
      std::count_if(present.begin(), present.end(), [](int64_t p) { return p != 0; });
  TORCH_CHECK_VALUE(given == static_cast<int64_t>(outputs.size()), op, ": expected ", given,
                    " outputs, as many as present says, but got ", outputs.size());
  TORCH_CHECK_VALUE(K <= kMaxOperands, op, ": expected at most ", kMaxOperands,
                    " outputs, but got ", K);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const cudaStream_t stream = stream_of(grad_output);
  GateRows gates{static_cast<int>(K), {}};
  for (int64_t k = 0, row = 0; k < K; ++k)
    gates.rows[k] = static_cast<signed char>(present[k] ? row++ : -1);
  at::ScalarType acc = at::kFloat;
  at::Tensor partial;
  int64_t count = 0;
  if (given && grad_output.numel()) {
    check_inputs(op, outputs, grad_output);
    TORCH_CHECK_VALUE(outputs[0].sizes() == grad_output.sizes(), op, ": expected outputs of shape ",
                      grad_output.sizes(), " like grad_output, but got ", outputs[0].sizes());
    const at::ScalarType dtype =
        c10::promoteTypes(grad_output.scalar_type(), result_dtype(outputs));
    const at::MemoryFormat format = memory_format(grad_output);
    const at::Tensor g = as_operand(grad_output, dtype, format);
    const std::vector<at::Tensor> operands = as_operands(outputs, dtype, format);
    std::vector<const void*> walked = pointers(operands);
    Dots dots{};
    std::copy(walked.begin(), walked.end(), dots.xs);
    dots.g = pointer(g);
    dots.step = 1;
    dots.K = static_cast<int>(given);
    walked.push_back(dots.g);
    const Plan plan = plan_flat(g.numel(), dtype, walked);
    acc = accumulate_dtype(dtype);
    count = plan.partials();
    partial = scratch((given + 1) * count, acc, grad_output);
    dots.partial = partial.mutable_data_ptr();
    C10_CUDA_CHECK(launch_dots(plan, dots, stream));
  } else {
    std::fill_n(gates.rows, K, static_cast<signed char>(-1));
  }
  const at::Tensor p = probs.contiguous();
  at::Tensor dalpha = at::empty({K}, probs.options());
  const size_t before =
      accumulator_size(dtype_of(acc)) * static_cast<size_t>(count);  // sum g comes first
  const void* first =
      partial.defined() ? static_cast<const char*>(partial.const_data_ptr()) + before : nullptr;
  C10_CUDA_CHECK(launch_gates(dtype_of(acc), gates, first, count, dtype_of(probs.scalar_type()),
                              pointer(p), mutable_pointer(dalpha), stream));
  return dalpha;
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("gate_gradient", &fastnas::cuda::gate_gradient);
}
