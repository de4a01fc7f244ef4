// The blocks of csrc/cuda/sparse_conv.h run on the host: every phase for every thread in turn.

#include <limits>
#include <vector>

#include "sparse_conv.h"

using namespace otk::sparse;

extern "C" int otk_host_problem_size() { return int(sizeof(Problem)); }

extern "C" int otk_host_shared_floats(const Problem* p) { return shared_floats(*p); }

template <int Taps>
void run(const Problem& p) {
  for (int64_t block = 0; block < blocks(p); ++block) {
    const Where at = where(p, block);
    const float poison = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> shared(shared_floats(p), poison);
    std::vector<int> place(kRows, -1);
    struct Sums {
      float of[kRowsPerWarp][kLines] = {};
    };
    std::vector<Sums> sums(kThreads);
    for (int t = 0; t < kThreads; ++t) find_places(p, at, t, place.data());
    for (int chunk = 0; chunk < chunks(p); ++chunk) {
      for (int t = 0; t < kThreads; ++t)
        load_tile<float, Taps>(p, at, chunk * p.chunk, t, shared.data());
      for (int t = 0; t < kThreads; ++t)
        accumulate<Taps>(p, at, chunk, t, shared.data(), sums[t].of);
    }
    for (int line = 0; line < kLines; ++line) {
      for (int t = 0; t < kThreads; ++t) stage(line, t, sums[t].of, shared.data());
      for (int t = 0; t < kThreads; ++t) store<float>(p, at, line, t, shared.data(), place.data());
    }
  }
}

extern "C" void otk_host_sparse_conv(const Problem* p) { p->taps == 1 ? run<1>(*p) : run<9>(*p); }
