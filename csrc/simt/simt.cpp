// The scheduler: one fiber a thread. A fiber that has to wait switches straight to the next one
// that can run, within its warp if there is one, then within its block.
#undef _FORTIFY_SOURCE  // its longjmp refuses to go from one stack to another
#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10;

enum class Waits { kNot, kCollective, kBarrier, kEnded };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, group;
};

struct Fiber {
  ucontext_t context;  // where it starts; under ASan, where it is as well
  jmp_buf left;        // where it was left, if it was
  bool was_left = false;
  const void* stack = nullptr;
  size_t stack_size = 0;
  unsigned thread = 0;
  int barriers = 0;  // so far
  Waits waits = Waits::kNot;
  std::vector<Copy> copies;  // that have not landed
  size_t groups = 0;         // of copies, so far
};

struct Warp {
  // Two rounds: a lane may start the next collective before its neighbour has read this one's
  // values.
  Lanes values[2][kMostWords];
  unsigned round = 0, arrived = 0;
  uint64_t call = 0;
};

struct AlignedDelete {
  size_t alignment;
  void operator()(unsigned char* memory) const {
    ::operator delete(memory, std::align_val_t{alignment});
  }
};

// What LYAPCUDA_SHARED gave the block; on the heap, where ASan sees what goes beyond it.
struct Shared {
  const void* site;
  size_t bytes;
  std::unique_ptr<unsigned char, AlignedDelete> memory;
};

// The fibers of one block, in the order in which they are scheduled. Warps likewise.
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Shared> pieces;
Fiber launcher;
std::unique_ptr<unsigned char[]> stacks;
size_t stack_count = 0;
size_t current = 0;
bool copies_land_at_once = false;
int missing = -1;  // the barrier that this launch is to do without
// Set by the fiber that gives up. Fibers then never unwind, so theirs is nothing to free.
const char* fault = nullptr;
unsigned fault_thread = 0;
Thread body;
void* body_context;

void arrived_from([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  const void* from = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &from, &size);
  if (launcher.stack == nullptr) {  // the first switch is the launcher's: learn its stack
    launcher.stack = from;
    launcher.stack_size = size;
  }
#endif
}

void switch_to(Fiber& from, Fiber& to) {
  void* fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  // A fiber that has ended never comes back: a null pointer lets ASan forget it.
  __sanitizer_start_switch_fiber(from.waits == Waits::kEnded ? nullptr : &fake_stack, to.stack,
                                 to.stack_size);
  swapcontext(&from.context, &to.context);
#else
  // swapcontext would have the kernel swap signal masks each time, which takes far longer.
  from.was_left = true;
  if (_setjmp(from.left) == 0) {
    if (to.was_left) _longjmp(to.left, 1);
    setcontext(&to.context);
  }
#endif
  arrived_from(fake_stack);
}

void resume(Fiber& from, size_t next) {
  if (&from == &fibers[next]) return;
  current = next;
  threadIdx.x = fibers[next].thread;
  switch_to(from, fibers[next]);
}

[[noreturn]] void fail(Fiber& from, const char* message) {
  fault = message;
  fault_thread = from.thread;
  switch_to(from, launcher);
  __builtin_unreachable();
}

unsigned count(size_t begin, size_t end, Waits waits) {
  unsigned n = 0;
  for (size_t i = begin; i < end; ++i) n += fibers[i].waits == waits;
  return n;
}

void release(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) fibers[i].waits = Waits::kNot;
}

// The calling fiber can't go on: to the rest of its warp, then of its block. Warps run as far as
// they can before others start, which is what makes a missing barrier visible.
void yield() {
  Fiber& self = fibers[current];
  const size_t first = current / kWarp * kWarp, n = fibers.size();
  for (size_t i = 1; i <= kWarp; ++i) {
    const size_t lane = first + (current - first + i) % kWarp;
    if (fibers[lane].waits == Waits::kNot) return resume(self, lane);
  }
  if (count(first, first + kWarp, Waits::kCollective) != 0) {
    fail(self, "a shuffle that not all lanes of the warp reach");
  }
  for (size_t i = 0; i < n; ++i) {
    if (fibers[i].waits == Waits::kNot) return resume(self, i);
  }
  const unsigned waiting = count(0, n, Waits::kBarrier);
  if (waiting == 0) return switch_to(self, launcher);
  if (waiting != n) fail(self, "a __syncthreads that not all threads of the block reach");
  release(0, n);
  resume(self, 0);
}

void fiber_main() {
  arrived_from(nullptr);
  body(body_context);
  if (!fibers[current].copies.empty())
    fail(fibers[current], "a copy that its thread never waits for");
  fibers[current].waits = Waits::kEnded;
  yield();
  __builtin_unreachable();
}

void prepare(size_t position, unsigned thread) {
  Fiber& fiber = fibers[position];
  unsigned char* const stack = stacks.get() + position * kStack;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStack);  // frames that a former fiber never left
#endif
  fiber.stack = stack;
  fiber.stack_size = kStack;
  fiber.thread = thread;
  fiber.barriers = 0;
  fiber.waits = Waits::kNot;
  fiber.was_left = false;
  fiber.copies.clear();
  fiber.groups = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  // Else ASan clears the shadow of the whole stack at every switch.
  fiber.context.uc_stack.ss_size = 0;
}

void run_block(unsigned block, Order order) {
  const unsigned size = static_cast<unsigned>(fibers.size());
  pieces.clear();
  warps.assign(size / kWarp, Warp{});
  for (unsigned i = 0; i < size; ++i) prepare(i, order == Order::kForward ? i : size - 1 - i);
  blockIdx.x = block;
  resume(launcher, 0);
  if (fault != nullptr) {
    throw std::runtime_error(std::string("simt: ") + fault + " (block " +
                             std::to_string(blockIdx.x) + ", thread " +
                             std::to_string(fault_thread) + ")");
  }
}

}  // namespace

void barrier() {
  if (fibers[current].barriers++ == missing) return;
  fibers[current].waits = Waits::kBarrier;
  yield();
}

const Lanes* exchange(unsigned mask, Collective call, unsigned argument, const uint64_t* words,
                      unsigned count, unsigned& lane) {
  Fiber& self = fibers[current];
  Warp& warp = warps[current / kWarp];
  lane = self.thread % kWarp;
  if (mask != 0xffffffffu) fail(self, "a shuffle of part of a warp");
  const uint64_t id = static_cast<uint64_t>(call) << 40 | uint64_t{count} << 32 | argument;
  if (warp.arrived == 0) warp.call = id;
  if (warp.call != id) fail(self, "two different shuffles at once in a warp");
  Lanes* const values = warp.values[warp.round];
  for (unsigned word = 0; word < count; ++word) values[word][lane] = words[word];
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    warp.round ^= 1;
    const size_t first = current / kWarp * kWarp;
    release(first, first + kWarp);
  } else {
    self.waits = Waits::kCollective;
    yield();
  }
  return values;
}

void copy_later(void* to, const void* from, size_t bytes) {
  Fiber& self = fibers[current];
  const bool known = bytes == 4 || bytes == 8 || bytes == 16;
  const uintptr_t places = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (!known || places % bytes != 0)
    fail(self, "an asynchronous copy that isn't of 4, 8 or 16 aligned bytes");
  if (copies_land_at_once) std::memcpy(to, from, bytes);
  self.copies.push_back({to, from, copies_land_at_once ? 0 : bytes, self.groups});
}

void commit_copies() { ++fibers[current].groups; }

void wait_for_copies(size_t prior) {
  Fiber& self = fibers[current];
  size_t left = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group + prior < self.groups) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      self.copies[left++] = copy;
    }
  }
  self.copies.resize(left);
}

void* shared(const void* site, size_t bytes, size_t alignment) {
  size_t total = bytes;
  for (const Shared& known : pieces) {
    if (known.site == site) return known.memory.get();
    total += known.bytes;
  }
  if (total > kMostShared) fail(fibers[current], "more than 48 KB of static shared memory");
  void* const memory = ::operator new(bytes, std::align_val_t{alignment});
  std::memset(memory, 0xff, bytes);  // a NaN in every floating type
  pieces.push_back({site, bytes, {static_cast<unsigned char*>(memory), {alignment}}});
  return memory;
}

void run(unsigned grid, unsigned block, Order order, Thread thread, void* context) {
  if (grid == 0 || block == 0 || block > 1024) throw std::runtime_error("simt: no such launch");
  if (block % kWarp != 0) throw std::runtime_error("simt: blocks of whole warps only");
  if (stack_count < block) {
    stacks.reset(new unsigned char[block * kStack]);
    stack_count = block;
  }
  body = thread;
  body_context = context;
  gridDim.x = grid;
  blockDim.x = block;
  copies_land_at_once = order == Order::kReverse;
  missing = missing_barrier.launch == 0 ? missing_barrier.barrier : -1;
  if (missing_barrier.launch >= 0) --missing_barrier.launch;
  launcher.stack = nullptr;
  launcher.waits = Waits::kNot;
  fault = nullptr;
  fibers.resize(block);
  const unsigned first = last_blocks == 0 ? 0 : grid - std::min(last_blocks, grid);
  for (unsigned i = first; i < grid; ++i) run_block(i, order);
}

}  // namespace simt
