// One band of output rows of a residual bottleneck: the intermediates stay in scratch small enough
// for the caches, and only the block's output is written.
#pragma once

#include "../../otk.h"
#include "../support/scratch.h"
#include "isa.h"

namespace otk {

// Rows of conv1's output that the next band down reads too.
struct Carry {
  float* rows = nullptr;  // [c1.cout][2][x.w]; null: bands compute them again
  int first = -1;         // image row of the first one; -1: none kept
};

struct Band {
  const Bottleneck& block;
  Planes x, out;  // of one image
  const Isa& isa;

  // A band starts on a whole vector of every plane it stores to: rows in between.
  int align() const;
  // Output rows of a band: whole tiles of conv2 where scratch allows.
  int rows() const;
  // Floats of scratch that `rows` output rows take, and floats of a carry.
  int64_t floats(int rows) const;
  int64_t carry_floats() const;

  // Output rows [o0, o1). `par`: splits every convolution; null: on this thread alone.
  void run(int o0, int o1, Arena& arena, Carry* carry, const Parallel* par) const;

 private:
  // conv2's output; conv1's has the rows of its windows.
  int mid_rows(int out_rows) const { return out_rows * block.pool; }
  int mid_width() const { return block.c2.stride > 1 ? out.w : x.w; }
  int c1_rows(int out_rows) const { return (mid_rows(out_rows) - 1) * block.c2.stride + 3; }
  // Whether the shortcut's convolution reads a smaller image than x.
  bool shrinks() const { return block.has_down && (block.down_pool > 1 || block.down.stride > 1); }
  int64_t c1_channel(int out_rows) const;
  int64_t mid_channel(int out_rows) const;
  int64_t pooled_channel(int out_rows) const;
};

}  // namespace otk
