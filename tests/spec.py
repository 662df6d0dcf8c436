# SPDX-License-Identifier: Apache-2.0
"""What an op under test is, and how its values and gradients are judged.

Tolerance: the error of an op against the float64 oracle may be twice the error that the oracle's own formula makes in
plain PyTorch in the same dtype, plus a round-off floor relative to the largest value. For float64, which is the
oracle's own dtype, that error is estimated from float32's.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import tokenprune_ext  # noqa: F401  (loads the library)
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


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
        call: the function under test: a sample's inputs and options to a tensor or a tuple of tensors.
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


def baseline_dtype(dtype):
    """The dtype in which plain PyTorch shows how well conditioned a result is."""
    return torch.float32 if dtype == torch.float64 else dtype


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
    return outputs, [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(result, leaves, strict=True)]


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
    if dtype == torch.float64:
        base = base * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    scale = truth[finite].abs().max()
    limit = 2 * base + FLOOR[dtype] * scale + 1e-30
    assert error <= limit, f"{name}: error {error:.3e} > {limit:.3e} (plain PyTorch {base:.3e}, largest {scale:.3e})"


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
            baselines[a.dtype] = run(spec.oracle, to_float(inputs, baseline_dtype(a.dtype)), sample.options)
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
        assert o.requires_grad or not e.requires_grad or not library_loaded(), f"output {i}: no gradient"
    plain = to_float(inputs, baseline_dtype(dtype))
    baseline = run_with_grad(spec.oracle, plain, sample.options, spec.grads, weights)[1]
    for name, a, t, b in zip(spec.grads, actual, truth, baseline, strict=True):
        assert a.dtype == inputs[name].dtype
        assert_within(f"grad {name}", a, t, b, dtype)


def assert_same(actual, expected, exact=True):
    """Equal bit for bit (NaN never occurs in the samples), or up to the order of a few sums."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype, f"{i}: {a.shape} {a.dtype}, expected {e.shape} {e.dtype}"
        if exact:
            assert torch.equal(a, e), f"{i}: not bitwise equal"
        else:
            torch.testing.assert_close(a, e)
