// SPDX-License-Identifier: Apache-2.0
// Storage types, 16-byte vectors of them, and the accumulator type sums are taken in.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace fastnas::cuda {

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_type = typename Accumulate<T>::type;

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(__half x) { return __half2float(x); }
__device__ inline float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_acc(acc_type<T> x) {
  return x;
}
template <>
__device__ inline __half from_acc<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_acc<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// V elements that move in one instruction when V * sizeof(T) is 16.
template <typename T, int V>
struct alignas(V * sizeof(T)) Vec {
  T v[V];

  __device__ acc_type<T> acc(int i) const { return to_acc(v[i]); }
  __device__ void set(int i, T x) { v[i] = x; }
};

template <typename T>
using Vec_4 = Vec<T, 4>;  // a name without a comma, for macros

// The same of two-byte elements that wait to be summed: two to a register, where the compiler would
// spend a register on each.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pairs {
  uint32_t words[V / 2];

  __device__ float acc(int i) const {
    return to_acc(words[i / 2], i % 2 != 0, static_cast<T*>(nullptr));
  }
  __device__ void set(int i, T x) {
    uint16_t bits;
    memcpy(&bits, &x, sizeof(bits));
    uint32_t& word = words[i / 2];
    word =
        i % 2 ? (word & 0xffffu) | static_cast<uint32_t>(bits) << 16 : (word & 0xffff0000u) | bits;
  }

 private:
  __device__ static float to_acc(uint32_t word, bool upper, const __nv_bfloat16*) {
    return __uint_as_float(upper ? word & 0xffff0000u : word << 16);
  }
  __device__ static float to_acc(uint32_t word, bool upper, const __half*) {
    __half_raw bits;
    bits.x = static_cast<unsigned short>(upper ? word >> 16 : word);
    return __half2float(__half(bits));
  }
};

template <typename T, int V>
using Operand = std::conditional_t<sizeof(T) == 2 && V % 2 == 0, Pairs<T, V>, Vec<T, V>>;

template <typename T, int V>
__device__ inline Operand<T, V> load(const T* p) {
  return *reinterpret_cast<const Operand<T, V>*>(p);
}

template <typename Words, typename Value>
__device__ inline void store_words(void* p, const Value& value) {
  Words words;
  memcpy(&words, &value, sizeof(words));
  store_whole(static_cast<Words*>(p), words);
}

template <typename T, int V>
__device__ inline void store(T* p, const acc_type<T> (&x)[V]) {
  Vec<T, V> out;
#pragma unroll
  for (int i = 0; i < V; ++i) out.v[i] = from_acc<T>(x[i]);
  // The compiler makes a store for each element of some assignments.
  if constexpr (sizeof(out) == 16) {
    store_words<uint4>(p, out);
  } else if constexpr (sizeof(out) == 8) {
    store_words<uint2>(p, out);
  } else {
    *reinterpret_cast<Vec<T, V>*>(p) = out;
  }
}

// V elements `stride` apart: one vector if they are neighbours.
template <typename T, int V>
__device__ inline Operand<T, V> load_strided(const T* p, int64_t stride) {
  if (stride == 1) return load<T, V>(p);
  Operand<T, V> out{};
#pragma unroll
  for (int i = 0; i < V; ++i) out.set(i, p[i * stride]);
  return out;
}

template <typename T, int V>
__device__ inline void store_strided(T* p, const acc_type<T> (&x)[V], int64_t stride) {
  if (stride == 1) {
    store<T, V>(p, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) p[i * stride] = from_acc<T>(x[i]);
}

// V entries of a coefficient table: neighbours in columns, one and the same in planes.
template <int V, bool kColumns, typename A>
__device__ inline void load_entries(A (&out)[V], const A* p) {
  if constexpr (kColumns && V > 1) {
    constexpr int kStep = 16 / sizeof(A) < V ? 16 / sizeof(A) : V;
#pragma unroll
    for (int i = 0; i < V; i += kStep) {
      const Operand<A, kStep> part = load<A, kStep>(p + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) out[i + j] = part.acc(j);
    }
  } else {
    const A a = *p;
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = a;
  }
}

// Number i of an array whose dtype is known at run time only, for the few that a kernel's type does not tell.
template <typename A>
__device__ inline A read_as(const void* p, int dtype, int64_t i) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kDouble:
      return static_cast<A>(static_cast<const double*>(p)[i]);
    case Dtype::kHalf:
      return to_acc(static_cast<const __half*>(p)[i]);
    case Dtype::kBFloat16:
      return to_acc(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

__device__ inline double read(const void* p, int dtype, int64_t i) {
  return read_as<double>(p, dtype, i);
}

__device__ inline void write(void* p, int dtype, int64_t i, double value) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kDouble:
      static_cast<double*>(p)[i] = value;
      break;
    case Dtype::kHalf:
      static_cast<__half*>(p)[i] = from_acc<__half>(static_cast<float>(value));
      break;
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(p)[i] = from_acc<__nv_bfloat16>(static_cast<float>(value));
      break;
    default:
      static_cast<float*>(p)[i] = static_cast<float>(value);
  }
}

// The storage type of a dtype, and the vector width and layout of a plan, as compile-time constants.
template <typename F>
cudaError_t with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(Type<float>{});
    case Dtype::kDouble:
      return f(Type<double>{});
    case Dtype::kHalf:
      return f(Type<__half>{});
    case Dtype::kBFloat16:
      return f(Type<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

template <typename F>
cudaError_t with_plan(const Plan& plan, F&& f) {
  return with_type(plan.dtype, [&](auto type) {
    constexpr int kWide = 16 / static_cast<int>(sizeof(typename decltype(type)::type));
    if (plan.vector == 1)
      return plan.columns ? f(type, Int<1>{}, Int<1>{}) : f(type, Int<1>{}, Int<0>{});
    return plan.columns ? f(type, Int<kWide>{}, Int<1>{}) : f(type, Int<kWide>{}, Int<0>{});
  });
}

}  // namespace fastnas::cuda
