// The emulator's products of tiles (kernels/mma.cuh), which take a warp.
#include "../kernels/mma.cuh"
#include "simt_panel_support.h"

namespace lyapcuda::test {
namespace {

using simt::Order;

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

}  // namespace

void simt_tiles_tests() {
  products_of_tiles<true, 4, 4>();
  products_of_tiles<true, 1, 1>();
  products_of_tiles<false, 4, 4>();
  products_of_tiles<false, 3, 2>();
}

}  // namespace lyapcuda::test
