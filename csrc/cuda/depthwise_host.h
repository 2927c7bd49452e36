// SPDX-License-Identifier: Apache-2.0
// The hosts' side of depthwise convolutions of one source, or of a source each, with a BatchNorm before them or without:
// what depthwise_group, batch_norm_depthwise, separable_group and separable_each share.
#pragma once
#include <vector>

#include "../depthwise.h"
#include "depthwise_group.h"
#include "mixed_batch_norm.h"

namespace fastnas::cuda {

// Convolutions as kernels take them, and the tensors that they point into.
struct Depthwise {
  DepthwiseGroup group;
  std::vector<at::Tensor> sources;  // dense, in `format`; empty where nothing reads them
  at::Tensor like;                  // of the dtype of all of them, on their device
  at::MemoryFormat format;
  std::vector<at::Tensor> weights, kept;
  Convolutions c;

  at::ScalarType acc() const { return accumulate_dtype(like.scalar_type()); }
  cudaStream_t stream() const { return stream_of(like); }
};

// Of one source, or of one for each convolution.
Depthwise make_depthwise(const DepthwiseGroup& group, const std::vector<at::Tensor>& sources,
                         const at::Tensor& like, at::MemoryFormat format, at::TensorList weights,
                         bool relu);

// The weights as convolve and input_gradients read them.
void add_weights(Depthwise& d);

std::vector<at::Tensor> convolve(const Depthwise& d);

// Of the outputs that are present, dense and in the format of d.
OutputGradients output_gradients(const std::vector<at::Tensor>& gs, at::IntArrayRef present);

std::vector<at::Tensor> input_gradients(const Depthwise& d, const OutputGradients& from,
                                        const InputSums& sums);

// Of the weights that need one: zeros where there are no pixels.
std::vector<at::Tensor> weight_gradients(const Depthwise& d, const OutputGradients& from,
                                         at::IntArrayRef need);

// Has the convolutions of d normalise their sources as they read them. The result must live as long as d.
Coefficients normalise_sources(Depthwise& d, const NormArguments& norms);

struct SourceGradients {
  std::vector<at::Tensor> dxs;  // of the sources that need one
  std::vector<at::Tensor> dweights;
  at::Tensor dgamma, dbeta;  // (affine norms, C)
};

// norms: those that d normalises by (null for none), mean and var the dense [sources][C] statistics that the forward has
// used. need_norms: of the affine parameters.
SourceGradients source_backward(const Depthwise& d, const OutputGradients& from,
                                const NormArguments* norms, const at::Tensor& mean,
                                const at::Tensor& var, at::IntArrayRef need_xs,
                                at::IntArrayRef need_norms, at::IntArrayRef need_weights);

}  // namespace fastnas::cuda
