# SPDX-License-Identifier: Apache-2.0
"""Packed linear layers: values against plain PyTorch, the rules, and what becomes of changed weights."""

import copy
from unittest import mock

import pytest
import tokenprune_ext
import torch
import torch.nn.functional as F
from tokenprune_ext import ops, profiling
from tokenprune_ext.ops._register import call
from torch import nn

from tests.conformance import Conformance, OpSpec, Sample, needs_library
from tests.ops.common import expect

SCHEMAS = [
    "pack_linear(Tensor weight) -> Tensor",
    "packed_linear(Tensor x, Tensor packed, SymInt out_features, Tensor? bias, bool norm, Tensor? norm_weight, "
    "Tensor? norm_bias, float norm_eps, int act, Tensor? scale, Tensor? residual, Tensor? indices) -> Tensor",
]

CPU_ONLY = True  # elsewhere the vendor's library packs weights by itself


# ---------------------------------------------------------------- samples and functions under test


def make(rng, rows, inputs, outputs, *, norm=False, act=None, full=False, index=0):
    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    tensors = {"x": normal(rows, inputs) + 0.5, "weight": normal(outputs, inputs) / max(inputs, 1) ** 0.5}
    count = index or rows
    if index:
        tensors["index"] = torch.randint(-1, rows, (index,), generator=rng).to(torch.int32)
    if norm:
        tensors |= {"norm_weight": normal(inputs), "norm_bias": normal(inputs)}
    if full:
        tensors |= {"bias": normal(outputs), "scale": normal(outputs), "residual": normal(count, outputs)}
    return Sample(tensors, {"act": act, "norm": norm})


def run(x, weight, bias=None, norm_weight=None, norm_bias=None, scale=None, residual=None, index=None, *, act, norm):
    return ops.packed_linear(
        x,
        ops.pack_linear(weight),
        weight.shape[0],
        bias,
        norm=(norm_weight, norm_bias, 1e-6) if norm else None,
        act=act,
        scale=scale,
        residual=residual,
        index=index,
    )


def oracle(x, weight, bias=None, norm_weight=None, norm_bias=None, scale=None, residual=None, index=None, *, act, norm):
    if norm:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6)
    if index is not None:
        x = torch.cat((x, x.new_zeros(1, x.shape[1])))[index.long()]
    y = F.linear(x, weight, bias)
    if act == "quick_gelu":
        y = y * torch.sigmoid(1.702 * y)
    elif act is not None:
        y = F.gelu(y, approximate="tanh" if act == "gelu_tanh" else "none")
    y = y if scale is None else y * scale
    return y if residual is None else residual + y


SPECS = [
    OpSpec(
        "packed_linear",
        run,
        oracle,
        make,
        cases={
            "one": {"rows": 1, "inputs": 1, "outputs": 1},
            "odd": {"rows": 67, "inputs": 33, "outputs": 71, "norm": True, "act": "gelu", "full": True},
            "strips": {"rows": 125, "inputs": 48, "outputs": 130, "norm": True, "full": True},
            "deep": {"rows": 13, "inputs": 2151, "outputs": 5, "norm": True, "full": True},
            "gelu_tanh": {"rows": 5, "inputs": 64, "outputs": 64, "act": "gelu_tanh"},
            "quick_gelu": {"rows": 5, "inputs": 64, "outputs": 64, "act": "quick_gelu", "full": True},
            "indexed": {"rows": 20, "inputs": 24, "outputs": 40, "norm": True, "full": True, "index": 31},
            "no_rows": {"rows": 0, "inputs": 8, "outputs": 8, "full": True},
            "no_outputs": {"rows": 3, "inputs": 8, "outputs": 0},
            "no_inputs": {"rows": 3, "inputs": 0, "outputs": 5, "full": True},
        },
        sized=lambda tokens: {"rows": tokens, "inputs": 32, "outputs": 48, "norm": True, "act": "gelu", "full": True},
        fuzz={
            "rows": (0, 130),
            "inputs": (1, 80),
            "outputs": (0, 150),
            "norm": [False, True],
            "full": [False, True],
            "act": [None, "gelu"],
        },
    )
]


class TestBattery(Conformance):
    specs = SPECS

    @pytest.fixture
    def device(self):
        return torch.device("cpu")


# ---------------------------------------------------------------- rules


def test_errors_name_op_argument_rule_and_value():
    x, packed = torch.randn(3, 8), ops.pack_linear(torch.randn(5, 8))
    call = ops.packed_linear
    expect(ValueError, "packed_linear", "act must be one of", call, x, packed, 5, act="relu")
    expect(ValueError, "packed_linear", "residual must have shape", call, x, packed, 5, residual=torch.randn(3, 6))
    expect(TypeError, "packed_linear", "x must be a float32", call, x.int(), packed, 5)
    expect(ValueError, "pack_linear", "weight must have shape", ops.pack_linear, x[0])


@needs_library
def test_a_packed_weight_of_another_shape_or_dtype_is_refused():
    x, packed = torch.randn(3, 8), ops.pack_linear(torch.randn(5, 8))
    with pytest.raises(RuntimeError, match=r"packed must hold a float32 weight \[900, 8\]"):
        ops.packed_linear(x, packed, 900)
    with pytest.raises(RuntimeError, match="packed must hold a float64 weight"):
        ops.packed_linear(x.double(), packed, 5)
    with pytest.raises(RuntimeError, match=r"indices must be -1 or in \[0, 3\)"):
        ops.packed_linear(x, packed, 5, index=torch.tensor([0, 3]))
    with pytest.raises(RuntimeError, match=r"bias must have size 5"):
        ops.packed_linear(x, packed, 5, torch.randn(4))


@needs_library
def test_differentiating_says_that_it_cannot():
    y = ops.packed_linear(torch.randn(3, 8, requires_grad=True), ops.pack_linear(torch.randn(5, 8)), 5)
    with pytest.raises(NotImplementedError, match="packed_linear has no derivative"):
        y.sum().backward()


@needs_library
@pytest.mark.parametrize("rows", [1, 61, 200])
def test_results_do_not_depend_on_the_threads(rows):
    x, packed = torch.randn(rows, 40), ops.pack_linear(torch.randn(300, 40))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.packed_linear(x, packed, 300, act="gelu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_library
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu"])
def test_activation(act):
    """As exact as PyTorch's own float32 from end to end, tails included; NaN and infinity come through."""
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.tensor([-1e30, 1e30, torch.inf, torch.nan])])

    def apply(x):
        return oracle(x[:, None], x.new_ones(1, 1), act=act, norm=False)[:, 0]

    got = run(x[:, None], torch.ones(1, 1), act=act, norm=False)[:, 0]
    want, plain = apply(x.double()), apply(x)
    limit = 2 * (plain[:-4] - want[:-4]).abs().max()
    assert (got[:-4] - want[:-4]).abs().max() <= limit
    assert torch.equal(got[-4:-1], want[-4:-1].float()) and got[-1].isnan()


# ---------------------------------------------------------------- the module


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).eval()


@needs_library
def test_pack_keeps_values_parameters_and_state():
    model, x = layers(), torch.randn(7, 16)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        assert tokenprune_ext.pack(model) is model
        torch.testing.assert_close(model(x), expected)
    assert model.state_dict().keys() == state.keys() and type(model[0]) is tokenprune_ext.nn.PackedLinear
    tokenprune_ext.unpack(model)
    assert type(model[0]) is nn.Linear and torch.equal(model(x), expected)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 32, 24), (1, 3, 35, 31), (0, 3, 32, 32), (1, 3, 7, 8)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_packed_patch_embedding_equals_the_convolution(shape, memory_format, dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 20, (7, 8), stride=(7, 8)).to(dtype=dtype, memory_format=memory_format)
    x = torch.randn(shape).to(dtype=dtype, memory_format=memory_format)
    expected = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), stride=(7, 8))
    tokenprune_ext.pack(conv)
    got = conv(x)
    assert type(conv) is tokenprune_ext.nn.PackedPatches and got.dtype == dtype and got.shape == expected.shape
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), expected, rtol=limit, atol=limit)
    assert got.flatten(2).transpose(1, 2).is_contiguous()  # tokens come out as they are needed
    assert type(tokenprune_ext.unpack(conv)) is nn.Conv2d


@needs_library
@pytest.mark.parametrize(
    "options",
    [{"stride": 4}, {"padding": 1}, {"dilation": 2}, {"groups": 3}, {"kernel_size": 4, "stride": 4}],
    ids=lambda options: next(iter(options)),
)
def test_other_convolutions_stay_as_they_are(options):
    conv = nn.Conv2d(3, 6, **{"kernel_size": 8, "stride": 8, **options})
    assert type(tokenprune_ext.pack(conv)) is nn.Conv2d


@needs_library
def test_a_packed_patch_embedding_refuses_what_the_convolution_refuses():
    conv = tokenprune_ext.pack(nn.Conv2d(3, 6, 8, stride=8))
    with torch.no_grad():
        for x in (torch.randn(1, 4, 16, 16), torch.randn(1, 3, 7, 16), torch.randn(3, 3), torch.ones(1, 3, 8, 8).int()):
            with pytest.raises(RuntimeError):
                conv(x)
        assert conv(torch.randn(3, 16, 16)).shape == (6, 2, 2)


@needs_library
def test_packed_layers_still_train():
    model, x = tokenprune_ext.pack(layers()), torch.randn(7, 16)
    plain = layers()
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("change", ["in_place", "load", "dtype", "copy", "replaced", "same_address", "data", "cut"])
def test_the_packed_copy_follows_the_weight(change):
    model, x = tokenprune_ext.pack(layers()), torch.randn(7, 16)
    model(x)
    if change == "in_place":
        model[0].weight.mul_(3)
    elif change == "load":
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    elif change == "dtype":
        model, x = model.double(), x.double()
    elif change == "copy":
        model = copy.deepcopy(model)
        model[0].weight.add_(1)
    elif change == "same_address":  # the allocator hands the memory of the first weight out again
        for _ in range(4):
            model[0].weight.data = model[0].weight.data * 2
    elif change == "cut":  # fewer rows in the same memory
        model[0].weight, model[0].bias = (nn.Parameter(t[:20].detach()) for t in (model[0].weight, model[0].bias))
        model[2].weight = nn.Parameter(model[2].weight[:, :20].detach())
    elif change == "data":
        model[0].weight.data.mul_(2)
        tokenprune_ext.pack(model)
    else:
        model[0].weight = nn.Parameter(torch.randn(24, 16))
    expected = F.linear(F.gelu(F.linear(x, model[0].weight, model[0].bias)), model[2].weight, model[2].bias)
    torch.testing.assert_close(model(x), expected)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_clip_224"])
@pytest.mark.parametrize("method", ["tome", "evit"])
def test_a_packed_reduced_model_equals_the_plain_one(name, method, dtype):
    import timm

    torch.manual_seed(0)
    small = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
    model = timm.create_model(name, **small).eval()
    options = {"r": 2} if method == "tome" else {"keep": 0.7, "layers": (1,)}
    tokenprune_ext.patch(model, method, **options)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    tokenprune_ext.pack(model)
    got = model.to(dtype)(x.to(dtype)).float()
    limit = 1e-5 if dtype == torch.float32 else 0.1
    assert (got - expected).norm() < limit * expected.norm() + limit


@needs_library
@torch.inference_mode()
def test_weights_made_in_inference_mode_are_not_packed():  # nothing counts their changes
    model, x = tokenprune_ext.pack(layers()), torch.randn(7, 16)
    model(x)
    model[0].weight.mul_(2)
    assert torch.equal(model(x), tokenprune_ext.unpack(model)(x))


def small_vit(method="tome", **options):
    import timm

    torch.manual_seed(0)
    shape = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", **shape, **options).eval()
    return tokenprune_ext.patch(model, method, **({"r": 1} if method == "tome" else {}))


@needs_library
@pytest.mark.parametrize("trained", ["norm1", "q_norm", "gamma", "bias", "fc2.bias", "proj.weight"])
def test_a_packed_model_with_frozen_weights_trains_the_rest(trained):
    plain = small_vit(qk_norm=True, init_values=0.5)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(trained in name and "patch_embed" not in name)
    packed, x = tokenprune_ext.pack(copy.deepcopy(plain)), torch.randn(2, 3, 32, 32)
    for model in (plain, packed):
        model(x).square().sum().backward()
    for a, b in zip(packed.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@needs_library
@torch.no_grad()
def test_a_packed_model_may_have_norms_of_another_dtype():
    model, x = small_vit(init_values=0.5).bfloat16(), torch.randn(2, 3, 32, 32).bfloat16()
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.float()
    expected = model(x).float()
    got = tokenprune_ext.pack(model)(x).float()
    assert (got - expected).norm() < 0.05 * expected.norm()


@needs_library
def test_a_packed_idle_model_drops_attention_weights_while_training():
    model = tokenprune_ext.patch(tokenprune_ext.unpatch(small_vit(attn_drop_rate=0.5)), "tome", r=0).train()
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    expected = model(x)
    tokenprune_ext.pack(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected)


@needs_library
@torch.no_grad()
def test_a_hook_on_a_packed_layer_still_runs():
    import timm

    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3).eval()
    tokenprune_ext.pack(tokenprune_ext.patch(model, "tome", r=1))
    seen = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *a: seen.append(a[2].shape))
    model.blocks[0].norm1.register_forward_hook(lambda *a: seen.append(a[2].shape))
    model(torch.randn(1, 3, 32, 32))
    assert len(seen) == 2


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("path", ["mlp", "mlp.act", "mlp.drop1", "attn.proj_drop", "ls1"])
def test_a_hook_on_what_packed_layers_take_over_still_runs(path):
    model, seen = tokenprune_ext.pack(small_vit(init_values=0.5)), []
    model.blocks[0].get_submodule(path).register_forward_hook(lambda *a: seen.append(a[2].shape))
    model(torch.randn(1, 3, 32, 32))
    assert len(seen) == 1


@needs_library
@torch.no_grad()
def test_packed_layers_compile():
    model, x = tokenprune_ext.pack(layers()), torch.randn(7, 16)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


@needs_library
def test_compiled_packed_layers_follow_training():
    model, x = tokenprune_ext.pack(layers()), torch.randn(7, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        with torch.no_grad():
            expected = F.linear(F.gelu(F.linear(x, model[0].weight, model[0].bias)), model[2].weight, model[2].bias)
            torch.testing.assert_close(compiled(x), expected)
        model.train()
        compiled(x).square().sum().backward()
        optimizer.step()
        model.eval()


@needs_library
def test_saving_a_packed_model_leaves_the_copy_behind(tmp_path):
    import io
    import pickle

    model = tokenprune_ext.pack(layers())
    again = pickle.load(io.BytesIO(pickle.dumps(model)))
    assert again[0]._copy is None
    with torch.no_grad():
        x = torch.randn(2, 16)
        assert torch.equal(again(x), model(x))


@needs_library
@torch.no_grad()
def test_copies_of_a_large_model_lie_together():
    """In one memory of large pages, each from a cache line on; a copy made later has its own."""
    model = nn.Sequential(nn.Linear(1501, 1000), nn.Linear(1000, 999), nn.Linear(999, 1501)).requires_grad_(False)
    x = torch.randn(5, 1501)
    plain = copy.deepcopy(model)
    tokenprune_ext.pack(model)
    copies = [layer._copy[2] for layer in model]
    assert len({packed.untyped_storage().data_ptr() for packed in copies}) == 1
    assert all(packed.data_ptr() % 64 == 0 for packed in copies)
    for later in (False, True):
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(copy.deepcopy(model)(x), plain(x))
        assert (model[1]._copy[2].untyped_storage().data_ptr() != copies[0].untyped_storage().data_ptr()) == later
        model[1].weight.mul_(2)
        plain[1].weight.mul_(2)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("patched_first", [False, True])
def test_what_a_method_learned_is_packed_with_the_model(patched_first):
    model, x = tokenprune_ext.unpatch(small_vit()), torch.randn(2, 3, 32, 32)
    options = {"layers": [0, 1], "keep": 0.7}
    plain = tokenprune_ext.patch(copy.deepcopy(model), "dynamicvit", **options)
    if patched_first:
        packed = tokenprune_ext.pack(tokenprune_ext.patch(model, "dynamicvit", **options))
    else:
        packed = tokenprune_ext.patch(tokenprune_ext.pack(model), "dynamicvit", **options)
    packed.load_state_dict(plain.state_dict())
    with mock.patch("tokenprune_ext.reducers._predictors.call", wraps=call) as calls:
        torch.testing.assert_close(packed(x), plain(x), atol=1e-5, rtol=1e-4)
    assert [c.args[0] for c in calls.mock_calls] == ["packed_predictor"] * 2


@needs_library
@torch.no_grad()
def test_halves_of_a_block_run_in_one_call_unless_their_ops_are_counted():
    model, x = tokenprune_ext.pack(small_vit()), torch.randn(2, 3, 32, 32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        model(x)
    names = [event.name for event in profiled.events()]
    assert names.count("tokenprune::packed_attention_merged") == names.count("tokenprune::packed_mlp") == 2
    plain = profiling.count_flops(lambda: tokenprune_ext.unpack(copy.deepcopy(model))(x))
    counted = profiling.count_flops(lambda: model(x))
    assert counted["attention"] == plain["attention"]  # attention and layers are told apart
    assert counted["linear"] == plain["linear"] + plain["conv"]  # the patches go through a packed product
