// Residual bottlenecks one behind the other, each a few rows behind the one before it: what a block
// writes is read by the next one while it is still in cache, and only a window of rows of it is
// kept. Only the last block's output goes to memory.
#include <algorithm>
#include <cstring>
#include <vector>

#include "band.h"
#include "run.h"

namespace otk {
namespace {

// Share of extra rows, weighted by nonzeros, that cutting an image into ranges may cost.
constexpr double kExtraWork = 0.06;

int64_t nonzeros(const Bottleneck& b) {
  return b.c1.nnz + b.c2.nnz + b.c3.nnz + (b.has_down ? b.down.nnz : 0);
}

// The blocks of a stage at work on rows [r0, r1) of the last one's output.
class Pipeline {
 public:
  Pipeline(const Bottleneck* blocks, int count, const Planes& x, const Planes& out, int r0, int r1,
           const Isa& isa)
      : x_(x), isa_(isa) {
    Planes in = x;
    for (int b = 0; b < count; ++b) {
      Planes made = out;
      if (b + 1 < count) {
        made = {};
        made.n = 1;
        made.c = blocks[b].c3.cout;
        made.h = static_cast<int>(blocks[b].size(in.h));
        made.w = static_cast<int>(blocks[b].size(in.w));
        made.row_stride = made.w;
        made.col_stride = 1;
      }
      links_.push_back({blocks + b, made});
      Link& link = links_.back();
      const Band band{*link.block, in, made, isa};
      link.step = band.rows();
      link.align = band.align();
      in = made;
    }
    // Rows that the next block reads, at whole vectors.
    links_.back().begin = r0;
    links_.back().end = r1;
    for (int b = count - 2; b >= 0; --b) {
      const Link& next = links_[b + 1];
      Link& link = links_[b];
      const int step = next.block->step(), h = link.made.h;
      link.begin = std::max(0, next.begin * step - 1) / link.align * link.align;
      const int end = next.end == next.made.h ? h : next.end * step + 1;
      link.end = std::min(h, (end + link.align - 1) / link.align * link.align);
    }
    schedule([&](int b, int, int o1, int keep) {
      links_[b].capacity = std::max(links_[b].capacity, o1 - keep);
    });
    for (int b = 0; b + 1 < count; ++b) {
      Planes& made = links_[b].made;
      made.plane_stride = plane_stride(int64_t{links_[b].capacity} * made.w);
      made.readable = made.plane_stride * made.c + 16;
    }
  }

  // Multiply-adds of nonzeros.
  double work() const {
    double sum = 0;
    for (const Link& link : links_)
      sum += static_cast<double>(nonzeros(*link.block)) * (link.end - link.begin) * link.made.w;
    return sum;
  }

  int64_t floats() const {
    int64_t kept = 0, most = 0;
    for (size_t b = 0; b < links_.size(); ++b) {
      const Band band = band_of(b, nullptr, nullptr);
      if (b + 1 < links_.size()) kept += Arena::rounded(links_[b].made.readable);
      kept += band.carry_floats();
      most = std::max(most, band.floats(links_[b].step));
    }
    return kept + most;
  }

  // One image; `arena` has room for floats().
  void run(float* image, float* result, Arena& arena) {
    std::vector<float*> window(links_.size());
    std::vector<Carry> carry(links_.size());
    for (size_t b = 0; b < links_.size(); ++b) {
      const Planes& made = links_[b].made;
      if (b + 1 < links_.size()) window[b] = arena.take(made.readable);
      carry[b].rows = arena.take(band_of(b, nullptr, nullptr).carry_floats());
    }
    const int64_t mark = arena.used();
    const int last = static_cast<int>(links_.size()) - 1;
    std::vector<int> kept(links_.size());
    for (size_t b = 0; b < links_.size(); ++b) kept[b] = links_[b].begin;
    schedule([&](int b, int o0, int o1, int keep) {
      const Planes& made = links_[b].made;
      if (b < last && keep > kept[b] && o0 > keep)
        for (int c = 0; c < made.c; ++c) {
          float* plane = window[b] + c * made.plane_stride;
          std::memmove(plane, plane + int64_t{keep - kept[b]} * made.w,
                       sizeof(float) * (o0 - keep) * made.w);
        }
      kept[b] = keep;
      // Rows are counted from the top of the image; a window begins at row `kept`.
      const auto top = [&](int i) { return window[i] - int64_t{kept[i]} * links_[i].made.w; };
      arena.rewind(mark);
      band_of(b, b ? top(b - 1) : image, b < last ? top(b) : result)
          .run(o0, o1, arena, &carry[b], nullptr);
    });
  }

 private:
  struct Link {
    const Bottleneck* block;
    Planes made;
    int step = 1, align = 1;
    int begin = 0, end = 0;  // output rows that are needed
    int done = 0;            // rows below this one are made
    int capacity = 0;        // rows of the window
  };

  Band band_of(size_t b, float* from, float* to) const {
    Band band{*links_[b].block, b ? links_[b - 1].made : x_, links_[b].made, isa_};
    band.x.data = from;
    band.out.data = to;
    return band;
  }

  // First row of block b's output that the next one still reads.
  int needed(size_t b) const {
    if (b + 1 == links_.size()) return 0;
    const Link& link = links_[b];
    const Link& next = links_[b + 1];
    // Its first band also reads the row above; later ones carry that row.
    const int above = next.done == next.begin ? 1 : 0;
    return std::max(link.begin,
                    std::max(0, next.done * next.block->step() - above) / link.align * link.align);
  }

  // Calls visit(block, first row, end row, first row kept) in an order in which every band finds
  // the rows it reads. A block waits until a band is as tall as it may be, so that tiles are full.
  template <class Visit>
  void schedule(Visit&& visit) {
    for (Link& link : links_) link.done = link.begin;
    while (links_.back().done < links_.back().end)
      for (size_t b = 0; b < links_.size(); ++b) {
        Link& link = links_[b];
        int can = link.end;
        if (b && links_[b - 1].done < links_[b - 1].end) {
          const int rows = std::max(0, (links_[b - 1].done - 1) / link.block->step());
          can = std::min(can, rows / link.align * link.align);
        }
        const int o0 = link.done, o1 = std::min(can, o0 + link.step);
        // One row short is what a block is behind the one before it.
        if (o1 <= o0 || (o1 < link.end && o1 - o0 + link.align < link.step)) continue;
        link.done = o1;
        visit(static_cast<int>(b), o0, o1, needed(b));
      }
  }

  Planes x_;
  const Isa& isa_;
  std::vector<Link> links_;
};

struct Cut {
  int pieces;  // ranges of rows an image is cut into
  bool pays;
};

Cut cut_of(const Bottleneck* blocks, int count, const Planes& x, const Planes& out,
           const Parallel& par, const Isa& isa) {
  if (par.threads <= 1 || x.n >= 2 * par.threads) return {1, true};
  const int align = Band{blocks[count - 1], x, out, isa}.align();
  const int pieces = par.threads;
  if (out.h < pieces * align) return {1, false};
  double work = 0;
  for (int i = 0; i < pieces; ++i) {
    const int r0 = out.h * i / pieces / align * align;
    const int r1 = i + 1 == pieces ? out.h : out.h * (i + 1) / pieces / align * align;
    work += Pipeline(blocks, count, x, out, r0, r1, isa).work();
  }
  const double whole = Pipeline(blocks, count, x, out, 0, out.h, isa).work();
  return {pieces, work <= (1 + kExtraWork) * whole};
}

}  // namespace

bool stage_pays(const Bottleneck* blocks, int count, const Planes& x, const Planes& out,
                const Parallel& par) {
  return cut_of(blocks, count, x, out, par, active_isa()).pays;
}

void sparse_stage(const Bottleneck* blocks, int count, const Planes& x, const Planes& out,
                  const Parallel& par) {
  const Isa& isa = active_isa();
  if (x.n == 0 || out.h <= 0 || out.w <= 0) return;
  const int pieces = cut_of(blocks, count, x, out, par, isa).pieces;
  const int align = Band{blocks[count - 1], x, out, isa}.align();
  parallel_for(par, int64_t{x.n} * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t n = u / pieces, i = u % pieces;
      const auto row = [&](int64_t k) {
        return k == pieces ? out.h : static_cast<int>(out.h * k / pieces / align * align);
      };
      Pipeline pipeline(blocks, count, x, out, row(i), row(i + 1), isa);
      Arena& shared = thread_scratch().shared;
      shared.reset(pipeline.floats());
      pipeline.run(x.data + n * x.batch_stride, out.data + n * out.batch_stride, shared);
    }
  });
}

}  // namespace otk
