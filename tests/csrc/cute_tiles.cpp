// SPDX-License-Identifier: Apache-2.0
// The tiles, matrix descriptors and register layouts of csrc/common/hopper_tile.h against CuTe's, on the host. Needs
// the headers of CUTLASS and of the CUDA toolkit; tests/ops/test_hopper.py builds and runs it.
#include <cstdio>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "../../csrc/common/hopper_tile.h"

using namespace cute;
namespace hopper = tokenprune::hopper;
using Element = cutlass::bfloat16_t;

int wrong = 0, compared = 0;

void expect(bool good, const char* what, int a, int b) {
  ++compared;
  if (good) return;
  if (++wrong < 20) std::printf("FAIL %s at %d, %d\n", what, a, b);
}

// The fields that the hardware reads: a descriptor of CuTe's for a tile at address 0, ours with its address taken out.
bool same_descriptor(uint64_t ours, uint64_t cutes, bool leading) {
  const uint64_t mask = ~uint64_t{0x3fff} & ~(leading ? uint64_t{0} : uint64_t{0x3fff} << 16);
  return (ours & mask) == (cutes & mask);
}
int start_of(uint64_t descriptor) { return static_cast<int>(descriptor & 0x3fff) << 4; }

// Elements and row operands of `Columns` columns from column `first` on; `ours(row, step)` gives the descriptor.
template <typename Atom, int Rows, int Columns, typename Offset, typename Ours>
void rows_operand(const char* what, Offset offset, Ours ours) {
  const auto layout = tile_to_shape(Atom{}, Shape<Int<Rows>, Int<Columns>>{});
  const auto place = as_position_independent_swizzle_layout(layout);
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Columns; ++c) expect(int(place(r, c)) * 2 == offset(r, c), what, r, c);
  }
  const auto tensor = make_tensor(make_smem_ptr(static_cast<Element*>(nullptr)), layout);
  for (int row = 0; row < Rows; row += 64) {
    for (int step = 0; step < Columns / 16; ++step) {
      const auto operand = local_tile(tensor, Shape<_64, _16>{}, make_coord(row / 64, step));
      const uint64_t cutes = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(operand).desc_;
      expect(same_descriptor(ours(row, step), cutes, false), what, row, step);
      // The start is not swizzled; `layout` without its position is not either.
      expect(start_of(ours(row, step)) == int(layout(row, step * 16)) * 2, what, row, step);
    }
  }
}

// Operand whose rows are summed over: the same memory seen as (column, row).
template <typename Atom, int Rows, int Columns, typename Offset, typename Ours>
void columns_operand(const char* what, Offset offset, Ours ours) {
  const auto layout = tile_to_shape(Atom{}, Shape<Int<Columns>, Int<Rows>>{}, Step<_2, _1>{});
  const auto place = as_position_independent_swizzle_layout(layout);
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Columns; ++c) expect(int(place(c, r)) * 2 == offset(r, c), what, r, c);
  }
  const auto tensor = make_tensor(make_smem_ptr(static_cast<Element*>(nullptr)), layout);
  for (int step = 0; step < Rows / 16; ++step) {
    const auto operand = local_tile(tensor, Shape<Int<Columns>, _16>{}, make_coord(0, step));
    const uint64_t cutes = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(operand).desc_;
    expect(same_descriptor(ours(step), cutes, Columns > 64), what, step, 0);
    expect(start_of(ours(step)) == int(layout(0, step * 16)) * 2, what, step, 1);
  }
}

template <int Rows, int Dim>
void tile() {
  using Tile = hopper::Tile<Rows, Dim>;
  using namespace SM90::GMMA;
  constexpr int kWide = 64 * Tile::kWide;
  rows_operand<Layout_K_SW128_Atom<Element>, Rows, kWide>(
      "rows", [](int r, int c) { return Tile::offset(r, c); },
      [](int row, int step) { return Tile::rows_wide(0, step / 4, row, step % 4); });
  columns_operand<Layout_MN_SW128_Atom<Element>, Rows, kWide>(
      "columns", [](int r, int c) { return Tile::offset(r, c); }, [](int step) { return Tile::columns_wide(0, step); });
  if constexpr (Tile::kNarrow == 1) {
    const auto offset = [](int r, int c) { return Tile::offset(r, kWide + c) - Tile::kNarrowAt; };
    constexpr uint64_t kBase = Tile::kNarrowAt / 16;
    rows_operand<Layout_K_SW32_Atom<Element>, Rows, 16>("narrow rows", offset,
                                                        [](int row, int) { return Tile::rows_narrow(0, row) - kBase; });
    columns_operand<Layout_MN_SW32_Atom<Element>, Rows, 16>(
        "narrow columns", offset, [](int step) { return Tile::columns_narrow(0, step) - kBase; });
  }
}

// Which sums a thread holds, and which elements of an operand from registers.
template <int N>
void registers() {
  using Op = decltype(SM90::GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<N>, _16>>());
  using Traits = MMA_Traits<Op>;
  const typename Traits::CLayout sums;
  const typename Traits::ALayout operand;
  for (int thread = 0; thread < 128; ++thread) {
    for (int n = 0; n < N / 2; ++n) {
      const int row = hopper::sum_row(thread, n / 2 % 2), column = hopper::sum_column(thread, n / 4, n % 2);
      expect(int(sums(thread, n)) == row + 64 * column, "sums", thread, n);
    }
    for (int v = 0; v < 8; ++v) {  // register v / 2, half v % 2: rows g, g + 8, then the columns from 8 on
      const int row = hopper::sum_row(thread, v / 2 % 2), column = v / 4 * 8 + hopper::sum_column(thread, 0, v % 2);
      expect(int(operand(thread, v)) == row + 64 * column, "operand", thread, v);
    }
  }
}

int main() {
  tile<64, 64>(), tile<128, 64>(), tile<64, 80>(), tile<128, 80>(), tile<64, 128>(), tile<128, 128>(), tile<256, 64>();
  registers<16>(), registers<64>(), registers<128>(), registers<256>();
  std::printf("%d compared, %d wrong\n", compared, wrong);
  return wrong == 0 ? 0 : 1;
}
