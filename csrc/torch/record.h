// What a kernel hands to its threads, run on the calling thread alone and timed: the material of a
// simulated schedule (opentrans_kernels/bench/schedule.py).
#pragma once

#include "../otk.h"

namespace otk_torch {

// The loops to use in place of torch's threads, or null: nothing is recorded on this thread.
const otk::Parallel* recorder();

}  // namespace otk_torch
