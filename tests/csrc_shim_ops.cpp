// Everything beside convolutions as functions that tests call: see csrc_call.h.
#include "csrc_call.h"
using namespace otk;
using calls::guarded;
using calls::parallel;

namespace {

// [outer][inner] rows of `length` floats, `padding` behind each of them.
Rows rows(const float* data, int64_t outer, int64_t inner, int64_t length, int64_t padding) {
  const int64_t step = length + padding;
  return {const_cast<float*>(data), outer, inner, inner * step, step, length, padding};
}

int64_t spread(const float* grad, float* out, int64_t n, int64_t c, int64_t h, int64_t w, int64_t k,
               int64_t padding, int64_t threads) {
  return guarded([&] {
    avg_pool2d_backward(rows(grad, n, c, (h / k) * (w / k), 0), rows(out, n, c, h * w, padding),
                        static_cast<int>(w), static_cast<int>(k), parallel(threads));
  });
}

int64_t relu(float* z, const float* scale, const float* shift, int64_t channels,
             const float* residual, uint8_t* bits, int64_t outer, int64_t inner, int64_t length,
             int64_t padding, int64_t threads) {
  return guarded([&] {
    const Rows extra = rows(residual, outer, inner, length, 0);
    relu_bits(rows(z, outer, inner, length, padding), {scale, shift, channels},
              residual ? &extra : nullptr, bits, parallel(threads));
  });
}

int64_t relu_backward(const float* grad, const uint8_t* bits, const float* y, const float* scale,
                      int64_t channels, float* out, float* scaled, int64_t outer, int64_t inner,
                      int64_t length, int64_t padding, int64_t threads) {
  return guarded([&] {
    const Rows from = rows(y, outer, inner, length, 0);
    const Rows plain = rows(out, outer, inner, length, padding);
    const Rows factored = rows(scaled, outer, inner, length, padding);
    relu_bits_backward(rows(grad, outer, inner, length, 0), bits, y ? &from : nullptr,
                       {scale, nullptr, channels}, out ? &plain : nullptr,
                       scaled ? &factored : nullptr, parallel(threads));
  });
}

int64_t powerlaw(const double* x, const int64_t* offsets, const int64_t* first, const int64_t* last,
                 int64_t layers, int64_t samples, int64_t block, double* out, int64_t threads) {
  return guarded([&] {
    powerlaw_fit(x, offsets, first, last, layers, static_cast<int>(samples),
                 static_cast<int>(block), out, parallel(threads));
  });
}

// strides: from one matrix, row and column to the next.
int64_t eigenvalues(const void* data, int64_t is_double, int64_t count, int64_t rows,
                    int64_t columns, const int64_t* strides, double scale, double threshold,
                    double relative, double* values, int64_t* redone, int64_t threads) {
  return guarded([&] {
    gram_eigenvalues(
        {data, is_double != 0, count, rows, columns, strides[0], strides[1], strides[2]}, scale,
        threshold, relative, values, redone, parallel(threads));
  });
}

// Dense tensors; sizes: n, s, m, d, q, levels, points, reference_size.
DeformAttn attention(const int64_t* sizes, const int64_t* shapes, const float* value,
                     const float* locations, const float* weights, const float* reference) {
  DeformAttn a{};
  a.shapes = shapes;
  a.n = sizes[0], a.s = sizes[1], a.m = sizes[2], a.d = sizes[3];
  a.q = sizes[4], a.levels = sizes[5], a.points = sizes[6];
  a.value = value;
  a.value_m = a.d, a.value_s = a.m * a.d, a.value_n = a.s * a.value_s;
  const int64_t k = a.levels * a.points;
  a.locations = locations;
  a.locations_m = 2 * k, a.locations_q = a.m * a.locations_m, a.locations_n = a.q * a.locations_q;
  a.weights = weights;
  a.weights_m = k, a.weights_q = a.m * k, a.weights_n = a.q * a.weights_q;
  a.reference = reference, a.reference_size = sizes[7];
  a.reference_l = sizes[7], a.reference_q = a.levels * sizes[7];
  a.reference_n = a.q * a.reference_q;
  return a;
}

int64_t attend(const int64_t* sizes, const int64_t* shapes, const float* value,
               const float* locations, const float* weights, const float* reference, float* out,
               int64_t threads) {
  return guarded([&] {
    ms_deform_attn(attention(sizes, shapes, value, locations, weights, reference), out,
                   parallel(threads));
  });
}

int64_t attend_backward(const int64_t* sizes, const int64_t* shapes, const float* value,
                        const float* locations, const float* weights, const float* grad,
                        float* grad_value, float* grad_locations, float* grad_weights,
                        int64_t threads) {
  return guarded([&] {
    ms_deform_attn_backward(attention(sizes, shapes, value, locations, weights, nullptr), grad,
                            grad_value, grad_locations, grad_weights, parallel(threads));
  });
}

// sizes: n, q, k, h, w, first, second, size, crop, out (two each).
int64_t scores(const int64_t* sizes, const float* masks, const float* classes, float* out,
               int64_t threads) {
  return guarded([&] {
    MaskScores a{};
    a.n = sizes[0], a.q = sizes[1], a.k = sizes[2], a.h = sizes[3], a.w = sizes[4];
    a.masks = masks;
    a.masks_w = 1, a.masks_h = a.w, a.masks_q = a.h * a.w, a.masks_n = a.q * a.masks_q;
    a.classes = classes;
    a.classes_k = 1, a.classes_q = a.k, a.classes_n = a.q * a.k;
    a.first = sizes[5] != 0, a.second = sizes[6] != 0;
    for (int i = 0; i < 2; ++i)
      a.size[i] = sizes[7 + i], a.crop[i] = sizes[9 + i], a.out[i] = sizes[11 + i];
    mask_scores(a, out, parallel(threads));
  });
}

int64_t sums(const void* data, int64_t bytes, int64_t* out, int64_t threads) {
  return guarded([&] { block_sums({data, bytes}, out, parallel(threads)); });
}

int64_t differ(const void* data, int64_t bytes, const int64_t* expected, int64_t turn,
               int64_t turns, int64_t threads) {
  prefetch_blocks({data, bytes}, expected, turn, turns);
  return blocks_differ({data, bytes}, expected, turn, turns, parallel(threads));
}

OTK_CALLABLE(spread);
OTK_CALLABLE(relu);
OTK_CALLABLE(relu_backward);
OTK_CALLABLE(powerlaw);
OTK_CALLABLE(eigenvalues);
OTK_CALLABLE(attend);
OTK_CALLABLE(attend_backward);
OTK_CALLABLE(scores);
OTK_CALLABLE(sums);
OTK_CALLABLE(differ);

}  // namespace
