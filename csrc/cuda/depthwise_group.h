// SPDX-License-Identifier: Apache-2.0
// Depthwise convolutions of one source, or of a source each. A tap is a load that neighbouring threads make of
// neighbouring elements and that its second and later uses find in the first-level cache; weights come from one table for
// all convolutions.
#pragma once
#include <cuda_runtime_api.h>

#include "plan.h"

namespace fastnas::cuda {

constexpr int kMaxSide = 7;  // of a kernel

// Sources are (N, C, H, W) and outputs (N, C, oh, ow), all dense and in one format. Pixels are `step` elements apart.
struct Convolutions {
  Dtype dtype;
  bool columns;
  int count, stride;
  int sources;  // 1 for all convolutions, or `count`
  int64_t N, C, H, W, oh, ow, step;
  int side[kMaxOperands];  // k
  int dilation[kMaxOperands];
  int first[kMaxOperands + 1];        // row of the first tap in a table of all taps
  const void* weights[kMaxOperands];  // (C, k, k)
  signed char weight_dtype[kMaxOperands];
  const void* xs[kMaxOperands];  // the source of each
  const void* table;  // of weights, in the accumulator type: [taps][C]; null unless needs_table
  // Of a source, before the convolutions read it: scale x + shift for each channel, in the accumulator type (null for
  // none; `pitch` from one source's to the next, 0 where there is one), then the ReLU.
  const void *scale, *shift;
  int64_t pitch;
  bool relu;

  FASTNAS_HOST_DEVICE int64_t taps() const { return first[count]; }
  // Elements of a source and of an output.
  int64_t inputs() const { return N * C * H * W; }
  int64_t outputs() const { return N * C * oh * ow; }
};

// Whether a table of the weights is to be made: some of the kernels below read them from there. They serve one source.
bool needs_table(const Convolutions& c);
cudaError_t launch_weight_table(const Convolutions& c, void* table, cudaStream_t stream);

// ys[i] from its source. Reads sources and writes outputs once.
struct Outputs {
  void* ys[kMaxOperands];
};
cudaError_t launch_convolutions(const Convolutions& c, const Outputs& to, cudaStream_t stream);

// dx of every source as its convolutions read it, summed over their gradients that are not null; masked by x where there
// is a ReLU. Reads them and writes dx once.
struct OutputGradients {
  const void* gs[kMaxOperands];
};
struct InputGradients {
  void* dxs[kMaxOperands];
};
// On the way, parts of sum dx and of sum dx (x - mean) of every channel, what a BatchNorm before asks for, for each
// source [2][C][parts].
struct InputSums {
  int64_t parts;
  const void* mean;  // [sources][C]
  void* partial;     // null: they are not wanted
};
// Parts of those; 0: these convolutions leave none.
int64_t input_sum_parts(const Convolutions& c);
cudaError_t launch_input_gradients(const Convolutions& c, const OutputGradients& from,
                                   const InputGradients& to, const InputSums& sums,
                                   cudaStream_t stream);

// How the sums over pixels that make up the gradients of the weights are split: follows from sizes alone.
struct WeightPlan {
  int lanes, rows,
      chunks;  // columns: a block is rows x lanes threads, and chunks of lanes are all channels
  int64_t parts, share;  // parts of `share` pixels, or tiles where a tile fits
};
WeightPlan plan_weights(const Convolutions& c);

// Parts of the gradients of weights[i] wherever need[i] and gs[i] are given: partial[first[i] C + c k k + tap][parts].
// Reads a source and a gradient once for each row of taps.
struct WeightGradients {
  bool need[kMaxOperands];
  void* partial;
};
cudaError_t launch_weight_gradients(const Convolutions& c, const WeightPlan& plan,
                                    const OutputGradients& from, const WeightGradients& to,
                                    cudaStream_t stream);

// Their sums, in double and in a fixed order, where dws[i] is given, in the dtypes of the weights.
struct FoldedGradients {
  void* dws[kMaxOperands];
};
cudaError_t launch_fold_weights(const Convolutions& c, const WeightPlan& plan, const void* partial,
                                const FoldedGradients& to, cudaStream_t stream);

}  // namespace fastnas::cuda
