// How the backward pass on a GPU cuts tokens into runs, one per block, and where the sums over a run go. Index
// arithmetic alone.
//
// All B * N tokens stand in one line, sample after sample, so a modulation row belongs to an interval of them: row q of
// a tensor with one row per L tokens to [q * L, (q + 1) * L). A run sums over the pieces of rows that lie in it. A row
// that lies in one run is done there. Of the rows that a run shares with others, at most one began before it (its sums
// are the run's head) and at most one begins in it and goes on (the tail); so two partial rows per run are enough,
// whatever the number of rows. A second pass adds the tail of the run in which the row begins and the heads of the runs
// that follow, in this order.
#pragma once

#include <cstdint>

#if !defined(__CUDACC__) && !defined(__host__)
#define __host__
#define __device__
#endif

namespace walt::cuda::adaln_lora {

// `tokens` cut into `count` nearly equal runs; count is at most tokens, and at least 1.
struct Runs {
  int64_t tokens, count;

  __host__ __device__ int64_t begin(int64_t run) const {
    const int64_t longer = tokens % count;
    return tokens / count * run + (run < longer ? run : longer);
  }
  __host__ __device__ int64_t of(int64_t token) const {
    const int64_t length = tokens / count, longer = tokens % count;
    const int64_t boundary = longer * (length + 1);
    return token < boundary ? token / (length + 1) : longer + (token - boundary) / length;
  }
};

enum class Piece { full, head, tail };

// What the run [begin, end) holds of the row that belongs to [first, last).
__host__ __device__ inline Piece piece_of(int64_t first, int64_t last, int64_t begin, int64_t end) {
  if (first < begin) return Piece::head;
  return last <= end ? Piece::full : Piece::tail;
}

// Partial rows of one tensor: head and tail of every run.
__host__ __device__ inline int64_t partial_row(int64_t run, Piece piece) { return 2 * run + (piece == Piece::tail); }

// The rows that the second pass looks at, all of them or the last one of every run, whichever are fewer: every row that
// runs share is among them, once.
struct SharedRows {
  Runs runs;
  int64_t rows, tokens_per_row;

  __host__ __device__ int64_t candidates() const { return rows < runs.count ? rows : runs.count; }

  // The row of a candidate, and the runs from the one in which it begins to the one in which it ends. False where
  // nothing is left to do.
  __host__ __device__ bool find(int64_t candidate, int64_t& row, int64_t& first_run, int64_t& last_run) const {
    row = rows < runs.count ? candidate : (runs.begin(candidate + 1) - 1) / tokens_per_row;
    first_run = runs.of(row * tokens_per_row);
    last_run = runs.of((row + 1) * tokens_per_row - 1);
    return first_run < last_run && (rows < runs.count || first_run == candidate);
  }
};

}  // namespace walt::cuda::adaln_lora
