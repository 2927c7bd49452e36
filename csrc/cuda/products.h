// SPDX-License-Identifier: Apache-2.0
// Pointwise convolutions of few channels: at every pixel the product of a small matrix and the channels there. All of
// one source or node go in one launch, in the format that they have.
#pragma once
#include <cuda_runtime_api.h>

#include "plan.h"

namespace fastnas::cuda {

// Channels of an operand. With more, multiply-adds are what counts, and the library's convolutions have the units for
// them; with fewer, a product is done when its operands have passed.
constexpr int kMostChannels = 64;

// Of `count` products of operands (N, C, ...) that are dense and in one format.
struct ProductSizes {
  Dtype dtype;
  bool columns, relu;  // relu: of what is read, the xs
  int count, inputs,
      outputs;   // inputs and outputs: channels of what is read and what is made of it
  int64_t N, S;  // S pixels an image

  FASTNAS_HOST_DEVICE int64_t pixels() const { return N * S; }
};

// y_i = w_i x_i at each pixel.
struct Products : ProductSizes {
  bool turned;       // weights are (inputs, outputs), else (outputs, inputs)
  const void* mask;  // y_0 is 0 where this, of its shape, is not positive; may be null
  const void* xs[kMaxOperands];
  void* ys[kMaxOperands];
  const void* weights[kMaxOperands];
  signed char weight_dtype[kMaxOperands];
};

inline bool few_channels(int64_t inputs, int64_t outputs) {
  return inputs >= 1 && inputs <= kMostChannels && outputs >= 1 && outputs <= kMostChannels;
}

// Reads the xs once from memory (as often as there are eights of outputs from the cache), writes the ys once.
cudaError_t launch_products(const Products& p, cudaStream_t stream);

// dw_i = sum over pixels of g_i x_i^T. A block sums `share` tiles of 4 << log_quads pixels into one of `parts`.
struct ProductSums : ProductSizes {
  const void* xs[kMaxOperands];
  const void* gs[kMaxOperands];
  void* dws[kMaxOperands];  // (outputs, inputs)
  signed char weight_dtype[kMaxOperands];
  int log_quads;
  int64_t parts, share;

  FASTNAS_HOST_DEVICE int64_t matrix() const { return int64_t{inputs} * outputs; }
  int64_t partials() const { return count * parts * matrix(); }
};

// Sets log_quads, parts and share.
void plan_sums(ProductSums& p);

// partial: of partials() accumulators. Reads xs and gs once.
cudaError_t launch_product_sums(const ProductSums& p, void* partial, cudaStream_t stream);

}  // namespace fastnas::cuda
