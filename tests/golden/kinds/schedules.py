# SPDX-License-Identifier: Apache-2.0
"""Kinds of learning-rate and keep-rate schedules of the classification recipes."""

import torch
from tokenprune_ext.tasks.classification import schedules

from tests.golden.harness import kind

EVIT = {
    "base_keep_rate": float,
    "epochs": int,
    "iters_per_epoch": int,
    "per": ("iteration",),
    "shrink_end_epoch": int,
    "shrink_start_epoch": int,
}
DYNAMICVIT = {
    "epochs": int,
    "iters_per_epoch": int,
    "lr": float,
    "min_lr": float,
    "per": str,
    "warmup_epochs": int,
}
SPVIT = {"epochs": int, "freeze_epochs": int, "min_lr": float, "per": ("epoch",), "scaled_lr": float}
RULES = {
    f"{system}_{number}.{key}": rule
    for system, keys in (("dynamicvit", DYNAMICVIT), ("evit", EVIT), ("spvit", SPVIT))
    for number in (0, 1)
    for key, rule in keys.items()
}


@kind("classification/schedules", RULES)
def classification_schedules(golden):
    result = {}
    for name, config in golden.config.items():
        result |= SYSTEMS[name.partition("_")[0]](name, config)
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in result.items()}


def dynamicvit(name, config):
    per_epoch, epochs = config["iters_per_epoch"], config["epochs"]
    options = {"min_rate": config["min_lr"], "warmup_epochs": config["warmup_epochs"]}
    steps = range(per_epoch * epochs)
    rates = [schedules.dynamicvit_learning_rate(s, per_epoch, epochs, config["lr"], **options) for s in steps]
    return {f"out.{name}_lr": rates}


def evit(name, config):
    start, per_epoch = config["shrink_start_epoch"], config["iters_per_epoch"]
    options = {"shrink_start_epoch": start, "shrink_epochs": config["shrink_end_epoch"] - start}
    steps = range(per_epoch * config["epochs"])
    rates = [schedules.evit_keep_rate(s, per_epoch, config["base_keep_rate"], **options) for s in steps]
    return {f"out.{name}_keep_rate": rates}


def spvit(name, config):
    options = {"min_rate": config["min_lr"], "freeze_epochs": config["freeze_epochs"]}
    epochs = config["epochs"]
    pairs = [schedules.spvit_learning_rates(e, epochs, config["scaled_lr"], **options) for e in range(epochs)]
    selectors, backbone = zip(*pairs)
    return {f"out.{name}_predictor_lr": selectors, f"out.{name}_backbone_lr": backbone}


SYSTEMS = {"dynamicvit": dynamicvit, "evit": evit, "spvit": spvit}
