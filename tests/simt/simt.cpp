// SPDX-License-Identifier: Apache-2.0
#include "simt.h"

#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>

namespace simt {

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = size_t{128} << 10;
constexpr uint64_t kMostBlocks = 1 << 20;

// --- switching fibers ------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// ucontext saves the signal mask by a system call at every switch; these few registers are all that a call must keep.
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
extern "C" void simt_switch(void** save, void* to);

struct Context {
  void* stack = nullptr;
  void start(char* bottom, size_t size, void (*entry)()) {
    void** top =
        reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(bottom) + size) & ~uintptr_t{15});
    *--top = nullptr;  // where entry would return to; it never does
    *--top = reinterpret_cast<void*>(entry);
    stack = top - 6;
  }
  void go_to(Context& other) { simt_switch(&stack, other.stack); }
};
#else
struct Context {
  ucontext_t context;
  void start(char* bottom, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = bottom;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void go_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  State state = State::kReady;
  int line = 0;  // where it waits
  unsigned mask = 0;
  int source = 0;
  uint64_t value = 0;
};

struct Launch {
  const char* kernel = "";
  const std::function<void()>* thread = nullptr;
  int threads = 0;
  uint64_t epoch = 0;  // barriers passed
  std::map<const void*, Region> shared;
};

std::vector<std::unique_ptr<Fiber>> fibers;
Context scheduler;
sigjmp_buf failed;
bool running = false;
int current = 0;
Launch now;
std::string message;
int64_t launched = 0;
std::mt19937_64 random_bits(0);

Fiber& self() { return *fibers[current]; }

void enter() {
  (*now.thread)();
  self().state = State::kDone;
  self().context.go_to(scheduler);
}

void wait(State state, int line) {
  self().state = state;
  self().line = line;
  self().context.go_to(scheduler);
}

void resume(int thread) {
  current = thread;
  const unsigned t = static_cast<unsigned>(thread), x = blockDim.x, y = blockDim.y;
  threadIdx = {t % x, t / x % y, t / x / y};
  scheduler.go_to(self().context);
}

template <typename... Args>
[[noreturn]] void fail_at(int thread, const char* format, Args... args) {
  current = thread;
  fail(format, args...);
}

// Lets a warp's shuffle happen if it is complete; its lanes have all stopped.
bool release_shuffle(int warp) {
  const int first = warp * kWarp, last = std::min(first + kWarp, now.threads);
  unsigned mask = 0;
  int line = 0;
  for (int t = first; t < last && !mask; ++t)
    if (fibers[t]->state == State::kAtShuffle) mask = fibers[t]->mask, line = fibers[t]->line;
  if (!mask) return false;
  for (int t = first; t < last; ++t) {
    Fiber& f = *fibers[t];
    if (!(mask >> (t - first) & 1)) continue;
    if (f.state != State::kAtShuffle)
      fail_at(t, "this thread is in the mask %08x of the shuffle at line %d, but does not reach it",
              mask, line);
    if (f.mask != mask || f.line != line)
      fail_at(t, "the shuffles at lines %d and %d meet, or masks %08x and %08x", line, f.line, mask,
              f.mask);
    if (!(mask >> f.source & 1) || first + f.source >= last)
      fail_at(t, "the shuffle at line %d reads lane %d, which is not in its mask %08x", line,
              f.source, mask);
  }
  uint64_t values[kWarp] = {};
  for (int t = first; t < last; ++t) values[t - first] = fibers[t]->value;
  for (int t = first; t < last; ++t) {
    if (!(mask >> (t - first) & 1)) continue;
    fibers[t]->value = values[fibers[t]->source];
    fibers[t]->state = State::kReady;
  }
  return true;
}

void release_barrier() {
  int line = 0;
  for (int t = 0; t < now.threads && !line; ++t)
    if (fibers[t]->state == State::kAtBarrier) line = fibers[t]->line;
  for (int t = 0; t < now.threads; ++t) {
    if (fibers[t]->state != State::kAtBarrier)
      fail_at(t, "this thread never reaches the barrier at line %d", line);
    if (fibers[t]->line != line)
      fail_at(t, "this thread waits at the barrier of line %d, others at that of line %d",
              fibers[t]->line, line);
  }
  for (int t = 0; t < now.threads; ++t) fibers[t]->state = State::kReady;
  ++now.epoch;
}

void run_block() {
  now.shared.clear();
  for (int t = 0; t < now.threads; ++t) {
    Fiber& f = *fibers[t];
    f.state = State::kReady;
    f.context.start(f.stack.get(), kStack, enter);
  }
  std::vector<int> ready;
  while (true) {
    ready.clear();
    for (int t = 0; t < now.threads; ++t)
      if (fibers[t]->state == State::kReady) ready.push_back(t);
    std::shuffle(ready.begin(), ready.end(), random_bits);
    for (int t : ready) resume(t);
    if (!ready.empty()) continue;
    bool moved = false;
    for (int warp = 0; warp * kWarp < now.threads; ++warp) moved = release_shuffle(warp) || moved;
    if (moved) continue;
    const auto done = [](const auto& f) { return f->state == State::kDone; };
    if (std::all_of(fibers.begin(), fibers.begin() + now.threads, done)) return;
    release_barrier();
  }
}

}  // namespace

const char* error() { return message.c_str(); }

void set_seed(uint64_t seed) { random_bits.seed(seed); }

int64_t launches() { return launched; }

int lane() { return current % kWarp; }

void fail(const char* format, ...) {
  char reason[400], where[200];
  va_list args;
  va_start(args, format);
  vsnprintf(reason, sizeof(reason), format, args);
  va_end(args);
  snprintf(where, sizeof(where), "%s block (%u, %u, %u) thread %d: ", now.kernel, blockIdx.x,
           blockIdx.y, blockIdx.z, current);
  message = std::string(where) + reason;
  siglongjmp(failed, 1);
}

void barrier(int line) { wait(State::kAtBarrier, line); }

uint64_t shuffle(unsigned mask, uint64_t value, int source, int line) {
  if (!(mask >> lane() & 1))
    fail("the shuffle at line %d has mask %08x without this lane", line, mask);
  self().mask = mask;
  self().value = value;
  self().source = source;
  wait(State::kAtShuffle, line);
  return self().value;
}

Region& region(const void* declaration, size_t count, size_t size) {
  Region& r = now.shared[declaration];
  if (r.cells.empty()) {
    r.bytes.assign(count * size, 0xff);
    r.cells.assign(count, Cell{});
  }
  return r;
}

void note_read(Cell& cell, const char* name, size_t index) {
  if (!cell.written)
    fail("element %zu of shared array %s is read, but was never written", index, name);
  if (cell.write_epoch == now.epoch && cell.writer != current)
    fail(
        "element %zu of shared array %s is read here and written by thread %d with no barrier "
        "between",
        index, name, cell.writer);
  cell.reader =
      cell.read_epoch == now.epoch && cell.reader != current && cell.reader != -1 ? -2 : current;
  cell.read_epoch = now.epoch;
}

void note_write(Cell& cell, const char* name, size_t index) {
  if (cell.written && cell.write_epoch == now.epoch && cell.writer != current)
    fail("element %zu of shared array %s is written here and by thread %d with no barrier between",
         index, name, cell.writer);
  if (cell.read_epoch == now.epoch && cell.reader != -1 && cell.reader != current)
    fail(
        "element %zu of shared array %s is written here and read by another thread with no barrier "
        "between",
        index, name);
  cell.written = true;
  cell.writer = current;
  cell.write_epoch = now.epoch;
}

bool launch(const char* kernel, dim3 grid, dim3 block, const std::function<void()>& thread) {
  ++launched;
  message.clear();
  now = Launch{};
  now.kernel = strrchr(kernel, '/') ? strrchr(kernel, '/') + 1 : kernel;
  now.thread = &thread;
  now.threads = static_cast<int>(block.x * block.y * block.z);
  blockDim = block;
  gridDim = grid;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535 || blocks > kMostBlocks || now.threads == 0 ||
      now.threads > 1024)
    message = std::string(now.kernel) + ": invalid configuration";
  if (!message.empty()) return false;
  while (fibers.size() < static_cast<size_t>(now.threads))
    fibers.push_back(std::make_unique<Fiber>());
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_bits);
  running = true;
  if (sigsetjmp(failed, 1) == 0) {
    for (uint64_t b : order) {
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      run_block();
    }
  }
  running = false;
  return message.empty();
}

// --- guarded memory --------------------------------------------------------------------------------------------------
// An allocation ends (to the next multiple of 64 bytes) at a page that may not be touched. What lies between it and its
// page borders holds a pattern that is checked when it is freed; the allocation itself starts out as NaN.

namespace {

constexpr unsigned char kSlack = 0xa5, kPoison = 0xff;

struct Block {
  unsigned char *map, *data;
  size_t mapped, size;
};
std::map<void*, Block> blocks;
std::string damage;

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

void on_fault(int, siginfo_t* info, void*) {
  if (!running) {  // not ours: let it end the process as it would have
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  const auto* at = static_cast<const unsigned char*>(info->si_addr);
  for (const auto& [data, b] : blocks)
    if (at >= b.map && at < b.map + b.mapped)
      fail("global memory is touched %td bytes past the end of an allocation of %zu",
           at - (b.data + b.size), b.size);
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

}  // namespace

void* guarded_alloc(size_t size) {
  install_handler();
  const size_t rounded = (size + 63) / 64 * 64, pages = (rounded + page() - 1) / page() * page();
  void* map =
      mmap(nullptr, pages + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  Block b{static_cast<unsigned char*>(map), nullptr, pages + page(), size};
  b.data = b.map + pages - rounded;
  std::memset(b.map, kSlack, pages);
  std::memset(b.data, kPoison, size);
  mprotect(b.map + pages, page(), PROT_NONE);
  blocks[b.data] = b;
  return b.data;
}

void guarded_free(void* data) {
  const auto found = blocks.find(data);
  if (found == blocks.end()) return;
  const Block& b = found->second;
  const unsigned char* end = b.map + b.mapped - page();
  for (const unsigned char* p = b.map; p < end; ++p) {
    if ((p >= b.data && p < b.data + b.size) || *p == kSlack) continue;
    damage = "an allocation of " + std::to_string(b.size) + " bytes was overrun at byte " +
             std::to_string(p - b.data);
    break;
  }
  munmap(b.map, b.mapped);
  blocks.erase(found);
}

// What frees have found since the last call, "" for nothing.
std::string take_damage() { return std::exchange(damage, ""); }

}  // namespace simt
