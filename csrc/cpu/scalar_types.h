// SPDX-License-Identifier: Apache-2.0
// Storage types of the CPU kernels. The narrow ones are bare bits: kernels know nothing of PyTorch's classes.
#pragma once
#include <cstdint>
#include <cstring>

namespace fastnas {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof(f));
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof(u));
  return u;
}

// IEEE binary16 to binary32, exact. Only machines without F16C come here.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal: exact in binary32
  return sign ? -magnitude : magnitude;
}

// IEEE binary32 to binary16, to nearest, ties to even.
inline uint16_t float_to_half(float f) {
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u)
    return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past the largest finite half
  if (a < 0x38800000u) {
    // Subnormal result: adding 0.5 puts the half's unit in binary32's last place, and the addition rounds.
    const float shifted = bits_to_float(a) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

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

template <typename T>
inline acc_type<T> to_acc(T x) {
  return x;
}
template <>
inline float to_acc(BFloat16 x) {
  return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}
template <>
inline float to_acc(Half x) {
  return half_to_float(x.bits);
}

}  // namespace fastnas
