// Tensors as the kernels take them: checks, views and new outputs.
#pragma once

#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <new>
#include <optional>

#include "../otk.h"

namespace otk_torch {

using torch::stable::Tensor;

// Raises if the forced instruction set is not to be had.
void check_isa();

// Raises.
void refuse(const char* op, const char* why);

// Calls kernel(); what it throws becomes an error of `op`.
template <class Kernel>
void run_kernel(const char* op, Kernel&& kernel) {
  try {
    kernel();
  } catch (const otk::PackError&) {
    refuse(op,
           "the structure is damaged: an entry or a code points out of its block; pack the weight "
           "again");
  } catch (const std::bad_alloc&) {
    refuse(op, "out of memory; pass a smaller batch or image");
  }
}

// A packed weight; raises unless its tensors have the sizes that its header says. Entries and codes
// are for the kernels to check.
otk::SparseWeight read_weight(const char* op, const Tensor& structure, const Tensor& values,
                              const std::optional<Tensor>& bias);

// What an op is to apply: `relu` is the short way of one of the kinds. Raises.
otk::Activation activation_of(const char* op, bool relu, int64_t kind, double slope);

// A float32 CPU tensor [N, C, H, W] with any strides.
otk::Planes planes(const char* op, const char* name, const Tensor& t);

// An uninitialised [n, c, h, w] in the kernels' layout.
Tensor new_planes(const char* op, const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w);

// Dense rows inside each plane, and whole vectors readable at the end of every plane.
bool dense_planes(const otk::Planes& p);
bool whole_vectors(const otk::Planes& p);

// A copy in the kernels' layout.
Tensor repacked(const char* op, const Tensor& t);

// A nonzero's offset is 32 bits wide: the channels of a chunk must lie within 4 GB.
bool reachable(const otk::Planes& p, const otk::SparseWeight& w);

// The planes of `x`, or of a copy where it is a view whose planes are too far apart. Raises if the
// image itself is too large.
otk::Planes reachable_planes(const char* op, const Tensor& x, const otk::SparseWeight& w,
                             std::optional<Tensor>& copy);

}  // namespace otk_torch
