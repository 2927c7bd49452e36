// SPDX-License-Identifier: Apache-2.0
// The small kernels between the passes of mixed_batch_norm: one block a channel, a warp an operand, all in double.
// They move K * C * parts numbers, a thousandth of what the passes do.
#include "norm.h"
#include "reduce.cuh"

namespace fastnas::cuda {

namespace {

constexpr int kWarps = kThreads / 32;
// Blocks of a multiprocessor. Left to itself, the compiler stops at as many registers and spills one.
constexpr int kBlocks = 4;

__device__ inline double weight(const Norms& n, int k) {
  return n.weights.data ? read(n.weights.data, static_cast<int>(n.weights.dtype), k) : 1.0;
}

__device__ inline double gamma(const Norms& n, int k, int64_t c) {
  return n.gamma[k] ? read(n.gamma[k], n.gamma_dtype[k], c) : 1.0;
}

__device__ inline double beta(const Norms& n, int k, int64_t c) {
  return n.beta[k] ? read(n.beta[k], n.beta_dtype[k], c) : 0.0;
}

// Calls f(entry) for the table entries of a channel.
template <typename F>
__device__ inline void for_each_entry(const Plan& p, int64_t channel, F&& f) {
  for (int64_t entry = channel; entry < p.period; entry += p.C) f(entry);
}

// Part i of a channel, counted over its table entries, among the partial results of row k.
__device__ inline int64_t part_of(const Plan& p, int64_t k, int64_t channel, int64_t i) {
  const int64_t repeat = i / p.parts;
  return (k * p.period + channel + repeat * p.C) * p.parts + i - repeat * p.parts;
}

template <typename A>
__global__ void __launch_bounds__(kThreads, kBlocks)
    normalise_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Norms norms,
                     const __grid_constant__ Normalise args) {
  FASTNAS_SHARED(double, offset, kMaxOperands);
  const int64_t c = blockIdx.x, parts = plan.period / plan.C * plan.parts;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int k = static_cast<int>(threadIdx.x) / 32; k < norms.K; k += kWarps) {
    Moments<double> m;
    if (norms.kinds[k] == kBatch) {
      for (int64_t i = lane; i < parts; i += 32) {
        const int64_t from = part_of(plan, k, c, i);
        m.merge({args.count[from], args.part_mean[from], args.m2[from]});
      }
      m = warp_merge(m);
    }
    if (lane != 0) continue;
    double mean = m.mean, var = m.count > 0 ? m.m2 / m.count : 1.0;
    if (norms.kinds[k] == kRunning) {
      mean = read(norms.mean[k], norms.mean_dtype[k], c);
      var = read(norms.var[k], norms.var_dtype[k], c);
    }
    static_cast<A*>(args.mean)[k * plan.C + c] = static_cast<A>(mean);
    static_cast<A*>(args.var)[k * plan.C + c] = static_cast<A>(var);
    const double w = weight(norms, k);
    const double scale =
        norms.kinds[k] == kPlain ? 1.0 : gamma(norms, k, c) / sqrt(var + norms.eps[k]);
    offset[k] = norms.kinds[k] == kPlain ? 0.0 : w * (beta(norms, k, c) - scale * mean);
    for_each_entry(plan, c, [&](int64_t entry) {
      const int64_t to = k * plan.period + entry;
      static_cast<A*>(args.coef)[to] = static_cast<A>(w * scale);
      if (args.apart) static_cast<A*>(args.bias)[to] = static_cast<A>(offset[k]);
    });
  }
  if (args.apart) return;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (int k = 0; k < norms.K; ++k) sum += offset[k];
  for_each_entry(plan, c,
                 [&](int64_t entry) { static_cast<A*>(args.bias)[entry] = static_cast<A>(sum); });
}

// What one operand's norm makes of the sums of g and of g (x_k - mean_k) over channel c.
template <typename A>
__device__ inline void write_gradients(const Plan& plan, const Norms& norms,
                                       const NormGradients& args, int k, int64_t c, double total,
                                       double dot) {
  const double w = weight(norms, k), count = static_cast<double>(plan.values());
  double a = w, b = 0, shift = 0, dw = dot;
  if (norms.kinds[k] != kPlain) {
    const double mean = static_cast<const A*>(args.mean)[k * plan.C + c];
    const double var = static_cast<const A*>(args.var)[k * plan.C + c];
    const double r = 1.0 / sqrt(var + norms.eps[k]), g = gamma(norms, k, c), t = r * dot;
    a = w * r * g;
    if (norms.kinds[k] == kBatch && count > 0) {
      b = -a * r * t / count;
      shift = -a * total / count - b * mean;
    }
    dw = g * t + beta(norms, k, c) * total;
    if (norms.affine_row[k] >= 0) {
      static_cast<A*>(args.dgamma)[norms.affine_row[k] * plan.C + c] = static_cast<A>(w * t);
      static_cast<A*>(args.dbeta)[norms.affine_row[k] * plan.C + c] = static_cast<A>(w * total);
    }
  }
  if (args.dw) args.dw[k * plan.C + c] = dw;
  for_each_entry(plan, c, [&](int64_t entry) {
    const int64_t to = k * plan.period + entry;
    static_cast<A*>(args.a)[to] = static_cast<A>(a);
    static_cast<A*>(args.b)[to] = static_cast<A>(b);
    static_cast<A*>(args.c)[to] = static_cast<A>(shift);
  });
}

template <typename A>
__global__ void __launch_bounds__(kThreads, kBlocks)
    norm_gradients_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Norms norms,
                          const __grid_constant__ NormGradients args) {
  FASTNAS_SHARED(double, sums, kMaxOperands + 1);  // sum g, then sum g (x_k - mean_k)
  const int64_t c = blockIdx.x;
  const int64_t parts = args.partial ? plan.period / plan.C * plan.parts : 0;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const A* partial = static_cast<const A*>(args.partial);
  for (int j = thread / 32; j <= norms.K; j += kWarps) {
    double sum = 0;
    for (int64_t i = lane; i < parts; i += 32)
      sum += static_cast<double>(partial[part_of(plan, j, c, i)]);
    sum = warp_sum(sum);
    if (lane == 0) sums[j] = sum;
  }
  __syncthreads();
  if (thread < norms.K) write_gradients<A>(plan, norms, args, thread, c, sums[0], sums[thread + 1]);
}

// grid: x channels, y operands. Sums are few and have many parts: all threads on each.
template <typename A>
__global__ void __launch_bounds__(kThreads, kBlocks)
    apart_norm_gradients_kernel(const __grid_constant__ Plan plan,
                                const __grid_constant__ Norms norms,
                                const __grid_constant__ NormGradients args) {
  const int64_t c = blockIdx.x, stride = plan.C * args.parts;
  const int k = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const A* partial = static_cast<const A*>(args.partial) + 2 * k * stride + c * args.parts;
  double sums[2] = {0, 0};
  for (int64_t i = thread; i < args.parts; i += kThreads) {
    sums[0] += static_cast<double>(partial[i]);
    sums[1] += static_cast<double>(partial[stride + i]);
  }
  sum_over_rows(sums, thread, kThreads, 1);
  if (thread == 0) write_gradients<A>(plan, norms, args, k, c, sums[0], sums[1]);
}

}  // namespace

cudaError_t launch_normalise(const Plan& plan, const Norms& norms, const Normalise& args,
                             cudaStream_t stream) {
  if (plan.C == 0) return cudaSuccess;
  if (!fits_grid(plan.C)) return cudaErrorInvalidConfiguration;
  const auto kernel =
      plan.dtype == Dtype::kDouble ? normalise_kernel<double> : normalise_kernel<float>;
  FASTNAS_LAUNCH(kernel, static_cast<unsigned>(plan.C), kThreads, stream, plan, norms, args);
  return cudaGetLastError();
}

cudaError_t launch_norm_gradients(const Plan& plan, const Norms& norms, const NormGradients& args,
                                  cudaStream_t stream) {
  if (plan.C == 0) return cudaSuccess;
  if (!fits_grid(plan.C)) return cudaErrorInvalidConfiguration;
  const bool wide = plan.dtype == Dtype::kDouble;
  auto kernel = wide ? norm_gradients_kernel<double> : norm_gradients_kernel<float>;
  dim3 grid(static_cast<unsigned>(plan.C));
  if (args.parts) {
    kernel = wide ? apart_norm_gradients_kernel<double> : apart_norm_gradients_kernel<float>;
    grid.y = static_cast<unsigned>(norms.K);
  }
  FASTNAS_LAUNCH(kernel, grid, kThreads, stream, plan, norms, args);
  return cudaGetLastError();
}

}  // namespace fastnas::cuda
