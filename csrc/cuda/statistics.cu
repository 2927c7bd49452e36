// SPDX-License-Identifier: Apache-2.0
// Mean and summed squared deviations of parts of the channels of K operands. Reads sizeof(T) bytes an element.
// A thread sums deviations from its own first value (of each channel it has), so a large mean costs no digits and one
// odd value spoils only its own share; threads and parts are merged by the formula of Chan, Golub and LeVeque, their
// means taken from the channel's first value, so that float resolves what they differ in.
// Operands dense, planes or columns (plan.h).
#include "mix.h"
#include "reduce.cuh"

namespace fastnas::cuda {

namespace {

// Running sums of deviations from the first value.
template <typename A>
struct Shifted {
  A shift, sum, squares;

  __device__ void add(A x) {
    const A d = x - shift;
    sum += d;
    squares += d * d;
  }
  // With the mean taken from `origin`.
  __device__ Moments<A> moments(int count, A origin) const {
    if (count == 0) return {};
    const A n = static_cast<A>(count), off = sum / n, rest = squares - off * sum;
    return {n, shift - origin + off, rest < 0 ? A{0} : rest};  // a NaN stays one
  }
};

// grid: x parts of every channel (planes) or of every chunk of lanes (columns), y operands.
template <typename T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads, 3)
    statistics_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Statistics args) {
  using A = acc_type<T>;
  constexpr int kWidth = kColumns ? V : 1;
  const int k = static_cast<int>(blockIdx.y);
  const T* x = static_cast<const T*>(args.xs[k]);
  if (!x) return;
  const int64_t side = blockIdx.x / static_cast<unsigned>(plan.parts),
                part = blockIdx.x - side * plan.parts;
  const int thread = static_cast<int>(threadIdx.x);
  const int row = kColumns ? thread / plan.lanes : thread, rows = kColumns ? plan.rows : kThreads;
  const int64_t lane = kColumns ? side * plan.lanes + thread - row * plan.lanes : 0;
  const bool works = row < rows && lane < plan.row;
  const int64_t first = part * plan.share + row, last = first - row + plan.share;

  Shifted<A> acc[kWidth];
  int count = 0;
  const auto add = [&](const T* p) {
    const Operand<T, V> loaded = load<T, V>(p);
    if (count == 0) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) acc[i] = {loaded.acc(i), 0, 0};
    }
#pragma unroll
    for (int i = 0; i < V; ++i) acc[kColumns ? i : 0].add(loaded.acc(i));
    count += V / kWidth;
  };
  if constexpr (kColumns) {
    if (works) {
#pragma unroll 4
      for (int64_t r = first; r < last; r += rows) {
        const int64_t vector = r * plan.row + lane;
        if (vector >= plan.vectors) break;
        add(x + vector * V);
      }
    }
  } else {
    const int64_t end = plan.N * plan.row;
#pragma unroll 4
    for (int64_t q = first; q < last; q += rows) {
      if (q >= end) break;
      const int64_t n = plan.by_row.quotient(q);
      add(x + (n * plan.C + side) * plan.S + (q - n * plan.row) * V);
    }
  }

  const Operand<T, kWidth> origin =
      load<T, kWidth>(x + (kColumns ? (works ? lane : 0) * V : side * plan.S));
  Moments<A> result[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) result[i] = acc[i].moments(count, origin.acc(i));
  merge_over_rows<kWidth>(result, row, rows, kColumns ? plan.lanes : 1);
  if (row != 0 || !works) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const int64_t entry = kColumns ? lane * V + i : side;
    const int64_t to = (k * plan.period + entry) * plan.parts + part;
    args.count[to] = result[i].count;
    args.mean[to] = static_cast<double>(origin.acc(i)) + static_cast<double>(result[i].mean);
    args.m2[to] = result[i].m2;
  }
}

}  // namespace

cudaError_t launch_statistics(const Plan& plan, const Statistics& args, cudaStream_t stream) {
  if (plan.elements == 0) return cudaSuccess;
  return with_plan(plan, [&](auto type, auto vector, auto columns) {
    constexpr bool kColumns = decltype(columns)::value;
    const auto kernel =
        statistics_kernel<typename decltype(type)::type, decltype(vector)::value, kColumns>;
    const int64_t blocks = plan.parts * (kColumns ? plan.chunks : plan.C);
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    FASTNAS_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks), args.K), plan.threads(), stream,
                   plan, args);
    return cudaGetLastError();
  });
}

}  // namespace fastnas::cuda
