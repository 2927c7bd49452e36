// SPDX-License-Identifier: Apache-2.0
// The hosts' side of depthwise convolutions of one source, with a BatchNorm before them or without: what
// depthwise_group, batch_norm_depthwise and separable_group share.
#pragma once
#include <vector>

#include "../depthwise.h"
#include "depthwise_group.h"
#include "mixed_batch_norm.h"

namespace fastnas::cuda {

// Convolutions as kernels take them, and the tensors that they point into.
struct Depthwise {
  DepthwiseGroup group;
  at::Tensor source;  // dense, in `format`; empty where nothing reads it
  at::Tensor like;    // of the dtype of all of them, on their device
  at::MemoryFormat format;
  std::vector<at::Tensor> weights, kept;
  Convolutions c;

  at::ScalarType acc() const { return accumulate_dtype(like.scalar_type()); }
  cudaStream_t stream() const { return stream_of(like); }
};

Depthwise make_depthwise(const DepthwiseGroup& group, const at::Tensor& source,
                         const at::Tensor& like, at::MemoryFormat format, at::TensorList weights,
                         bool relu);

// The weights as convolve and input_gradient read them.
void add_weights(Depthwise& d);

std::vector<at::Tensor> convolve(const Depthwise& d);

// Of the outputs that are present, dense and in the format of d.
OutputGradients output_gradients(const std::vector<at::Tensor>& gs, at::IntArrayRef present);

at::Tensor input_gradient(const Depthwise& d, const OutputGradients& from, const InputSums& sums);

// Of the weights that need one: zeros where there are no pixels.
std::vector<at::Tensor> weight_gradients(const Depthwise& d, const OutputGradients& from,
                                         at::IntArrayRef need);

// Has the convolutions of d normalise their source as they read it: by its own statistics (kind 1), or by mean and var
// (kind 2). The result must live as long as d.
Coefficients normalise_source(const char* op, Depthwise& d, const SourceNorm& norm,
                              const OptionalTensor& mean, const OptionalTensor& var);

struct SourceGradients {
  at::Tensor dx;  // without elements if it is not needed
  std::vector<at::Tensor> dweights;
  at::Tensor dgamma, dbeta;  // (1, C) or, where there are none, (0, C)
};

// mean and var are what the forward has used. d normalises by them, where norm.kind is not 0.
SourceGradients source_backward(const char* op, const Depthwise& d, const OutputGradients& from,
                                const SourceNorm& norm, const at::Tensor& mean,
                                const at::Tensor& var, bool need_x, bool need_norm,
                                at::IntArrayRef need_weights);

}  // namespace fastnas::cuda
