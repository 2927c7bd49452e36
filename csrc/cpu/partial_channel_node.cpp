// SPDX-License-Identifier: Apache-2.0
// The tail of a PC-DARTS node whose states are kept in two parts: the bypassed channels of its edges are summed up and
// shuffled with the mixed ones in one pass, and the two parts that the next edges read are written.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

#include "../parts.h"
#include "dispatch.h"
#include "flat.h"
#include "shuffle.h"

namespace fastnas {

namespace {

template <typename T>
using Pointers = std::array<T*, kMaxCandidates>;

// A gradient as it is read: channels innermost, `pitch` values from pixel to pixel; or planes, at these strides of image
// and channel. A part of a concatenation is read where it stands. Null stands for zeros.
template <typename T>
struct Source {
  const T* data = nullptr;
  int64_t pitch = 0, image = 0, channel = 0;

  const T* plane(int64_t n, int64_t c) const {
    return data ? data + n * image + c * channel : nullptr;
  }
};

// Pixels at one distance from each other, or 0; channels stand side by side.
int64_t pixel_pitch(const at::Tensor& x) {
  if (x.size(1) > 1 && x.stride(1) != 1) return 0;
  int64_t pitch = 0, extent = 0;
  for (const int64_t d : {3, 2, 0}) {
    if (x.size(d) == 1) continue;
    if (pitch == 0)
      extent = pitch = x.stride(d);
    else if (x.stride(d) != extent)
      return 0;
    extent *= x.size(d);
  }
  return pitch == 0 ? x.size(1) : pitch;
}

bool has_dense_planes(const at::Tensor& x) {
  return (x.size(3) == 1 || x.stride(3) == 1) && (x.size(2) == 1 || x.stride(2) == x.size(3));
}

// Keeps in `held` what the source points into.
template <typename T>
Source<T> source_of(const std::optional<at::Tensor>& grad, bool columns, at::MemoryFormat format,
                    std::vector<at::Tensor>& held) {
  if (!grad || grad->numel() == 0) return {};
  at::Tensor g = *grad;
  if (columns ? pixel_pitch(g) == 0 : !has_dense_planes(g)) g = g.contiguous(format);
  held.push_back(g);
  return {const_pointer<T>(g), columns ? pixel_pitch(g) : 0, g.stride(0), g.stride(1)};
}

// f(begin, count) for the blocks of pixels of a task; how many pixels there are in a task does not depend on threads.
template <typename F>
void parallel_pixels(const PartSizes& s, int64_t operands, F&& f) {
  const int64_t C = s.k * s.c, pixels = s.N * s.space();
  const int64_t share = std::max<int64_t>(kTaskElements / C, 1);
  const int64_t tasks = (pixels + share - 1) / share, grain = std::max<int64_t>(2 / operands, 1);
  parallel_tasks(tasks, grain, [&](Tasks::Worker& worker) {
    for (int64_t t; worker.next(t);) f(t, t * share, std::min(share, pixels - t * share));
  });
}

int64_t block_of(const PartSizes& s) { return std::max<int64_t>(kBlockElements / (s.k * s.c), 1); }

template <typename T>
void node_columns(const PartSizes& s, const T* mixed, const std::vector<const T*>& rests,
                  const std::vector<double>& weights, T* to_mixed, T* to_rest) {
  const RangeKernels<T>& kernels = range_kernels<T>();
  const auto coef = table<acc_type<T>>(weights, kernels.lanes);
  const int64_t E = rests.size(), R = s.others(), block = block_of(s);
  parallel_pixels(s, E + 1, [&](int64_t, int64_t begin, int64_t count) {
    std::vector<T> sum(block * R);
    Pointers<const T> at;
    for (int64_t end = begin + count; begin < end; begin += block) {
      const int64_t n = std::min(block, end - begin);
      for (int64_t e = 0; e < E; ++e) at[e] = rests[e] + begin * R;
      kernels.combine(at.data(), E, sum.data(), n * R, coef.data(), nullptr, kernels.lanes);
      shuffle<T>(s.k, s.c, n, {mixed + begin * s.c, sum.data(), s.c, R},
                 {to_mixed + begin * s.c, to_rest + begin * R, s.c, R});
    }
  });
}

// f(n, z, o) for every image and channel: shuffled channel o is channel z of mixed and rest.
template <typename F>
void parallel_planes(const PartSizes& s, F&& f) {
  const int64_t C = s.k * s.c;
  const int64_t grain = std::max<int64_t>(kTaskElements / s.space(), 1);
  parallel_tasks(s.N * C, grain, [&](Tasks::Worker& worker) {
    for (int64_t i; worker.next(i);) {
      const int64_t z = i % C;
      f(i / C, z, z % s.c * s.k + z / s.c);
    }
  });
}

template <typename T>
void node_planes(const PartSizes& s, const T* mixed, const std::vector<const T*>& rests,
                 const std::vector<double>& weights, T* to_mixed, T* to_rest) {
  const RangeKernels<T>& kernels = range_kernels<T>();
  const auto coef = table<acc_type<T>>(weights, kernels.lanes);
  const int64_t E = rests.size(), R = s.others(), S = s.space();
  parallel_planes(s, [&](int64_t n, int64_t z, int64_t o) {
    T* to = o < s.c ? to_mixed + (n * s.c + o) * S : to_rest + (n * R + o - s.c) * S;
    if (z < s.c) {
      std::memcpy(static_cast<void*>(to), mixed + (n * s.c + z) * S, S * sizeof(T));
      return;
    }
    Pointers<const T> at;
    for (int64_t e = 0; e < E; ++e) at[e] = rests[e] + (n * R + z - s.c) * S;
    kernels.combine(at.data(), E, to, S, coef.data(), nullptr, kernels.lanes);
  });
}

// Where the gradients go; dmixed and entries of drests may be null, and rests is empty where dw is not asked for.
template <typename T>
struct NodeGradients {
  T* dmixed;
  const std::vector<T*>& drests;
  const std::vector<const T*>& rests;
  const std::vector<double>& weights;
};

// Gradients of n values of the rests, from their place `at` on, out of that of their sum; sums: [E][lanes].
template <typename T>
void rest_gradients(const RangeKernels<T>& kernels, const NodeGradients<T>& to, const T* g,
                    int64_t at, int64_t n, const std::vector<acc_type<T>>& coef,
                    acc_type<T>* sums) {
  const int64_t E = to.drests.size();
  const Pointers<const T> none{};
  Pointers<const T> read{};
  Pointers<T> write{};
  for (int64_t e = 0; e < E; ++e) {
    if (!to.rests.empty()) read[e] = to.rests[e] + at;
    if (to.drests[e]) write[e] = to.drests[e] + at;
  }
  kernels.gradients(g, none.data(), write.data(), E, n, coef.data(), nullptr, nullptr, nullptr,
                    kernels.lanes);
  if (!to.rests.empty())
    kernels.reduce(g, read.data(), E, n, nullptr, nullptr, sums, kernels.lanes);
}

// partial: [E] of a task.
template <typename A>
void fold_dots(const std::vector<A>& sums, int64_t lanes, double* partial) {
  for (size_t i = 0; i < sums.size(); ++i) partial[i / lanes] += sums[i];
}

std::vector<double> total_of(const std::vector<double>& partial, int64_t E) {
  std::vector<double> dots(E);
  for (size_t i = 0; i < partial.size(); ++i) dots[i % E] += partial[i];
  return dots;
}

template <typename T>
std::vector<double> node_columns_backward(const PartSizes& s, Source<T> mixed, Source<T> rest,
                                          const NodeGradients<T>& to) {
  const RangeKernels<T>& kernels = range_kernels<T>();
  const auto coef = table<acc_type<T>>(to.weights, kernels.lanes);
  const int64_t E = to.drests.size(), R = s.others(), block = block_of(s), L = kernels.lanes;
  const int64_t share = std::max<int64_t>(kTaskElements / (s.k * s.c), 1);
  const std::vector<T> zeros(mixed.data && rest.data ? 0 : s.k * s.c);
  std::vector<double> partial((s.N * s.space() + share - 1) / share * E);
  parallel_pixels(s, E + 1, [&](int64_t task, int64_t begin, int64_t count) {
    std::vector<T> g(block * R), unused(to.dmixed ? 0 : block * s.c);
    std::vector<acc_type<T>> sums(E * L);
    const auto from = [&](const Source<T>& x) {
      return x.data ? x.data + begin * x.pitch : zeros.data();
    };
    for (int64_t end = begin + count; begin < end; begin += block) {
      const int64_t n = std::min(block, end - begin);
      unshuffle<T>(s.k, s.c, n, {from(mixed), from(rest), mixed.pitch, rest.pitch},
                   {to.dmixed ? to.dmixed + begin * s.c : unused.data(), g.data(), s.c, R});
      rest_gradients(kernels, to, g.data(), begin * R, n * R, coef, sums.data());
    }
    fold_dots(sums, L, partial.data() + task * E);
  });
  return total_of(partial, E);
}

template <typename T>
std::vector<double> node_planes_backward(const PartSizes& s, Source<T> mixed, Source<T> rest,
                                         const NodeGradients<T>& to) {
  const RangeKernels<T>& kernels = range_kernels<T>();
  const auto coef = table<acc_type<T>>(to.weights, kernels.lanes);
  const int64_t E = to.drests.size(), R = s.others(), S = s.space(), L = kernels.lanes;
  const std::vector<T> zeros(mixed.data && rest.data ? 0 : S);
  std::vector<double> partial(s.N * R * E);
  parallel_planes(s, [&](int64_t n, int64_t z, int64_t o) {
    const T* g = o < s.c ? mixed.plane(n, o) : rest.plane(n, o - s.c);
    if (!g) g = zeros.data();
    if (z < s.c) {
      if (to.dmixed)
        std::memcpy(static_cast<void*>(to.dmixed + (n * s.c + z) * S), g, S * sizeof(T));
      return;
    }
    const int64_t plane = n * R + z - s.c;
    std::vector<acc_type<T>> sums(to.rests.empty() ? 0 : E * L);
    rest_gradients(kernels, to, g, plane * S, S, coef, sums.data());
    fold_dots(sums, L, partial.data() + plane * E);
  });
  return total_of(partial, E);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> partial_channel_node_cpu(const at::Tensor& mixed,
                                                            at::TensorList rests,
                                                            const at::Tensor& weights, int64_t k) {
  const char* op = "partial_channel_node";
  const PartSizes s = check_parts(op, mixed, rests, weights, k);
  const at::ScalarType dtype = c10::promoteTypes(result_dtype(rests), mixed.scalar_type());
  const at::MemoryFormat format = memory_format(mixed);
  const at::Tensor m = as_operand(mixed, dtype, format);
  const std::vector<at::Tensor> operands = as_operands(rests, dtype, format);
  at::Tensor to_mixed = at::empty(s.mixed(), mixed.options().dtype(dtype), format);
  at::Tensor to_rest = at::empty(s.rest(), mixed.options().dtype(dtype), format);
  if (m.numel() == 0) return {to_mixed, to_rest};
  dispatch(op, dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool columns = layout_of(mixed.sizes(), format != at::MemoryFormat::Contiguous).columns;
    (columns ? node_columns<T> : node_planes<T>)(s, const_pointer<T>(m),
                                                 const_pointers<T>(operands), to_doubles(weights),
                                                 static_cast<T*>(to_mixed.mutable_data_ptr()),
                                                 static_cast<T*>(to_rest.mutable_data_ptr()));
  });
  return {to_mixed, to_rest};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor> partial_channel_node_backward_cpu(
    const std::optional<at::Tensor>& grad_mixed, const std::optional<at::Tensor>& grad_rest,
    at::TensorList rests, const at::Tensor& weights, int64_t k, bool need_mixed,
    at::IntArrayRef need_rests, bool need_weights) {
  const char* op = "partial_channel_node_backward";
  const PartSizes s =
      check_parts_backward(op, grad_mixed, grad_rest, rests, weights, k, need_rests, need_weights);
  const at::Tensor& like = grad_mixed ? *grad_mixed : *grad_rest;
  const at::ScalarType dtype = like.scalar_type();
  const at::MemoryFormat format = memory_format(like);
  at::Tensor dmixed = at::empty({0}, like.options()), dw = at::empty({0}, weights.options());
  if (need_mixed) dmixed = at::empty(s.mixed(), like.options(), format);
  std::vector<at::Tensor> drests;
  for (int64_t need : need_rests)
    if (need) drests.push_back(at::empty(s.rest(), like.options(), format));
  const int64_t E = need_rests.size();
  dispatch(op, dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool columns = layout_of(s.mixed(), format != at::MemoryFormat::Contiguous).columns;
    std::vector<double> dots(E);
    if (like.numel()) {
      std::vector<at::Tensor> held;
      const Source<T> m = source_of<T>(grad_mixed, columns, format, held),
                      r = source_of<T>(grad_rest, columns, format, held);
      const std::vector<at::Tensor> operands = as_operands(rests, dtype, format);
      const std::vector<const T*> x = const_pointers<T>(operands);
      const std::vector<double> w = to_doubles(weights);
      std::vector<T*> to(E, nullptr);
      for (int64_t e = 0, i = 0; e < E; ++e)
        if (need_rests[e]) to[e] = static_cast<T*>(drests[i++].mutable_data_ptr());
      T* dm = need_mixed ? static_cast<T*>(dmixed.mutable_data_ptr()) : nullptr;
      dots =
          (columns ? node_columns_backward<T> : node_planes_backward<T>)(s, m, r, {dm, to, x, w});
    }
    if (need_weights) dw = from_doubles(dots, {E}, weights.options());
  });
  return {dmixed, drests, dw};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("partial_channel_node", &fastnas::partial_channel_node_cpu);
  m.impl("partial_channel_node_backward", &fastnas::partial_channel_node_backward_cpu);
}
