// SPDX-License-Identifier: Apache-2.0
#include "simt.h"

#include <setjmp.h>
#include <stdio.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdarg>
#include <map>
#include <memory>
#include <random>
#include <regex>
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

constexpr int kVote = -1;  // the source of a vote
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
  const char *file = "", *launcher = "";
  const std::function<void()>* thread = nullptr;
  int threads = 0;
  std::map<const void*, Region> shared;
};

std::vector<std::unique_ptr<Fiber>> fibers;
Context scheduler;
sigjmp_buf failed;
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
  position.thread = static_cast<uint32_t>(thread);
  const unsigned t = static_cast<unsigned>(thread), x = blockDim.x, y = blockDim.y;
  threadIdx = {t % x, t / x % y, t / x / y};
  scheduler.go_to(self().context);
}

// "combine.cu launch_combine [Type<float>, Int<4>, Int<1>]" of a file and a function's whole name.
std::string kernel_name() {
  std::string name = now.launcher, types;
  if (const size_t with = name.find("[with "); with != std::string::npos) {
    types = name.substr(with + 6);
    types = " [" + std::regex_replace(
                       types, std::regex(R"([\w:]+ = |fastnas::cuda::|; using .*(?=\]))"), "");
    types = std::regex_replace(types, std::regex("; "), ", ");
  }
  name = name.substr(0, name.find('('));
  return std::string(now.file) + " " + name.substr(name.find_last_of(" :") + 1) + types;
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
    if (f.source != kVote && (!(mask >> f.source & 1) || first + f.source >= last))
      fail_at(t, "the shuffle at line %d reads lane %d, which is not in its mask %08x", line,
              f.source, mask);
  }
  uint64_t values[kWarp] = {}, votes = 0;
  for (int t = first; t < last; ++t) {
    values[t - first] = fibers[t]->value;
    if ((mask >> (t - first) & 1) && fibers[t]->value) votes |= uint64_t{1} << (t - first);
  }
  for (int t = first; t < last; ++t) {
    if (!(mask >> (t - first) & 1)) continue;
    Fiber& f = *fibers[t];
    f.value = f.source == kVote ? votes : values[f.source];
    f.state = State::kReady;
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
  ++position.epoch;
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
  char reason[400], where[400];
  va_list args;
  va_start(args, format);
  vsnprintf(reason, sizeof(reason), format, args);
  va_end(args);
  snprintf(where, sizeof(where), "%s block (%u, %u, %u) thread %d: ", kernel_name().c_str(),
           blockIdx.x, blockIdx.y, blockIdx.z, current);
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

unsigned ballot(unsigned mask, bool vote, int line) {
  return static_cast<unsigned>(shuffle(mask, vote ? 1 : 0, kVote, line));
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
  if (cell.write_epoch == position.epoch && cell.writer != current)
    fail(
        "element %zu of shared array %s is read here and written by thread %d with no barrier "
        "between",
        index, name, cell.writer);
  cell.reader = cell.read_epoch == position.epoch && cell.reader != current && cell.reader != -1
                    ? -2
                    : current;
  cell.read_epoch = position.epoch;
}

void note_write(Cell& cell, const char* name, size_t index) {
  if (cell.written && cell.write_epoch == position.epoch && cell.writer != current)
    fail("element %zu of shared array %s is written here and by thread %d with no barrier between",
         index, name, cell.writer);
  if (cell.read_epoch == position.epoch && cell.reader != -1 && cell.reader != current)
    fail(
        "element %zu of shared array %s is written here and read by another thread with no barrier "
        "between",
        index, name);
  cell.written = true;
  cell.writer = current;
  cell.write_epoch = position.epoch;
}

bool launch(const char* file, const char* launcher, dim3 grid, dim3 block,
            const std::function<void()>& thread) {
  ++launched;
  message.clear();
  now = Launch{};
  now.file = strrchr(file, '/') ? strrchr(file, '/') + 1 : file;
  now.launcher = launcher;
  now.thread = &thread;
  now.threads = static_cast<int>(block.x * block.y * block.z);
  position = {false, static_cast<uint32_t>(launched), 0, 0, 0};
  blockDim = block;
  gridDim = grid;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535 || blocks > kMostBlocks || now.threads == 0 ||
      now.threads > 1024)
    message = kernel_name() + ": invalid configuration";
  if (!message.empty()) return false;
  while (fibers.size() < static_cast<size_t>(now.threads))
    fibers.push_back(std::make_unique<Fiber>());
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_bits);
  position.running = true;
  if (sigsetjmp(failed, 1) == 0) {
    for (uint64_t b : order) {
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      position.block = static_cast<uint32_t>(b);
      run_block();
    }
  }
  position.running = false;
  return message.empty();
}

}  // namespace simt
