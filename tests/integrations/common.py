# SPDX-License-Identifier: Apache-2.0
"""What every patched family is held to, whatever library it comes from."""

import pytest
import tokenprune_ext as tp
import torch
from tokenprune_ext import _library, reducers
from tokenprune_ext._patch import features, patched
from torch import nn

# Nothing to do: the model's own blocks run.
INACTIVE = [
    ("tome", {"r": 0}),
    ("evit", {"keep": 1.0, "score_mode": "mean"}),
    ("evo", {"ratio": 1.0}),
    ("hourglass", {"layer": -1}),
    ("threshold", {"layers": []}),
    *((name, {"layers": []}) for name in ("act", "ats", "smyrf", "svit", "spvit", "dynamicvit")),
]
# The method's own code runs, and changes nothing.
IDENTITIES = [
    ("tome", {"r": 0, "fast_idle": False}),
    ("evit", {"keep": 1.0, "fast_idle": False, "score_mode": "mean"}),
    ("evit", {"keep": 1.0, "fast_idle": False}),
    ("evo", {"ratio": 1.0, "fast_idle": False}),
    ("hourglass", {"layer": 1, "clusters": 16, "iters": 0}),
    ("threshold", {"mode": "topk", "keep": 1.0, "selector": "norm", "layers": [0, 1]}),
    ("threshold", {"mode": "topk", "keep": 1.0, "selector": "norm", "layers": [0, 1], "dense": True}),
    ("act", {"width": 1e-4}),
    ("smyrf", {"rounds": 1, "cluster_size": 64}),
    ("dynamicvit", {"keep": 1.0, "layers": [0], "fast_idle": False}),
    ("dynamicvit", {"keep": 1.0, "layers": [0], "fast_idle": False, "dense": True}),
    ("spvit", {"layers": [], "fast_idle": False}),
    ("svit", {"layers": [], "fast_idle": False}),
]
REDUCING = [
    ("tome", {"r": 3}),
    ("evit", {"keep": 0.6, "score_mode": "mean"}),
    ("evit", {"keep": 0.6}),
    ("evo", {"layer": 1}),
    ("hourglass", {"layer": 1, "clusters": 4}),
    ("threshold", {"mode": "topk", "keep": 0.5, "selector": "norm"}),
    ("ats", {"layers": [1]}),
    ("act", {}),
    ("smyrf", {"rounds": 2, "cluster_size": 4}),
    ("svit", {"mode": "threshold", "layers": [1]}),
    ("spvit", {"layers": [1]}),
    ("dynamicvit", {"layers": [1]}),
]
# A bias of every pair of tokens is in the way of methods with their own attention; these need a class token.
OWN_ATTENTION = ("act", "ats", "smyrf")
CLASS_TOKEN = ("ats", "dynamicvit", "evo", "spvit")


def liven(model: nn.Module) -> nn.Module:
    """Weights that hide nothing: heads, LayerScale and relative positions start at or near zero in some families."""
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last.startswith(("gamma", "lambda")) or "position_bias" in last or ".cpb" in name or "rel_pos" in name:
            nn.init.normal_(parameter, std=0.5)
        elif name in ("head.weight", "head_dist.weight", "heads.head.weight"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def legal(method: str, options: dict, facts: dict) -> bool:
    """Whether a method makes sense for a model."""
    if method in OWN_ATTENTION and facts.get("pair_bias") and options.get("layers") != []:
        return False
    if method == "evit" and options.get("score_mode") != "mean" and not facts["class_token"]:
        return False
    if method in ("spvit", "dynamicvit") and facts["pooling"] != "token":
        return False
    if (
        method == "ats"
        and options.get("layers") != []
        and facts["pooling"] not in ("token", "avg", "token and avg", "")
    ):
        return False
    return facts["class_token"] or method not in CLASS_TOKEN


def hold_identities(model, run, adapter, owner=None, part=None):
    """Both identity tests, and finite results of the expected shape under reduction, for every method.

    Args:
        model: to patch.
        run: ``() -> output``.
        adapter: of its library.
        owner, part: as ``adapter.facts`` takes them; default: the model itself.
    """
    facts = adapter.facts(model if part is None else part, owner)
    with torch.no_grad():
        expected = run()
        assert expected.std() > 0
        for exact, cases in ((True, INACTIVE), (False, IDENTITIES), (None, REDUCING)):
            for method, options in cases:
                if not legal(method, options, facts):
                    with pytest.raises(ValueError, match=r"class token|own attention|pooling"):
                        tp.patch(model, method, **options)
                    continue
                torch.manual_seed(0)
                with patched(model, method, **options):
                    result = run()
                if exact:
                    assert torch.equal(result, expected), method
                elif exact is False:
                    torch.testing.assert_close(
                        result, expected, atol=2e-5, rtol=1e-4, msg=lambda m, o=options: f"{o}: {m}"
                    )
                else:
                    assert result.shape == expected.shape and torch.isfinite(result).all(), method
        assert torch.equal(run(), expected)


def hold_gradients(model, run, methods=("tome", "evit", "threshold")):
    """Gradients of the training step with nothing to reduce are the original's; ``run() -> output`` in float64."""
    gradients = []
    wanted = {name: options for name, options in IDENTITIES[::-1] if "dense" not in options or name == "threshold"}
    wanted["evit"] = IDENTITIES[1][1]
    for method in (None, *methods):
        if method is not None:
            tp.patch(model, method, **wanted[method])
        model.zero_grad()
        torch.manual_seed(0)
        run().square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        if method is not None:
            tp.unpatch(model)
    for found in gradients[1:]:
        assert found.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-7)


def hold_places(model, images):
    """Gathered tokens keep their places: the same as hiding the others in the full map."""
    outputs = []
    with torch.no_grad():
        for dense in (True, False):
            reducer = reducers.create("threshold", {"depth": 3}, mode="topk", keep=0.5, selector="norm", dense=dense)
            with patched(model, reducer):
                outputs.append(features(model, images)[0])
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)


def hold_compile(model, make, output=lambda result: result, *, methods=(("tome", {"r": 3}), ("evit", {"keep": 0.6}))):
    """One compilation serves all batch sizes and gives the eager results; ``make(batch) -> images``."""
    if not _library.cpu_loaded():
        pytest.skip("the references read lengths on the host")
    for method, options in methods:
        torch._dynamo.reset()
        with patched(model, method, **options):
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
                for batch in (2, 3, 5):
                    images = make(batch)
                    torch._dynamo.mark_dynamic(images, 0)  # an error where the size of the batch gets fixed
                    torch.testing.assert_close(output(compiled(images)), output(model(images)))


def hold_autocast(model, run, tolerance=0.1):
    """Mixed precision gives what it gives without the patch, up to rounding."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = run().float()
        for method, options in IDENTITIES[:2]:
            with patched(model, method, **options):
                result = run().float()
            assert (result - expected).norm() <= tolerance * expected.norm()
        with patched(model, "tome", r=3):
            assert torch.isfinite(run()).all()


def hold_checkpointing(model, run, switch):
    """Gradient checkpointing changes no gradient; ``switch(on)`` turns it on and off."""
    generator = torch.Generator()
    tp.patch(model, "threshold", layers=[0, 1], generator=generator)
    gradients = []
    for on in (False, True):
        switch(on)
        torch.manual_seed(0)
        generator.manual_seed(0)
        model.train().zero_grad()
        run().square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    tp.unpatch(model.eval())
    switch(False)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


__all__ = [
    "hold_autocast",
    "hold_checkpointing",
    "hold_compile",
    "hold_gradients",
    "hold_identities",
    "hold_places",
    "legal",
    "liven",
]
