// A launch of a compiled kernel of which all is known but the addresses of its tensors, handed to the driver.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "common/checks.h"
#include "launches/driver.h"

namespace walt::launches {

// The address of one of the call's tensors, some bytes further on.
struct Pointer {
  int base;
  int64_t offset;

  uint64_t in(const std::vector<uint64_t>& addresses) const { return addresses[base] + offset; }
};

// A tensor map: what TMA knows of a tensor and of the box that it reads from it, in the driver's numbers and with the
// innermost dimension first.
struct Box {
  static constexpr int kMaxRank = 5;
  static constexpr size_t kBytes = 128;

  Pointer pointer;
  int dtype, swizzle, fill;
  std::vector<uint64_t> sizes, strides;  // strides in bytes, of all dimensions but the innermost
  std::vector<uint32_t> box;

  Result encode(const Driver& driver, uint64_t address, void* map) const {
    constexpr uint32_t element_strides[kMaxRank] = {1, 1, 1, 1, 1};
    constexpr int no_interleave = 0, l2_promotion_of_128_bytes = 2;
    return driver.cuTensorMapEncodeTiled(map, dtype, static_cast<uint32_t>(box.size()),
                                         reinterpret_cast<void*>(address), sizes.data(), strides.data(), box.data(),
                                         element_strides, no_interleave, swizzle, l2_promotion_of_128_bytes, fill);
  }
};

class Launch {
 public:
  static constexpr size_t kMaxParameters = 256, kMaxBoxes = 4;
  static constexpr int kMaxBases = 1 << 16;

  Launch(Function function, std::array<unsigned, 3> grid, unsigned threads, unsigned shared_bytes)
      : function_(function), grid_(grid), threads_(threads), shared_bytes_(shared_bytes) {}

  // Parameters, in the kernel's order. Of a constant, `bits` are the memory, its first byte lowest.
  void constant(size_t bytes, uint64_t bits) { add({Kind::constant, bytes, bits, {}}); }
  void pointer(const Pointer& pointer) { add({Kind::pointer, sizeof(uint64_t), 0, pointer}); }
  void box(const Box& box) {
    const size_t rank = box.box.size();
    require(boxes_.size() < kMaxBoxes, "a launch has at most 4 boxes");
    require(rank >= 1 && rank <= Box::kMaxRank && box.sizes.size() == rank && box.strides.size() + 1 == rank,
            "a box has 1 to 5 dimensions, a size for each, and a stride for each but the innermost");
    add({Kind::box, Box::kBytes, 0, box.pointer});
    boxes_.push_back(box);
  }

  // Whether these are the parameters that the kernel was compiled with, as far as their number and sizes tell.
  bool fits(const Driver& driver) const {
    size_t offset = 0, bytes = 0;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      if (driver.cuFuncGetParamInfo(function_, i, &offset, &bytes) != 0 || bytes != parameters_[i].bytes) return false;
    }
    return driver.cuFuncGetParamInfo(function_, parameters_.size(), &offset, &bytes) != 0;
  }

  int bases() const {
    int count = 0;
    for (const Parameter& parameter : parameters_) {
      if (parameter.kind != Kind::constant) count = std::max(count, parameter.pointer.base + 1);
    }
    return count;
  }

  Result run(const Driver& driver, const std::vector<uint64_t>& addresses, Stream stream) const {
    alignas(128) unsigned char maps[kMaxBoxes][Box::kBytes];
    uint64_t values[kMaxParameters];
    void* places[kMaxParameters];
    size_t box = 0;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const Parameter& parameter = parameters_[i];
      places[i] = &values[i];
      if (parameter.kind == Kind::constant) {
        values[i] = parameter.bits;
      } else if (parameter.kind == Kind::pointer) {
        values[i] = parameter.pointer.in(addresses);
      } else {
        places[i] = maps[box];
        const Result result = boxes_[box].encode(driver, parameter.pointer.in(addresses), maps[box]);
        if (result != 0) return result;
        ++box;
      }
    }
    return driver.cuLaunchKernel(function_, grid_[0], grid_[1], grid_[2], threads_, 1, 1, shared_bytes_, stream, places,
                                 nullptr);
  }

 private:
  enum class Kind { constant, pointer, box };
  struct Parameter {
    Kind kind;
    size_t bytes;
    uint64_t bits;
    Pointer pointer;
  };

  void add(const Parameter& parameter) {
    require(parameters_.size() < kMaxParameters, "a launch has at most 256 parameters");
    require(parameter.kind == Kind::box || parameter.bytes <= sizeof(uint64_t), "a constant has at most 8 bytes");
    require(parameter.pointer.base >= 0 && parameter.pointer.base < kMaxBases, "base must be from 0 to 65535");
    parameters_.push_back(parameter);
  }

  Function function_;
  std::array<unsigned, 3> grid_;
  unsigned threads_, shared_bytes_;
  std::vector<Parameter> parameters_;
  std::vector<Box> boxes_;
};

}  // namespace walt::launches
