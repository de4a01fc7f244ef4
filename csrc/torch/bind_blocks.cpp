// The torch side of residual blocks: one at a time, and a whole stage.
#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <vector>

#include "arguments.h"
#include "parallel.h"

using namespace otk_torch;

namespace {

// The packed convolutions of one block, checked against its input of `in` channels
// and h x w pixels.
otk::Bottleneck read_block(const char* op, const std::array<otk::SparseWeight, 4>& packs,
                           bool has_down, int64_t in, int64_t h, int64_t w, int64_t cout,
                           int64_t pool, int64_t down_pool, int64_t stride) {
  otk::Bottleneck block{};
  block.c1 = packs[0];
  block.c2 = packs[1];
  block.c3 = packs[2];
  block.down = packs[3];
  block.has_down = has_down;
  const auto pointwise = [](const otk::SparseWeight& c, int64_t step) {
    return c.kernel == 1 && c.stride == step && c.padding == 0;
  };
  STD_TORCH_CHECK(stride == 1 || (stride == 2 && has_down && pool == 1), op, ": stride ", stride,
                  " must be 1, or 2 with a shortcut convolution and no pool");
  STD_TORCH_CHECK(pointwise(block.c1, 1) && pointwise(block.c3, 1) && block.c2.kernel == 3 &&
                      block.c2.stride == stride && block.c2.padding == 1 &&
                      block.c2.dilation == 1 && (!has_down || pointwise(block.down, stride)),
                  op, ": needs 1x1, 3x3 (stride ", stride,
                  ", padding 1), 1x1 and a 1x1 shortcut of the same stride");
  STD_TORCH_CHECK(block.c1.cin == in && block.c2.cin == block.c1.cout &&
                      block.c3.cin == block.c2.cout && block.c3.cout == cout &&
                      (has_down ? block.down.cin == in && block.down.cout == cout : in == cout),
                  op, ": channel counts of x and the convolutions do not chain");
  STD_TORCH_CHECK(pool >= 1 && down_pool >= 1 && (has_down ? pool == down_pool : pool == 1), op,
                  ": pool ", pool, " and down_pool ", down_pool, " give different output sizes");
  STD_TORCH_CHECK(h >= pool && w >= pool, op, ": the image ", h, "x", w, " is too small for a ",
                  pool, "x", pool, " window");
  block.pool = static_cast<int>(pool);
  block.down_pool = static_cast<int>(down_pool);
  return block;
}

// Whether every convolution of a block reaches the channels it reads. Intermediates are no larger
// than a plane of the input.
bool block_reaches(const otk::Bottleneck& block, const otk::Planes& in) {
  return reachable(in, block.c1) && reachable(in, block.c2) && reachable(in, block.c3) &&
         (!block.has_down || reachable(in, block.down));
}

Tensor run_block(const char* op, const otk::Bottleneck& block, const Tensor& x) {
  otk::Planes in = planes(op, "x", x);
  otk::Planes dense = in;
  dense.plane_stride = otk::plane_stride(int64_t{in.h} * in.w);
  STD_TORCH_CHECK(block_reaches(block, dense), op, ": an image of ", in.h, "x", in.w,
                  " is too large; split it into tiles");
  std::optional<Tensor> copy;
  if (!whole_vectors(in) || !block_reaches(block, in)) {
    copy = repacked(op, x);
    in = planes(op, "x", *copy);
  }
  Tensor out = new_planes(op, x, in.n, block.c3.cout, block.size(in.h), block.size(in.w));
  const otk::Planes made = planes(op, "out", out);
  run_kernel(op, [&] { otk::sparse_bottleneck(block, in, made, torch_threads()); });
  return out;
}

Tensor sparse_bottleneck(const Tensor& x, const Tensor& s1, const Tensor& v1, const Tensor& b1,
                         const Tensor& s2, const Tensor& v2, const Tensor& b2, const Tensor& s3,
                         const Tensor& v3, const Tensor& b3, const std::optional<Tensor>& sd,
                         const std::optional<Tensor>& vd, const std::optional<Tensor>& bd,
                         int64_t cout, int64_t pool, int64_t down_pool, int64_t stride) {
  const char* op = "sparse_bottleneck";
  check_isa();
  STD_TORCH_CHECK(sd.has_value() == vd.has_value(), op,
                  ": the shortcut needs both its structure and its values");
  const std::array<otk::SparseWeight, 4> weights{
      read_weight(op, s1, v1, b1), read_weight(op, s2, v2, b2), read_weight(op, s3, v3, b3),
      sd ? read_weight(op, *sd, *vd, bd) : otk::SparseWeight{}};
  const otk::Planes in = planes(op, "x", x);
  const otk::Bottleneck block =
      read_block(op, weights, sd.has_value(), in.c, in.h, in.w, cout, pool, down_pool, stride);
  return run_block(op, block, x);
}

Tensor sparse_stage(const Tensor& x, std::vector<Tensor> weights, std::vector<int64_t> cout,
                    std::vector<int64_t> pool, std::vector<int64_t> down,
                    std::vector<int64_t> stride, bool in_turn) {
  const char* op = "sparse_stage";
  check_isa();
  const size_t count = cout.size();
  if (stride.empty()) stride.assign(count, 1);
  STD_TORCH_CHECK(
      count > 0 && pool.size() == count && down.size() == count && stride.size() == count, op,
      ": cout, pool, down and stride must have one element per block");
  size_t expected = 0;
  for (const int64_t has_down : down) expected += has_down ? 12 : 9;
  STD_TORCH_CHECK(weights.size() == expected, op, ": these blocks have ", expected,
                  " tensors (structure, values, bias of each convolution), got ", weights.size());
  otk::Planes in = planes(op, "x", x);
  std::vector<otk::Bottleneck> blocks;
  size_t at = 0;
  int64_t c = in.c, h = in.h, w = in.w;
  for (size_t b = 0; b < count; ++b) {
    std::array<otk::SparseWeight, 4> packs{};
    for (size_t i = 0; i < (down[b] ? 4 : 3); ++i, at += 3)
      packs[i] = read_weight(op, weights[at], weights[at + 1], weights[at + 2]);
    blocks.push_back(read_block(op, packs, down[b] != 0, c, h, w, cout[b], pool[b],
                                down[b] ? pool[b] : 1, stride[b]));
    c = cout[b];
    h = blocks.back().size(h);
    w = blocks.back().size(w);
  }
  bool fits = !in_turn;
  for (const otk::Bottleneck& block : blocks) fits = fits && block_reaches(block, in);
  if (fits) {
    std::optional<Tensor> copy;
    if (!whole_vectors(in)) {
      copy = repacked(op, x);
      in = planes(op, "x", *copy);
    }
    Tensor out = new_planes(op, x, in.n, c, h, w);
    const otk::Planes made = planes(op, "out", out);
    const int n_blocks = static_cast<int>(count);
    const otk::Parallel par = torch_threads();
    if (otk::stage_pays(blocks.data(), n_blocks, in, made, par)) {
      run_kernel(op, [&] { otk::sparse_stage(blocks.data(), n_blocks, in, made, par); });
      return out;
    }
  }
  Tensor y = x;
  for (const otk::Bottleneck& block : blocks) y = run_block(op, block, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CPU, m) {
  m.impl("sparse_bottleneck", TORCH_BOX(&sparse_bottleneck));
  m.impl("sparse_stage", TORCH_BOX(&sparse_stage));
}
