// torch's own threads as the loop of otk.h, so that torch.set_num_threads holds for the kernels.
#pragma once

#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/ops.h>

#include "../otk.h"
#include "record.h"

inline otk::Parallel torch_threads() {
  if (const otk::Parallel* recorder = otk_torch::recorder()) return *recorder;
  const auto run = [](int64_t n, void* ctx, otk::RangeBody body) {
    torch::stable::parallel_for(0, n, 1,
                                [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
  };
  otk::Parallel threads{run, static_cast<int>(torch::stable::get_num_threads())};
  if (otk_torch::deals_in_ranges()) threads.deal = run;
  return threads;
}
