// SPDX-License-Identifier: Apache-2.0
// What the kernels of depthwise convolutions without tiles share: which sizes they serve, and what taps read.
#pragma once
#include "depthwise_group.h"
#include "vec.cuh"

namespace fastnas::cuda {

// f(Int<k>) for the k that the kernels serve.
template <typename F>
__device__ inline void with_side(int side, F&& f) {
  if (side == 1) f(Int<1>{});
  if (side == 3) f(Int<3>{});
  if (side == 5) f(Int<5>{});
  if (side == 7) f(Int<7>{});
}

// What a tap multiplies of a source: BatchNorm and ReLU come before, where there are such.
template <int V, bool kColumns, typename A>
struct Source {
  A scale[V], shift[V];
  bool normed, relu;

  __device__ Source(const Convolutions& c, int64_t channel) : normed(c.scale), relu(c.relu) {
    if (!normed) return;
    load_entries<V, kColumns>(scale, static_cast<const A*>(c.scale) + channel);
    load_entries<V, kColumns>(shift, static_cast<const A*>(c.shift) + channel);
  }
  __device__ A of(A x, int v) const {
    if (normed) x = scale[v] * x + shift[v];
    return relu && x <= 0 ? A(0) : x;  // NaN stays
  }
};

}  // namespace fastnas::cuda
