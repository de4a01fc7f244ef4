// A convolution on prepared planes: which sub-tiles, row blocks and chunks are run in which order.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <type_traits>

#include "../otk.h"
#include "isa.h"
#include "scratch.h"

namespace otk {

// The source is a flat run of `positions` floats per channel: rows of `src_row` floats, of which
// the first `valid` are pixels. Position p lies in row (p - skip) / src_row; positions before
// `skip` are not pixels.
struct Run {
  const SparseWeight* w;
  const float* x;             // channel 0, position 0
  int64_t x_channel;          // floats between channels
  const uint32_t* tap_bytes;  // kernel > 1: byte offset by code
  int64_t positions;
  int skip, src_row, valid;
  float* out;  // plane of output row 0
  int64_t out_channel;
  const float* residual;  // planes like out, or null
  int64_t residual_channel;
  int dst_row;  // floats between rows of out; 0: whole vectors are stored at the same positions
  bool relu;
};

int64_t vectors_of(const Run& run, const Isa& isa);

// Floats of `local` scratch that run_range takes.
int64_t run_scratch(const SparseWeight& w, const Isa& isa);

// Vectors [v0, v1) of row blocks [b0, b1).
void run_range(const Run& run, int64_t v0, int64_t v1, int b0, int b1, const Isa& isa,
               Arena& local);

// All of it, split over row blocks and vectors.
void run_parallel(const Run& run, const Isa& isa, const Parallel& par);

// Calls body(begin, end) over [0, n) through `par`. No exception crosses the callback: running out
// of memory in a unit of work is reported once all of them have stopped.
template <class Body>
void parallel_for(const Parallel& par, int64_t n, Body&& body) {
  if (n <= 0) return;
  if (par.threads <= 1 || n == 1) {
    body(int64_t{0}, n);
    return;
  }
  struct Context {
    std::remove_reference_t<Body>* body;
    std::atomic<bool> failed;
  } context{&body, {false}};
  par.run(n, &context, [](void* p, int64_t begin, int64_t end) {
    auto* c = static_cast<Context*>(p);
    try {
      (*c->body)(begin, end);
    } catch (...) {
      c->failed = true;
    }
  });
  if (context.failed) throw std::bad_alloc();
}

}  // namespace otk
