# SPDX-License-Identifier: Apache-2.0
"""The conformance battery: every op is a spec (tests/spec.py), and every spec passes the same tests."""

from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.spec import (
    OpSpec,
    Sample,
    assert_same,
    check_gradient,
    check_value,
    needs_library,
    outputs_of,
    run,
    run_with_grad,
)

__all__ = ["TOKEN_COUNTS", "Conformance", "OpSpec", "Sample", "assert_same", "needs_library", "recorded_calls"]

TOKEN_COUNTS = (19, 23, 8, 40, 10, 31, 64, 17, 47, 12)


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

    specs: ClassVar[list[OpSpec]] = []

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
        choices = {n: st.integers(*c) if isinstance(c, tuple) else st.sampled_from(c) for n, c in spec.fuzz.items()}

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
        from torch._inductor import config  # slow to import

        with config.patch(force_disable_caches=True):  # a cached graph may carry another run's guards
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
    """Export with every dimension dynamic that depends on the number of tokens; run it with another."""

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
