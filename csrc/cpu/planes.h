// SPDX-License-Identifier: Apache-2.0
// Depthwise convolutions with one plane (image and channel) a lane of a vector, as a table of functions for one
// instruction set.
//
// Lane l of group q is plane q L + l, counted over the batch: (n, c) = (plane / C, plane % C). A group is packed into a
// buffer of pixels, each a vector of L lanes, with a border of zeros. There every tap of every convolution is an
// aligned load at a fixed distance, whatever the memory format, the width of the image, the dilation or the stride, and
// no lane is wasted on borders. Weights become vectors too: lane l of group q has those of channel (q L + l) % C.
#pragma once
#include <cstdint>

#include "scalar_types.h"

namespace fastnas {

// A tensor (N, C, H, W), dense, plane after plane or with the channels innermost.
struct Planes {
  int64_t planes, C, H, W;  // planes: N * C
  bool columns;
};

template <typename T>
struct PlaneKernels {
  using acc_t = acc_type<T>;

  int lanes;  // L

  // Pixels of `rows` whole rows from row0 on, of the L planes from `plane` on; zeros for those past the last one.
  // Rows are `pitch` pixels apart in `to`. scratch: W * L values.
  void (*pack)(const Planes& shape, const T* x, int64_t plane, int64_t row0, int64_t rows,
               acc_t* to, int64_t pitch, bool relu, T* scratch);

  // As pack without a gap and of a g + b (y - centre) + c; a, b, centre and c are vectors that follow each other in
  // `carried`. buffer: as large as `to`.
  void (*pack_carried)(const Planes& shape, const T* g, const T* y, int64_t plane, int64_t row0,
                       int64_t rows, acc_t* to, const acc_t* carried, acc_t* buffer, T* scratch);

  // The reverse, from rows without a gap between them. scratch: rows * W * L values.
  void (*unpack)(const Planes& shape, const acc_t* from, int64_t plane, int64_t row0, int64_t rows,
                 T* y, T* scratch);

  // out[r][i] (+)= sum_t w[t] x[r][s i + offsets[t] / L] for rows x n pixels, which are `step` elements apart in out. Rows
  // are x_row and out_row elements apart. The first is for s = 1, the second for s = 2.
  void (*convolve[2])(const acc_t* x, int64_t x_row, const int64_t* offsets, const acc_t* w,
                      int64_t taps, acc_t* out, int64_t out_row, int64_t step, int64_t rows,
                      int64_t n, bool add);

  // sums[t] += sum over rows x n pixels of g[r][i] x[r][s i + offsets[t] / L].
  void (*correlate[2])(const acc_t* g, int64_t g_row, const acc_t* x, int64_t x_row,
                       const int64_t* offsets, int64_t taps, acc_t* sums, int64_t rows, int64_t n);

  // x = max(scale x + shift, 0) over rows x n pixels, a scale and a shift for each lane.
  void (*normalise)(acc_t* x, int64_t x_row, int64_t rows, int64_t n, const acc_t* scale,
                    const acc_t* shift);

  // out[r][i] = W h[r][i] for rows x n pixels, C channels in and `outputs` out. A pixel is C / L vectors, x_group apart,
  // and outputs / L of out, out_group apart; with fewer channels than lanes, as many in as out, a vector holds those of
  // L / C images. Pixels of x are L elements apart, those of out `step`. w: vector q C + c has w[q L + l mod C][c] in
  // lane l. Asks for C % L == 0 and outputs % L == 0, or L % C == 0.
  void (*multiply)(const acc_t* x, int64_t x_group, int64_t x_row, const acc_t* w, int64_t C,
                   int64_t outputs, acc_t* out, int64_t out_group, int64_t out_row, int64_t step,
                   int64_t rows, int64_t n);

  // sums += sum over n pixels of g x^T, in the layout that w has there.
  void (*outer)(const acc_t* g, int64_t g_group, int64_t outputs, const acc_t* x, int64_t x_group,
                int64_t C, acc_t* sums, int64_t n);

  // dx = 0 where x (rectified) is 0, over rows x n pixels without a gap in dx.
  void (*mask)(acc_t* dx, const acc_t* x, int64_t x_row, int64_t rows, int64_t n);
};

// The table of the instruction set that this process runs with.
template <typename T>
const PlaneKernels<T>& plane_kernels();

}  // namespace fastnas
