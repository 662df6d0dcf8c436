// SPDX-License-Identifier: Apache-2.0
// Tiles in shared memory as the tensor copy engine of sm_90 writes and wgmma reads them, and who holds which sum. Pure
// arithmetic, for the device, the host model of the tests, and the comparison with CuTe (tests/csrc/cute_tiles.cpp).
#pragma once

#include <cstdint>

namespace tokenprune::hopper {

constexpr int kGroupThreads = 128, kGroupRows = 64, kStep = 16;  // a wgmma takes 16 of the summed dimension

// ---- tiles ---------------------------------------------------------------------------------------------------------

// Bits 62 and 63 of a matrix descriptor.
enum class Swizzle : int { k128 = 1, k32 = 3 };
constexpr int swizzle_mask(Swizzle s) { return s == Swizzle::k128 ? 7 : 1; }

// Both engines exchange the 16-byte units of a row: address bits 4 to 6 (or 4) with bits 7 to 9 (or 7).
constexpr int swizzled(int address, Swizzle s) { return address ^ ((address >> 7 & swizzle_mask(s)) << 4); }

// leading: bytes from one column block to the next (operands whose columns are summed over do not use it);
// stride: bytes from 8 rows to the next 8.
constexpr uint64_t matrix_descriptor(uint32_t address, int leading, int stride, Swizzle s) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | static_cast<uint64_t>(s) << 62;
}

// Rows x Dim 16-bit values in column blocks: blocks of 64 columns (rows of 128 bytes) one after another, then one of 16
// (rows of 32 bytes) when Dim % 64 is 16. A block is what one copy_tile brings. Base addresses are multiples of 1024.
template <int Rows, int Dim>
struct Tile {
  static constexpr int kRows = Rows, kDim = Dim;
  static constexpr int kWide = Dim / 64, kNarrow = Dim % 64 / 16;  // blocks of 64, of 16
  static constexpr int kWideBytes = Rows * 128, kNarrowBytes = Rows * 32, kNarrowAt = kWide * kWideBytes;
  static constexpr int kBytes = Rows * Dim * 2, kUnits = Dim / 8;  // units of 16 bytes per row
  static_assert(Rows % 8 == 0 && kWide >= 1 && Dim == 64 * kWide + 16 * kNarrow && kNarrow <= 1);

  // Bytes from the base to an element.
  static constexpr int offset(int row, int column) {
    return column < 64 * kWide ? column / 64 * kWideBytes + swizzled(row * 128 + column % 64 * 2, Swizzle::k128)
                               : kNarrowAt + swizzled(row * 32 + (column - 64 * kWide) * 2, Swizzle::k32);
  }
  // Operand whose columns are summed over (A, or B given row by row): `step` counts 16 columns of a block.
  static constexpr uint64_t rows_wide(uint32_t base, int block, int row, int step) {
    return matrix_descriptor(base + block * kWideBytes + row * 128 + step * 32, 16, 1024, Swizzle::k128);
  }
  static constexpr uint64_t rows_narrow(uint32_t base, int row) {
    return matrix_descriptor(base + kNarrowAt + row * 32, 16, 256, Swizzle::k32);
  }
  // Operand B whose rows are summed over (`step` counts 16 rows): all wide blocks, or the narrow one.
  static constexpr uint64_t columns_wide(uint32_t base, int step) {
    return matrix_descriptor(base + step * kStep * 128, kWideBytes, 1024, Swizzle::k128);
  }
  static constexpr uint64_t columns_narrow(uint32_t base, int step) {
    return matrix_descriptor(base + kNarrowAt + step * kStep * 32, 16, 256, Swizzle::k32);
  }
};

// What B is given as: rows whose columns are summed over, or columns.
enum class Order : int { kRows = 0, kColumns = 1 };

// ---- accumulators --------------------------------------------------------------------------------------------------

// Row within the warpgroup's 64 and column of d[4 j + 2 i + e] of a thread of the warpgroup.
constexpr int sum_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + 8 * i; }
constexpr int sum_column(int thread, int j, int e) { return 8 * j + thread % 4 * 2 + e; }

}  // namespace tokenprune::hopper
