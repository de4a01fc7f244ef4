// What a kernel hands to its threads, run on the calling thread alone and timed: the material of a
// simulated schedule (opentrans_kernels/bench/schedule.py).
#pragma once

#include "../otk.h"

namespace otk_torch {

// The loops to use in place of torch's threads, or null: nothing is recorded on this thread.
const otk::Parallel* recorder();

// Whether this thread's calls run dealt units in one range per thread: the other side of a
// measurement (benchmarks/bench_threads.py).
bool deals_in_ranges();

}  // namespace otk_torch
