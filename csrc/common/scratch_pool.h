// Memory that the calls of a thread have worked in, kept for its next calls: the system takes back what is freed in
// large pieces, and handing out fresh pages again takes longer than many a kernel.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

namespace walt {

class ScratchPool {
 public:
  struct Block {
    void* data;
    size_t bytes;
  };

  static Block take(size_t bytes) {
    if (bytes >= kSmallest) {
      ScratchPool& pool = mine();
      size_t best = pool.kept_.size();
      for (size_t i = 0; i < pool.kept_.size(); ++i) {
        const size_t size = pool.kept_[i].bytes;
        if (size >= bytes && size / 2 <= bytes && (best == pool.kept_.size() || size < pool.kept_[best].bytes))
          best = i;
      }
      if (best < pool.kept_.size()) return pool.remove(best);
    }
    bytes = (bytes + 63) / 64 * 64;
    void* data = std::aligned_alloc(64, bytes);
    if (data == nullptr) throw std::bad_alloc();
    return {data, bytes};
  }

  static void give(Block block) {
    if (block.bytes < kSmallest || block.bytes > kMost) return std::free(block.data);
    ScratchPool& pool = mine();
    while (pool.kept_.size() == kBlocks || pool.bytes_ + block.bytes > kMost) std::free(pool.remove(0).data);  // oldest
    pool.kept_.push_back(block);
    pool.bytes_ += block.bytes;
  }

  // Frees what the calling thread keeps; malloc may keep it still.
  static void clear() {
    ScratchPool& pool = mine();
    while (!pool.kept_.empty()) std::free(pool.remove(0).data);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)  // which sees the end of a block only where it is as long as was asked for
  static constexpr size_t kMost = 0, kSmallest = 0;
#else
  static constexpr size_t kMost = size_t{256} << 20, kSmallest = 64 << 10;  // bytes; of a block
#endif
  static constexpr size_t kBlocks = 32;

  ScratchPool() { kept_.reserve(kBlocks); }
  ~ScratchPool() {
    for (const Block& block : kept_) std::free(block.data);
  }
  static ScratchPool& mine() {
    static thread_local ScratchPool pool;
    return pool;
  }
  Block remove(size_t i) {
    const Block block = kept_[i];
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(i));
    bytes_ -= block.bytes;
    return block;
  }

  std::vector<Block> kept_;  // the oldest first
  size_t bytes_ = 0;
};

}  // namespace walt
