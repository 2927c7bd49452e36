// SPDX-License-Identifier: Apache-2.0
// The channels of PC-DARTS' mixed op that no candidate sees: copied, or pooled 2x2, into their shuffled places.
// Bypassed channel j = (q - 1) c + r of rest is channel r k + q of the output, q = 1 .. k - 1, r = 0 .. c - 1;
// the mixed channel r is channel r k.
#pragma once
#include "mix.h"

namespace fastnas::cuda {

struct Strides {
  int64_t n, c, h, w;  // in elements
};

struct Bypass {
  int64_t N, c, k;       // batch, processed channels, groups
  int64_t H, W, oh, ow;  // of rest, and of the output: the same or half of each, rounded down
  Strides rest, drest;   // of rest and of its gradient
  Divider by_ow, by_oh, by_c, by_channels;

  FASTNAS_HOST_DEVICE bool pooled() const { return oh != H || ow != W; }
  FASTNAS_HOST_DEVICE int64_t channels() const { return (k - 1) * c; }
};

inline Bypass make_bypass(int64_t N, int64_t c, int64_t k, int64_t H, int64_t W, int64_t oh,
                          int64_t ow) {
  Bypass b{};
  b.N = N;
  b.c = c;
  b.k = k;
  b.H = H;
  b.W = W;
  b.oh = oh;
  b.ow = ow;
  const int64_t most = N * k * c * oh * ow;  // no index is larger
  const auto divider = [&](int64_t d) { return Divider(d > 0 ? d : 1, most); };
  b.by_ow = divider(ow);
  b.by_oh = divider(oh);
  b.by_c = divider(c);
  b.by_channels = divider(b.channels());
  return b;
}

// Channels innermost: whole pixels of the output in one pass, the mixed channels (as launch_combine sums them, with
// its tables) between the bypassed ones. y is (N, oh, ow, k c), the operands (N, oh, ow, c). Reads K c + (k - 1) c (four
// times that when pooled) and writes k c a pixel.
cudaError_t launch_partial_columns(const Plan& plan, const Combine& args, const Bypass& bypass,
                                   const void* rest, cudaStream_t stream);

// The gradients of launch_gradients and of rest in one pass over g (N, oh, ow, k c). rest is read only to find maxima.
cudaError_t launch_partial_columns_backward(const Plan& plan, const Gradients& args,
                                            const Bypass& bypass, const void* rest, void* drest,
                                            cudaStream_t stream);

// Planes: the bypassed planes of y (N, k c, oh, ow); launch_combine writes the others.
cudaError_t launch_bypass(Dtype dtype, const Bypass& bypass, const void* rest, void* y,
                          cudaStream_t stream);

// drest from grad (N, k c, oh, ow), every element of it.
cudaError_t launch_bypass_backward(Dtype dtype, const Bypass& bypass, const void* grad,
                                   const void* rest, void* drest, cudaStream_t stream);

}  // namespace fastnas::cuda
