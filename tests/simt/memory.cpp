// SPDX-License-Identifier: Apache-2.0
// Global memory that is watched. Allocations live in one arena, each on pages of its own with one behind them that may
// not be touched, and start out as NaN. Kernels are compiled so that every load and store calls a function of this file
// first (the instrumentation of a thread sanitizer, and that of misaligned pointers, with handlers of our own): it looks
// whether the bytes belong to an allocation, and which thread touched them last.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "simt.h"

namespace simt {

namespace {

constexpr size_t kArena = size_t{4} << 30, kPage = 4096;
constexpr unsigned char kSlack = 0xa5, kPoison = 0xff;
constexpr size_t kRest =
    64;  // pages of one number that are not used again yet, so that a late touch is seen
constexpr size_t kGranule = 2;  // bytes: the smallest element there is

struct Block {
  unsigned char* data;  // up to 63 bytes before the end of its pages
  size_t pages, size;
};

struct Access {
  uint32_t launch, block, thread, epoch;
};

// The last write and the last read of two bytes.
struct Shadow {
  Access write, read;
};

unsigned char* arena = nullptr;
Shadow* shadows = nullptr;
uint32_t* owners = nullptr;  // of a page: index into blocks, 0 for none
size_t used = kPage;         // bytes from the start of the arena
std::vector<Block> blocks(1);
std::vector<uint32_t> unused_blocks;
std::map<size_t, std::deque<unsigned char*>> unused_pages;  // by number
std::string damage;

void* reserve(size_t size) {
  void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return at == MAP_FAILED ? nullptr : at;
}

bool open_arena() {
  static const bool opened = [] {
    owners = static_cast<uint32_t*>(reserve(kArena / kPage * sizeof(uint32_t)));
    shadows = static_cast<Shadow*>(reserve(kArena / kGranule * sizeof(Shadow)));
    arena = static_cast<unsigned char*>(reserve(kArena));
    return arena && shadows && owners;
  }();
  return opened;
}

const Block* owner(const unsigned char* at) {
  const uint32_t index = owners[(at - arena) / kPage];
  return index ? &blocks[index] : nullptr;
}

// A kernel that touches what is no memory at all, or a page behind an allocation by code that is not instrumented.
void on_fault(int, siginfo_t* info, void*) {
  if (!position.running) {  // not ours: let it end the process as it would have
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  fail("address %p is no memory", info->si_addr);
}

void install_handler() {
  static const bool done = [] {
    static char stack[1 << 16];
    stack_t alternative{};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof(stack);
    sigaltstack(&alternative, nullptr);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    return true;
  }();
  (void)done;
}

// Whether a barrier, or the start of another launch, lies between an access and now.
bool ordered(const Access& a) {
  return a.launch != position.launch ||
         (a.block == position.block && (a.thread == position.thread || a.epoch < position.epoch));
}

void touch(const void* address, size_t size, bool writes) {
  const auto* at = static_cast<const unsigned char*>(address);
  if (!position.running || at < arena || at >= arena + kArena) return;
  const Block* block = owner(at);
  // The pages of an allocation and the one behind belong to it.
  if (!block)
    fail("global memory that nobody has allocated, or no longer, is %s",
         writes ? "written" : "read");
  const ptrdiff_t offset = at - block->data;
  if (offset < 0 || static_cast<size_t>(offset) + size > block->size)
    fail("byte %td of an allocation of %zu bytes is %s", offset, block->size,
         writes ? "written" : "read");
  const Access me{position.launch, position.block, position.thread, position.epoch};
  for (size_t i = 0; i < size; i += kGranule) {
    Shadow& shadow = shadows[static_cast<size_t>(at - arena + i) / kGranule];
    if (!ordered(shadow.write))
      fail(
          "byte %td of an allocation of %zu bytes is %s here and written by thread %u of block %u "
          "with no barrier between",
          offset + static_cast<ptrdiff_t>(i), block->size, writes ? "written" : "read",
          shadow.write.thread, shadow.write.block);
    if (writes && !ordered(shadow.read))
      fail(
          "byte %td of an allocation of %zu bytes is written here and read by thread %u of block "
          "%u with no barrier between",
          offset + static_cast<ptrdiff_t>(i), block->size, shadow.read.thread, shadow.read.block);
    (writes ? shadow.write : shadow.read) = me;
  }
}

}  // namespace

void* guarded_alloc(size_t size) {
  install_handler();
  if (!open_arena()) return nullptr;
  const size_t rounded = (size + 63) / 64 * 64, pages = (rounded + kPage - 1) / kPage;
  std::deque<unsigned char*>& free = unused_pages[pages];
  unsigned char* map = nullptr;
  if (free.size() <= kRest) {
    if (used + (pages + 1) * kPage > kArena) return nullptr;
    map = arena + used;
    used += (pages + 1) * kPage;
    mprotect(map + pages * kPage, kPage, PROT_NONE);
  } else {
    map = free.front();
    free.pop_front();
  }
  if (unused_blocks.empty()) {
    unused_blocks.push_back(static_cast<uint32_t>(blocks.size()));
    blocks.emplace_back();
  }
  const uint32_t index = unused_blocks.back();
  unused_blocks.pop_back();
  unsigned char* data = map + pages * kPage - rounded;
  blocks[index] = {data, pages, size};
  std::memset(map, kSlack, pages * kPage);
  std::memset(data, kPoison, size);
  for (size_t p = 0; p <= pages; ++p) owners[(map - arena) / kPage + p] = index;
  return data;
}

void guarded_free(void* data) {
  auto* at = static_cast<unsigned char*>(data);
  if (!at || !arena || at < arena || at >= arena + kArena) return;
  const uint32_t index = owners[(at - arena) / kPage];
  const Block b = blocks[index];
  unsigned char* end = b.data + (b.size + 63) / 64 * 64;
  unsigned char* map = end - b.pages * kPage;
  for (const unsigned char* p = map; p < end; ++p) {
    if ((p >= b.data && p < b.data + b.size) || *p == kSlack) continue;
    damage = "an allocation of " + std::to_string(b.size) + " bytes was overrun at byte " +
             std::to_string(p - b.data);
    break;
  }
  for (size_t p = 0; p <= b.pages; ++p) owners[(map - arena) / kPage + p] = 0;
  unused_blocks.push_back(index);
  unused_pages[b.pages].push_back(map);
}

// What frees have found since the last call, "" for nothing.
std::string take_damage() { return std::exchange(damage, ""); }

}  // namespace simt

// --- what the compiler calls ---------------------------------------------------------------------------------------

extern "C" {

void __tsan_init() {}

#define SIMT_ACCESS(size)                                                      \
  void __tsan_read##size(void* at) { simt::touch(at, size, false); }           \
  void __tsan_write##size(void* at) { simt::touch(at, size, true); }           \
  void __tsan_unaligned_read##size(void* at) { simt::touch(at, size, false); } \
  void __tsan_unaligned_write##size(void* at) { simt::touch(at, size, true); }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
#undef SIMT_ACCESS

void __tsan_read_range(void* at, size_t size) { simt::touch(at, size, false); }
void __tsan_write_range(void* at, size_t size) { simt::touch(at, size, true); }
void __tsan_vptr_update(void**, void*) {}

#define SIMT_ATOMIC(bits, type)                                          \
  type __tsan_atomic##bits##_load(const volatile type* at, int) {        \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                        \
  }                                                                      \
  void __tsan_atomic##bits##_store(volatile type* at, type value, int) { \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                       \
  }
SIMT_ATOMIC(8, char)
SIMT_ATOMIC(32, int)
#undef SIMT_ATOMIC

// As the compiler lays it out: where, the type, log2 of its alignment, the kind of access.
struct SimtMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1_abort(SimtMismatch* what, uintptr_t pointer) {
  if (!simt::position.running) abort();
  simt::fail("line %u touches address %#zx, which is no multiple of %d", what->line,
             static_cast<size_t>(pointer), 1 << what->log_alignment);
}
}
