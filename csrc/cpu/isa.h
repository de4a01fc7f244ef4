// What an instruction-set file provides: a few loops, chosen once at run time through a table.
#pragma once

#include <cstdint>

#include "../otk.h"

namespace otk {

// A piece of one image row inside a sub-tile: `len` floats at `src` (offset in the sub-tile) go to
// `dst` (offset from the start of the output plane).
struct Segment {
  int32_t src, len;
  int64_t dst;
};

// One sub-tile (`vectors` vectors of pixels) of one (row block, chunk).
struct TileArgs {
  const float* x;  // first channel of the chunk, first pixel of the sub-tile
  const uint32_t* entries;
  int32_t n_entries;
  const uint32_t* offsets;  // bytes from x, one per nonzero
  const float* values;
  const float* bias;      // of the row block, or null
  float* partial;         // [row][vectors * lanes] sums between chunks
  float* out;             // output plane of the block's first row
  int64_t out_stride;     // floats between output planes
  const float* residual;  // as out, or null
  int64_t residual_stride;
  const Segment* segments;  // null: store whole vectors at out
  int32_t n_segments;
  bool relu;
  int32_t vectors;
};

// Gradient of the nonzeros of one (row block, chunk) over one sub-tile.
struct GradArgs {
  const float* x;
  const uint32_t* entries;
  int32_t n_entries;
  const uint32_t* offsets;
  const float* grad_out;  // plane of the block's first row, first pixel of the sub-tile
  int64_t grad_stride;
  float* grad_values;  // of the block's first nonzero
  int32_t vectors;
};

struct Isa {
  const char* name;
  int lanes;        // floats per vector
  int max_vectors;  // largest sub-tile
  void (*tile)(const TileArgs&);
  void (*grad)(const GradArgs&);
  // offsets[i] = tap_bytes[codes[i]], or codes[i] * channel_bytes if tap_bytes is null.
  void (*decode)(const uint16_t* codes, int64_t n, const uint32_t* tap_bytes,
                 uint32_t channel_bytes, uint32_t* offsets);
  // Copies `floats` floats (whole vectors) of each channel.
  void (*gather)(const float* src, int64_t src_stride, int channels, int64_t floats, float* dst,
                 int64_t dst_stride);
  void (*pool2)(const float* row0, const float* row1, float* out, int64_t n);
};

#if defined(__x86_64__)
extern const Isa isa_avx2, isa_avx512;
#elif defined(__aarch64__)
extern const Isa isa_neon;
#endif
extern const Isa isa_generic;

// The chosen table; never null once cpu_capability() has returned a name.
const Isa* active_isa();

}  // namespace otk
