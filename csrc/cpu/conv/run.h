// A convolution on prepared planes: which tiles, row blocks and chunks are run in which order.
#pragma once

#include <cstdint>

#include "../../otk.h"
#include "../support/parallel.h"
#include "../support/scratch.h"
#include "isa.h"
#include "window.h"

namespace otk {

// With a window, tiles of it; without, a 1x1 that reads whole vectors of the planes where they are
// and writes them at the same positions.
struct Run {
  const SparseWeight* w;
  const float* x;     // channel 0, position 0; with a window its pixel (y0, 0)
  int64_t x_channel;  // floats between channels
  const Window* window;
  int64_t positions;  // floats per channel, without a window
  bool exact;         // touch no more than `positions` floats of a residual or output plane
  bool gathered;      // x is a tile already, no copy of it could be read faster
  int first_row;      // whose plane `out` is, 0 unless only later ones are run
  float* out;         // plane of that output row, at the first position or the window's row0
  int64_t out_channel;
  const float* residual;  // planes like out, or null
  int64_t residual_channel;
  Activation act;
};

// What a run is cut into: vectors, or tiles of the window.
int64_t units_of(const Run& run, const Isa& isa);

// Floats of `local` scratch that run_range takes.
int64_t run_scratch(const Run& run, const Isa& isa);

// Units [u0, u1) of row blocks [b0, b1).
void run_range(const Run& run, int64_t u0, int64_t u1, int b0, int b1, const Isa& isa,
               Arena& local);

// Chunk c of all row blocks of a 1x1 over one sub-tile, whose input channels of that chunk begin at
// `x`; takes chunk_floats of `local`. Sums wait in `partial` ([row blocks][row_block][vectors *
// lanes]) from the first chunk to the last, which writes the planes. The rows must have been
// checked.
void run_chunk(const Run& run, int c, int vectors, const float* x, const Isa& isa, float* partial,
               Arena& local);
int64_t chunk_floats(const SparseWeight& w);

// All of it, split over row blocks and units.
void run_parallel(const Run& run, const Isa& isa, const Parallel& par);

// First word of block (b, c): its first entry and first nonzero, then those of the next block.
inline const int32_t* block_of(const SparseWeight& w, int b, int c) {
  return w.blocks + 2 * (int64_t{b} * w.n_chunks + c);
}

// What the entries of block (b, c) add up to. Throws PackError unless their rows lie in the block
// and they count its nonzeros.
EntrySums check_entries(const SparseWeight& w, int b, int c, const Isa& isa);

// Throws PackError unless the entries of row block b can be run: also where each row begins with
// its own sum and is written as often as it should be. Without partial sums no entry may ask for
// them.
void check_rows(const SparseWeight& w, int b, const Isa& isa);

// Byte offsets of the nonzeros of block (b, c), see Isa::decode. Throws PackError for a code
// outside the chunk's channels.
void decode_block(const SparseWeight& w, int b, int c, const Isa& isa, const CodeMap& map,
                  uint32_t* offsets);

}  // namespace otk
