// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/scalar_types.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  return fastnas::bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = fastnas::float_to_bits(x);
  if (x != x) return {0x7fff};
  return {
      static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};  // to nearest, ties to even
}
