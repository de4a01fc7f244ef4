// Checksums of memory, block by block: whether something was written to since they were made.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "../../otk.h"
#include "parallel.h"

namespace otk {
namespace {

constexpr int kWords = kBlockBytes / 8;
constexpr int64_t kPiece = 256;  // blocks of one unit of work

// SplitMix64 of the position, made odd; opentrans_kernels/ops/contents.py has the same keys.
constexpr std::array<uint64_t, kWords> make_keys() {
  std::array<uint64_t, kWords> keys{};
  for (uint64_t i = 0; i < kWords; ++i) {
    uint64_t z = (i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    keys[i] = (z ^ (z >> 31)) | 1;
  }
  return keys;
}
alignas(64) constexpr std::array<uint64_t, kWords> kKeys = make_keys();

uint64_t term(const unsigned char* at, int i) {
  uint64_t word;
  std::memcpy(&word, at + 8 * i, 8);
  // The highest bit alone would be 2^63 times any key, so that two flipped signs would cancel. By
  // 32 the signs of both floats of a word would meet.
  return (word ^ (word >> 29)) * kKeys[i];
}

int64_t block_sum(const Memory& memory, int64_t block) {
  const unsigned char* at = static_cast<const unsigned char*>(memory.data) + block * kBlockBytes;
  const int64_t bytes = std::min(kBlockBytes, memory.bytes - block * kBlockBytes);
  const int words = static_cast<int>(bytes / 8);
  uint64_t sum[4] = {};
  int i = 0;
  for (; i + 4 <= words; i += 4)
    for (int j = 0; j < 4; ++j) sum[j] += term(at, i + j);
  for (; i < words; ++i) sum[0] += term(at, i);
  if (const int64_t rest = bytes % 8) {
    uint64_t word = 0;
    std::memcpy(&word, at + 8 * words, rest);
    sum[0] += (word ^ (word >> 29)) * kKeys[words];
  }
  return static_cast<int64_t>(sum[0] + sum[1] + sum[2] + sum[3]);
}

int64_t blocks_of(const Memory& memory) { return (memory.bytes + kBlockBytes - 1) / kBlockBytes; }

// One run of neighbours: the processor fetches ahead, and their checksums lie together.
struct Part {
  int64_t first, last;
};
Part part_of(const Memory& memory, int64_t turn, int64_t turns) {
  const int64_t blocks = blocks_of(memory);
  if (blocks == 0) return {0, 0};
  if (blocks < turns) return {turn % blocks, turn % blocks + 1};
  return {turn * blocks / turns, (turn + 1) * blocks / turns};
}

}  // namespace

void block_sums(const Memory& memory, int64_t* sums, const Parallel& par) {
  const int64_t blocks = blocks_of(memory);
  parallel_for(par, (blocks + kPiece - 1) / kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin * kPiece; b < std::min(end * kPiece, blocks); ++b)
      sums[b] = block_sum(memory, b);
  });
}

bool blocks_differ(const Memory& memory, const int64_t* sums, int64_t turn, int64_t turns,
                   const Parallel& par) {
  const Part part = part_of(memory, turn, turns);
  std::atomic<bool> differ{false};
  const int64_t pieces = (part.last - part.first + kPiece - 1) / kPiece;
  parallel_for(par, pieces, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(part.first + end * kPiece, part.last);
    for (int64_t b = part.first + begin * kPiece; b < stop && !differ; ++b)
      if (block_sum(memory, b) != sums[b]) differ = true;
  });
  return differ;
}

void prefetch_blocks(const Memory& memory, const int64_t* sums, int64_t turn, int64_t turns) {
  const Part part = part_of(memory, turn, turns);
  if (part.first == part.last) return;
  const char* at = static_cast<const char*>(memory.data) + part.first * kBlockBytes;
  const int64_t bytes = std::min(kBlockBytes, memory.bytes - part.first * kBlockBytes);
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte);
  __builtin_prefetch(sums + part.first);
}

}  // namespace otk
