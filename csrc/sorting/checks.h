// SPDX-License-Identifier: Apache-2.0
// Check and fill: the rules of the ops of this family.
#pragma once

#include <algorithm>
#include <cstring>

#include "../common/contents.h"
#include "params.h"

namespace tokenprune {

inline void check_sortable(const char* op, const Tensor& x) {
  check_dim(op, "x", x, 2, "[R, N]");
  check_floating(op, "x", x);
  TP_CHECK(x.size(1) < (int64_t{1} << 31), op, "x must have less than 2^31 columns, got ", x.size(1));
}

// Where the first of the values is that does not lie in [0, end), or -1. Eight at a time: orders are long.
inline int64_t first_outside(const int32_t* values, int64_t n, int64_t end) {
  typedef uint32_t Eight __attribute__((vector_size(32), aligned(4), may_alias));
  const auto outside = [&](int64_t i) { return values[i] < 0 || values[i] >= end; };
  const uint32_t limit = static_cast<uint32_t>(end);
  Eight bad{};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) bad |= (Eight)(*reinterpret_cast<const Eight*>(values + i) >= limit);
  bool any = false;
  for (int lane = 0; lane < 8; ++lane) any |= bad[lane] != 0;
  for (; i < n; ++i) any |= outside(i);
  for (i = 0; any && i < n; ++i) {
    if (outside(i)) return i;
  }
  return -1;
}

// Tensors kept alive while the kernel runs, and the parameters that point into them.
struct BalancedCall {
  std::vector<Tensor> held;
  BalancedParams p;
  Tensor like;

  BalancedCall(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_order,
               const Tensor& k_order, const std::optional<Tensor>& q_lengths, const std::optional<Tensor>& k_lengths,
               const std::optional<Tensor>& key_bias, int64_t q_size, int64_t k_size, bool per_row, double scale)
      : like(q) {
    held.reserve(8);
    check_dim(op, "q", q, 3, "[R, Nq, D]");
    check_floating(op, "q", q);
    check_dim(op, "q_order", q_order, 3, "[rounds, R, Nq]");
    p.rounds = q_order.size(0), p.rows = q.size(0), p.dim = q.size(2), p.per_row = per_row, p.scale = scale;
    p.q.tokens = q.size(1), p.q.size = q_size, p.k.size = k_size;
    set_rows(op, "q", q, p.q_rows);
    set_rows(op, "k", k, p.k_rows);
    p.k.tokens = k.size(1);
    set_rows(op, "v", v, p.v_rows);
    check_size(op, "v", v, 1, p.k.tokens);
    set_side(op, "q_order", "q_lengths", q_order, q_lengths, p.q);
    set_side(op, "k_order", "k_lengths", k_order, k_lengths, p.k);
    TP_CHECK(q_size > 0, op, "q_size must be positive, got ", q_size);
    TP_CHECK(k_size > 0, op, "k_size must be positive, got ", k_size);
    if (!per_row) check_list(op);
    if (key_bias.has_value()) {
      check_dim(op, "key_bias", *key_bias, 2, "[R, Nk]");
      check_size(op, "key_bias", *key_bias, 0, p.rows);
      check_size(op, "key_bias", *key_bias, 1, p.k.tokens);
      check_dtype(op, "key_bias", *key_bias, stat_dtype(q.scalar_type()));
      check_device(op, "key_bias", *key_bias, q);
      p.key_bias = held.emplace_back(as_contiguous(*key_bias)).const_data_ptr();
    }
  }

 private:
  void set_rows(const char* op, const char* name, const Tensor& t, TokenRows& rows) {
    check_dim(op, name, t, 3, "[R, N, D]");
    check_dtype(op, name, t, like.scalar_type());
    check_device(op, name, t, like);
    check_size(op, name, t, 0, p.rows);
    check_size(op, name, t, 2, p.dim);
    const Tensor& kept = held.emplace_back(inner_contiguous(t));
    rows = {kept.const_data_ptr(), kept.stride(0), kept.stride(1)};
  }

  void set_side(const char* op, const char* order_name, const char* lengths_name, const Tensor& order,
                const std::optional<Tensor>& lengths, BalancedSide& side) {
    check_dim(op, order_name, order, 3, "[rounds, R, N]");
    check_dtype(op, order_name, order, ScalarType::Int);
    check_device(op, order_name, order, like);
    check_size(op, order_name, order, 0, p.rounds);
    check_size(op, order_name, order, 1, p.rows);
    check_size(op, order_name, order, 2, side.tokens);
    const Tensor& kept = held.emplace_back(as_contiguous(order));
    side.order = data<int32_t>(kept);
    const int64_t bad = first_outside(side.order, kept.numel(), side.tokens);
    TP_CHECK(bad < 0, op, order_name, " must be in [0, ", side.tokens, "), got ", side.order[bad], " at ", bad);
    if (!lengths.has_value()) return;
    TP_CHECK(p.per_row, op, lengths_name, " must be left out unless per_row, got lengths");
    check_dim(op, lengths_name, *lengths, 1, "[R]");
    check_dtype(op, lengths_name, *lengths, ScalarType::Int);
    check_device(op, lengths_name, *lengths, like);
    check_size(op, lengths_name, *lengths, 0, p.rows);
    side.lengths = data<int32_t>(held.emplace_back(as_contiguous(*lengths)));
  }

  // One list: whole clusters, as many of queries as of keys.
  void check_list(const char* op) const {
    const int64_t q_slots = p.rounds * p.rows * p.q.tokens, k_slots = p.rounds * p.rows * p.k.tokens;
    TP_CHECK(q_slots % p.q.size == 0, op, "q_size must divide rounds * rows * tokens (", q_slots, "), got ", p.q.size);
    TP_CHECK(k_slots % p.k.size == 0, op, "k_size must divide rounds * rows * tokens (", k_slots, "), got ", p.k.size);
    TP_CHECK(q_slots / p.q.size == k_slots / p.k.size, op, "k_size must make as many clusters as q_size (",
             q_slots / p.q.size, "), got ", k_slots / p.k.size);
  }
};

struct SampleCall {
  Tensor scores, order;
  std::optional<Tensor> valid, counts;
  SampleParams p;

  SampleCall(const char* op, const Tensor& s, const Tensor& ascending, int64_t grid_points,
             const std::optional<Tensor>& grid_counts, const std::optional<Tensor>& valid_entries, bool published)
      : scores(s), order(ascending) {
    check_dim(op, "scores", s, 2, "[B, n]");
    check_dtype(op, "scores", s, stat_dtype(s.scalar_type()));
    TP_CHECK(s.size(1) < (int64_t{1} << 31), op, "scores must have less than 2^31 columns, got ", s.size(1));
    TP_CHECK(grid_points >= 0, op, "grid_points must be >= 0, got ", grid_points);
    scores = as_contiguous(s);
    p.scores = scores.const_data_ptr();
    p.batch = s.size(0), p.n = s.size(1), p.points = grid_points, p.published = published;
    check_dim(op, "order", ascending, 2, "[B, n]");
    check_size(op, "order", ascending, 0, p.batch);
    check_size(op, "order", ascending, 1, p.n);
    check_dtype(op, "order", ascending, ScalarType::Long);
    check_device(op, "order", ascending, s);
    order = as_contiguous(ascending);
    p.order = data<int64_t>(order);
    for (int64_t i = 0; i < p.batch * p.n; ++i) {
      TP_CHECK(p.order[i] >= 0 && p.order[i] < p.n, op, "order must be in [0, ", p.n, "), got ", p.order[i], " at ", i);
    }
    if (grid_counts.has_value()) {
      check_dim(op, "grid_counts", *grid_counts, 1, "[B]");
      check_size(op, "grid_counts", *grid_counts, 0, p.batch);
      check_dtype(op, "grid_counts", *grid_counts, ScalarType::Int);
      check_device(op, "grid_counts", *grid_counts, s);
      counts = as_contiguous(*grid_counts);
      p.counts = data<int32_t>(*counts);
    }
    if (valid_entries.has_value()) {
      check_dim(op, "valid", *valid_entries, 2, "[B, n]");
      check_size(op, "valid", *valid_entries, 0, p.batch);
      check_size(op, "valid", *valid_entries, 1, p.n);
      check_dtype(op, "valid", *valid_entries, ScalarType::Bool);
      check_device(op, "valid", *valid_entries, s);
      valid = as_contiguous(*valid_entries);
      p.valid = data<bool>(*valid);
    }
  }
};

struct SequenceCall {
  std::vector<Tensor> held;
  SequenceParams p;

  SequenceCall(const char* op, const Tensor& attention, const Tensor& v, const Tensor& initial,
               const Tensor& cu_seqlens, int64_t max_seqlen, const std::optional<Tensor>& key_bias,
               int64_t num_prefix) {
    held.reserve(5);
    check_dim(op, "v", v, 3, "[T, H, D]");
    check_floating(op, "v", v);
    p.total = v.size(0), p.heads = v.size(1), p.dim = v.size(2), p.prefix = num_prefix, p.max_seqlen = max_seqlen;
    const Tensor& values = held.emplace_back(inner_contiguous(v));
    p.values = values.const_data_ptr(), p.row_stride = values.stride(0), p.head_stride = values.stride(1);
    check_dim(op, "attention", attention, 2, "[H, T]");
    check_size(op, "attention", attention, 0, p.heads);
    p.attention = set_stat(op, "attention", attention, 1, v);
    if (key_bias.has_value()) {
      check_dim(op, "key_bias", *key_bias, 1, "[T]");
      p.key_bias = set_stat(op, "key_bias", *key_bias, 0, v);
    }
    check_dim(op, "cu_seqlens", cu_seqlens, 1, "[B + 1]");
    check_dtype(op, "cu_seqlens", cu_seqlens, ScalarType::Int);
    check_device(op, "cu_seqlens", cu_seqlens, v);
    TP_CHECK(cu_seqlens.numel() >= 1, op, "cu_seqlens must have at least one entry, got ", shape_text(cu_seqlens));
    const Tensor& starts = held.emplace_back(as_contiguous(cu_seqlens));
    check_cu_seqlens(op, "cu_seqlens", starts, p.total, max_seqlen, "max_seqlen");
    p.cu_seqlens = data<int32_t>(starts), p.batch = starts.numel() - 1;
    TP_CHECK(num_prefix >= 0, op, "num_prefix must be >= 0, got ", num_prefix);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int32_t length = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
      TP_CHECK(length >= num_prefix, op, "num_prefix must be at most every sequence length, got ", num_prefix,
               " for a length of ", length, " at ", b);
    }
    TP_CHECK(p.batch == 0 || max_seqlen < (int64_t{1} << 31) / p.batch, op,
             "max_seqlen must give fewer than 2^31 rows in ", p.batch, " sequences, got ", max_seqlen);
    check_dim(op, "initial", initial, 2, "[B, N]");
    check_size(op, "initial", initial, 0, p.batch);
    check_dtype(op, "initial", initial, ScalarType::Bool);
    check_device(op, "initial", initial, v);
    p.points = initial.size(1) - num_prefix;
    TP_CHECK(initial.size(1) <= INT32_MAX, op, "initial must have fewer than 2^31 columns, got ", shape_text(initial));
    TP_CHECK(p.points >= 0, op, "initial must have the prefix (", num_prefix, ") in every row, got ",
             shape_text(initial));
    p.initial = data<bool>(held.emplace_back(as_contiguous(initial)));
  }

 private:
  const void* set_stat(const char* op, const char* name, const Tensor& t, int64_t dim, const Tensor& like) {
    check_size(op, name, t, dim, p.total);
    check_dtype(op, name, t, stat_dtype(like.scalar_type()));
    check_device(op, name, t, like);
    return held.emplace_back(as_contiguous(t)).const_data_ptr();
  }
};

struct GroupCall {
  std::vector<Tensor> held;
  GroupParams p;
  Tensor ids, counts;
  std::vector<int32_t> found;

  // x [R, N, D].
  GroupCall(const char* op, const Tensor& x, const Tensor& projection, const Tensor& offset, double width, double scale,
            const std::optional<Tensor>& valid) {
    check_dim(op, "x", x, 3, "[R, N, D]");
    p.rows = x.size(0), p.tokens = p.longest = x.size(1);
    TP_CHECK(p.tokens <= INT32_MAX, op, "x must have rows of less than 2^31 tokens, got ", p.tokens);
    set(op, x, projection, offset, width, scale);
    p.sequence_stride = held[0].stride(0), p.token_stride = held[0].stride(1);
    if (valid.has_value()) {
      check_dim(op, "valid", *valid, 2, "[R, N]");
      check_size(op, "valid", *valid, 0, p.rows);
      check_size(op, "valid", *valid, 1, p.tokens);
      check_dtype(op, "valid", *valid, ScalarType::Bool);
      check_device(op, "valid", *valid, x);
      p.valid = static_cast<const uint8_t*>(held.emplace_back(as_contiguous(*valid)).const_data_ptr());
    }
  }

  // Every head of x [T, H, D] in sequences.
  GroupCall(const char* op, const Tensor& x, const Tensor& cu_seqlens, int64_t max_seqlen, const Tensor& projection,
            const Tensor& offset, double width, double scale) {
    check_dim(op, "x", x, 3, "[T, H, D]");
    check_dim(op, "cu_seqlens", cu_seqlens, 1, "[B + 1]");
    check_dtype(op, "cu_seqlens", cu_seqlens, ScalarType::Int);
    TP_CHECK(cu_seqlens.numel() >= 1, op, "cu_seqlens must have at least one entry, got ", shape_text(cu_seqlens));
    TP_CHECK(max_seqlen >= 0 && max_seqlen <= INT32_MAX, op, "max_seqlen must be in 0..2^31 - 1, got ", max_seqlen);
    p.heads = x.size(1), p.rows = (cu_seqlens.numel() - 1) * p.heads, p.tokens = max_seqlen;
    p.longest = std::min(max_seqlen, x.size(0));
    set(op, x, projection, offset, width, scale);
    p.token_stride = held[0].stride(0), p.head_stride = held[0].stride(1);
    const Tensor& starts = held.emplace_back(as_contiguous(cu_seqlens));
    check_cu_seqlens(op, "cu_seqlens", starts, x.size(0), max_seqlen, "max_seqlen");
    p.cu_seqlens = data<int32_t>(starts);
  }

 private:
  void set(const char* op, const Tensor& x, const Tensor& projection, const Tensor& offset, double width,
           double scale) {
    held.reserve(4);
    check_floating(op, "x", x);
    TP_CHECK(width > 0, op, "width must be positive, got ", width);
    p.x = held.emplace_back(inner_contiguous(x)).const_data_ptr();
    p.dim = x.size(2), p.width = width, p.scale = scale;
    const int64_t hashes = check_draws(op, x, projection, offset);
    p.hashes = (hashes + kPadding - 1) / kPadding * kPadding;
    p.projection = held.emplace_back(padded(projection, p.dim, hashes)).const_data_ptr();
    p.offset = held.emplace_back(padded(offset, 1, hashes)).const_data_ptr();
    ids = allocate(x, {p.rows, p.tokens}, ScalarType::Int), counts = allocate(x, {p.rows, p.tokens}, ScalarType::Int);
    found.resize(p.rows);
    p.ids = mutable_data<int32_t>(ids), p.counts = mutable_data<int32_t>(counts), p.found = found.data();
  }

  // Lanes of the widest vector. Behind the first hash one of zeros adds nothing to a code, nor does one of NaN.
  static constexpr int64_t kPadding = 16;

  static int64_t check_draws(const char* op, const Tensor& x, const Tensor& projection, const Tensor& offset) {
    check_dim(op, "projection", projection, 2, "[D, L]");
    check_size(op, "projection", projection, 0, x.size(2));
    const int64_t hashes = projection.size(1);
    TP_CHECK(hashes >= 1 && hashes <= kMaxHashes, op, "projection must hold 1 to ", kMaxHashes, " hashes, got ",
             hashes);
    check_dim(op, "offset", offset, 1, "[L]");
    check_size(op, "offset", offset, 0, hashes);
    check_dtype(op, "projection", projection, stat_dtype(x.scalar_type()));
    check_dtype(op, "offset", offset, stat_dtype(x.scalar_type()));
    check_device(op, "projection", projection, x);
    check_device(op, "offset", offset, x);
    return hashes;
  }

  Tensor padded(const Tensor& t, int64_t rows, int64_t columns) const {
    const Tensor from = as_contiguous(t);
    Tensor to = allocate(t, {rows, p.hashes});
    const int64_t bytes = t.element_size();
    char* row = static_cast<char*>(to.mutable_data_ptr());
    std::memset(row, 0, rows * p.hashes * bytes);
    for (int64_t r = 0; r < rows; ++r, row += p.hashes * bytes) {
      std::memcpy(row, static_cast<const char*>(from.const_data_ptr()) + r * columns * bytes, columns * bytes);
    }
    return to;
  }
};

}  // namespace tokenprune
