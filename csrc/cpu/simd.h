// SPDX-License-Identifier: Apache-2.0
// Vectors of FASTNAS_VECTOR_BYTES, included by isa.h inside the namespace of one instruction set.
// A kernel works in lanes of the accumulator type; Lane<T> loads them from storage of type T and stores them back.
#undef FASTNAS_F16C
#if FASTNAS_VECTOR_BYTES > 16
#define FASTNAS_F16C 1
#else
#define FASTNAS_F16C 0
#endif

using vfloat = float __attribute__((vector_size(FASTNAS_VECTOR_BYTES)));
using vdouble = double __attribute__((vector_size(FASTNAS_VECTOR_BYTES)));
using vuint = uint32_t __attribute__((vector_size(FASTNAS_VECTOR_BYTES)));
using vint = int32_t __attribute__((vector_size(FASTNAS_VECTOR_BYTES)));
using vushort = uint16_t __attribute__((vector_size(FASTNAS_VECTOR_BYTES / 2)));

template <typename T>
struct Lane;

template <>
struct Lane<float> {
  using acc_t = float;
  using V = vfloat;
  static constexpr int kLanes = FASTNAS_VECTOR_BYTES / 4;
  static inline V load(const float* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static inline void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }
};

template <>
struct Lane<double> {
  using acc_t = double;
  using V = vdouble;
  static constexpr int kLanes = FASTNAS_VECTOR_BYTES / 8;
  static inline V load(const double* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static inline void store(double* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }
};

template <>
struct Lane<BFloat16> {
  using acc_t = float;
  using V = vfloat;
  static constexpr int kLanes = FASTNAS_VECTOR_BYTES / 4;
  static inline V load(const BFloat16* p) {
    vushort h;
    __builtin_memcpy(&h, p, sizeof(h));
    const vuint u = __builtin_convertvector(h, vuint) << 16;
    V v;
    __builtin_memcpy(&v, &u, sizeof(v));
    return v;
  }
  static inline void store(BFloat16* p, V v) {
    vuint u;
    __builtin_memcpy(&u, &v, sizeof(u));
    const vuint rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const vint ordered = v == v;
    vuint mask;
    __builtin_memcpy(&mask, &ordered, sizeof(mask));
    const vushort h = __builtin_convertvector((rounded & mask) | (~mask & 0x7fc0u), vushort);
    __builtin_memcpy(p, &h, sizeof(h));
  }
};

template <>
struct Lane<Half> {
  using acc_t = float;
  using V = vfloat;
  static constexpr int kLanes = FASTNAS_VECTOR_BYTES / 4;
  static inline V load(const Half* p) {
#if FASTNAS_VECTOR_BYTES == 64
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FASTNAS_F16C
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    V v;
    for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i].bits);
    return v;
#endif
  }
  static inline void store(Half* p, V v) {
#if FASTNAS_VECTOR_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif FASTNAS_F16C
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(v[i]);
#endif
  }
};

// The first n lanes, the others zero: ends of rows that a whole load would run over.
template <typename T>
inline typename Lane<T>::V load_first(const T* p, int64_t n) {
  T buffer[Lane<T>::kLanes] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return Lane<T>::load(buffer);
}

template <typename T>
inline void store_first(T* p, typename Lane<T>::V v, int64_t n) {
  T buffer[Lane<T>::kLanes];
  Lane<T>::store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

template <typename T>
inline typename Lane<T>::V broadcast(typename Lane<T>::acc_t a) {
  return a - typename Lane<T>::V{};
}
