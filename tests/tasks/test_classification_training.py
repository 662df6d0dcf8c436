# SPDX-License-Identifier: Apache-2.0
"""Recipes of the classification systems: losses, rates, groups, freezing, latency budgets."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tokenprune_ext import create_model
from tokenprune_ext.profiling import LatencyTable, latency_table
from tokenprune_ext.tasks.classification import groups, latency, losses, schedules
from torch import nn

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}


def small(name, **options):
    torch.manual_seed(0)
    return create_model(name, **SMALL, **options), torch.randn(2, 3, 32, 32)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("name", ["spvit_deit_small", "spvit_lvvit_s", "dynamicvit_deit_s", "dynamicvit_lvvit_s"])
def test_distillation_step(name):
    """Student and teacher from one file; everything that is trained gets a gradient."""
    lv = "lvvit" in name
    student, images = small(name)
    teacher, _ = small("lvvit_s") if lv else small("deit_256_patch16_224")
    teacher.eval()
    student.train()
    with torch.no_grad():
        taught = losses.token_outputs(teacher, images)
    ours = losses.token_outputs(student, images)
    assert taught.state is None and taught.mask is None
    assert ours.tokens.shape == taught.tokens.shape == (2, 16, 5 if lv else 24)
    reducer = student.token_reducer
    parts = losses.distillation_loss(
        ours.logits,
        torch.full((2, 5), 0.2),
        [ours.state.carry[f"keep.{layer}"] for layer in reducer.layers],
        reducer.keep,
        tokens=ours.tokens,
        mask=ours.mask,
        teacher_logits=taught.logits,
        teacher_tokens=taught.tokens,
        token_kind="kl" if lv else "mse",
        ratio_per_sample=reducer.ratio_per_sample,
    )
    expected = parts.cls + 2 / 3 * parts.ratio_sum + 0.5 * (parts.kl + parts.token)
    torch.testing.assert_close(parts.total, expected)
    parts.total.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_teacher_says_the_same_in_evaluation_and_training_but_for_its_statistics():
    teacher, images = small("lvvit_s")
    with torch.no_grad():
        teacher.eval()
        quiet = losses.token_outputs(teacher, images)
        assert quiet.logits.shape == (2, 5)
        torch.testing.assert_close(teacher(images), quiet.logits + 0.5 * quiet.tokens.max(1).values)


def test_token_outputs_need_all_patches():
    student, images = small("spvit_deit_small")
    with pytest.raises(ValueError, match="must keep all patches"):
        losses.token_outputs(student.eval(), images)


def test_loss_terms():
    torch.manual_seed(0)
    logits, teacher = torch.randn(3, 5), torch.randn(3, 5)
    hard = F.one_hot(torch.tensor([1, 0, 4]), 5).float()
    torch.testing.assert_close(
        losses.soft_cross_entropy(logits, hard), F.cross_entropy(logits, torch.tensor([1, 0, 4]))
    )
    p, q = teacher.softmax(-1), logits.softmax(-1)
    torch.testing.assert_close(losses.kl_divergence(logits, teacher), (p * (p / q).log()).sum(-1).mean())
    tokens, taught = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).float()
    kept = mask > 0.5
    torch.testing.assert_close(losses.token_distillation(tokens, taught, mask), F.mse_loss(tokens[kept], taught[kept]))
    torch.testing.assert_close(
        losses.token_distillation(tokens, taught, mask, "kl"), losses.kl_divergence(tokens[kept], taught[kept])
    )
    leaf = tokens.requires_grad_()
    nothing = losses.token_distillation(leaf, taught, torch.zeros(3, 4))
    nothing.backward()
    assert nothing == 0 and torch.isfinite(leaf.grad).all()
    with pytest.raises(ValueError, match="kind must be"):
        losses.token_distillation(tokens, taught, mask, "l1")


def test_ratio_of_a_batch_lets_images_differ():
    keep = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert losses.ratio_loss([keep], [0.5], per_sample=False) == 0
    assert losses.ratio_loss([keep], [0.5], per_sample=True) == 0.25


# ---------------------------------------------------------------- rates


def test_frozen_and_slow_backbones():
    for epoch in range(30):
        selectors, backbone = schedules.spvit_learning_rates(epoch, 30, 1e-3)
        assert selectors == pytest.approx(1e-5 + 0.5 * (1 + math.cos(math.pi * epoch / 30)) * (1e-3 - 1e-5))
        assert backbone == (0.0 if epoch < 5 else min(1e-5, selectors))
    # The script's late literal, and the corrected behaviour.
    assert schedules.spvit_learning_rates(30, 60, 2e-3)[0] == pytest.approx(1e-5 + 0.5 * (5e-4 - 1e-5))
    assert schedules.spvit_learning_rates(30, 60, 2e-3, late_override=False)[0] == pytest.approx(
        1e-5 + 0.5 * (2e-3 - 1e-5)
    )
    rates = [schedules.dynamicvit_rates(step, 10, 30, 1e-3) for step in range(300)]
    assert rates[0] == (0.0, 0.0) and rates[49] == (pytest.approx(1e-3), 0.0)
    assert all(backbone == pytest.approx(0.01 * predictors) for predictors, backbone in rates[50:])
    svit = [schedules.svit_learning_rate(epoch, 30, 2e-5) for epoch in range(30)]
    assert svit[0] == svit[1] == 2e-5 and svit[2] < svit[1]
    assert schedules.evit_keep_rate(0, 10, 0.7, shrink_epochs=0) == 0.7


@pytest.mark.parametrize("recipe", ["spvit", "dynamicvit", "svit"])
def test_groups(recipe):
    name = {"spvit": "spvit_lvvit_s", "dynamicvit": "dynamicvit_lvvit_s", "svit": "svit_s"}[recipe]
    model, _ = small(name)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    found = {}
    for group in groups.parameter_groups(model, recipe, 0.05):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["role"], group["weight_decay"])
    for key, parameter in model.named_parameters():
        if key in ("cls_token", "pos_embed"):
            assert found.get(key) == (("backbone", 0.0) if recipe == "svit" else None)
            continue
        role = "selectors" if key.startswith("token_reducer.") else "backbone"
        decays = parameter.dim() > 1 or (recipe == "spvit" and role == "selectors")
        assert found[key] == (role, 0.05 if decays else 0.0), key
    with pytest.raises(ValueError, match="recipe must be"):
        groups.parameter_groups(model, "deit")


@pytest.mark.parametrize("name", ["spvit_lvvit_s", "dynamicvit_lvvit_s"])
def test_a_resting_backbone_moves_only_its_statistics(name):
    model, images = small(name)
    model.train()
    optimizer = torch.optim.AdamW(groups.parameter_groups(model, name.partition("_")[0]), lr=1.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def step(epoch):
        if name.startswith("spvit"):
            rates = schedules.spvit_learning_rates(epoch, 30, 1e-3)
        else:
            rates = schedules.dynamicvit_rates(10 * epoch + 9, 10, 30, 1e-3)
        groups.set_rates(optimizer, *rates)
        outputs = losses.token_outputs(model, images)
        loss = outputs.logits.square().sum() + model.token_reducer.losses(outputs.state)["ratio"]
        optimizer.zero_grad()
        (loss + outputs.tokens.square().mean()).backward()
        optimizer.step()
        return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}

    learning = {key for key, _ in model.token_reducer.named_parameters(prefix="token_reducer")}
    statistics = {key for key, _ in model.named_buffers() if ".bn" in key}
    assert step(4) == learning | statistics
    moved = step(5)
    assert {"cls_token", "pos_embed"} & moved == set()
    still = {key for key, _ in model.named_parameters()} - moved
    assert still == {"cls_token", "pos_embed"}


def test_learning_reaches_the_target_share():
    """A few steps on the ratio loss alone pull the kept share to its target."""
    torch.manual_seed(0)
    model, _ = small("spvit_deit_small", keep=[0.5], layers=[1], generator=torch.Generator().manual_seed(0))
    model.train()
    nn.init.constant_(model.token_reducer.selectors[0].out_conv[4].bias, 0.0)
    model.token_reducer.selectors[0].out_conv[4].bias.data[0] = 2.0  # starts by keeping nearly all
    images = torch.randn(16, 3, 32, 32)
    optimizer = torch.optim.Adam(model.token_reducer.parameters(), lr=0.02)
    shares = []
    for _ in range(60):
        state = losses.token_outputs(model, images).state
        shares.append(float(state.carry["keep"].detach().mean()))
        optimizer.zero_grad()
        model.token_reducer.losses(state)["ratio"].backward()
        optimizer.step()
    assert shares[0] > 0.8 and abs(sum(shares[-5:]) / 5 - 0.5) < 0.08


# ---------------------------------------------------------------- latency


def linear_table(selector=0.1):
    ratios = tuple(i / 10 for i in range(1, 11))
    return LatencyTable(ratios, tuple(0.2 + r for r in ratios), (selector,) * 10, 1.0)


def test_table_interpolates():
    table = linear_table()
    assert table.block(0.55) == pytest.approx(0.75) and table.block(0.05) == pytest.approx(0.25)
    assert table.model([1.0, 0.5], [1]) == pytest.approx(1 + 1.2 + 0.7 + 0.1)
    assert LatencyTable((1.0,), (2.0,), (0.0,), 0.0).block(0.5) == 1.0
    for ratios, times in (((0.5, 0.4), (1.0, 1.0)), ((), ()), ((0.5, 1.0), (1.0,))):
        with pytest.raises(ValueError, match="ratios must rise"):
            LatencyTable(ratios, times, times, 0.0)


def test_solver_meets_the_limit():
    table, layers = linear_table(), [1, 2, 3]
    dense = latency.predicted_ms(table, {}, 4)
    assert latency.block_shares({1: 0.7, 3: 0.3}, 4) == [1.0, 0.7, 0.7, 0.3]
    rate = latency.solve_base_rate(table, layers, 4, 0.8 * dense)
    found = latency.predicted_ms(table, {layer: rate ** (s + 1) for s, layer in enumerate(layers)}, 4)
    assert found == pytest.approx(0.8 * dense) and found <= 0.8 * dense
    assert latency.solve_base_rate(table, layers, 4, 10 * dense) == 1.0
    with pytest.raises(ValueError, match="limit_ms must be at least"):
        latency.solve_base_rate(table, layers, 4, 0.1)


def test_latency_sparsity_loss():
    keep = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    loss = latency.latency_sparsity_loss([keep], [0.5])
    torch.testing.assert_close(loss, torch.tensor((1 - 0.5 - 0.75) ** 2))
    loss.backward()
    assert keep.grad is not None


def test_layer_to_phase():
    """An accuracy that falls with what each block loses gives rising pruning, merged into phases."""
    calls = []

    def score(stages):
        calls.append(dict(stages))
        return 80 - sum((1 - share) * (0.5 if layer < 8 else 0.2) for layer, share in stages.items())

    table = linear_table()
    phases = latency.layer_to_phase(score, table, depth=12, limit_ms=1.0)
    assert calls[0] == {} and min(phases) >= 3
    shares = [phases[layer] for layer in sorted(phases)]
    assert shares == sorted(shares, reverse=True) and all(a - b >= 0.085 for a, b in pairwise(shares))
    assert score(phases) >= 79.5
    # With time to spare the first phase keeps more.
    loose = latency.layer_to_phase(score, table, depth=12, limit_ms=100.0)
    assert loose[min(loose)] >= phases[min(phases)] and loose[min(loose)] == 1.0
    assert latency.layer_to_phase(lambda stages: 80.0 - 9 * len(stages), table, depth=6, limit_ms=1.0) == {}


@pytest.mark.parametrize("name", ["spvit_deit_small", "svit_s", "lvvit_s"])
def test_measured_table(name):
    model, _ = small(name)
    model.train()
    table = latency_table(model, ratios=(0.25, 0.5), batch_size=2, budget_s=0.05)
    assert table.ratios == (0.25, 0.5, 1.0) and table.batch_size == 2
    assert all(ms > 0 for ms in table.block_ms) and table.other_ms > 0
    assert all((ms > 0) == hasattr(model, "token_reducer") for ms in table.selector_ms)
    assert model.training
    with pytest.raises(ValueError, match="ratios must lie in"):
        latency_table(model, ratios=(0.0,))
