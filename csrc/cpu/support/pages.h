// Memory straight from the system, on 2 MB pages where it offers them: a tile spread over hundreds
// of channels needs more 4 KB pages than the TLB holds.
#pragma once

#include <cstddef>

namespace otk {

constexpr size_t kHugePage = size_t{1} << 21;

// `bytes`, a multiple of kHugePage, aligned to it. Throws std::bad_alloc.
void* pages_take(size_t bytes);
void pages_give(void* block, size_t bytes);

// Asks for 2 MB pages where `block`, which somebody else allocated, spans whole ones. To be called
// before it is first written to; of memory that was used before, nothing changes.
void pages_advise(void* block, size_t bytes);

}  // namespace otk
