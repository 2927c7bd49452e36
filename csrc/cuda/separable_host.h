// SPDX-License-Identifier: Apache-2.0
// The hosts' side of separable convolutions, of one source or of a source each: what separable_group and separable_each
// share.
#pragma once
#include <tuple>
#include <vector>

#include "../separable.h"
#include "depthwise_host.h"

namespace fastnas::cuda {

std::vector<at::Tensor> convolve_separably(Depthwise& d, at::TensorList pointwise);

struct SeparableGradients {
  SourceGradients source;
  std::vector<at::Tensor> dpointwise;  // of the weights that need one
};

// gs: the gradients of the outputs that are present. The rest is as source_backward has it.
SeparableGradients separable_backward(Depthwise& d, const std::vector<at::Tensor>& gs,
                                      at::IntArrayRef present, const NormArguments* norms,
                                      const at::Tensor& mean, const at::Tensor& var,
                                      at::TensorList pointwise, at::IntArrayRef need_xs,
                                      at::IntArrayRef need_norms, at::IntArrayRef need_depthwise,
                                      at::IntArrayRef need_pointwise);

}  // namespace fastnas::cuda
