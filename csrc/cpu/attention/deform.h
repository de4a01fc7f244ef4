// Multi-scale deformable attention on maps of one head: what an instruction-set file provides.
//
// A map holds the pixels of all levels of one head one after the other, each `pixel` floats (the
// head's channels, filled up with zeros to whole vectors). Every level has a frame of zeros, and
// one more pixel of zeros closes the map: the four corners of a point beside a level are read like
// all others, and a point that is farther away reads four zeros.
#pragma once

#include <cstdint>

namespace otk {

// Points of a block of queries of one head, [queries][levels * points] each. The block is as many
// queries as a vector has lanes, so that no loop over its points has a rest.
struct PointBlock {
  int64_t count;  // of points
  // Of the point's level: size, floats from one row of the map to the next, first pixel of the map.
  const float *width, *height;
  const int32_t *pitch, *first;
  float* coordinates;  // in pixels, x and y interleaved
  float* weights;      // in: attention; out: 0 where the point is outside
  // Out.
  int32_t* corner;  // pixel of the map
  float *fx, *fy;   // position between the corners
  float* share[4];  // of the corners 00, 01, 10, 11: bilinear times weight
  int32_t* inside;  // all bits or none
};

// Pixel coordinates of a level's points are shift + scale * location.
struct Placement {
  float shift[2], scale[2];
};

// Locations and weights of one query and head, into a PointBlock.
struct PlaceArgs {
  const float *locations, *weights;
  const Placement* levels;
  int64_t level_count, points;  // points of a level
  float *coordinates, *to_weights;
};

struct SampleArgs {
  const float* map;
  int64_t pixel;  // floats, a multiple of the lanes
  int64_t queries, points;
  const int32_t *corner, *pitch;
  const float* share[4];
  float* out;  // of the first query
  int64_t out_stride;
  int64_t channels;  // that `out` has; fewer than `pixel` if it was filled up
};

// Backward: `grad` is read like `out` is written.
struct ScatterArgs {
  SampleArgs sample;
  const float* grad;
  float* grad_map;
  float* dot[4];  // of the corner's value and the gradient, per point; added to
};

struct FinishArgs {
  const PointBlock* points;
  const float* dot[4];
  float* grad_weights;
  float* grad_locations;  // x and y interleaved
};

struct DeformIsa {
  int lanes;
  void (*place)(const PlaceArgs&);
  void (*softmax)(float* rows, int64_t count, int64_t length);
  void (*locate)(const PointBlock&);
  void (*sample)(const SampleArgs&);
  void (*scatter)(const ScatterArgs&);
  void (*finish)(const FinishArgs&);
};

}  // namespace otk
