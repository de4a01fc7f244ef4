// The functions of benchmarks/gpu/prototype/sm90.h for a host: one block, a fiber per thread, run
// in a random order. Asynchronous work is done as late, as early or as randomly as its waits allow,
// so that a missing wait, fence or barrier shows as a wrong result or as an error:
//  - copies land when they are waited for, or before; until then their target holds NaN;
//  - tensor cores refuse bytes that were written without fence.proxy.async behind them;
//  - a multiplication reads its operands at any time up to its wait, and the sums are NaN till
//  then;
//  - blocked threads that nothing can wake are an error.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define OTK_DEVICE inline
#define OTK_UNROLL

struct uint4 {
  uint32_t x, y, z, w;
};

namespace otk::sm90 {

enum class When { late, early, random };

inline float bf16_value(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint16_t bf16_bits(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (value != value) return uint16_t(word >> 16 | 0x40);
  return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// One multiplication of a warp: a quarter of the warpgroup's rows.
struct Product {
  int n = 0;
  uint64_t left[32], right[32];
  uint32_t indices[32];
};

struct Warp {
  std::deque<Product> open;   // not yet issued by every lane
  std::deque<Product> ready;  // issued by all
  std::deque<int> groups;     // products of each committed group that are not done
  int uncommitted = 0;
  bool fenced = false;
  int arrived = 0, round = 0;   // of the collective under way
  std::vector<float> sums[32];  // while products are under way
  float* place[32] = {};
  uint32_t address[32], words[32][4];
  int shared_value = 0;
};

struct Barrier {
  int count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
};

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes, barrier;
};

class Block {
 public:
  Block(int threads, int shared_bytes, int index, int count, unsigned seed, When when)
      : index(index),
        count(count),
        when(when),
        random(seed),
        memory(shared_bytes, 0xff),
        unfenced(shared_bytes, 0),
        fibers(threads),
        warps((threads + 31) / 32),
        copies(threads),
        written(threads) {}

  void run(const std::function<void()>& body) {
    current_block() = this;
    for (auto& fiber : fibers) {
      fiber.stack.resize(256 << 10);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::start), 0);
    }
    this->body = &body;
    std::vector<int> ready;
    while (true) {
      ready.clear();
      bool all_done = true;
      for (int i = 0; i < int(fibers.size()); ++i) {
        all_done &= fibers[i].done;
        if (!fibers[i].done && (!fibers[i].blocked || fibers[i].blocked())) ready.push_back(i);
      }
      // Bulk copies land between any two steps; at the latest when nobody else can go on.
      if (!bulk.empty() && (ready.empty() || (when != When::late && coin()))) {
        const size_t which = when == When::random ? random() % bulk.size() : 0;
        const Copy copy = bulk[which];
        bulk.erase(bulk.begin() + which);
        land(copy);
        continue;
      }
      if (all_done) break;
      if (ready.empty()) fail("every thread waits: " + std::string(waiting()));
      thread = ready[random() % ready.size()];
      fibers[thread].blocked = nullptr;
      swapcontext(&scheduler, &fibers[thread].context);
      if (error) std::rethrow_exception(error);
    }
    for (auto& warp : warps)
      if (!warp.ready.empty() || !warp.open.empty()) fail("a multiplication was never waited for");
    for (auto& list : copies)
      if (!list.empty()) fail("a copy was never waited for");
  }

  // Blocks the running thread until `go` is true.
  void wait(const char* why, std::function<bool()> go) {
    fibers[thread].why = why;
    if (go()) {
      if (random() % 4) return;
      go = [] { return true; };  // go on later, so that threads change places
    }
    fibers[thread].blocked = std::move(go);
    const int self = thread;
    swapcontext(&fibers[self].context, &scheduler);
  }

  [[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }
  bool coin() { return random() % 2; }
  Warp& warp() { return warps[thread / 32]; }
  int lane() const { return thread % 32; }

  void check(uint32_t at, uint32_t bytes, uint32_t aligned) {
    if (at % aligned || at + uint64_t(bytes) > memory.size()) {
      fail("bad shared address " + std::to_string(at));
    }
  }

  // All lanes of the warp meet; the last one runs `last`.
  void collective(const char* why, const std::function<void()>& last) {
    Warp& w = warp();
    const int round = w.round;
    if (++w.arrived == 32) {
      w.arrived = 0;
      last();
      ++w.round;
    } else {
      wait(why, [&w, round] { return w.round != round; });
    }
  }

  void write(uint32_t to, const void* from, uint32_t bytes, bool by_async) {
    if (from)
      std::memcpy(memory.data() + to, from, bytes);
    else
      std::memset(memory.data() + to, 0, bytes);
    std::memset(unfenced.data() + to, !by_async, bytes);
    if (!by_async) written[thread].push_back({to, bytes});
  }

  void land(const Copy& copy) {
    write(copy.to, copy.from, copy.bytes, true);
    Barrier& b = barriers.at(copy.barrier);
    b.bytes -= copy.bytes;
    advance(b);
  }

  static void advance(Barrier& b) {
    if (b.pending == 0 && b.bytes == 0) b.pending = b.count, ++b.phase;
  }

  Barrier& barrier(uint32_t at) {
    auto found = barriers.find(at);
    if (found == barriers.end()) fail("no barrier was initialised at " + std::to_string(at));
    return found->second;
  }

  uint16_t operand(uint32_t at) {
    check(at, 2, 2);
    if (unfenced[at]) fail("tensor cores read bytes that no fence.proxy.async follows");
    uint16_t bits;
    std::memcpy(&bits, memory.data() + at, 2);
    return bits;
  }

  // PTX ISA: "wgmma.mma_async.sp"; the fields of a descriptor, no swizzle.
  uint32_t place_of(uint64_t matrix, int row, int k) {
    const uint32_t start = uint32_t(matrix & 0x3fff) << 4;
    const uint32_t along = uint32_t(matrix >> 16 & 0x3fff) << 4;
    const uint32_t down = uint32_t(matrix >> 32 & 0x3fff) << 4;
    if (matrix >> 62) fail("this emulation knows no swizzle");
    return start + row / 8 * down + k / 8 * along + row % 8 * 16 + k % 8 * 2;
  }

  // The oldest product of a warp.
  void multiply_one(int number) {
    Warp& w = warps[number];
    const Product product = w.ready.front();
    w.ready.pop_front();
    for (int lane = 1; lane < 32; ++lane)
      if (product.left[lane] != product.left[0] || product.right[lane] != product.right[0])
        fail("operands of one multiplication differ between lanes");
    std::vector<float> right(32 * product.n);
    for (int k = 0; k < 32; ++k)
      for (int n = 0; n < product.n; ++n)
        right[k * product.n + n] = bf16_value(operand(place_of(product.right[0], n, k)));
    for (int r = 0; r < 16; ++r) {
      std::vector<double> line(product.n, 0.0);
      for (int kept = 0; kept < 16; ++kept) {
        const int group = kept / 2;
        // PTX ISA, sparsity selector 0: the first two lanes of four hold the indices.
        const uint32_t word = product.indices[4 * (r % 8) + group / 4];
        const uint32_t pair = word >> (16 * (r / 8) + 4 * (group % 4)) & 15;
        if ((pair & 3) >= pair >> 2) fail("indices of a 2:4 group must rise");
        const int k = 4 * group + int(kept % 2 ? pair >> 2 : pair & 3);
        const float left =
            bf16_value(operand(place_of(product.left[0], 16 * (number % 4) + r, kept)));
        for (int n = 0; n < product.n; ++n) line[n] += double(left) * right[k * product.n + n];
      }
      for (int n = 0; n < product.n; ++n) {
        const int lane = 4 * (r % 8) + n % 8 / 2;
        float& sum = w.sums[lane][4 * (n / 8) + 2 * (r / 8) + n % 2];
        sum = float(sum + line[n]);
      }
    }
  }

  // Finishes products until at most `left` groups are under way.
  void finish(int number, size_t left) {
    Warp& w = warps[number];
    while (w.groups.size() > left) {
      for (; w.groups.front() > 0; --w.groups.front()) multiply_one(number);
      w.groups.pop_front();
    }
    if (!w.groups.empty() || w.uncommitted) return;
    for (int lane = 0; lane < 32; ++lane)
      if (w.place[lane]) {
        std::memcpy(w.place[lane], w.sums[lane].data(), 4 * w.sums[lane].size());
        w.place[lane] = nullptr;
      }
  }

  static Block*& current_block() {
    static Block* block = nullptr;
    return block;
  }

  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    std::function<bool()> blocked;
    const char* why = "";
    bool done = false;
  };

  int index, count, thread = 0;
  When when;
  std::mt19937 random;
  std::vector<uint8_t> memory, unfenced;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::vector<Copy>> copies;  // cp.async, by thread
  std::vector<std::vector<std::pair<uint32_t, uint32_t>>> written;
  std::deque<Copy> bulk;
  std::map<uint32_t, Barrier> barriers;
  int block_arrived = 0, block_round = 0;

 private:
  static void start() {
    Block& block = *current_block();
    const int self = block.thread;
    try {
      (*block.body)();
    } catch (...) {
      block.error = std::current_exception();
    }
    block.fibers[self].done = true;
  }
  const char* waiting() const {
    for (const auto& fiber : fibers)
      if (!fiber.done) return fiber.why;
    return "";
  }
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
  std::exception_ptr error;
};

inline Block& block() { return *Block::current_block(); }

inline int thread_index() { return block().thread; }
inline int block_index() { return block().index; }
inline int block_count() { return block().count; }
inline uint32_t shared_base() { return 0; }

inline int uniform(int value) {
  Block& b = block();
  Warp& w = b.warp();
  if (b.lane() == 0) w.shared_value = value;
  b.collective("uniform", [] {});
  const int result = w.shared_value;
  b.collective("uniform", [] {});  // before lane 0 writes the next one
  return result;
}

inline void sync_block() {
  Block& b = block();
  const int round = b.block_round;
  if (++b.block_arrived == int(b.fibers.size())) {
    b.block_arrived = 0;
    ++b.block_round;
  } else {
    b.wait("sync_block", [&b, round] { return b.block_round != round; });
  }
}
inline void sync_warp() {
  block().collective("sync_warp", [] {});
}

inline void barrier_init(uint32_t at, uint32_t count) {
  Block& b = block();
  b.check(at, 8, 8);
  b.barriers[at] = {int(count), int(count), 0, 0};
}
inline void barrier_fence_init() {}
inline void barrier_arrive_expect(uint32_t at, uint32_t bytes) {
  Block& b = block();
  Barrier& barrier = b.barrier(at);
  if (barrier.pending == 0) b.fail("more threads arrive at a barrier than it counts");
  barrier.bytes += bytes;
  --barrier.pending;
  Block::advance(barrier);
}
inline void barrier_arrive(uint32_t at) { barrier_arrive_expect(at, 0); }
inline void barrier_wait(uint32_t at, uint32_t parity) {
  Block& b = block();
  Barrier* barrier = &b.barrier(at);
  b.wait("barrier_wait", [barrier, parity] { return (barrier->phase & 1) != int(parity); });
}

inline void copy16(uint32_t to, const void* from, bool inside) {
  Block& b = block();
  b.check(to, 16, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16) b.fail("a copy's source is not aligned");
  std::memset(b.memory.data() + to, 0xff, 16);
  std::memset(b.unfenced.data() + to, 1, 16);
  const Copy copy{to, inside ? from : nullptr, 16, 0};
  if (b.when == When::early || (b.when == When::random && b.coin()))
    b.write(copy.to, copy.from, 16, false);
  else
    b.copies[b.thread].push_back(copy);
}
inline void copies_wait() {
  Block& b = block();
  for (const Copy& copy : b.copies[b.thread]) b.write(copy.to, copy.from, 16, false);
  b.copies[b.thread].clear();
}
inline void fence_async() {
  Block& b = block();
  if (!b.copies[b.thread].empty()) b.fail("fence.proxy.async before the copies were waited for");
  for (auto [at, bytes] : b.written[b.thread]) std::memset(b.unfenced.data() + at, 0, bytes);
  b.written[b.thread].clear();
}
inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  Block& b = block();
  b.check(to, bytes, 16);
  if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) b.fail("a bulk copy is not aligned");
  std::memset(b.memory.data() + to, 0xff, bytes);
  b.barrier(barrier);
  b.bulk.push_back({to, from, bytes, barrier});
}

inline uint32_t load32(uint32_t at) {
  Block& b = block();
  b.check(at, 4, 4);
  uint32_t value;
  std::memcpy(&value, b.memory.data() + at, 4);
  return value;
}
inline uint4 load128(uint32_t at) {
  Block& b = block();
  b.check(at, 16, 16);
  uint4 value;
  std::memcpy(&value, b.memory.data() + at, 16);
  return value;
}
inline void store128(void* to, uint4 value) {
  if (reinterpret_cast<uintptr_t>(to) % 16) block().fail("a store is not aligned");
  std::memcpy(to, &value, 16);
}
inline void store_transposed(uint32_t at, const uint32_t (&v)[4]) {
  Block& b = block();
  Warp& w = b.warp();
  b.check(at, 16, 16);
  w.address[b.lane()] = at;
  std::memcpy(w.words[b.lane()], v, 16);
  b.collective("stmatrix", [&b, &w] {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < 32; ++lane)
        for (int c = 0; c < 2; ++c) {
          const uint16_t bits = uint16_t(w.words[lane][matrix] >> (16 * c));
          const uint32_t row = w.address[8 * matrix + 2 * (lane % 4) + c];
          std::memcpy(b.memory.data() + row + 2 * (lane / 4), &bits, 2);
        }
  });
}
inline uint32_t pack_bf16(float low, float high) {
  return bf16_bits(low) | uint32_t(bf16_bits(high)) << 16;
}

inline uint64_t matrix(uint32_t at, uint32_t along, uint32_t down) {
  if ((at | along | down) % 16 || at >> 18 || along >> 18 || down >> 18)
    block().fail("a matrix descriptor cannot say this");
  return uint64_t((at >> 4) & 0x3fff) | uint64_t((along >> 4) & 0x3fff) << 16 |
         uint64_t((down >> 4) & 0x3fff) << 32;
}

inline void multiply_fence() {
  Block& b = block();
  b.collective("wgmma.fence", [&b] { b.warp().fenced = true; });
}

template <int N>
inline void multiply(float (&s)[N / 2], uint64_t left, uint64_t right, uint32_t indices) {
  Block& b = block();
  Warp& w = b.warp();
  const int lane = b.lane();
  if (!w.fenced) b.fail("wgmma.fence must come before the first multiplication");
  if (!w.place[lane]) {
    w.place[lane] = s;
    w.sums[lane].assign(s, s + N / 2);
    for (float& value : s) value = std::numeric_limits<float>::quiet_NaN();
  }
  b.collective("wgmma", [] {});
  if (lane == 0) {
    w.open.emplace_back();
    w.open.back().n = N;
  }
  b.collective("wgmma", [] {});
  Product& product = w.open.back();
  product.left[lane] = left;
  product.right[lane] = right;
  product.indices[lane] = indices;
  b.collective("wgmma", [&w] {
    w.ready.push_back(w.open.front());
    w.open.pop_front();
    ++w.uncommitted;
  });
}

inline void multiply_commit() {
  Block& b = block();
  Warp& w = b.warp();
  const int number = b.thread / 32;
  b.collective("wgmma.commit", [&b, &w, number] {
    w.groups.push_back(w.uncommitted);
    w.uncommitted = 0;
    w.fenced = false;
    if (b.when == When::early || (b.when == When::random && b.coin()))
      for (int& left : w.groups)
        for (; left > 0; --left) b.multiply_one(number);
  });
}

template <int Left>
inline void multiply_wait() {
  Block& b = block();
  const int number = b.thread / 32;
  b.collective("wgmma.wait", [&b, number] { b.finish(number, Left); });
}

template <int Count>
inline void registers_down() {}
template <int Count>
inline void registers_up() {}

}  // namespace otk::sm90
