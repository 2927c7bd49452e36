// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/scalar_types.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) { return fastnas::half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {fastnas::float_to_half(x)}; }
