# SPDX-License-Identifier: Apache-2.0
"""Golden files: results of the original implementations, compared with ours. Format: docs/spec/golden.md.

A kind is served by a handler in ``kinds/*.py``: a function from a :class:`Golden` to the tensors that it computes,
by the names they have in the file. Every ``out.*`` and ``grad.*`` of the file must be among them.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch
from safetensors import safe_open
from torch import Tensor

DATA = Path(os.environ.get("TOKENPRUNE_GOLDEN_DIR") or Path(__file__).parent / "data")
MAX_FLOORED = "per tensor: max|a-b| <= atol + rtol*max(|b|_max,1e-3); integer tensors exactly equal"

handlers: dict[str, Callable] = {}
config_rules: dict[str, dict] = {}


@dataclass(frozen=True)
class Golden:
    """One file: metadata, configuration and tensors by their full names."""

    path: Path
    meta: dict[str, str]
    config: dict
    tensors: dict[str, Tensor]
    device: torch.device

    @property
    def kind(self):
        return self.meta["kind"]

    def __contains__(self, name):
        return name in self.tensors

    def __getitem__(self, name) -> Tensor:
        return self.tensors[name].to(self.device)

    def group(self, prefix) -> dict[str, Tensor]:
        """Tensors below ``prefix.``, without it."""
        start = prefix + "."
        return {n[len(start) :]: self[n] for n in self.tensors if n.startswith(start)}

    def leaf(self, name) -> Tensor:
        """An input or parameter that will be differentiated."""
        return self[name].clone().requires_grad_()

    def gradients(self, outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """``grad.<leaf>`` of the sum of ``out * in.grad_out.<out>``; nothing for a file without them."""
        weights = self.group("in.grad_out")
        if not weights:
            return {}
        loss = sum((outputs[n] * w).sum() for n, w in weights.items())
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        pairs = zip(leaves.items(), grads, strict=True)
        return {f"grad.{n}": torch.zeros_like(t) if g is None else g for (n, t), g in pairs}


def kind(name: str, config: dict):
    """Decorator: serve ``name``. ``config``: for every legal key a type, or a tuple of the legal values and types."""

    def decorate(function):
        if name in handlers:
            raise ValueError(f"two handlers for {name}")
        handlers[name] = function
        config_rules[name] = config
        return function

    return decorate


def load_kinds():
    """Import every module in kinds/, which fills the registry."""
    package = import_module("tests.golden.kinds")
    for info in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{info.name}")


def files() -> list[Path]:
    return sorted(DATA.rglob("*.safetensors"))


def kind_of(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return file.metadata()["kind"]


def load(path: Path, device) -> Golden:
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Golden(path, meta, json.loads(meta["config"]), tensors, torch.device(device))


def check_config(golden: Golden):
    """An unknown key or an illegal value is a failure: it would silently test something else."""
    rules = config_rules[golden.kind]
    for key, value in _flat(golden.config):
        assert key in rules, f"{golden.kind}: unknown configuration key {key!r}"
        rule = rules[key]
        legal = any(_is(value, one) for one in rule) if isinstance(rule, tuple) else _is(value, rule)
        assert legal, f"{golden.kind}: {key} = {value!r} is not {rule}"


def _flat(config, start=""):
    """Pairs of dotted key and value; a list of dicts is one value."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value


def _is(value, rule):
    if not isinstance(rule, (type, list)):  # a value
        return type(value) is type(rule) and value == rule
    if isinstance(rule, list):  # [int]: a list of ints
        return isinstance(value, list) and all(_is(v, rule[0]) for v in value)
    if rule is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, rule) and (rule is bool or not isinstance(value, bool))


def tolerances(golden: Golden, name: str) -> tuple[float, float]:
    """``(atol, rtol)`` of a tensor: the file's own for its group where given."""
    meta, group = golden.meta, name.partition(".")[0]
    own = {"out": ("atol_fwd",), "mid": ("mid_atol", "atol_fwd"), "grad": ("grad_atol", "atol_grad")}[group]
    atol = next((meta[k] for k in own if k in meta), meta["atol"])
    rtol = meta.get("grad_rtol", meta["rtol"]) if group == "grad" else meta["rtol"]
    return float(atol), float(rtol)


def compare(golden: Golden, name: str, actual: Tensor):
    """One tensor against the file's, under the file's rule."""
    expected = golden.tensors[name]
    actual = actual.detach().cpu()
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    atol, rtol = tolerances(golden, name)
    exact = not expected.is_floating_point() and atol < 1  # a tolerance of whole steps is meant for the integers
    if exact:
        assert torch.equal(actual.to(expected.dtype), expected), f"{name}: integers differ"
        return
    if expected.numel() == 0:
        return
    rule = golden.meta.get("compare")
    assert rule in (None, MAX_FLOORED), f"{golden.path.name}: unknown comparison {rule!r}"
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite]), f"{name}: infinities differ"
    largest = expected[finite].abs().max().item() if finite.any() else 0.0
    error = (actual - expected)[finite].abs().max().item() if finite.any() else 0.0
    limit = atol + rtol * (max(largest, 1e-3) if rule else largest)
    assert error <= limit, f"{name}: error {error:.3e} > {limit:.3e} (largest {largest:.3e})"


def run(golden: Golden):
    """Handle one file: everything that it holds is computed and compared."""
    check_config(golden)
    actual = handlers[golden.kind](golden)
    wanted = [n for n in golden.tensors if n.partition(".")[0] in ("out", "grad")]
    missing = [n for n in wanted if n not in actual]
    assert not missing, f"{golden.kind}: nothing computed for {missing}"
    compared = [n for n in golden.tensors if n in actual]
    assert any(n.startswith("out.") for n in compared), f"{golden.path.name} has no output to compare"
    for name in compared:
        compare(golden, name, actual[name])
