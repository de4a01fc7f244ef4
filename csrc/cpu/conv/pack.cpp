// The header and the list of blocks of a structure tensor. What the blocks point to, the kernels
// look at where they decode it (run.h): it is in cache then, and each thread sees to its own part.
#include <algorithm>

#include "../../otk.h"

namespace otk {
namespace {

// The order of opentrans_kernels/pack/layout.py.
enum Header {
  kMagic,
  kVersion,
  kCin,
  kCout,
  kKernel,
  kStride,  // and the dilation less one, in the upper half
  kPadding,
  kChunk,
  kRowBlock,
  kChunks,
  kRowBlocks,
  kNnz,
  kEntries,
  kHeaderSize
};  // clang-format off
constexpr int32_t kMagicValue = 0x4b544f50;
constexpr int32_t kVersionValue = 1;
constexpr int32_t kMaxKernel = 127;  // its square is the most codes of a chunk that an entry counts
// clang-format on

bool within(int32_t value, int32_t least, int32_t most) { return value >= least && value <= most; }

bool possible(const SparseWeight& w, int64_t entries) {
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  return w.cin >= 1 && w.cout >= 1 && within(w.kernel, 1, kMaxKernel) &&
         within(w.stride, 1, kMaxStep) && within(w.padding, 0, kMaxStep) &&
         within(w.dilation, 1, w.kernel > 1 ? kMaxStep : 1) &&
         within(w.chunk, 1, std::min<int>(w.cin, kEntryCountMask / (w.kernel * w.kernel))) &&
         within(w.row_block, 1, std::min<int>(w.cout, kEntryRowMask)) &&
         w.n_chunks == parts(w.cin, w.chunk) && w.n_row_blocks == parts(w.cout, w.row_block) &&
         w.nnz >= 0 && entries >= w.cout;
}

// Whether the blocks follow each other and cover all entries and nonzeros. Their sizes are bounded,
// so that sums over a block do not overflow and its offsets fit their scratch.
bool ordered(const SparseWeight& w, int64_t entries) {
  const int32_t* const end = w.blocks + 2 * int64_t{w.n_chunks} * w.n_row_blocks;
  const int64_t codes = int64_t{w.chunk} * w.kernel * w.kernel;
  if (w.blocks[0] != 0 || w.blocks[1] != 0 || end[0] != entries || end[1] != w.nnz) return false;
  for (const int32_t* p = w.blocks; p != end; p += 2) {
    const int64_t rows = int64_t{p[2]} - p[0], nonzeros = int64_t{p[3]} - p[1];
    if (rows < 0 || rows > w.row_block || nonzeros < 0 || nonzeros > rows * codes) return false;
  }
  return true;
}

}  // namespace

const char* read_pack(const int32_t* structure, int64_t words, SparseWeight* out) {
  const int32_t* h = structure;
  if (words < kHeaderSize || h[kMagic] != kMagicValue || h[kVersion] != kVersionValue)
    return "was not made by this version of SparseWeight";
  SparseWeight w{};
  w.cin = h[kCin];
  w.cout = h[kCout];
  w.kernel = h[kKernel];
  w.stride = h[kStride] & 0xffff;
  w.dilation = (h[kStride] >> 16) + 1;
  w.padding = h[kPadding];
  w.chunk = h[kChunk];
  w.row_block = h[kRowBlock];
  w.n_chunks = h[kChunks];
  w.n_row_blocks = h[kRowBlocks];
  w.nnz = h[kNnz];
  const int64_t entries = h[kEntries];
  if (!possible(w, entries)) return "has a header that no SparseWeight can have";
  const int64_t blocks = 2 * (int64_t{w.n_chunks} * w.n_row_blocks + 1);
  if (words != kHeaderSize + blocks + entries + (w.nnz + 1) / 2)
    return "is not as long as its header says";
  w.blocks = h + kHeaderSize;
  w.entries = reinterpret_cast<const uint32_t*>(w.blocks + blocks);
  w.codes = reinterpret_cast<const uint16_t*>(w.entries + entries);
  if (!ordered(w, entries)) return "has blocks that do not cover its entries and nonzeros";
  *out = w;
  return nullptr;
}

}  // namespace otk
