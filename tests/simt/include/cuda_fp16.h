// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/scalar_types.h"

struct __half_raw {
  unsigned short x;
};
struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(__half_raw raw) : bits(raw.x) {}
};
inline float __half2float(__half x) { return fastnas::half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return __half(__half_raw{fastnas::float_to_half(x)}); }
