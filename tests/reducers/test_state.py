# SPDX-License-Identifier: Apache-2.0
"""Token state and block branches."""

import pytest
import torch
from tokenprune_ext.nn import (
    AttentionBranch,
    BlockParts,
    MlpBranch,
    TokenState,
    pad_rows,
    row_positions,
    run_block,
    sequence_of_row,
    unpad_rows,
)
from torch import nn

from .common import WIDTH, pack_ragged, tiny_blocks, tokens


def test_packed_helpers_handle_empty_sequences():
    cu = torch.tensor([0, 0, 3, 3, 5, 5], dtype=torch.int32)
    assert sequence_of_row(cu, 5).tolist() == [1, 1, 1, 3, 3]
    assert row_positions(cu, 5).tolist() == [0, 1, 2, 0, 1]
    values = torch.arange(10.0).view(5, 2)
    padded = pad_rows(values, cu, 4, -1.0)
    assert padded.shape == (5, 4, 2) and bool((padded[[0, 2, 4]] == -1).all())
    assert torch.equal(unpad_rows(padded, cu, 5), values)
    nothing = torch.zeros(3, dtype=torch.int32)
    assert pad_rows(values[:0], nothing, 2, 0.0).shape == (2, 2, 2)
    assert unpad_rows(padded, nothing, 0).shape == (0, 2)


def test_packing_there_and_back():
    x = tokens()
    state = TokenState(grid=(4, 4), num_prefix=1, size=torch.rand(2, 17)).with_trace(x)
    packed, inner = state.as_packed(x)
    assert packed.shape == (34, WIDTH) and inner.cu_seqlens.tolist() == [0, 17, 34] and inner.size.shape == (34,)
    assert inner.packed and inner.uniform(packed) and inner.as_packed(packed)[0] is packed
    back, outer = inner.as_padded(packed)
    assert torch.equal(back, x) and torch.equal(outer.index, state.index) and not outer.packed
    ragged, other = pack_ragged([tokens(1, 3), tokens(1, 5)])
    with pytest.raises(ValueError, match="as_padded"):
        other.as_padded(ragged)
    traced = other.with_trace(ragged)
    assert traced.index.tolist() == [-1, 0, 1, -1, 0, 1, 2, 3]
    assert traced.carry["parent"].tolist() == [[0, 1, 2, -1, -1], [0, 1, 2, 3, 4]]


def test_state_is_frozen_and_a_pytree():
    state = TokenState(grid=(4, 4), num_prefix=1, carry={"parent": torch.zeros(1, 2)})
    with pytest.raises(AttributeError):
        state.num_prefix = 2
    leaves, spec = torch.utils._pytree.tree_flatten(state)
    assert torch.utils._pytree.tree_unflatten(leaves, spec) == state
    other = state.with_carry(score=torch.ones(1))
    assert sorted(other.carry) == ["parent", "score"] and list(state.carry) == ["parent"]


@pytest.mark.parametrize("packed", [False, True])
def test_branch_equals_the_formula(packed):
    block, x = tiny_blocks(1)[0], tokens()
    bias = torch.randn(2, 17, dtype=x.dtype)
    expected, weights, keys = block.attend(x, bias)
    state = TokenState(num_prefix=1, key_bias=bias)
    rows, state = state.as_packed(x) if packed else (x, state)
    branch = block.parts().attention
    products = {"key": keys.mean(2), "cls": weights[:, :, 0].mean(1), "mean": weights.mean((1, 2))}
    for want, product in products.items():
        y, got = branch(rows, state, want=want)
        torch.testing.assert_close(y.view_as(x), expected)
        torch.testing.assert_close(got.reshape(product.shape), product)
    torch.testing.assert_close(branch(rows, state).view_as(x), expected)
    z = branch.norm(rows)
    mixed, _ = branch.mix(*branch.qkv(z, state), state)
    torch.testing.assert_close(branch.scale(branch.out(mixed, z), state), branch(rows, state))
    with pytest.raises(ValueError, match="want must be"):
        branch(rows, state, want="row")


def test_original_block_runs_only_where_it_is_the_same():
    block, x = tiny_blocks(1)[0], tokens()
    calls = []
    handle = block.register_forward_hook(lambda *_: calls.append(1))
    state = TokenState(num_prefix=1)
    y, _ = run_block(block.parts(), x, state, 0, None)
    assert torch.equal(y, block(x)) and len(calls) == 2
    packed, inner = state.as_packed(x)
    for tokens_, other in ((packed, inner), (x, state.replace(key_bias=torch.zeros(2, 17, dtype=x.dtype)))):
        z, _ = run_block(block.parts(), tokens_, other, 0, None)
        torch.testing.assert_close(z.view_as(y), y)
    assert len(calls) == 2
    handle.remove()


class HalfPath(nn.Module):
    """Drops the branch of every second sample while training, as stochastic depth may."""

    def forward(self, x):
        if not self.training:
            return x
        keep = (torch.arange(x.shape[0]) % 2).to(x.dtype)
        return x * keep.view(-1, *[1] * (x.dim() - 1)) * 2


def test_stochastic_depth_is_per_image_also_when_packed():
    block, x = tiny_blocks(1)[0], tokens(4)
    drop = HalfPath()
    attention = AttentionBranch(block.norm1, block.qkv, block.proj, num_heads=3, head_dim=8, drop_path=drop)
    parts = BlockParts(attention, MlpBranch(block.norm2, block.mlp, drop_path=drop))
    state = TokenState()
    y, _ = run_block(parts, x, state, 0, None)
    assert torch.equal(y[::2], x[::2]) and not torch.equal(y[1], x[1])
    z, _ = run_block(parts, *state.as_packed(x), 0, None)
    torch.testing.assert_close(z.view_as(y), y)


def test_attention_dropout_is_refused():
    block = tiny_blocks(1)[0]
    branch = AttentionBranch(block.norm1, block.qkv, block.proj, num_heads=3, head_dim=8, attn_drop=0.1)
    with pytest.raises(ValueError, match="attn_drop must be 0"):
        branch(tokens(), TokenState())
