// The emulator's collectives beyond one warp's shuffles: products of tiles, cooperative launches,
// shared memory that each block has for itself, faults that it is told to seed.
#include "../kernels/mma.cuh"
#include "simt_panel_support.h"

namespace lyapcuda::test {
namespace {

using simt::Order;

// --- products of tiles --------------------------------------------------------------------------
template <bool kUpper, int kRows, int kColumns>
__global__ void multiply_tiles(const double* a, const double* b, double* out) {
  const unsigned lane = threadIdx.x;
  double sums[4][4][2] = {}, mine[4] = {}, other[4] = {};
  for (int i = 0; i < kRows; ++i) mine[i] = a[i * 32 + lane];
  for (int j = 0; j < kColumns; ++j) other[j] = b[j * 32 + lane];
  kernels::multiply_add<kUpper, kRows, kColumns>(sums, mine, other);
  for (int v = 0; v < 32; ++v) out[v * 32 + lane] = sums[v / 8][v / 2 % 4][v % 2];
}

// a and b by rows of four, one 8×4 tile below the other: a·bᵀ.
template <bool kUpper, int kRows, int kColumns>
void products_of_tiles() {
  std::vector<double> a(kRows * 32), b(kColumns * 32), out(1024, std::nan(""));
  for (double& entry : a) entry = random_number();
  for (double& entry : b) entry = random_number();
  simt::launch(1, 32, Order::kReverse, multiply_tiles<kUpper, kRows, kColumns>, a.data(), b.data(),
               out.data());
  for (int i = 0; i < kRows * 8; ++i) {
    for (int j = 0; j < kColumns * 8; ++j) {
      if (kUpper && i / 8 > j / 8) continue;
      Sum expected;
      for (int k = 0; k < 4; ++k) expected.add(a[i * 4 + k], b[j * 4 + k]);
      const int lane = i % 8 * 4 + j % 8 / 2;  // PTX ISA, mma.m8n8k4 with .f64: the accumulators
      CHECK(expected.near(out[((i / 8 * 4 + j / 8) * 2 + j % 2) * 32 + lane]));
    }
  }
}

// --- cooperative launches -----------------------------------------------------------------------
// Every block reads what the others wrote before the barrier.
__global__ void meet(const int* from, int* between, int* to) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  between[i] = from[i];
  LYAPCUDA_GRID_SYNC();
  to[i] = between[(i + blockDim.x + 1) % n];
  LYAPCUDA_GRID_SYNC();
  between[(i + 1) % n] = 0;
}

bool meets_right(Order order) {
  constexpr int kBlocks = 3, kBlock = 64, n = kBlocks * kBlock;
  std::vector<int> from(n), between(n, -1), to(n, -1);
  for (int i = 0; i < n; ++i) from[i] = 5 * i + 2;
  simt::launch_cooperative(kBlocks, kBlock, order, meet, from.data(), between.data(), to.data());
  for (int i = 0; i < n; ++i) {
    if (to[i] != from[(i + kBlock + 1) % n] || between[i] != 0) return false;
  }
  return true;
}

// Blocks are alive at once, and still don't share their shared memory.
__global__ void keep_apart(int* to) {
  LYAPCUDA_SHARED(int[64], held);
  held[threadIdx.x] = static_cast<int>(blockIdx.x * 64 + threadIdx.x);
  LYAPCUDA_GRID_SYNC();
  to[blockIdx.x * 64 + threadIdx.x] = held[63 - threadIdx.x];
}

__global__ void first_to_run(int* order, int* count) {
  if (threadIdx.x == 0) order[(*count)++] = static_cast<int>(blockIdx.x);
  LYAPCUDA_GRID_SYNC();
}

void cooperative_launches() {
  for (const Order order : kOrders) {
    CHECK(meets_right(order));
    std::vector<int> apart(3 * 64, -1);
    simt::launch_cooperative(3, 64, order, keep_apart, apart.data());
    for (int i = 0; i < 3 * 64; ++i) CHECK(apart[i] == i / 64 * 64 + 63 - i % 64);
    int blocks[3], count = 0;
    simt::launch_cooperative(3, 32, order, first_to_run, blocks, &count);
    for (int i = 0; i < 3; ++i) CHECK(blocks[i] == (order == Order::kForward ? i : 2 - i));
  }
}

// --- what would hang is reported ----------------------------------------------------------------
__global__ void grid_barrier_for_some_blocks() {
  if (blockIdx.x != 1) LYAPCUDA_GRID_SYNC();
}
__global__ void grid_barrier_for_some_threads() {
  if (threadIdx.x % 64 < 40) LYAPCUDA_GRID_SYNC();
}
__global__ void grid_barrier_beside_barrier() {
  if (threadIdx.x < 32) {
    LYAPCUDA_GRID_SYNC();
  } else {
    __syncthreads();
  }
}
__global__ void grid_barrier_beside_shuffle() {
  if (threadIdx.x == 5) {
    LYAPCUDA_GRID_SYNC();
  } else {
    __shfl_xor_sync(0xffffffffu, 1, 1);
  }
}
__global__ void grid_barrier() { LYAPCUDA_GRID_SYNC(); }
__global__ void too_much_shared() {
  LYAPCUDA_SHARED(char[30000], some);
  LYAPCUDA_SHARED(char[20000], more);
  some[0] = more[0];
}

bool says(void (*kernel)(), bool cooperative, Order order, const char* part) {
  try {
    simt::launch_as(cooperative, 3, 64, order, kernel);
  } catch (const std::runtime_error& error) {
    return std::string(error.what()).find(part) != std::string::npos;
  }
  return false;
}

void misuse_is_an_error() {
  for (const Order order : kOrders) {
    CHECK(says(grid_barrier_for_some_blocks, true, order, "not all threads of the grid"));
    CHECK(says(grid_barrier_for_some_threads, true, order, "not all threads of the grid"));
    CHECK(says(grid_barrier_beside_barrier, true, order, "not all threads of the block"));
    CHECK(says(grid_barrier_beside_shuffle, true, order, "not all lanes"));
    CHECK(says(grid_barrier, false, order, "not cooperative"));
    CHECK(says(too_much_shared, false, order, "48 KB"));
    CHECK(meets_right(order));  // an abandoned launch leaves nothing behind
  }
}

}  // namespace

void simt_grid_tests() {
  products_of_tiles<true, 4, 4>();
  products_of_tiles<true, 1, 1>();
  products_of_tiles<false, 4, 4>();
  products_of_tiles<false, 3, 2>();
  cooperative_launches();
  misuse_is_an_error();
  CHECK(sees_missing_barrier(0, meets_right));
  CHECK(sees_missing_barrier(1, meets_right));
}

}  // namespace lyapcuda::test
