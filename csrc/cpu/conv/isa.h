// What an instruction-set file provides: a few loops, chosen once at run time through a table.
#pragma once

#include <cstdint>

#include "../../otk.h"

namespace otk {

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
  // 0: vectors follow each other in out, `exact` floats of them (0: all, `out` has room for whole
  // ones). Else a tile of a window: floats between output rows, and what of the vectors is valid.
  int64_t out_row;
  int32_t piece, rows, cols;
  int32_t exact;
  Activation act;
  int32_t vectors;
};

// Copies the input of one tile of a window; see window.h.
struct StageArgs {
  const float* x;  // pixel (y0, 0) of the first channel
  int64_t x_channel;
  int32_t channels;
  int64_t row_stride, col_stride;
  const float *readable, *readable_end;
  int32_t y0, y1, w;
  int32_t iy, ix;  // input pixel of the tile's first tap
  int32_t kernel, stride, dilation, phases;
  int32_t vectors;  // per run
  int32_t pitch;    // vectors between runs
  int32_t piece;
  int32_t piece_rows;  // input rows between pieces
  bool far;            // the image is larger than L2
  float* dst;
};
constexpr int kMaxStaged = 4;  // tiles that are copied together

// One plane of a depthwise convolution.
struct DepthwiseArgs {
  const float* x;
  int64_t row_stride;
  int32_t h, w;
  const float* weight;  // [kernel][kernel]
  float bias;
  int32_t kernel, stride, padding;
  int32_t phases;  // of a column modulo the stride that some tap has
  float* out;
  int32_t out_h, out_w;
  Activation act;
  int64_t band;    // output rows whose input is copied together
  int64_t pitch;   // floats of a copied row's phase: those of the taps, and whole vectors
  float* scratch;  // [input rows of a band][phases][pitch]
  // Kernels of 3, 5 and 7 with kernel / 2 pixels of padding, else null: for each kx, [mask_pitch]
  // bit masks of the columns whose pixel lies inside, begun again from 0 at the end of a row.
  const float* masks;
  int64_t mask_pitch;
  float* row;  // w floats, where there is a stride
};

// Gradient of the nonzeros of one (row block, chunk) over one sub-tile.
struct GradArgs {
  const float* x;
  const uint32_t* entries;
  int32_t n_entries;
  const uint32_t* offsets;
  const float* grad_out;  // tile of the block's first row
  int64_t grad_stride;    // floats between rows' tiles
  float* grad_values;     // of the block's first nonzero
  int32_t vectors;
};

// Winograd's F(2x2, 3x3), see winograd.cpp: a vector's first output pixel.
struct WinogradVector {
  int32_t y, x;
};
constexpr int kWinogradVectors = 3;  // of a panel

// Transforms the inputs of a panel: to[(p * pitch) + (channel * kWinogradVectors + vector) *
// lanes].
struct WinogradInputArgs {
  const float* x;  // channel 0, pixel (0, 0)
  int64_t x_channel, row_stride, col_stride;
  int32_t h, w, padding, channels;
  const WinogradVector* vectors;
  int32_t count;
  float* to;
  int64_t pitch;  // floats between the 16 matrices
};

// A block of rows of one of the 16 products.
struct WinogradProductArgs {
  const float* weight;  // [channel][kWinogradRows]
  const float* x;       // [channel][kWinogradVectors * lanes]
  int32_t channels, vectors;
  float* sums;  // [kWinogradRows][kWinogradVectors * lanes]
  bool add;     // to what is there
};

// From sums[p * pitch + (row * kWinogradVectors + vector) * lanes] to the pixels of `rows` planes.
struct WinogradOutputArgs {
  const float* sums;
  int64_t pitch;
  int32_t rows;
  const float* bias;  // of the first row, or null
  float* out;         // plane of the first row, rows dense
  int64_t out_stride;
  const float* residual;  // as out, or null
  int64_t residual_stride;
  int32_t h, w;
  const WinogradVector* vectors;
  int32_t count;
  Activation act;
};

// What the entries of one block add up to.
struct EntrySums {
  uint32_t nonzeros, largest_row;
  uint32_t begun, finished;  // rows
};

// How codes become byte offsets. A code of a 1x1 is its channel, of a window its tap, counted
// through the channels.
struct CodeMap {
  uint32_t channel_bytes;  // of a 1x1
  const uint32_t* table;   // by code; null: computed
  // (code * column + q * row + q / kernel * channel) mod 2^16, shifted, with q = code / kernel; a
  // quotient is a product's upper half.
  uint16_t reciprocal;  // 0: a 1x1
  uint16_t column, row, channel;
  int32_t shift;
};

struct Isa {
  int lanes;        // floats per vector
  int max_vectors;  // largest sub-tile
  void (*tile)(const TileArgs&);
  void (*grad)(const GradArgs&);
  // False if a code is `limit`, the size of the map's table, or more.
  bool (*decode)(const uint16_t* codes, int64_t n, uint32_t limit, const CodeMap& map,
                 uint32_t* offsets);
  // n: at most 65535, so that no sum overflows.
  EntrySums (*sum_entries)(const uint32_t* entries, int64_t n);
  // Copies neighbouring sub-tiles of each channel: sub-tile i has vectors[i] vectors and goes to
  // dst + i * dst_tile.
  void (*gather)(const float* src, int64_t src_stride, int channels, const int* vectors, int tiles,
                 float* dst, int64_t dst_stride, int64_t dst_tile);
  // Tiles of one window; up to kMaxStaged that differ in place alone.
  void (*stage)(const StageArgs* tiles, int count);
  void (*depthwise)(const DepthwiseArgs&);
  void (*winograd_input)(const WinogradInputArgs&);
  void (*winograd_product)(const WinogradProductArgs&);
  void (*winograd_output)(const WinogradOutputArgs&);
  void (*pool2)(const float* row0, const float* row1, float* out, int64_t n);
  // [tokens][channels] -> [channels][tokens], planes filled up with zeros to whole vectors; back,
  // plus a residual or null; activations of rows of `len` floats, in place.
  void (*to_planes)(const float* src, int64_t src_stride, int64_t tokens, int64_t channels,
                    float* dst, int64_t dst_stride);
  void (*to_tokens)(const float* src, int64_t src_stride, int64_t tokens, int64_t channels,
                    float* dst, int64_t dst_stride, const float* residual, int64_t residual_stride);
  void (*activate)(float* p, int64_t rows, int64_t stride, int64_t len, const Activation& act);
  // dst[i] = the largest, or the sum, of rows[0][i] ... rows[count - 1][i]. Of equal numbers the
  // first is taken, of NaNs the last.
  void (*max_rows)(const float* const* rows, int count, float* dst, int64_t n);
  void (*sum_rows)(const float* const* rows, int count, float* dst, int64_t n);
  // even[i] = src[2 i] and odd[i] = src[2 i + 1], of n numbers; odd may be null.
  void (*split)(const float* src, int64_t n, float* even, float* odd);
};

#if defined(__x86_64__)
extern const Isa isa_avx2, isa_avx512;
#elif defined(__aarch64__)
extern const Isa isa_neon;
#endif
extern const Isa isa_generic;

// The table of capability().
const Isa& active_isa();

}  // namespace otk
