// SPDX-License-Identifier: Apache-2.0
// BatchNorm and weighted sum of K operands: what mixed_batch_norm and partial_channel_mix share.
//
// With mean m, inverse deviation r, h = (x - m) r and, where affine, gamma and beta:
//   y    = sum_k w_k (gamma h + beta) + sum_j w_j x_j
//   S    = sum g,  P = sum g (x - m),  T = r P
//   dw   = sum_c (gamma T + beta S),  dgamma = w T,  dbeta = w S
//   dx   = w r gamma (g - S / M - h T / M)      M values a channel; running statistics: without the two / M terms
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "../check.h"
#include "../source_norm.h"
#include "dispatch.h"
#include "mix.h"

namespace fastnas {

enum NormKind : int64_t { kPlain = 0, kBatch = 1, kRunning = 2 };

// The operands of one call with their BatchNorms: [K][C] tables in double, plain rows neutral.
struct NormTable {
  int64_t K, C;
  std::vector<int64_t> kinds;
  std::vector<double> w, eps, mean, var, gamma, beta;
  std::vector<bool> known;          // whether the batch's statistics have been taken already
  std::vector<int64_t> affine_row;  // row of k in the affine gradients, -1 if it has none

  double inverse_deviation(int64_t k, int64_t c) const {
    return kinds[k] == kPlain ? 1.0 : 1.0 / std::sqrt(var[k * C + c] + eps[k]);
  }
};

NormTable make_norm_table(const char* op, int64_t C, const at::Tensor& weights,
                          at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine,
                          at::TensorList gammas, at::TensorList betas);

// One norm as the only row of a table whose weight is 1; kind 0 makes it a plain row.
NormTable make_source_table(const char* op, const at::Tensor& x, const SourceNorm& norm);

void set_running_statistics(const char* op, NormTable& table, at::TensorList means,
                            at::TensorList vars);

void set_statistics(const char* op, NormTable& table, const at::Tensor& mean,
                    const at::Tensor& var);

// Those that came with operands: of each one's carrier, the first two rows; no carriers, or empty ones, for none.
void set_made_statistics(NormTable& table, at::TensorList carriers);

// The carriers of so many outputs with these means and biased variances, [outputs][2][C].
std::vector<at::Tensor> made_carriers(const std::vector<double>& made, int64_t outputs, int64_t C,
                                      const at::TensorOptions& options);

// Per channel: y = bias + sum_k coef_k x_k.
struct ForwardCoefficients {
  std::vector<double> coef, bias;
};
ForwardCoefficients forward_coefficients(const NormTable& table);

// Per channel: dx_k = a g + b (x_k - centre) + c; and the gradients of what is not an operand.
struct BackwardCoefficients {
  std::vector<double> a, b, c;
  std::vector<double> dw, dgamma, dbeta;
};
BackwardCoefficients backward_coefficients(const NormTable& table, const std::vector<double>& sums,
                                           const std::vector<double>& dots, double count);

template <typename T>
void batch_statistics(const Mix<T>& mix, const std::vector<const T*>& xs, NormTable& table) {
  std::vector<const T*> batch(xs);
  for (size_t k = 0; k < batch.size(); ++k)
    if (table.kinds[k] != kBatch || table.known[k]) batch[k] = nullptr;
  mix.statistics(batch, table.mean, table.var);
}

struct MixGradients {
  std::vector<at::Tensor> dxs;
  at::Tensor dw, dgamma, dbeta;
  at::Tensor carried;  // as carried_gradients has them
};

// (number of carried inputs, 4, C): a, b, centre and c of their gradients, in so many rows.
at::Tensor carried_gradients(const NormTable& table, const BackwardCoefficients& b,
                             at::IntArrayRef need, const at::TensorOptions& options);

// The backward for operands xs (N, C, ...) whose output gradient is the slot g. Empty xs were not kept by the
// forward because nothing needs them. `need` says which of them carry their gradient, none if it is empty.
template <typename T>
void mix_backward(const Mix<T>& mix, const Layout& layout, Slot<const T> g,
                  const std::vector<const T*>& xs, NormTable& table, const std::vector<T*>& dxs,
                  MixGradients& out, const at::Tensor& weights, bool need_weights,
                  at::IntArrayRef need = {}) {
  const int64_t K = table.K, C = table.C;
  std::vector<double> sums(C), dots(K * C);
  mix.reduce(g, xs, table.mean, sums, dots);
  const BackwardCoefficients b =
      backward_coefficients(table, sums, dots, static_cast<double>(layout.values()));
  if (need_weights) out.dw = from_doubles(b.dw, {K}, weights.options());
  const int64_t rows = b.dgamma.size() / std::max<int64_t>(C, 1);
  out.dgamma = from_doubles(b.dgamma, {rows, C}, weights.options());
  out.dbeta = from_doubles(b.dbeta, {rows, C}, weights.options());
  out.carried = carried_gradients(table, b, need, weights.options());
  std::vector<const T*> read(xs);
  for (int64_t k = 0; k < K; ++k)
    if (table.kinds[k] != kBatch) read[k] = nullptr;  // a * g is all there is
  if (std::any_of(dxs.begin(), dxs.end(), [](T* p) { return p != nullptr; }))
    mix.gradients(g, read, dxs, b.a, b.b, b.c, table.mean);
}

}  // namespace fastnas
