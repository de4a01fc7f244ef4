// A k x k convolution cut into tiles whose input is staged so that every tap reads whole, aligned
// vectors. A vector holds `pieces` pieces of `piece` pixels of one output row each; vector t of a
// tile of T vectors holds output rows t, T + t, ... of the tile. For each kx the input columns a
// tile reads are copied once, shifted by kx, as one run of vectors: tap (ky, kx) then starts ky
// vectors into run kx, and all T of its vectors follow. Strides split a run into `phases` runs, one
// per ky % stride. With a dilation d read kx d and ky d for kx and ky.
#pragma once

#include <cstdint>

#include "../../otk.h"
#include "isa.h"

namespace otk {

struct Window {
  // Output rows [row0, row1) of a convolution of a h x w image, for tiles of `isa`.
  Window(const SparseWeight& weight, int h, int w, int row0, int row1, const Isa& isa);

  struct Tile {
    int row, rows;  // output rows [row, row + rows)
    int col, cols;
    int vectors;
  };
  Tile tile(int64_t i) const;
  int64_t tiles() const { return int64_t{strips} * row_tiles; }
  // Staged floats per channel.
  int64_t channel_floats() const { return int64_t{kernel} * phases * (pitch + reach) * lanes; }
  // Where the codes of `chunk` staged channels lie; `table` has room for all of them.
  CodeMap code_map(int chunk, uint32_t* table) const;
  // Stages `channels` channels, of which the first begins at `x`, for `count` tiles.
  void stage(const Isa& isa, const Tile* tiles, int count, const float* x, int64_t x_channel,
             int channels, float* const* dst) const;

  int cin, kernel, stride, padding, dilation, lanes;
  int w, out_w;
  int row0, row1;
  int reach;   // vectors of a run beyond the tile's own: the last tap's distance over the stride
  int phases;  // of ky that some tap has
  int piece, pieces, strips, row_tiles;
  int pitch;  // vectors of the tallest tile

  // The source, set by its owner: plane + (y - y0) * row_stride + x * col_stride is pixel (y, x)
  // for y in [y0, y1); other rows are zero. Only [readable, readable_end) may be touched.
  int y0, y1;
  int64_t row_stride, col_stride;
  const float *readable, *readable_end;
  int64_t out_row;  // floats between output rows
};

}  // namespace otk
