// SPDX-License-Identifier: Apache-2.0
// Includes FASTNAS_BODY once per instruction set, each time in a namespace of its own. Nothing but that body is
// compiled with the wider sets, so no inline function of libstdc++ or ATen can leak AVX code into the baseline.
// Define FASTNAS_BODY as a quoted file name and include every header the body needs before this one. No include
// guard: each kernel file includes it for its own body.
#define FASTNAS_VECTOR_BYTES 16
namespace fastnas::baseline {
#include "simd.h"
#include FASTNAS_BODY
}  // namespace fastnas::baseline
#undef FASTNAS_VECTOR_BYTES

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTNAS_VECTOR_BYTES 32
namespace fastnas::avx2 {
#include "simd.h"
#include FASTNAS_BODY
}  // namespace fastnas::avx2
#undef FASTNAS_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define FASTNAS_VECTOR_BYTES 64
namespace fastnas::avx512 {
#include "simd.h"
#include FASTNAS_BODY
}  // namespace fastnas::avx512
#undef FASTNAS_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86_64
