// SPDX-License-Identifier: Apache-2.0
// Memory whose vectors never lie across two cache lines.
#pragma once
#include <cstddef>
#include <new>
#include <vector>

namespace fastnas {

template <typename T>
struct CacheLines {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  CacheLines() = default;
  template <typename U>
  CacheLines(const CacheLines<U>&) {}

  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const CacheLines&) const { return true; }
  bool operator!=(const CacheLines&) const { return false; }
};

template <typename T>
using AlignedVector = std::vector<T, CacheLines<T>>;

}  // namespace fastnas
