# SPDX-License-Identifier: Apache-2.0
"""The conformance battery: every op is a spec, and every spec passes the same tests.

Tolerance: the error of an op against the float64 oracle may be twice the error that the oracle's own formula makes in
plain PyTorch in the same dtype, plus a round-off floor relative to the largest value.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import tokenprune_ext  # noqa: F401  (loads the library)
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
TOKEN_COUNTS = (19, 23, 8, 40, 5, 31, 64, 17, 47, 12)


@dataclass(frozen=True)
class Sample:
    """One call: tensors by name (floating ones in float64, on the CPU) and the other arguments."""

    inputs: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpSpec:
    """One public function under test.

    Attributes:
        name: shown in test ids.
        call: the function under test; takes a sample's inputs and options, returns a tensor or a tuple of tensors.
        oracle: the same in plain, obvious PyTorch; runs in any floating dtype.
        make: ``make(rng, **dims) -> Sample``.
        cases: named ``dims``; empties, odd and ragged shapes belong here.
        sized: ``sized(tokens) -> dims`` with everything but the number of tokens fixed.
        fuzz: range (a pair) or choices (a list) of every fuzzed dim.
        gradcheck: small ``dims`` for the numerical gradient.
        grads: the differentiable inputs.
        stats: inputs that stay float32 beside half-precision values.
        autocast: inputs that autocast turns into its own dtype.
        inductor: compile this spec with inductor too (one per family).
    """

    name: str
    call: Callable
    oracle: Callable
    make: Callable[..., Sample]
    cases: Mapping[str, dict]
    sized: Callable[[int], dict] | None = None
    fuzz: Mapping[str, tuple[int, int] | list] = field(default_factory=dict)
    gradcheck: dict | None = None
    grads: tuple[str, ...] = ()
    stats: frozenset[str] = frozenset()
    autocast: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = DTYPES
    inductor: bool = False

    def sample(self, seed: int | str = 0, **dims) -> Sample:
        """A sample in float64, the same for the same seed and dims."""
        rng = torch.Generator().manual_seed(zlib.crc32(f"{self.name}/{seed}".encode()))
        return self.make(rng, **dims)

    def cast(self, sample: Sample, dtype, device="cpu") -> dict[str, Tensor]:
        """The inputs as the op takes them for values of ``dtype``."""
        stat = stat_dtype(dtype)
        return {
            name: t.to(device, (stat if name in self.stats else dtype) if t.is_floating_point() else t.dtype)
            for name, t in sample.inputs.items()
        }


def stat_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def library_loaded() -> bool:
    return hasattr(torch.ops.tokenprune, "gather_tokens")


needs_library = pytest.mark.skipif(not library_loaded(), reason="the compiled library is not loaded")


def outputs_of(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def to_float(inputs, dtype):
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def run(function, inputs, options) -> tuple[Tensor, ...]:
    return outputs_of(function(**inputs, **options))


def cotangents(outputs, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=rng, dtype=torch.float64) for o in outputs]


def run_with_grad(function, inputs, options, grads, weights=None):
    """Outputs, and the gradients of the weighted sum of the differentiable outputs for the named inputs."""
    inputs = {n: t.detach().clone().requires_grad_(n in grads) for n, t in inputs.items()}
    outputs = run(function, inputs, options)
    weights = cotangents(outputs) if weights is None else weights
    used = [(o, w.to(o.device, o.dtype)) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    leaves = [inputs[n] for n in grads]
    if not used:
        return outputs, [torch.zeros_like(leaf) for leaf in leaves]
    result = torch.autograd.grad([o for o, _ in used], leaves, [w for _, w in used], allow_unused=True)
    return outputs, [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(result, leaves, strict=True)
    ]


def assert_within(name, actual, truth, baseline, dtype):
    """The tolerance policy; infinities must agree in place and sign."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, truth = actual.detach().cpu().double(), truth.detach().cpu().double()
    finite = truth.isfinite()
    assert torch.equal(actual[~finite], truth[~finite]), f"{name}: infinities differ"
    if not finite.any():
        return
    error = (actual - truth)[finite].abs().max()
    base = (baseline.detach().cpu().double() - truth)[finite].abs().nan_to_num(0).max()
    scale = truth[finite].abs().max()
    limit = 2 * base + FLOOR[dtype] * scale + 1e-30
    assert error <= limit, (
        f"{name}: error {error:.3e} > {limit:.3e} (plain PyTorch {base:.3e}, largest {scale:.3e})"
    )


def check_value(spec: OpSpec, sample: Sample, dtype, device="cpu"):
    """Outputs against the float64 oracle."""
    inputs = spec.cast(sample, dtype)
    actual = run(spec.call, {n: t.to(device) for n, t in inputs.items()}, sample.options)
    truth = run(spec.oracle, to_float(inputs, torch.float64), sample.options)
    assert len(actual) == len(truth)
    baselines = {}
    for i, (a, t) in enumerate(zip(actual, truth, strict=True)):
        if not t.is_floating_point():
            assert torch.equal(a.cpu().long(), t.long()), f"output {i}: {a} expected {t}"
            continue
        if a.dtype not in baselines:  # a float32 statistic beside bfloat16 values is held to float32
            baselines[a.dtype] = run(spec.oracle, to_float(inputs, a.dtype), sample.options)
        assert_within(f"output {i}", a, t, baselines[a.dtype][i], a.dtype)


def check_gradient(spec: OpSpec, sample: Sample, dtype, device="cpu"):
    """Gradients against the float64 oracle's."""
    inputs = spec.cast(sample, dtype)
    placed = {n: t.to(device) for n, t in inputs.items()}
    outputs, actual = run_with_grad(spec.call, placed, sample.options, spec.grads)
    weights = [w.to(o.dtype) for w, o in zip(cotangents(outputs), outputs, strict=True)]
    expected, truth = run_with_grad(
        spec.oracle,
        to_float(inputs, torch.float64),
        sample.options,
        spec.grads,
        [w.double() for w in weights],
    )
    for i, (o, e) in enumerate(zip(outputs, expected, strict=True)):
        assert o.requires_grad == e.requires_grad or not library_loaded(), (
            f"output {i}: requires_grad is {o.requires_grad}"
        )
    baseline = run_with_grad(spec.oracle, to_float(inputs, dtype), sample.options, spec.grads, weights)[1]
    for name, a, t, b in zip(spec.grads, actual, truth, baseline, strict=True):
        assert a.dtype == inputs[name].dtype
        assert_within(f"grad {name}", a, t, b, dtype)


def assert_same(actual, expected, exact=True):
    """Equal bit for bit (NaN never occurs in the samples), or up to the order of a few sums."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype, (
            f"{i}: {a.shape} {a.dtype}, expected {e.shape} {e.dtype}"
        )
        if exact:
            assert torch.equal(a, e), f"{i}: not bitwise equal"
        else:
            torch.testing.assert_close(a, e)


# ---------------------------------------------------------------- layouts


def inner_strided(t):
    """The same values with an inner stride of 2."""
    return torch.stack([t, t], -1)[..., 0] if t.dim() else t


def sliced(t):
    """The same values inside a wider buffer at an odd offset."""
    return torch.nn.functional.pad(t, (1, 2))[..., 1 : 1 + t.shape[-1]] if t.dim() else t


def transposed(t):
    """The same values with the last two dimensions swapped in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def expanded_rows(t):
    """Every second row of a taller buffer."""
    return torch.stack([t, t], 1).flatten(0, 1)[::2] if t.dim() else t


LAYOUTS = {f.__name__: f for f in (inner_strided, sliced, transposed, expanded_rows)}


# ---------------------------------------------------------------- recorded ops


class OpRecorder(TorchDispatchMode):
    """Records the arguments of every ``tokenprune`` op that runs below autograd."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tokenprune":
            # once per op and set of present optional arguments
            key = (func, tuple(a is None for a in args), tuple(a for a in args if isinstance(a, bool)))
            copy = torch.utils._pytree.tree_map_only(Tensor, lambda t: _copy(t, func), args)
            self.calls.setdefault(key, (func, copy, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _copy(t, func):
    inner = "backward" in func.__name__ or "grad" in func.__name__  # no derivative of their own
    copied = t.detach().clone()
    return copied.requires_grad_(t.requires_grad and not inner) if copied.is_floating_point() else copied


def recorded_calls(spec: OpSpec, dims: dict, device="cpu"):
    """The low-level op calls that one forward and backward of a spec makes."""
    sample = spec.sample(**dims)
    with OpRecorder() as recorder:
        run_with_grad(spec.call, spec.cast(sample, torch.float32, device), sample.options, spec.grads)
    return list(recorder.calls.values())


# ---------------------------------------------------------------- the battery


class Conformance:
    """Subclass as ``class TestBattery(Conformance): specs = SPECS``."""

    specs: list[OpSpec] = []

    def pytest_generate_tests(self, metafunc):
        names = metafunc.fixturenames
        if "spec" not in names:
            return
        specs = [s for s in metafunc.cls.specs if _applies(s, metafunc.function.__name__)]
        if "case" in names:
            rows = [
                pytest.param(s, dims, dtype, id=f"{s.name}-{case}-{str(dtype)[6:]}")
                for s in specs
                for case, dims in s.cases.items()
                for dtype in s.dtypes
            ]
            metafunc.parametrize("spec, case, dtype", rows)
        else:
            metafunc.parametrize("spec", [pytest.param(s, id=s.name) for s in specs])

    def test_value(self, spec, case, dtype, device):
        check_value(spec, spec.sample(**case), dtype, device)

    def test_gradient(self, spec, case, dtype, device):
        check_gradient(spec, spec.sample(**case), dtype, device)

    def test_gradcheck(self, spec, device):
        sample = spec.sample(**spec.gradcheck)
        inputs = spec.cast(sample, torch.float64, device)
        leaves = [inputs[n].clone().requires_grad_() for n in spec.grads]

        def function(*tensors):
            result = run(spec.call, {**inputs, **dict(zip(spec.grads, tensors, strict=True))}, sample.options)
            return tuple(o for o in result if o.requires_grad)

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)

    @needs_library
    def test_opcheck(self, spec, device):
        calls = recorded_calls(spec, spec.sized(TOKEN_COUNTS[0]), device)
        assert calls, "the public function called no op of the library"
        for func, args, kwargs in calls:
            torch.library.opcheck(func, args, kwargs)

    @needs_library
    def test_compile_dynamic(self, spec, device):
        check_compile(spec, "aot_eager", TOKEN_COUNTS, device)

    @needs_library
    def test_export_dynamic(self, spec, device):
        check_export(spec, device)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, spec, layout, device):
        sample = spec.sample(**spec.sized(TOKEN_COUNTS[0]))
        inputs = spec.cast(sample, torch.float32, device)
        expected, grads = run_with_grad(spec.call, inputs, sample.options, spec.grads)

        def strided(**leaves):
            return spec.call(**{n: LAYOUTS[layout](t) for n, t in leaves.items()}, **sample.options)

        actual, actual_grads = run_with_grad(strided, inputs, {}, spec.grads)
        assert_same(actual, expected, exact=False)
        assert_same(actual_grads, grads, exact=False)

    @needs_library
    def test_autocast(self, spec, device):
        sample = spec.sample(**spec.sized(TOKEN_COUNTS[0]))
        inputs = spec.cast(sample, torch.float32, device)
        cast = {n: t.bfloat16() if n in spec.autocast else t for n, t in inputs.items()}
        with torch.autocast(device.type, torch.bfloat16):
            actual, grads = run_with_grad(spec.call, inputs, sample.options, spec.grads)
        assert_same(actual, run(spec.call, cast, sample.options))
        assert [g.dtype for g in grads] == [inputs[n].dtype for n in spec.grads]

    def test_deterministic(self, spec, device):
        sample = spec.sample(**spec.sized(TOKEN_COUNTS[6]))
        inputs = spec.cast(sample, torch.float32, device)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            outputs, grads = run_with_grad(spec.call, inputs, sample.options, spec.grads)
            for count in (1, 2):
                torch.set_num_threads(count)
                again, grads_again = run_with_grad(spec.call, inputs, sample.options, spec.grads)
                assert_same(again, outputs)
                assert_same(grads_again, grads)
        finally:
            torch.set_num_threads(threads)

    @needs_library
    def test_no_second_derivative(self, spec, device):
        sample = spec.sample(**spec.sized(TOKEN_COUNTS[0]))
        inputs = spec.cast(sample, torch.float32, device)
        leaves = {n: t.clone().requires_grad_(n in spec.grads) for n, t in inputs.items()}
        outputs = [o for o in run(spec.call, leaves, sample.options) if o.requires_grad]
        weights = [torch.randn_like(o).requires_grad_() for o in outputs]
        first = torch.autograd.grad(outputs, leaves[spec.grads[0]], weights, create_graph=True)[0]
        with pytest.raises(NotImplementedError):
            torch.autograd.grad(first.sum(), weights[0])

    @needs_library
    def test_no_functorch_derivative(self, spec, device):
        sample = spec.sample(**spec.sized(TOKEN_COUNTS[0]))
        inputs = spec.cast(sample, torch.float32, device)
        name = spec.grads[0]

        def function(t):
            result = run(spec.call, {**inputs, name: t}, sample.options)
            return sum(o.sum() for o in result if o.is_floating_point())

        with pytest.raises(NotImplementedError):
            torch.func.grad(function)(inputs[name])
        with pytest.raises(NotImplementedError):
            torch.func.jvp(function, (inputs[name],), (torch.ones_like(inputs[name]),))

    def test_fuzz(self, spec, device, extended):
        choices = {
            n: st.integers(*c) if isinstance(c, tuple) else st.sampled_from(c) for n, c in spec.fuzz.items()
        }

        @settings(
            max_examples=300 if extended else 20,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(dims=st.fixed_dictionaries(choices), seed=st.integers(0, 2**16))
        def fuzz(dims, seed):
            sample = spec.sample(seed, **dims)
            check_value(spec, sample, torch.float32, device)
            if spec.grads:
                check_gradient(spec, sample, torch.float32, device)

        fuzz()

    @needs_library
    def test_inductor(self, spec, device):
        check_compile(spec, "inductor", TOKEN_COUNTS[:3], device, exact=False)


def _applies(spec, test):
    needs_grads = (
        "test_gradient",
        "test_gradcheck",
        "test_no_second_derivative",
        "test_no_functorch_derivative",
    )
    if test in needs_grads and not spec.grads:
        return False
    if test == "test_gradcheck":
        return spec.gradcheck is not None
    if test == "test_fuzz":
        return bool(spec.fuzz)
    if test == "test_inductor":
        return spec.inductor
    return True


def check_compile(spec, backend, counts, device, exact=True):
    """One graph for all token counts: the first call compiles, any later compilation is an error."""
    torch._dynamo.reset()
    compiled = torch.compile(spec.call, backend=backend, fullgraph=True, dynamic=True)
    for i, count in enumerate(counts):
        sample = spec.sample(**spec.sized(count))
        inputs = spec.cast(sample, torch.float32, device)
        with torch._dynamo.config.patch(error_on_recompile=i > 0, capture_dynamic_output_shape_ops=True):
            actual, grads = run_with_grad(compiled, inputs, sample.options, spec.grads)
        expected, expected_grads = run_with_grad(spec.call, inputs, sample.options, spec.grads)
        assert_same(actual, expected, exact)
        assert_same(grads, expected_grads, exact)


def check_export(spec, device):
    """Export with every dimension dynamic that depends on the number of tokens; run it with another number."""

    class Module(torch.nn.Module):
        def forward(self, inputs):
            return spec.call(**inputs, **large.options)

    large, small = (spec.sample(**spec.sized(n)) for n in TOKEN_COUNTS[1::-1])
    example, other = (spec.cast(s, torch.float32, device) for s in (large, small))
    dynamic = {
        name: {d: torch.export.Dim.DYNAMIC for d in range(t.dim()) if t.shape[d] != other[name].shape[d]}
        for name, t in example.items()
    }
    program = torch.export.export(Module(), (example,), dynamic_shapes=(dynamic,))
    actual = outputs_of(program.module()(other))
    assert_same(actual, run(spec.call, other, large.options))
