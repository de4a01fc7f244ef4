// Work split over the caller's threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <type_traits>

#include "../../otk.h"

namespace otk {

// Passes `start` the body as a callback. No exception crosses it: a damaged pack, or running out of
// memory, is reported once all units of work have stopped.
template <class Body, class Start>
void guarded(Body&& body, Start&& start) {
  struct Context {
    std::remove_reference_t<Body>* body;
    std::atomic<bool> failed, damaged;
  } context{&body, {false}, {false}};
  start(&context, [](void* p, int64_t begin, int64_t end) {
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

// Calls body(begin, end) over [0, n) through `par`, in one range per thread.
template <class Body>
void parallel_for(const Parallel& par, int64_t n, Body&& body) {
  if (n <= 0) return;
  if (par.threads <= 1 || n == 1) {
    body(int64_t{0}, n);
    return;
  }
  guarded(body, [&](void* context, RangeBody call) { par.run(n, context, call); });
}

// The same for units of unequal work: a thread that is done takes the next one, so nobody waits for
// more than one unit. Who computes a unit changes, what it computes does not.
template <class Body>
void deal(const Parallel& par, int64_t n, Body&& body) {
  if (par.threads <= 1 || n <= par.threads) {
    parallel_for(par, n, body);
    return;
  }
  guarded(body, [&](void* context, RangeBody call) {
    if (par.deal) {
      par.deal(n, context, call);
      return;
    }
    struct Counter {
      std::atomic<int64_t> next;
      int64_t n;
      void* context;
      RangeBody call;
    } counter{{0}, n, context, call};
    par.run(par.threads, &counter, [](void* p, int64_t, int64_t) {
      auto* c = static_cast<Counter*>(p);
      for (int64_t i; (i = c->next.fetch_add(1, std::memory_order_relaxed)) < c->n;)
        c->call(c->context, i, i + 1);
    });
  });
}

}  // namespace otk
