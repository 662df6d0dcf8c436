// SPDX-License-Identifier: Apache-2.0
// CPU registration: layers and attention called one after another. A small model at batch 1 spends a tenth of its time
// on the way from one op to the next, because the weights push the interpreter's code and data out of the cache.
#include "../attention/cpu.h"

#include <algorithm>
#include <cstring>

#include "../common/contents.h"
#include "../merge/cpu.h"
#include "../packed/cpu.h"
#include "../sorting/cpu.h"
#include "../tokens/cpu.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kMost = 1 << 20;  // heads, and their width: products of both must not overflow

// Starts of sequences of equal length.
Tensor equal_starts(const Tensor& like, int64_t batch, int64_t tokens) {
  const Tensor starts = allocate(like, {batch + 1}, ScalarType::Int);
  for (int64_t b = 0; b <= batch; ++b) mutable_data<int32_t>(starts)[b] = static_cast<int32_t>(b * tokens);
  return starts;
}

template <typename C>
void fill_mean(const Tensor& x, C* mean) {
  const C* from = data<C>(x);
  const int64_t heads = x.size(0), n = x.size(1);
  std::fill(mean, mean + n, C(0));
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < n; ++i) mean[i] += from[h * n + i];
  }
  for (int64_t i = 0; i < n; ++i) mean[i] /= static_cast<C>(heads);
}

Tensor mean_over_heads(const Tensor& x) {  // [H, T] -> [T]
  Tensor mean = allocate(x, {x.size(1)});
  x.scalar_type() == ScalarType::Double ? fill_mean(x, mutable_data<double>(mean))
                                        : fill_mean(x, mutable_data<float>(mean));
  return mean;
}

// What the rows of x are: padded [B, N, C], packed [T, C], or through an index.
struct Tokens {
  bool padded;
  int64_t heads, dim, width, rows, most;
  Tensor starts;

  Tokens(const char* op, const Tensor& x, int64_t num_heads, int64_t head_dim, const Optional& cu_seqlens,
         int64_t max_seqlen, const Optional& indices = {})
      : padded(!cu_seqlens.has_value()), heads(num_heads), dim(head_dim) {
    TP_CHECK(!padded || !indices.has_value(), op, "cu_seqlens must be given with indices, got none");
    check_dim(op, "x", x, padded ? 3 : 2, padded ? "[B, N, C] without cu_seqlens" : "[T, C] with cu_seqlens");
    TP_CHECK(heads >= 0 && heads <= kMost, op, "num_heads must be in 0..", kMost, ", got ", heads);
    TP_CHECK(dim >= 0 && dim <= kMost, op, "head_dim must be in 0..", kMost, ", got ", dim);
    width = heads * dim, most = padded ? x.size(1) : max_seqlen;
    rows = padded ? x.size(0) * most : indices.has_value() ? indices->numel() : x.size(0);
    TP_CHECK(!padded || (rows <= INT32_MAX && x.size(0) < INT32_MAX), op, "x must have fewer than 2^31 tokens, got ",
             shape_text(x));
    starts = padded ? equal_starts(x, x.size(0), most) : as_contiguous(*cu_seqlens);
  }

  // Queries, keys or values.
  Tensor part(const Tensor& qkv, int64_t place) const {
    return view(qkv, {rows, heads, dim}, {3 * width, dim, 1}, place * width);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_attention(
    const Tensor& x, const Optional& norm_weight, const Optional& norm_bias, double norm_eps, const Tensor& packed_qkv,
    const Optional& bias_qkv, const Tensor& packed_proj, const Optional& bias_proj, const Optional& layer_scale,
    int64_t heads, int64_t dim, const Optional& indices, const Optional& cu_seqlens, int64_t max_seqlen,
    const Optional& key_bias, double scale, bool want_cls) {
  const Tokens tokens("packed_attention", x, heads, dim, cu_seqlens, max_seqlen, indices);
  const int64_t width = tokens.width, most = tokens.most, rows = tokens.rows, channels = x.size(x.dim() - 1);
  const Tensor qkv =
      packed_linear(x, packed_qkv, 3 * width, bias_qkv, true, norm_weight, norm_bias, norm_eps, 0, {}, {}, indices);
  auto [mixed, lse, cls] =
      sparse_attention(tokens.part(qkv, 0), tokens.part(qkv, 1), tokens.part(qkv, 2), tokens.starts, tokens.starts,
                       most, most, key_bias, {}, {}, scale, want_cls);
  const Tensor inner = tokens.padded ? view(mixed, {x.size(0), most, width}, {most * width, width, 1}, 0)
                                     : view(mixed, {rows, width}, {width, 1}, 0);
  const Tensor residual = indices.has_value() ? gather_tokens(x, *indices) : x;
  Tensor y = packed_linear(inner, packed_proj, channels, bias_proj, false, {}, {}, 0, 0, layer_scale, residual, {});
  return {y, qkv, lse, mean_over_heads(cls)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_attention_merged(
    const Tensor& x, const Optional& norm_weight, const Optional& norm_bias, double norm_eps, const Tensor& packed_qkv,
    const Optional& bias_qkv, const Tensor& packed_proj, const Optional& bias_proj, const Optional& layer_scale,
    int64_t heads, int64_t dim, const Optional& key_bias, double scale, int64_t r, const Optional& size,
    bool class_token, bool distill_token, int64_t num_prefix) {
  check_dim("packed_attention_merged", "x", x, 3, "[B, N, C]");
  const auto [y, qkv, lse, cls] =
      packed_attention(x, norm_weight, norm_bias, norm_eps, packed_qkv, bias_qkv, packed_proj, bias_proj, layer_scale,
                       heads, dim, {}, {}, 0, key_bias, scale, false);
  const int64_t tokens = x.size(1), width = heads * dim;
  const Tensor keys = view(qkv, {x.size(0), tokens, heads, dim}, {tokens * 3 * width, 3 * width, dim, 1}, width);
  return match_and_merge(y, keys, r, size, class_token, distill_token, num_prefix);
}

// Rows of y without a source become zero.
void clear_padding(const Tensor& source, Tensor& y) {
  const int64_t bytes = y.size(1) * y.element_size();
  for (int64_t i = 0; i < source.numel(); ++i) {
    if (data<int32_t>(source)[i] < 0) std::memset(static_cast<char*>(y.mutable_data_ptr()) + i * bytes, 0, bytes);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_attention_sampled(
    const Tensor& input, const Optional& norm_weight, const Optional& norm_bias, double norm_eps,
    const Tensor& packed_qkv, const Optional& bias_qkv, const Tensor& packed_proj, const Optional& bias_proj,
    const Optional& layer_scale, int64_t heads, int64_t dim, const Optional& cu_seqlens, int64_t max_seqlen,
    const Optional& key_bias, double scale, const Tensor& initial, int64_t num_prefix, bool drop) {
  const char* op = "packed_attention_sampled";
  TP_CHECK(num_prefix >= 1, op, "num_prefix must be >= 1 (the class token), got ", num_prefix);
  const Tensor x = as_contiguous(input);
  const Tokens tokens(op, x, heads, dim, cu_seqlens, max_seqlen);
  check_dim(op, "cu_seqlens", tokens.starts, 1, "[B + 1]");
  check_dtype(op, "cu_seqlens", tokens.starts, ScalarType::Int);
  const int64_t batch = tokens.starts.numel() - 1, most = tokens.most, channels = x.size(x.dim() - 1);
  TP_CHECK(batch >= 0, op, "cu_seqlens must have at least one entry, got ", shape_text(tokens.starts));
  check_cu_seqlens(op, "cu_seqlens", tokens.starts, tokens.rows, most, "max_seqlen");
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* length = data<int32_t>(tokens.starts) + b;
    TP_CHECK(length[1] > length[0], op, "cu_seqlens must give every sequence a class token, got an empty one at ", b);
  }
  const Tensor qkv =
      packed_linear(x, packed_qkv, 3 * tokens.width, bias_qkv, true, norm_weight, norm_bias, norm_eps, 0, {}, {}, {});
  const Tensor q = tokens.part(qkv, 0), k = tokens.part(qkv, 1), v = tokens.part(qkv, 2);
  const Tensor first = view(tokens.starts, {batch}, {1}, 0), one = equal_starts(x, batch, 1);
  const Tensor cls =
      std::get<2>(sparse_attention(q, k, v, one, tokens.starts, 1, most, key_bias, first, {}, scale, true));
  auto [rows, source, starts] =
      sample_tokens(cls, v, initial, tokens.starts, most, key_bias, num_prefix, tokens.padded, drop);
  const int64_t columns = rows.size(1), kept = source.numel();
  const Tensor mixed =
      std::get<0>(sparse_attention(q, k, v, starts, tokens.starts, columns, most, key_bias, source, {}, scale, false));
  const Tensor residual = gather_tokens(view(x, {tokens.rows, channels}, {channels, 1}, 0), source);
  Tensor y = packed_linear(view(mixed, {kept, tokens.width}, {tokens.width, 1}, 0), packed_proj, channels, bias_proj,
                           false, {}, {}, 0, 0, layer_scale, residual, {});
  clear_padding(source, y);
  if (tokens.padded) y = view(y, {batch, columns, channels}, {columns * channels, channels, 1}, 0);
  return {y, rows, source, starts};
}

// Every head of every sequence as a sequence of its own: the rows of keys (or values) [T * 3 * H, D], counted from the
// first head of the first token.
struct HeadRows {
  Tensor starts, index;
  std::optional<Tensor> bias;

  HeadRows(const Tokens& tokens, const Optional& key_bias) {
    const int64_t batch = tokens.starts.numel() - 1, heads = tokens.heads;
    const int32_t* from = data<int32_t>(tokens.starts);
    starts = allocate(tokens.starts, {batch * heads + 1}, ScalarType::Int);
    index = allocate(tokens.starts, {from[batch] * heads}, ScalarType::Int);
    int32_t *first = mutable_data<int32_t>(starts), *row = mutable_data<int32_t>(index), end = 0;
    *first++ = 0;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t t = from[b]; t < from[b + 1]; ++t) *row++ = static_cast<int32_t>(t * 3 * heads + h);
        *first++ = end += from[b + 1] - from[b];
      }
    }
    if (key_bias.has_value()) set_bias(tokens, as_contiguous(*key_bias));
  }

 private:
  void set_bias(const Tokens& tokens, const Tensor& key_bias) {
    const int64_t batch = tokens.starts.numel() - 1, bytes = key_bias.element_size();
    const int32_t* from = data<int32_t>(tokens.starts);
    bias = allocate(key_bias, {index.numel()});
    char* to = static_cast<char*>(bias->mutable_data_ptr());
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t size = (from[b + 1] - from[b]) * bytes;
      for (int64_t h = 0; h < tokens.heads; ++h, to += size) {
        std::memcpy(to, static_cast<const char*>(key_bias.const_data_ptr()) + from[b] * bytes, size);
      }
    }
  }
};

// Every token receives what its group got, [rows, H * D]; zeros behind the last sequence.
Tensor spread_groups(const Tokens& tokens, const HeadGroups& groups, const Tensor& mixed) {
  Tensor out = allocate(mixed, {tokens.rows, tokens.width});
  const int32_t *cu = data<int32_t>(tokens.starts), *first = data<int32_t>(groups.cu_groups),
                *ids = data<int32_t>(groups.ids);
  const int64_t batch = tokens.starts.numel() - 1, bytes = tokens.dim * mixed.element_size();
  const char* from = static_cast<const char*>(mixed.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = cu[b]; t < cu[b + 1]; ++t) {
      for (int64_t row = b * tokens.heads; row < (b + 1) * tokens.heads; ++row, to += bytes) {
        std::memcpy(to, from + (first[row] + ids[row * tokens.most + t - cu[b]]) * bytes, bytes);
      }
    }
  }
  std::memset(to, 0, (tokens.rows - cu[batch]) * tokens.heads * bytes);
  return out;
}

std::tuple<Tensor, Tensor> packed_attention_grouped(
    const Tensor& input, const Optional& norm_weight, const Optional& norm_bias, double norm_eps,
    const Tensor& packed_qkv, const Optional& bias_qkv, const Tensor& packed_proj, const Optional& bias_proj,
    const Optional& layer_scale, int64_t heads, int64_t dim, const Optional& cu_seqlens, int64_t max_seqlen,
    const Optional& key_bias, double scale, const Tensor& projection, const Tensor& offset, double width) {
  const char* op = "packed_attention_grouped";
  const Tensor x = as_contiguous(input);
  const Tokens tokens(op, x, heads, dim, cu_seqlens, max_seqlen);
  TP_CHECK(tokens.rows <= INT32_MAX / (3 * heads + 1), op, "x must have fewer than 2^31 / (3 * num_heads) tokens, got ",
           shape_text(x));
  if (key_bias.has_value()) {
    check_dim(op, "key_bias", *key_bias, 1, "[T]");
    check_size(op, "key_bias", *key_bias, 0, tokens.rows);
  }
  const int64_t rows = tokens.rows, channels = x.size(x.dim() - 1);
  const Tensor qkv =
      packed_linear(x, packed_qkv, 3 * tokens.width, bias_qkv, true, norm_weight, norm_bias, norm_eps, 0, {}, {}, {});
  const HeadGroups groups =
      group_heads(op, tokens.part(qkv, 0), tokens.starts, tokens.most, projection, offset, width, scale);
  const HeadRows keys(tokens, key_bias);
  const auto all_heads = [&](int64_t place) {  // from the first head of keys (values) on
    const int64_t count = rows > 0 ? (3 * rows - 2) * heads : 0;
    return view(qkv, {count, 1, dim}, {dim, dim, 1}, place * tokens.width);
  };
  const int64_t found = groups.means.size(0);
  const Tensor mixed = std::get<0>(sparse_attention(view(groups.means, {found, 1, dim}, {dim, dim, 1}, 0), all_heads(1),
                                                    all_heads(2), groups.cu_groups, keys.starts, tokens.most,
                                                    tokens.most, keys.bias, {}, keys.index, scale, false));
  const Tensor inner = spread_groups(tokens, groups, mixed);
  Tensor y = packed_linear(inner, packed_proj, channels, bias_proj, false, {}, {}, 0, 0, layer_scale,
                           view(x, {rows, channels}, {channels, 1}, 0), {});
  if (tokens.padded) y = view(y, {x.size(0), tokens.most, channels}, {tokens.most * channels, channels, 1}, 0);
  const int64_t batch = tokens.starts.numel() - 1;
  const Tensor ids = view(groups.ids, {batch, heads, tokens.most}, {heads * tokens.most, tokens.most, 1}, 0);
  return {y, ids};
}

Tensor packed_mlp(const Tensor& x, const Optional& norm_weight, const Optional& norm_bias, double norm_eps,
                  const Tensor& packed_1, const Optional& bias_1, int64_t hidden, int64_t act, const Tensor& packed_2,
                  const Optional& bias_2, const Optional& layer_scale) {
  TP_CHECK(x.dim() >= 1, "packed_mlp", "x must have shape [..., C], got ", shape_text(x));
  const Tensor inner =
      packed_linear(x, packed_1, hidden, bias_1, true, norm_weight, norm_bias, norm_eps, act, {}, {}, {});
  return packed_linear(inner, packed_2, x.size(x.dim() - 1), bias_2, false, {}, {}, 0, 0, layer_scale, x, {});
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("packed_attention", TORCH_BOX(&packed_attention));
  m.impl("packed_attention_merged", TORCH_BOX(&packed_attention_merged));
  m.impl("packed_attention_sampled", TORCH_BOX(&packed_attention_sampled));
  m.impl("packed_attention_grouped", TORCH_BOX(&packed_attention_grouped));
  m.impl("packed_mlp", TORCH_BOX(&packed_mlp));
}

}  // namespace
}  // namespace tokenprune
