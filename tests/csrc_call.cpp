// The process in which tests call the kernels: reads calls from stdin, writes results to stdout.
//
// A message is its length (int64), then a name that ends with a zero byte, then the arguments: 'i'
// and an int64, 'd' and a double, 'a', a size in bytes and an array, '0' for no array, 'p', a count
// and as many packs of three arrays. The answer: its length, the result (int64), and of every
// array the bytes that may have changed, a size in front.
#include "csrc_call.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

namespace calls {
namespace {

constexpr int64_t kMargin = 256;  // bytes in front of an array that are looked at
constexpr char kUntouched = '\x5a';

std::map<std::string, Function>& functions() {
  static std::map<std::string, Function> all;
  return all;
}

void backwards(int64_t n, void* ctx, otk::RangeBody body) {
  for (int64_t i = n; i-- > 0;) body(ctx, i, i + 1);
}
void once(int64_t n, void* ctx, otk::RangeBody body) { body(ctx, 0, n); }

bool read_all(char* to, int64_t bytes) {
  return static_cast<int64_t>(std::fread(to, 1, bytes, stdin)) == bytes;
}
void write_number(int64_t number) { std::fwrite(&number, 8, 1, stdout); }

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "csrc_call: %s\n", what);
  std::_Exit(3);
}

Array::Array(const char* from, int64_t size, bool may_change)
    : bytes(size), writable(may_change), from_(from) {
#if defined(__SANITIZE_ADDRESS__)
  data = pages_ = new char[bytes];
#else
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t front = (bytes + kMargin + page - 1) / page * page;
  length_ = front + page;
  void* made = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) fail("no memory");
  pages_ = static_cast<char*>(made);
  if (mprotect(pages_ + front, page, PROT_NONE)) fail("mprotect");
  data = pages_ + front - bytes;
  std::fill(data - kMargin, data, kUntouched);
#endif
  std::copy(from, from + bytes, data);
}

Array::~Array() {
#if defined(__SANITIZE_ADDRESS__)
  delete[] pages_;
#else
  munmap(pages_, length_);
#endif
}

void Array::check() const {
  if (!writable && !std::equal(data, data + bytes, from_)) fail("an input was written to");
#if !defined(__SANITIZE_ADDRESS__)
  if (std::any_of(data - kMargin, data, [](char c) { return c != kUntouched; }))
    fail("something was written in front of an array");
#endif
}

template <class T>
T Call::take() {
  T found;
  if (end_ - at_ < static_cast<int64_t>(sizeof(T))) fail("the message is too short");
  std::memcpy(&found, at_, sizeof(T));
  at_ += sizeof(T);
  return found;
}

void Call::expect(char letter) {
  if (take<char>() != letter) fail("an argument is of another kind than its parameter");
}

int64_t Call::integer() {
  expect('i');
  return take<int64_t>();
}

double Call::real() {
  expect('d');
  return take<double>();
}

void* Call::array(bool writable) {
  if (at_ < end_ && *at_ == '0') {
    ++at_;
    return nullptr;
  }
  expect('a');
  const auto bytes = take<int64_t>();
  if (bytes < 0 || bytes > end_ - at_) fail("the message is too short");
  arrays.emplace_back(at_, bytes, writable);
  at_ += bytes;
  return arrays.back().data;
}

const Pack* Call::packs() {
  expect('p');
  const auto count = take<int64_t>();
  std::vector<Pack>& found = packs_.emplace_back();
  for (int64_t i = 0; i < count; ++i) {
    const auto* structure = static_cast<const int32_t*>(array(false));
    const int64_t words = structure ? arrays.back().bytes / 4 : 0;
    const auto* values = static_cast<const float*>(array(false));
    found.push_back({structure, words, values, static_cast<const float*>(array(false))});
  }
  return found.data();
}

void Call::finish() const {
  if (at_ != end_) fail("more arguments than parameters");
}

void add(const char* name, Function function) { functions()[name] = std::move(function); }

otk::Parallel parallel(int64_t threads) {
  return {threads > 1 ? backwards : once, static_cast<int>(threads)};
}

}  // namespace calls

int main() {
  using namespace calls;
  const rlimit none{0, 0};
  setrlimit(RLIMIT_CORE, &none);  // a crash is a result here
  std::vector<char> message;
  for (int64_t length; read_all(reinterpret_cast<char*>(&length), 8);) {
    message.resize(length);
    if (!read_all(message.data(), length)) fail("the message is too short");
    const char *begin = message.data(), *end = begin + length;
    const char* name_end = std::find(begin, end, '\0');
    const auto found = functions().find(std::string(begin, name_end));
    if (name_end == end || found == functions().end()) fail("no such function");
    Call call(name_end + 1, end);
    const int64_t result = found->second(call);
    int64_t bytes = 8;
    for (const Array& array : call.arrays) {
      array.check();
      bytes += 8 + (array.writable ? array.bytes : 0);
    }
    write_number(bytes);
    write_number(result);
    for (const Array& array : call.arrays) {
      write_number(array.writable ? array.bytes : 0);
      if (array.writable) std::fwrite(array.data, 1, array.bytes, stdout);
    }
    std::fflush(stdout);
  }
}
