// Tensors as the kernels take them: checks, views and new outputs.
#pragma once

#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../otk.h"

namespace otk_torch {

using torch::stable::Tensor;

// Raises if the forced instruction set is not to be had.
void check_isa();

// A packed weight; raises unless its three tensors are what SparseWeight made.
otk::SparseWeight read_weight(const char* op, const Tensor& structure, const Tensor& values,
                              const std::optional<Tensor>& bias);

// A float32 CPU tensor [N, C, H, W] with any strides.
otk::Planes planes(const char* op, const char* name, const Tensor& t);

// An uninitialised [n, c, h, w] in the kernels' layout.
Tensor new_planes(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w);

// Dense rows inside each plane, and whole vectors readable at the end of every plane.
bool dense_planes(const otk::Planes& p);
bool whole_vectors(const otk::Planes& p);

// A copy in the kernels' layout.
Tensor repacked(const Tensor& t);

// A nonzero's offset is 32 bits wide: the channels of a chunk must lie within 4 GB.
bool reachable(const otk::Planes& p, const otk::SparseWeight& w);

}  // namespace otk_torch
