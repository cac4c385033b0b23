// The emulator itself (simt.h): it runs what is right, reports what would hang, and its orders show
// a missing barrier; the tables of segments.
#include "../simt/simt.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/reduce.cuh"
#include "../kernels/segments.cuh"
#include "check.h"

namespace lyapcuda::test {
namespace {

using simt::Order;
constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kReverseLate};
constexpr int kThreads = kernels::kThreads;

// --- the words ----------------------------------------------------------------------------------
__global__ void record_places(unsigned* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = i + 1000 * gridDim.x;
}

__global__ void shuffle_all(double* down, unsigned* across) {
  const unsigned i = threadIdx.x;
  down[i] = __shfl_down_sync(0xffffffffu, double(i) + 0.5, 5);
  for (unsigned mask = 1; mask < 32; mask *= 2) {
    across[i] += __shfl_xor_sync(0xffffffffu, i, mask);
  }
}

// Reads what its neighbour's warp wrote, twice through the same memory.
__global__ void rotate_twice(const int* from, int* to) {
  LYAPCUDA_SHARED(int[kThreads], held);
  const unsigned i = threadIdx.x, next = (i + 32) % kThreads;
  held[i] = from[i];
  __syncthreads();
  const int first = held[next];
  __syncthreads();
  held[i] = first;
  __syncthreads();
  to[i] = held[next];
}

__global__ void read_unwritten(double* out) {
  LYAPCUDA_SHARED(double, never);
  if (threadIdx.x == 0) {
    *out = never;
    never = 1.0;
  }
}

// What its thread sees of a copy before it waits for it, and after; of two, waits for the first
// first.
__global__ void copy_asynchronously(const float4* from, float* before, float* after) {
  LYAPCUDA_SHARED(float4[2][32], held);
  const unsigned i = threadIdx.x;
  for (unsigned group = 0; group < 2; ++group) {
    __pipeline_memcpy_async(&held[group][i], &from[group * 32 + i], 16);
    __pipeline_commit();
  }
  before[i] = held[0][i].x;
  __pipeline_wait_prior(1);
  after[i] = held[0][i].x;
  before[32 + i] = held[1][i].x;
  __pipeline_wait_prior(0);
  after[32 + i] = held[1][i].x;
}

void copies_land_between() {
  for (const Order order : kOrders) {
    alignas(16) float from[64 * 4];
    float before[64], after[64];
    for (int i = 0; i < 64 * 4; ++i) from[i] = static_cast<float>(i);
    simt::launch(1, 32, order, copy_asynchronously, reinterpret_cast<const float4*>(from), before,
                 after);
    for (int i = 0; i < 64; ++i) {
      CHECK(after[i] == 4.0f * static_cast<float>(i));
      CHECK(std::isnan(before[i]) == (order != Order::kReverse));
    }
  }
}

void words_mean_what_cuda_says() {
  for (const Order order : kOrders) {
    std::vector<unsigned> places(3 * 64, 0);
    simt::launch(3, 64, order, record_places, places.data());
    for (unsigned i = 0; i < places.size(); ++i) CHECK(places[i] == i + 3000);

    std::vector<double> down(64);
    std::vector<unsigned> across(64, 0);
    simt::launch(1, 64, order, shuffle_all, down.data(), across.data());
    for (unsigned i = 0; i < 64; ++i) {
      CHECK(down[i] == (i % 32 + 5 < 32 ? i + 5 : i) + 0.5);
      CHECK(across[i] == (i ^ 1) + (i ^ 2) + (i ^ 4) + (i ^ 8) + (i ^ 16));
    }

    std::vector<int> from(kThreads), to(kThreads);
    for (int i = 0; i < kThreads; ++i) from[i] = 7 * i + 1;
    simt::launch(1, kThreads, order, rotate_twice, from.data(), to.data());
    for (int i = 0; i < kThreads; ++i) CHECK(to[i] == from[(i + 64) % kThreads]);

    double unwritten = 0.0;  // the second block doesn't see what the first left either
    simt::launch(2, 32, order, read_unwritten, &unwritten);
    CHECK(std::isnan(unwritten));
  }
}

// --- what would hang is reported ----------------------------------------------------------------
__global__ void barrier_for_some() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void barrier_beside_shuffle() {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    __shfl_down_sync(0xffffffffu, 1, 1);
  }
}
__global__ void shuffle_for_some() {
  if (threadIdx.x % 32 != 7) __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void shuffle_of_half() {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffu, 1, 1);
}
__global__ void two_shuffles() {
  if (threadIdx.x % 2 == 0) {
    __shfl_down_sync(0xffffffffu, 1, 1);
  } else {
    __shfl_down_sync(0xffffffffu, 1, 2);
  }
}

__global__ void copy_not_waited_for(const float4* from) {
  LYAPCUDA_SHARED(float4[32], held);
  __pipeline_memcpy_async(&held[threadIdx.x], from, 16);
  __pipeline_commit();
  __pipeline_wait_prior(1);
}
__global__ void misaligned_copy(const float4* from) {
  LYAPCUDA_SHARED(float4[32], held);
  __pipeline_memcpy_async(&held[threadIdx.x], reinterpret_cast<const char*>(from) + 8, 16);
  __pipeline_wait_prior(0);
}

__global__ void too_much_shared() {
  LYAPCUDA_SHARED(char[30000], some);
  LYAPCUDA_SHARED(char[20000], more);
  some[0] = more[0];
}

template <class Kernel, class... A>
std::string fault_of(Kernel* kernel, unsigned block, Order order, A... arguments) {
  try {
    simt::launch(2, block, order, kernel, arguments...);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void misuse_is_an_error() {
  const auto says = [](const std::string& message, const char* part) {
    return message.find(part) != std::string::npos;
  };
  for (const Order order : kOrders) {
    CHECK(says(fault_of(barrier_for_some, 64, order), "not all threads"));
    CHECK(says(fault_of(barrier_beside_shuffle, 64, order), "not all lanes"));
    CHECK(says(fault_of(shuffle_for_some, 64, order), "not all lanes"));
    CHECK(says(fault_of(shuffle_of_half, 64, order), "part of a warp"));
    CHECK(says(fault_of(two_shuffles, 64, order), "two different shuffles"));
    CHECK(says(fault_of(too_much_shared, 64, order), "48 KB"));
    alignas(16) float4 from[2] = {};
    const float4* const some = from;
    CHECK(says(fault_of(copy_not_waited_for, 32, order, some), "never waits for"));
    CHECK(says(fault_of(misaligned_copy, 32, order, some), "aligned"));
    CHECK(says(fault_of(shuffle_for_some, 33, order), "whole warps"));
    CHECK(says(fault_of(shuffle_for_some, 0, order), "no such launch"));
  }
  words_mean_what_cuda_says();  // an abandoned launch leaves nothing behind
}

// --- seeded faults ------------------------------------------------------------------------------
// block_sum of reduce.cuh, and without its barrier.
template <bool kBarrier>
__global__ void sum_block(const double* from, double* to) {
  double sums[1] = {from[threadIdx.x]};
  if constexpr (kBarrier) {
    kernels::block_sum(sums);
  } else {
    LYAPCUDA_SHARED(double[kernels::kWarps], rows);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (unsigned delta = 16; delta > 0; delta /= 2) {
      sums[0] += __shfl_down_sync(0xffffffffu, sums[0], delta);
    }
    if (lane == 0) rows[warp] = sums[0];
    if (warp != 0) return;
    sums[0] = lane < kernels::kWarps ? rows[lane] : 0.0;
    for (unsigned delta = kernels::kWarps / 2; delta > 0; delta /= 2) {
      sums[0] += __shfl_down_sync(0xffffffffu, sums[0], delta);
    }
  }
  if (threadIdx.x == 0) *to = sums[0];
}

// rotate_twice without the barrier between a read and the next write.
__global__ void rotate_racing(const int* from, int* to) {
  LYAPCUDA_SHARED(int[kThreads], held);
  const unsigned i = threadIdx.x, next = (i + 32) % kThreads;
  held[i] = from[i];
  __syncthreads();
  held[i] = held[next];
  __syncthreads();
  to[i] = held[next];
}

bool sums_right(void (*kernel)(const double*, double*), Order order) {
  std::vector<double> from(kThreads);
  double sum = 0.0;
  for (int i = 0; i < kThreads; ++i) from[i] = i + 1;
  simt::launch(1, kThreads, order, kernel, from.data(), &sum);
  return sum == kThreads * (kThreads + 1) / 2;
}

bool rotates_right(void (*kernel)(const int*, int*), Order order) {
  std::vector<int> from(kThreads), to(kThreads);
  for (int i = 0; i < kThreads; ++i) from[i] = i;
  simt::launch(1, kThreads, order, kernel, from.data(), to.data());
  for (int i = 0; i < kThreads; ++i) {
    if (to[i] != (i + 64) % kThreads) return false;
  }
  return true;
}

void seeded_faults_are_seen() {
  for (const Order order : kOrders) {
    CHECK(sums_right(sum_block<true>, order));
    CHECK(rotates_right(rotate_twice, order));
  }
  // Each order alone misses one of the races.
  CHECK(!sums_right(sum_block<false>, Order::kForward));
  CHECK(!rotates_right(rotate_racing, Order::kForward) ||
        !rotates_right(rotate_racing, Order::kReverse));
}

// --- tables of segments --------------------------------------------------------------------------
void counts_have_64_bits() {
  constexpr int64_t kHuge = (int64_t{1} << 43) + 5, kChunk = kernels::kChunk<float>;
  float* const nothing = nullptr;
  float* const* const lists[1] = {&nothing};
  kernels::for_each_table(lists, &kHuge, nullptr, 1, [&](const auto& table) {
    CHECK(table.first_chunk[1] == kHuge / kChunk + 1 && table.size[0] == kHuge);
  });
}

void tables_take_so_many_tensors() {
  constexpr int64_t kMost = kernels::kMaxSegments, kTensors = 2 * kMost + 22;
  std::vector<int64_t> sizes(kTensors, 3), counts;
  sizes[7] = 0;
  std::vector<float*> list(kTensors, nullptr);
  float* const* const lists[1] = {list.data()};
  const auto note = [&](const auto& table) { counts.push_back(table.count); };
  kernels::for_each_table(lists, sizes.data(), nullptr, kTensors, note);
  CHECK(counts == std::vector<int64_t>({kMost, kMost, 21}));
  counts.clear();
  kernels::for_each_table(lists, sizes.data(), nullptr, kMost + 1, note);  // one of them is empty
  CHECK(counts == std::vector<int64_t>({kMost}));
  counts.clear();
  kernels::for_each_table(lists, sizes.data(), nullptr, 0, note);
  CHECK(counts == std::vector<int64_t>({0}));
}

// Every chunk from every segment that it may be looked for from, in tables of all lengths.
void chunks_are_found() {
  std::vector<int64_t> sizes;
  std::vector<float*> list(kernels::kMaxSegments, nullptr);
  float* const* const lists[1] = {list.data()};
  for (int count = 1; count <= kernels::kMaxSegments; count += count < 9 ? 1 : 13) {
    sizes.assign(count, 0);
    for (int s = 0; s < count; ++s) sizes[s] = s % 7 == 3 ? 5 : 1;
    const auto find = [&](const kernels::Segments<float, 1>& table) {
      bool right = table.count == count;
      for (int s = 0; s < count; ++s) {
        for (int64_t chunk = table.first_chunk[s]; chunk < table.first_chunk[s + 1]; ++chunk) {
          for (int known = 0; known <= s; ++known) {
            right = right && kernels::segment_of(table, chunk, known) == s;
          }
        }
      }
      CHECK(right);
    };
    kernels::for_each_table(lists, sizes.data(), nullptr, count, find, 1);
  }
}

}  // namespace

void simt_emulator_tests() {
  words_mean_what_cuda_says();
  copies_land_between();
  misuse_is_an_error();
  seeded_faults_are_seen();
  counts_have_64_bits();
  tables_take_so_many_tensors();
  chunks_are_found();
}

}  // namespace lyapcuda::test
