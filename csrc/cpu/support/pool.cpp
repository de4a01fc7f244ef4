// Memory of large outputs: kept for the next call instead of being returned to the system, and on
// huge pages. A fresh 4 KB page costs a fault and its clearing (15 % of a trunk's time when
// measured).
#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>

#include "../../otk.h"
#include "pages.h"

namespace otk {
namespace {

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, void*> idle;         // by size
  std::unordered_map<void*, size_t> in_use;  // size of each block handed out
  size_t idle_bytes = 0, used_bytes = 0, peak_bytes = 0;
};

Pool& pool() {
  // Never destroyed: tensors may be freed after static destructors have run.
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

void* pool_take(int64_t bytes) {
  const size_t size = (static_cast<size_t>(bytes) + kHugePage - 1) / kHugePage * kHugePage;
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  // The smallest idle block that fits without wasting more than half of it.
  auto found = p.idle.lower_bound(size);
  void* block = nullptr;
  size_t got = size;
  if (found != p.idle.end() && found->first <= 2 * size) {
    got = found->first;
    block = found->second;
    p.idle.erase(found);
    p.idle_bytes -= got;
  } else {
    block = pages_take(size);
  }
  p.in_use[block] = got;
  p.used_bytes += got;
  p.peak_bytes = std::max(p.peak_bytes, p.used_bytes);
  return block;
}

void pool_give(void* block) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  const auto entry = p.in_use.find(block);
  const size_t size = entry->second;
  p.in_use.erase(entry);
  p.used_bytes -= size;
  p.idle.emplace(size, block);
  p.idle_bytes += size;
  // Idle memory never exceeds what was once needed at the same time; the largest blocks go first.
  while (!p.idle.empty() && p.used_bytes + p.idle_bytes > p.peak_bytes) {
    const auto last = std::prev(p.idle.end());
    p.idle_bytes -= last->first;
    pages_give(last->second, last->first);
    p.idle.erase(last);
  }
}

int64_t pool_bytes() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  return static_cast<int64_t>(p.idle_bytes + p.used_bytes);
}

void pool_trim() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  for (const auto& [size, block] : p.idle) pages_give(block, size);
  p.idle.clear();
  p.idle_bytes = 0;
  p.peak_bytes = p.used_bytes;
}

}  // namespace otk
