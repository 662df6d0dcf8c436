# SPDX-License-Identifier: Apache-2.0
"""What every method promises: identity, padded = packed, traces, plans, purity, gradients, one compilation."""

import dataclasses

import pytest
import torch
from tokenprune_ext import _library, pack, reducers
from tokenprune_ext.nn import TokenState, run_block
from tokenprune_ext.reducers import Reducer
from torch import nn

from . import pruning_cases
from .common import DEPTH, HEADS, WIDTH, dense, tiny_blocks, tokens, walk

FACTS = {
    "depth": DEPTH,
    "embed_dim": WIDTH,
    "num_heads": HEADS,
    "num_prefix": 1,
    "class_token": True,
    "distill_token": False,
}

# Options with which a method does nothing: the model's own blocks run, or its own code runs and changes nothing.
INACTIVE = {
    "evit": {"keep": 1.0},
    "evo": {"ratio": 1.0},
    "hourglass": {"layer": -1},
    "threshold": {"layers": []},
    "tome": {"r": 0},
}
ACTIVE_IDENTITY = {
    "tome": [{"r": 0, "fast_idle": False}],
    "evit": [{"keep": 1.0, "fast_idle": False, "score_mode": mode} for mode in ("cls", "mean")],
    "evo": [{"ratio": 1.0, "fast_idle": False}],
    # As many cells as patches: without an iteration, or assigned hard, every patch is its own center.
    "hourglass": [{"layer": 1, "clusters": 16, "iters": 0}, {"layer": 2, "clusters": (4, 4), "temperature": 1e4}],
    "threshold": [{"mode": "topk", "keep": 1.0, "layers": [0, 1, 2, 3], "dense": masked} for masked in (False, True)],
}
ACTIVE = {
    "tome": [{"r": 3}, {"r": [0, 4, 0, 2], "prop_attn": False}, {"r": (3, -1.0), "trace_source": True}],
    "evit": [{"keep": 0.6}, {"keep": [0.5, 1.0, 0.9, 0.4], "fuse_token": False, "score_mode": "mean"}],
    "evo": [
        {"ratio": 0.6, "layer": 2},
        {"ratio": [1.0, 1.0, 0.5, 0.3], "tradeoff": [0.5, 0.2, 0.9, 1.0]},
        {"ratio": 0.5, "layer": 2, "summary": True},
    ],
    "hourglass": [{"layer": 1, "clusters": 9}, {"layer": 0, "clusters": (2, 3), "iters": 0}],
    "threshold": [
        {"mode": "sample"},
        {"mode": "threshold", "selector": "cls"},
        {"mode": "topk", "keep": 0.4},
        {"mode": "expected", "selector": "norm", "dense": True},
    ],
}
INACTIVE |= pruning_cases.INACTIVE
ACTIVE_IDENTITY |= pruning_cases.ACTIVE_IDENTITY
ACTIVE |= pruning_cases.ACTIVE
CASES = [
    pytest.param(name, options, id=f"{name}-{n}") for name, all_ in ACTIVE.items() for n, options in enumerate(all_)
]

# Compiling takes seconds; the other cases are compiled with --extended.
DEFAULT_COMPILES = ("tome-0", "evit-0", "evo-0", "threshold-1", "threshold-2")
# A map of patches does not change its size from call to call.
CHANGING = [case for case in CASES if case.values[0] != "hourglass"]


DEFAULT_COMPILES += pruning_cases.DEFAULT_COMPILES


def make(name, options):
    torch.manual_seed(3)
    reducer = reducers.create(name, FACTS, **options).double().eval()
    for linear in (module for module in reducer.modules() if isinstance(module, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.5)  # gates that are sure of their choice, whatever they start with
    return reducer


def given_noise(reducer, x):
    """The state in which a method starts, its random draws made."""
    return reducer.begin(x, TokenState(grid=(4, 4), num_prefix=1).with_trace(x))[1]


def test_every_method_is_covered():
    assert set(reducers.names()) >= set(ACTIVE) == set(INACTIVE) == set(ACTIVE_IDENTITY)


@pytest.mark.parametrize("name", INACTIVE)
def test_inactive_runs_the_original_blocks(name):
    blocks, x = tiny_blocks(), tokens()
    y, _ = walk(blocks, x, make(name, INACTIVE[name]))
    assert torch.equal(y, dense(blocks, x))


@pytest.mark.parametrize("kind", ["cpu", "double", "dropping"])
def test_idle_layers_take_the_faster_way(kind):
    """Bit for bit the model's own block in an inactive method; in an active one the branches, where they are exact."""
    blocks = tiny_blocks(1, torch.float64 if kind == "double" else torch.float32)
    parts, x = blocks[0].parts(), tokens(dtype=blocks[0].proj.weight.dtype)
    if kind == "dropping":
        parts.attention._attn_drop = 0.1
    calls = []
    parts = dataclasses.replace(parts, original=lambda x: calls.append(1) or blocks[0](x))
    reducer = reducers.create("tome", depth=2, r=[0, 3])
    record = []
    y, _ = run_block(parts, x, TokenState(num_prefix=1), 0, reducer, record)
    torch.testing.assert_close(y, blocks[0](x), atol=1e-5, rtol=1e-5)
    assert bool(calls) == (kind != "cpu" or not _library.cpu_loaded())
    assert len(record) == 1 and record[0].mlp.tolist() == [17, 17]
    y, _ = run_block(parts, x, TokenState(num_prefix=1), 0, reducers.create("tome", depth=2, r=0))
    assert calls and torch.equal(y, blocks[0](x))


@pytest.mark.parametrize("name", ACTIVE_IDENTITY)
def test_active_code_with_nothing_to_do_is_the_identity(name):
    blocks, x = tiny_blocks(), tokens()
    for options in ACTIVE_IDENTITY[name]:
        y, _ = walk(blocks, x, make(name, options), TokenState(grid=(4, 4), num_prefix=1))
        torch.testing.assert_close(y, dense(blocks, x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_padded_and_packed_are_equal(name, options):
    blocks, x = tiny_blocks(), tokens()
    reducer = make(name, options)
    state = given_noise(reducer, x)
    with torch.no_grad():
        y, padded = walk(blocks, x, reducer, state)
        rows, inner = state.as_packed(x)
        z, packed = walk(blocks, rows, reducer, inner)
    torch.testing.assert_close(z.view(y.shape), y, atol=1e-12, rtol=1e-12)
    assert torch.equal(padded.carry["parent"], packed.carry["parent"])
    assert torch.equal(padded.index.flatten(), packed.index.flatten())


@pytest.mark.skipif(not _library.cpu_loaded(), reason="the compiled library is not loaded")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_packed_weights_change_nothing(name, options, flat):
    blocks, x = tiny_blocks(), tokens()
    reducer = make(name, options)
    state = given_noise(reducer, x)
    with torch.no_grad():
        x, state = state.as_packed(x) if flat else (x, state)
        expected, _ = walk(blocks, x, reducer, state)
        got, _ = walk(pack(blocks), x, pack(reducer), state)
    assert blocks[0].parts().attention.is_packed
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_images_at_all(name, options):
    blocks, x = tiny_blocks(), tokens()
    reducer = make(name, options)
    y, _ = walk(blocks, x[:1], reducer, given_noise(reducer, x[:1]))
    none, state = walk(blocks, x[:0], reducer, given_noise(reducer, x[:0]))
    assert none.shape[0] == 0 and none.shape[-1] == y.shape[-1]
    assert state.packed or none.shape[1] > 0  # the class token has its place, which heads read
    if not state.packed:
        rest = none[:, state.num_prefix :]
        assert reducer.restore(rest, state).shape[0] == reducer.restore(rest[..., 0], state).shape[0] == 0
    rows, inner = given_noise(reducer, x[:0]).as_packed(x[:0])
    none, _ = walk(blocks, rows, reducer, inner)
    assert none.shape[0] == 0 and none.shape[-1] == y.shape[-1]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_one_value_per_token_is_restored_as_a_channel_is(name, options):
    blocks, x = tiny_blocks(), tokens()
    reducer = make(name, options)
    y, state = walk(blocks, x, reducer, given_noise(reducer, x))
    if not state.packed:
        rest = y[:, state.num_prefix :]
        torch.testing.assert_close(reducer.restore(rest[..., 0], state), reducer.restore(rest, state)[..., 0])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_nothing_is_stored_or_changed(name, options):
    blocks, x = tiny_blocks(), tokens()
    reducer = make(name, options)
    before = x.clone()
    modules = list(reducer.modules()) + list(blocks.modules())
    attributes = [dict(vars(module)) for module in modules]
    values = {key: value.clone() for key, value in {**reducer.state_dict(), **blocks.state_dict()}.items()}
    state = given_noise(reducer, x)
    carry = dict(state.carry)
    with torch.no_grad():
        walk(blocks, x, reducer, state)
    assert torch.equal(x, before) and state.carry == carry
    assert [dict(vars(module)) for module in modules] == attributes
    for key, value in {**reducer.state_dict(), **blocks.state_dict()}.items():
        assert torch.equal(value, values[key])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_plan_equals_what_runs(name, options):
    blocks, x = tiny_blocks(), tokens()
    reducer, record = make(name, options), []
    with torch.no_grad():
        walk(blocks, x, reducer, given_noise(reducer, x), record)
    plan = reducer.plan(DEPTH, x.shape[1])
    if plan is not None:
        # The masked form of a selection runs all tokens; its plan is that of the gathered form.
        assert [(int(step.attention[0]), int(step.mlp[0])) for step in record] == plan
    assert [step.layer for step in record] == list(range(DEPTH))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients(name, options):
    """The input's gradient against finite differences in a random direction; every parameter gets one."""
    blocks, x = tiny_blocks(), tokens().requires_grad_()
    reducer = make(name, options)
    state = given_noise(reducer, x.detach())

    def loss(tokens_):
        y, _ = walk(blocks, tokens_, reducer, state)
        return (y.sin() * torch.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype)).mean(-1).sum()

    loss(x).backward()
    assert all(parameter.grad is not None for parameter in blocks.parameters())
    if any(parameter.requires_grad for parameter in reducer.parameters()):
        return  # the straight-through gradient is not a derivative
    if name == "hourglass" and options.get("iters", 5):
        return  # the affinities are constants of the backward pass
    direction = torch.randn_like(x)
    with torch.no_grad():
        step = 1e-6
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    torch.testing.assert_close((x.grad * direction).sum(), slope, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_autocast_and_half(name, options):
    blocks, x = tiny_blocks(dtype=torch.float32), tokens(dtype=torch.float32)
    reducer = make(name, options).float()
    state = given_noise(reducer, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, _ = walk(blocks, x, reducer, state)
    assert y.dtype == torch.float32 and torch.isfinite(y).all()
    half = make(name, options).bfloat16()
    with torch.no_grad():
        z, _ = walk(tiny_blocks(dtype=torch.bfloat16), x.bfloat16(), half, TokenState(grid=(4, 4), num_prefix=1))
    assert z.dtype == torch.bfloat16 and torch.isfinite(z).all()


@pytest.mark.skipif(
    not _library.cpu_loaded(), reason="the references read lengths on the host; the compiled ops do not"
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "options"), CHANGING)
def test_one_compilation_for_ten_token_counts(name, options, packed, backend, request):
    short = not packed and backend == "aot_eager" and request.node.callspec.id.split("-False")[0] in DEFAULT_COMPILES
    if not short and not request.config.getoption("--extended", default=False):
        pytest.skip("needs --extended")
    blocks, reducer = tiny_blocks(2), make(name, options)
    torch._dynamo.reset()

    def run(x):
        state = TokenState(num_prefix=1)
        x, state = state.as_packed(x) if packed else (x, state)
        x, state = reducer.begin(x, state)
        for layer, block in enumerate(blocks):
            x, state = run_block(block.parts(), x, state, layer + 1, reducer)
        return x, state

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    config = {"capture_dynamic_output_shape_ops": True, "error_on_recompile": True}
    with torch.no_grad(), torch._dynamo.config.patch(**config):
        for tokens_ in range(30, 40):
            x = tokens(2, tokens_, seed=tokens_)
            torch.manual_seed(tokens_)
            expected, _ = run(x)
            torch.manual_seed(tokens_)
            y, state = compiled(x)
            torch.testing.assert_close(y, expected)
            assert isinstance(state, TokenState)


@pytest.mark.extended
@pytest.mark.skipif(
    not _library.cpu_loaded(), reason="the references read lengths on the host; the compiled ops do not"
)
@pytest.mark.parametrize(("name", "options"), CHANGING)
def test_compiled_training_step(name, options):
    blocks, reducer = tiny_blocks(2), make(name, options)
    torch._dynamo.reset()

    def loss(x, noise):
        state = TokenState(num_prefix=1, carry=noise)
        for layer, block in enumerate(blocks):
            x, state = run_block(block.parts(), x, state, layer + 1, reducer)
        return x.square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    config = {"capture_dynamic_output_shape_ops": True, "error_on_recompile": True}
    with torch._dynamo.config.patch(**config):
        for count in (30, 33, 36):
            x = tokens(2, count, seed=count).requires_grad_()
            _, state = reducer.begin(x, TokenState(num_prefix=1))
            grads = []
            for function in (loss, compiled):
                function(x, dict(state.carry)).backward()
                grads.append([x.grad, *(p.grad for p in blocks.parameters()), *(p.grad for p in reducer.parameters())])
                x.grad = None
                blocks.zero_grad()
                reducer.zero_grad()
            torch.testing.assert_close(*grads)


def test_defaults_are_the_plain_block():
    blocks, x = tiny_blocks(), tokens()
    reducer = Reducer()
    y, state = walk(blocks, x, reducer)
    torch.testing.assert_close(y, dense(blocks, x))
    assert reducer.restore(y, state) is y and reducer.losses(state) == {} and reducer.plan(4, 17) is None


def test_a_new_method_is_one_new_file(tmp_path, monkeypatch):
    """A file in the package folder is a method; nothing else is edited."""
    (tmp_path / "dummy_method.py").write_text(
        "from tokenprune_ext.reducers._base import Reducer, register\n\n\n"
        "@register('dummy_method')\nclass Dummy(Reducer):\n    '''Does nothing.'''\n"
    )
    known = dict(reducers._base._registry)
    try:
        monkeypatch.setattr(reducers, "__path__", [*reducers.__path__, str(tmp_path)])
        reducers.discover(reducers.__name__, reducers.__path__)
        assert "dummy_method" in reducers.names()
        y, _ = walk(tiny_blocks(), tokens(), reducers.create("dummy_method", FACTS))
        torch.testing.assert_close(y, dense(tiny_blocks(), tokens()))
    finally:
        reducers._base._registry.clear()
        reducers._base._registry.update(known)


def test_registry_errors():
    with pytest.raises(ValueError, match="method must be one of"):
        reducers.get("tom")
    with pytest.raises(ValueError, match="options must be among"):
        reducers.create("tome", FACTS, rate=3)
    with pytest.raises(ValueError, match="without options"):
        reducers.create(Reducer(), r=3)
    with pytest.raises(ValueError, match="name must be new"):
        reducers.register("tome")(type("Other", (Reducer,), {}))
    for method in (nn.Linear, nn.Linear(1, 1), 5):
        with pytest.raises(ValueError, match="method must be"):
            reducers.create(method, FACTS)
    for layers in (3, "all", [1.5]):
        with pytest.raises(ValueError, match="layers must be a list of whole numbers"):
            reducers.create("evit", FACTS, layers=layers)
    with pytest.raises(ValueError, match="ACT: options must be of the documented types"):
        reducers.create("act", FACTS, q_hashes="many")
    assert isinstance(reducers.create(reducers.get("tome"), FACTS), nn.Module)
