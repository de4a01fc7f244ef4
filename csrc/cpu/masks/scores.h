// Scores of classes from masks that are enlarged a tile at a time: what an instruction-set file
// provides. A panel holds kPanelVectors vectors of pixels of one row for every query.
#pragma once

#include <cstdint>

namespace otk {

constexpr int kPanelVectors = 2;

// Columns of a resized row, in whole vectors: column x is weight0[x] * from[i] + weight1[x] *
// from[i + 1] with i = first[x / lanes] + offset[x].
struct Columns {
  const int32_t *first, *offset;
  const float *weight0, *weight1;
  bool narrow;  // all offsets are less than the lanes
  bool same;    // as many columns as before
};

struct ResizeArgs {
  const Columns* columns;
  const float* from;   // of source column 0; readable a vector past the last one
  int64_t begin, end;  // vectors
  float* to;           // of vector `begin`
};

// A row between two rows.
struct Between {
  const float *top, *bottom;
  float weight0, weight1;
};

struct FinishArgs {
  Between rows;
  int64_t panels;
  float* to;       // of the query in the first panel
  int64_t stride;  // to the next panel
  bool blend;      // else `top` alone
};

struct ProductArgs {
  // Classes in blocks of `rows` and, the last ones, one less: [block][query][row].
  const float* classes;
  int64_t blocks, whole;  // of which `whole` have `rows`
  int64_t rows;
  int64_t queries;
  const float* panel;  // [query][pixel]
  float* out;          // of the first row
  int64_t out_stride;
  int64_t pixels;  // that `out` has; fewer than the panel at the end of a row
};

struct ScoresIsa {
  int lanes, rows;  // rows: the most of a block
  void (*resize)(const ResizeArgs&);
  void (*blend)(const Between&, int64_t vectors, float* to);
  void (*finish)(const FinishArgs&);  // sigmoid, into panels
  void (*product)(const ProductArgs&);
};

}  // namespace otk
