// How work is cut and sums are joined (cpu/blocks.h).
#include "../cpu/blocks.h"

#include "check.h"

namespace lyapcuda::test {
namespace {

void trees_sum_every_row() {
  for (int64_t width : {1, 6}) {
    for (int64_t count = 1; count < 300; ++count) {
      std::vector<double> rows(count * width + 1, 0.0);
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < width; ++i) rows[row * width + i] = double(row * (i + 1) + 1);
      }
      rows.back() = -7.0;  // beyond the end
      cpu::tree_sum(rows.data(), count, width);
      for (int64_t i = 0; i < width; ++i) {
        CHECK(rows[i] == double((i + 1) * (count * (count - 1) / 2) + count));
      }
      CHECK(rows.back() == -7.0);
    }
  }
}

void trees_are_pairwise() {
  // ((a + b) + (c + d)) + (e + 0): any other order rounds these differently.
  double rows[5] = {1.0, 0x1p-53, 0x1p-53, 0x1p-53, 0x1p-52};
  const double expected = ((rows[0] + rows[1]) + (rows[2] + rows[3])) + rows[4];
  cpu::tree_sum(rows, 5, 1);
  CHECK(rows[0] == expected);
  double untouched = 3.0;
  cpu::tree_sum(&untouched, 0, 1);
  CHECK(untouched == 3.0);
}

void blocks_cover_their_segments() {
  const int64_t b = cpu::kBlock;
  CHECK(cpu::Blocks({}).count() == 0);
  CHECK(cpu::Blocks({0, 0}).count() == 0);
  CHECK(cpu::Blocks({1, b, b + 1, 0}).count() == 1 + 1 + 2);
  CHECK(cpu::Blocks({1, b, b + 1, 0}).elements() == 2 * b + 2);
  const int64_t huge = int64_t{1} << 33;  // counts don't pass through 32 bits
  CHECK(cpu::Blocks({huge, huge}).count() == 2 * (huge / b));
  CHECK(cpu::Blocks({huge, huge}).elements() == 2 * huge);
}

}  // namespace

void blocks_tests() {
  trees_sum_every_row();
  trees_are_pairwise();
  blocks_cover_their_segments();
}

}  // namespace lyapcuda::test
