#include "record.h"

#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <ctime>
#include <limits>
#include <vector>

#include "parallel.h"

using torch::stable::Tensor;

namespace {

struct Record {
  otk::Parallel loops{};  // threads: 0 if nothing is recorded
  bool units = false;     // time every unit; else every thread's range
  // For each region: 1 if its units are dealt, their number, number of times, seconds of each.
  std::vector<double> regions;
};
thread_local Record record;
thread_local bool in_ranges = false;

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Processor time of this thread, to which interruptions by other processes do not add.
double seconds() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec now;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) == 0)
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#endif
  return wall_seconds();
}

void time_region(bool dealt, int64_t n, void* ctx, otk::RangeBody body) {
  const int64_t threads = record.loops.threads;
  const int64_t step = record.units ? 1 : (n + threads - 1) / threads;  // as torch cuts [0, n)
  const int64_t times = (n + step - 1) / step;
  record.regions.insert(record.regions.end(), {double(dealt), double(n), double(times)});
  for (int64_t begin = 0; begin < n; begin += step) {
    const double start = seconds();
    body(ctx, begin, std::min(begin + step, n));
    record.regions.push_back(seconds() - start);
  }
}

void record_units(int64_t threads, bool units) {
  STD_TORCH_CHECK(threads >= 0 && threads <= 4096, "record_units: threads must be 0 to 4096, got ",
                  threads);
  record.loops.run = [](int64_t n, void* c, otk::RangeBody body) {
    time_region(false, n, c, body);
  };
  record.loops.deal = [](int64_t n, void* c, otk::RangeBody body) {
    time_region(true, n, c, body);
  };
  record.loops.threads = static_cast<int>(threads);
  record.units = units;
  record.regions.clear();
}

void deal_in_ranges(bool on) { in_ranges = on; }

Tensor recorded_units(const Tensor& like) {
  STD_TORCH_CHECK(like.is_cpu(), "recorded_units: like must be a CPU tensor");
  const std::array<int64_t, 1> size{static_cast<int64_t>(record.regions.size())};
  Tensor out = torch::stable::new_empty(like, size, torch::headeronly::ScalarType::Double);
  std::copy(record.regions.begin(), record.regions.end(), out.mutable_data_ptr<double>());
  record.regions.clear();
  return out;
}

// Smallest seconds of a region in which nobody has anything to do.
double empty_region_seconds(int64_t repeats) {
  STD_TORCH_CHECK(repeats >= 1 && repeats <= 1000000,
                  "empty_region_seconds: repeats must be 1 to 1000000, got ", repeats);
  const otk::Parallel par = torch_threads();
  double best = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < repeats; ++i) {
    const double start = wall_seconds();
    par.run(par.threads, nullptr, [](void*, int64_t, int64_t) {});
    best = std::min(best, wall_seconds() - start);
  }
  return best;
}

}  // namespace

namespace otk_torch {

const otk::Parallel* recorder() { return record.loops.threads > 0 ? &record.loops : nullptr; }

bool deals_in_ranges() { return in_ranges; }

}  // namespace otk_torch

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CompositeExplicitAutograd, m) {
  m.impl("record_units", TORCH_BOX(&record_units));
  m.impl("deal_in_ranges", TORCH_BOX(&deal_in_ranges));
  m.impl("empty_region_seconds", TORCH_BOX(&empty_region_seconds));
}

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CPU, m) {
  m.impl("recorded_units", TORCH_BOX(&recorded_units));
}
