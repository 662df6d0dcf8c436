// SPDX-License-Identifier: Apache-2.0
// The sm_90a attention kernel on the host model (host_hopper.h) against scalar loops in double.
#include "../../csrc/attention/kernel_hopper_launch.cuh"
#include "attention_problem.h"

namespace tokenprune::test {
namespace {

hopper::TensorMap encode(const Rows& rows, int64_t heads, int64_t dim, int columns, int box_rows) {
  return {rows.data,
          {dim, heads, rows.rows},
          {2, rows.head_stride * 2, rows.row_stride * 2},
          columns,
          box_rows,
          columns == 64 ? hopper::Swizzle::k128 : hopper::Swizzle::k32};
}

template <typename T>
void forward(const Case& c, int processors) {
  Problem<T> x(c);
  std::vector<T> out(x.oracle.out.size(), from_acc<T>(kPoison));
  std::vector<float> lse(x.oracle.lse.size(), kPoison);
  x.p.o = out.data(), x.p.lse = lse.data();
  if (!hopper_serves(x.p)) return report(x.name("is served"), false, "");
  launch_hopper<T>(host_model::Launcher{}, encode, x.p, processors);
  const std::string groups = processors == 0 ? " tall" : "";
  close(x.name("out") + groups, out, x.oracle.out, tolerance<T>());
  close(x.name("lse") + groups, lse, x.oracle.lse, 2e-5);
}

// What lies behind a sequence belongs to others: infinities and NaN there must not come through.
template <typename T>
void neighbours(int dim) {
  Problem<T> x({"neighbours " + std::to_string(dim), {70, 3}, {130, 5}, 1, dim});
  for (int row = x.cu_k[1]; row < x.cu_k[2]; ++row) {
    for (int d = 0; d < dim; ++d) {
      x.k[int64_t{row} * dim + d] = x.v[int64_t{row} * dim + d] = from_acc<T>(d % 2 ? INFINITY : NAN);
    }
  }
  std::vector<T> out(x.oracle.out.size(), from_acc<T>(kPoison));
  std::vector<float> lse(x.oracle.lse.size(), kPoison);
  x.p.o = out.data(), x.p.lse = lse.data();
  launch_hopper<T>(host_model::Launcher{}, encode, x.p, 0);
  out.resize(int64_t{70} * dim), x.oracle.out.resize(int64_t{70} * dim);
  close(x.name("out"), out, x.oracle.out, tolerance<T>());
}

// Lengths that contradict each other and the buffers: any result, but no access outside (AddressSanitizer).
void wrong_contents() {
  Problem<__half> x({"wrong", {5, 3}, {4, 9}, 1, 64});
  x.cu_q = {3, -2, 100}, x.cu_k = {0, 50, 7};
  std::vector<__half> out(x.oracle.out.size());
  std::vector<float> lse(x.oracle.lse.size());
  x.p.o = out.data(), x.p.lse = lse.data();
  launch_hopper<__half>(host_model::Launcher{}, encode, x.p, 1);
  report(x.name("contents"), true, "");
}

void refused() {
  Problem<__half> odd({"odd", {4}, {4}, 2, 64, false, false, 0, 1}), indexed({"indexed", {4}, {4}, 1, 64, true}),
      narrow({"narrow", {4}, {4}, 1, 32}), empty({"empty", {0}, {0}, 1, 64});
  float cls = 0;
  Problem<__half> row({"cls", {4}, {4}, 1, 64});
  row.p.cls = &cls;
  report("others are refused",
         !hopper_serves(odd.p) && !hopper_serves(indexed.p) && !hopper_serves(narrow.p) && !hopper_serves(empty.p) &&
             !hopper_serves(row.p),
         "");
}

void everything() {
  for (const int dim : {64, 80, 128}) {
    const std::string width = " " + std::to_string(dim);
    const Case ragged{"ragged" + width, {5, 0, 67, 1, 0}, {270, 3, 0, 1, 4}, 2, dim, false, true, 3};
    const Case tiles{"tiles" + width, {130, 64}, {400, 128}, 1, dim, false, false, 0, 8};
    for (const int processors : {0, 1000}) {
      forward<__nv_bfloat16>(ragged, processors), forward<__half>(tiles, processors);
    }
  }
  neighbours<__nv_bfloat16>(80), neighbours<__half>(128);
  wrong_contents(), refused();
}

}  // namespace
}  // namespace tokenprune::test

int main() {
  using namespace tokenprune::test;
  if (kTiny) {  // every stage is used again
    forward<__nv_bfloat16>({"tiny", {70}, {600}, 1, 80, false, true}, 0);
    return finish();
  }
  everything();
  return finish();
}
