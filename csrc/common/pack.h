// SPDX-License-Identifier: Apache-2.0
// Rows of tensors -> packed operands of gemm.h.
#pragma once

#include "gemm.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

// Carves scratch memory into 64-byte aligned arrays.
struct Arena {
  char* next;
  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next);
    next += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

// Rows of one head of one sequence (or of one image), addressed directly or through an index.
template <typename T>
struct RowView {
  const T* base;
  int64_t stride, first, rows;
  const int32_t* index;
  // Row t of the sequence; null when the index says "no token".
  const T* operator()(int64_t t) const {
    const int64_t row = index == nullptr ? first + t : index[first + t];
    return row < 0 || row >= rows ? nullptr : base + row * stride;
  }
};

// Rows as compute values [n, width], zero beyond dim.
template <typename T>
void pack_rows(const RowView<T>& rows, int64_t begin, int64_t n, int64_t dim, int64_t width, Compute<T>* out) {
  for (int64_t i = 0; i < n; ++i) {
    Compute<T>* to = out + i * width;
    const T* from = rows(begin + i);
    if (from != nullptr) {
      widen(from, to, dim);
    } else {
      for (int64_t d = 0; d < dim; ++d) to[d] = 0;
    }
    for (int64_t d = dim; d < width; ++d) to[d] = 0;
  }
}

// Rows as transposed column panels (see gemm.h). `staging` holds n rows of compute values for 16-bit types.
template <typename T>
void pack_transposed(const RowView<T>& rows, int64_t n, int64_t dim, Compute<T>* staging, Compute<T>* out) {
  using C = Compute<T>;
  if constexpr (sizeof(T) == sizeof(C)) {
    pack_columns<C>([&](int64_t i) { return reinterpret_cast<const C*>(rows(i)); }, n, dim, out);
  } else {
    pack_rows(rows, 0, n, dim, dim, staging);
    pack_columns<C>([&](int64_t i) { return staging + i * dim; }, n, dim, out);
  }
}

// bfloat16 operands stay bfloat16, as pairs, where the CPU has dot products of pairs; everything else computes in
// float32 (float64).
template <typename T>
constexpr bool kUsesPairs = false;
template <>
inline constexpr bool kUsesPairs<BFloat16> = kHasBFloat16Dot;

// Storage unit of the packed operands.
template <typename T, bool Pairs = kUsesPairs<T>>
struct Packed {
  using type = Compute<T>;
};
template <typename T>
struct Packed<T, true> {
  using type = uint32_t;
};

// What a unit holds: pairs of T, or one compute value.
template <typename T, bool Pairs = kUsesPairs<T>>
struct PackedValue {
  using type = Compute<T>;
};
template <typename T>
struct PackedValue<T, true> {
  using type = T;
};

// Rows -> rows of units, for queries ([n, dim_units]) and as source of the key panels.
template <typename T>
void pack_units(const RowView<T>& rows, int64_t begin, int64_t n, int64_t dim, int64_t units,
                typename Packed<T>::type* out) {
  if constexpr (kUsesPairs<T>) {
    for (int64_t i = 0; i < n; ++i) {
      BFloat16* to = reinterpret_cast<BFloat16*>(out + i * units);
      const BFloat16* from = rows(begin + i);
      if (from == nullptr) {
        __builtin_memset(to, 0, units * 4);
        continue;
      }
      __builtin_memcpy(to, from, dim * 2);
      if (dim & 1) to[dim].bits = 0;
    }
  } else {
    pack_rows(rows, begin, n, dim, units, out);
  }
}

// Calls f.template operator()<T>(); float64 lives in the generic object only.
template <typename F>
bool visit(Dtype dtype, F&& f) {
  switch (dtype) {
    case kFloat32: f.template operator()<float>(); return true;
    case kFloat16: f.template operator()<Half>(); return true;
    case kBFloat16: f.template operator()<BFloat16>(); return true;
#if defined(TOKENPRUNE_ISA_IS_GENERIC)
    case kFloat64: f.template operator()<double>(); return true;
#endif
    default: return false;
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
