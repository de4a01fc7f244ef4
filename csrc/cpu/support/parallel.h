// Work split over the caller's threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <type_traits>

#include "../../otk.h"

namespace otk {

// Calls body(begin, end) over [0, n) through `par`. No exception crosses the callback: a damaged
// pack, or running out of memory, is reported once all units of work have stopped.
template <class Body>
void parallel_for(const Parallel& par, int64_t n, Body&& body) {
  if (n <= 0) return;
  if (par.threads <= 1 || n == 1) {
    body(int64_t{0}, n);
    return;
  }
  struct Context {
    std::remove_reference_t<Body>* body;
    std::atomic<bool> failed, damaged;
  } context{&body, {false}, {false}};
  par.run(n, &context, [](void* p, int64_t begin, int64_t end) {
    auto* c = static_cast<Context*>(p);
    try {
      (*c->body)(begin, end);
    } catch (const PackError&) {
      c->damaged = true;
    } catch (...) {
      c->failed = true;
    }
  });
  if (context.damaged) throw PackError{};
  if (context.failed) throw std::bad_alloc();
}

}  // namespace otk
