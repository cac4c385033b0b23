// torch's parallel_for over threads of our own, for ThreadSanitizer: torch's pool isn't
// instrumented, so races between its threads and their joins would be invisible or invented. Linked
// into the extension, this is what the ops of csrc/cpu call; the cut is that of at::parallel_for.
//
// LYAPCUDA_TEST_RACE=1 hands the first element of every share to its neighbour as well: a race that
// a run has to report, or it proves nothing.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                                             ParallelFunc f, void* context) {
  if (begin >= end) return 0;
  const int64_t all = end - begin, grain = std::max<int64_t>(grain_size, 1);
  const int64_t count = std::min(kThreads, (all + grain - 1) / grain);
  const int64_t share = (all + count - 1) / count;
  static const bool race = std::getenv("LYAPCUDA_TEST_RACE") != nullptr;
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += share) {
    const int64_t to = std::min(end, from + share + (race ? 1 : 0));
    threads.emplace_back([=] { f(from, to, context); });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
