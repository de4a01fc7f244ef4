// Calls by name from a pipe, for tests of the kernels without torch. A function of a shim file
// takes int64_t, double, arrays and packs, and is made known by OTK_CALLABLE(name).
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <new>
#include <tuple>
#include <type_traits>
#include <vector>

#include "otk.h"

namespace calls {

// An array that ends where its pages end: what is touched behind it is a crash, and what is written
// before it is noticed. With the address sanitizer an allocation of its own.
class Array {
 public:
  Array(const char* from, int64_t bytes, bool writable);
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array();
  // Ends the process if something was written that should not be.
  void check() const;

  char* data;
  const int64_t bytes;
  const bool writable;

 private:
  const char* from_;
  char* pages_ = nullptr;
  int64_t length_ = 0;
};

// The parts of a pack; a null structure stands for none.
struct Pack {
  const int32_t* structure;
  int64_t words;
  const float *values, *bias;
};

// One message: a name, then arguments, each with a letter in front.
class Call {
 public:
  Call(const char* at, const char* end) : at_(at), end_(end) {}
  int64_t integer();
  double real();
  void* array(bool writable);
  const Pack* packs();
  void finish() const;  // nothing may be left

  std::deque<Array> arrays;  // in the order of the message

 private:
  void expect(char letter);
  template <class T>
  T take();
  const char *at_, *end_;
  std::deque<std::vector<Pack>> packs_;
};

[[noreturn]] void fail(const char* what);

template <class T>
T argument(Call& call) {
  if constexpr (std::is_same_v<T, const Pack*>)
    return call.packs();
  else if constexpr (std::is_pointer_v<T>)
    return static_cast<T>(call.array(!std::is_const_v<std::remove_pointer_t<T>>));
  else if constexpr (std::is_same_v<T, double>)
    return call.real();
  else
    return call.integer();
}

using Function = std::function<int64_t(Call&)>;
void add(const char* name, Function function);

struct Added {
  template <class... A>
  Added(const char* name, int64_t (*function)(A...)) {
    add(name, [function](Call& call) {
      const std::tuple<A...> arguments{argument<A>(call)...};  // braces: from left to right
      call.finish();
      return std::apply(function, arguments);
    });
  }
};
#define OTK_CALLABLE(name) \
  const calls::Added name##_added { #name, name }

// 1: the pack is damaged, 2: out of memory.
template <class Body>
int64_t guarded(Body&& body) {
  try {
    body();
  } catch (const otk::PackError&) {
    return 1;
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}

// Several threads are played by one that runs ranges one by one, last first: an order that no
// result may depend on.
otk::Parallel parallel(int64_t threads);

}  // namespace calls
