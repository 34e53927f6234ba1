// What the low-rank kernels share. Few samples meet many weights here, so the floor is reading (or writing) each weight
// once.
#pragma once

#include "adaln_lora/rows.h"

namespace walt::WALT_ISA::adaln_lora {

// From this rank on, a row of `up` is long enough for vectors along the rank; below, vectors run along K.
constexpr int64_t kWideRank = 16;
// Columns of K that one block of the narrow path transposes at a time.
constexpr int64_t kNarrowColumns = 256;

template <int kRank, bool kScatter, class T, class A>
inline void transpose_columns(T* up, A* columns, int64_t count, int64_t rank) {
  const int64_t r = kRank > 0 ? kRank : rank;
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t j = 0; j < r; ++j) {
      if constexpr (kScatter) {
        up[k * r + j] = from_float<T>(columns[j * kNarrowColumns + k]);
      } else {
        columns[j * kNarrowColumns + k] = to_float(up[k * r + j]);
      }
    }
  }
}

// `up`, [count, rank], to or from `columns`, [rank, kNarrowColumns]. The common ranks are known to the compiler.
template <bool kScatter, class T, class A>
inline void transpose_up(T* up, A* columns, int64_t count, int64_t rank) {
  switch (rank) {
    case 1: return transpose_columns<1, kScatter>(up, columns, count, rank);
    case 2: return transpose_columns<2, kScatter>(up, columns, count, rank);
    case 4: return transpose_columns<4, kScatter>(up, columns, count, rank);
    case 8: return transpose_columns<8, kScatter>(up, columns, count, rank);
    default: return transpose_columns<0, kScatter>(up, columns, count, rank);
  }
}

// A matrix of few rows widened to the accumulation type.
template <class T, class A>
inline void widen(const T* source, A* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = to_float(source[i]);
}

}  // namespace walt::WALT_ISA::adaln_lora
