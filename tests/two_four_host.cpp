// The 2:4 convolution's own code on a host, with the instructions of tests/sm90_host.h.
#include "two_four_conv.h"

namespace {

using namespace otk;

template <int Rows>
void run(const two_four::Problem& p, int blocks, unsigned seed, sm90::When when) {
  for (int index = 0; index < blocks; ++index) {
    sm90::Block block(two_four::kThreads, two_four::Tile<Rows>::shared, index, blocks, seed + index,
                      when);
    block.run([&p] { two_four::run_block<Rows>(p); });
  }
}

}  // namespace

// when: 0 late, 1 early, 2 random. Returns 0, or 1 with what went wrong in `message`.
extern "C" int otk_host_two_four(const two_four::Problem* p, int rows, int blocks, unsigned seed,
                                 int when, char* message, int room) {
  try {
    const auto kind = sm90::When(when);
    if (rows == 16) run<16>(*p, blocks, seed, kind);
    if (rows == 25) run<25>(*p, blocks, seed, kind);
    if (rows == 32) run<32>(*p, blocks, seed, kind);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, size_t(room), "%s", error.what());
    return 1;
  }
}

extern "C" int otk_host_two_four_problem_size() { return int(sizeof(two_four::Problem)); }
extern "C" int otk_host_two_four_shared(int rows) {
  if (rows == 16) return two_four::Tile<16>::shared;
  if (rows == 25) return two_four::Tile<25>::shared;
  return two_four::Tile<32>::shared;
}
