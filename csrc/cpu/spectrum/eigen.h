// Eigenvalues of symmetric matrices in two stages: full -> band -> tridiagonal -> eigenvalues.
//
// Matrices are cut into tiles of 32 x 32 doubles, 8 KB each and contiguous, so that nearly all work
// is products of tiles that lie in the first two cache levels. The loops that depend on the
// instruction set are a table, chosen at run time like those of isa.h.
#pragma once

#include <cstdint>
#include <vector>

#include "../support/pages.h"

namespace otk {

constexpr int kTile = 32;  // side of a tile, bandwidth after the first stage, length of a reflector
constexpr int64_t kTileSize = int64_t{kTile} * kTile;
// Doubles between neighbouring columns of the band: an odd number of cache lines.
constexpr int64_t kBandStep = 72;

struct EigenIsa {
  // c (=, +=, -=) sum over t < count of op(a[t]) * b[t], op = transpose if `transposed`.
  enum Mode { kSet, kAdd, kSubtract };
  void (*product)(double* c, const double* const* a, const double* const* b, int count, Mode mode,
                  bool transposed);
  // The same where the result is symmetric; its lower half is computed and mirrored.
  void (*symmetric)(double* c, const double* const* a, const double* const* b, int count, Mode mode,
                    bool transposed);
  // One column of a panel [rows][32], rows > 0: row -= row[column] * w, then row[column] *= scale,
  // and z += row[column + 1] * row over rows >= 1. column -1 only sums.
  void (*panel)(double* rows, int64_t count, int column, const double* w, double scale, double* z);
  // I - tau v v^T maps x [32] to (beta, 0, ...); v[0] = 1. Returns tau, 0 where nothing is to do.
  double (*reflector)(const double* x, double* v, double* beta);
  // Applies H = I - tau v v^T to the diagonal block `d` and, from the right, to the block `d + 32`
  // below it, annihilates the first column of that block and applies its reflector from the left.
  // Columns are kBandStep apart. v, tau: the reflector, replaced by the next one. `last`: there is
  // no block below.
  void (*chase)(double* d, double* v, double* tau, bool last);
  // rows [length][32] -= tau v (v^T rows).
  void (*apply)(double* rows, int length, const double* v, double tau);
  // out[k][r] = a[r * row + k * column], or 0 outside rows x columns (both at most 32).
  void (*pack32)(const float* a, int64_t row, int64_t column, int rows, int columns, double* out);
  void (*pack64)(const double* a, int64_t row, int64_t column, int rows, int columns, double* out);
};
const EigenIsa& eigen_isa();

// Doubles on 64-byte boundaries; 2 MB pages from 1 MB. Not initialised.
class Doubles {
 public:
  explicit Doubles(int64_t count);
  ~Doubles();
  Doubles(const Doubles&) = delete;
  Doubles& operator=(const Doubles&) = delete;
  double* data() const { return data_; }

 private:
  double* data_ = nullptr;
  size_t bytes_ = 0;
};

// A strided matrix of float or double.
struct MatrixView {
  const void* data;
  bool is_double;
  int64_t rows, columns, row_stride, column_stride;
};

// Lower triangle of a symmetric matrix in tiles, rows of tiles one after the other; diagonal tiles
// are stored in full, and what lies behind row n is zero.
struct TileTriangle {
  explicit TileTriangle(int64_t size)
      : n(size), side((size + kTile - 1) / kTile), store(side * (side + 1) / 2 * kTileSize) {}
  double* tile(int64_t row, int64_t column) const {
    return store.data() + (row * (row + 1) / 2 + column) * kTileSize;
  }
  int64_t n, side;
  Doubles store;
};

// Rows of `a` from its column `column` on, in tiles [k][r] one after the other, zero outside it.
void pack_column(const MatrixView& a, int64_t column, double* tiles);

// a a^T of a matrix.
void gram_tiles(const MatrixView& a, const TileTriangle& out);

// Lower band of half-width 32, element (i, j) at data[i + j * kBandStep], room for bulges, and zero
// columns behind the last.
struct SymmetricBand {
  explicit SymmetricBand(int64_t size);
  int64_t doubles() const { return (n + 2 * kTile) * kBandStep + 4 * kTile; }
  double* at(int64_t i, int64_t j) const { return store.data() + kTile + i + j * kBandStep; }
  int64_t n;
  Doubles store;
};

// First stage, in place: `a` becomes Q1^T a Q1. Afterwards tile (i, j), i > j, holds rows of the
// reflectors of block column j, and factors[j] their 32 x 32 factor: Q1 = product of I - V T V^T.
void reduce_to_band(const TileTriangle& a, SymmetricBand& band, Doubles& factors);
// vectors [side * 32][32], 32 columns at once, become Q1 vectors.
void apply_first_stage(const TileTriangle& reduced, const Doubles& factors, double* vectors);

// Second stage, in place. d [n], e [n - 1]. If `kept` is given it receives every reflector: v, tau.
struct Reflectors {
  struct One {
    double v[kTile];
    double tau;
    int64_t row;
  };
  std::vector<One> list;
};
void chase_band(SymmetricBand& band, double* d, double* e, Reflectors* kept);
// vectors [rows][32] become Q2 vectors.
void apply_second_stage(const Reflectors& kept, int64_t rows, double* vectors);

// Eigenvalues of the tridiagonal (d, e), ascending, in d; e is destroyed. False if it does not
// converge.
bool tridiagonal_values(double* d, double* e, int64_t n);
// Orthonormal vectors of the subspace of its `count` smallest eigenvalues, `values`: groups of 32
// columns [rows][32], rows the next multiple of 32.
void tridiagonal_vectors(const double* d, const double* e, int64_t n, const double* values,
                         int count, double* vectors);

}  // namespace otk
