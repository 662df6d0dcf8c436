# SPDX-License-Identifier: Apache-2.0
"""Every row of the expedit-swag tables: SWAG ViT-L/16 at 512 and H/14 at 518 pixels with seven methods.

``--quick``: one row per method of L/16 in bfloat16. Without it: every row of L/16, the first of each method also for a batch
of 8, and in bfloat16 for H/14. ``--full``: every row everywhere.
"""

import functools
import re

import tokenprune_ext
import torch
from tokenprune_ext import tables
from tokenprune_ext.tables._base import without_memory

from benchmarks.core import Context
from benchmarks.models._common import Backbone, Row, case_of, settings

L16 = Backbone("swag_l16_512", lambda: tokenprune_ext.create_model("vit_l16_in1k"), patient=True)
H14 = Backbone("swag_h14_518", lambda: tokenprune_ext.create_model("vit_h14_in1k"), patient=True)
# Settings for the short table, by method and what their key ends in.
_HEADLINES = ("hourglass_6_529", "tome_40", "evit_0.7", "ats_16", "evo_8_0.4", "act_16", "smyrf_12_32_32")
_HEADLINES_H14 = ("hourglass_10_676", "tome_40", "evit_0.5", "ats_14", "evo_14_0.5", "act_16", "smyrf_16_32_32")
_METHODS = {"e_vit": "evit", "evo_vit": "evo", "tome_vit": "tome"}
_SLOWER = ("act", "smyrf")  # published as slower than dense: less is promised


def _apply(name, options, model):
    """Put the reducer of a published model into another one of the same size."""
    return tokenprune_ext.patch(
        model, without_memory(lambda: tokenprune_ext.create_model(name, **options)).token_reducer
    )


def _row(row: tables.Row, headlines) -> Row:
    prefix = re.sub(r"_[lh]1[46]_in1k$", "", row.model)
    method = _METHODS.get(prefix, prefix.removesuffix("_vit"))
    values = [value for option in row.options.values() for value in (option if isinstance(option, list) else [option])]
    key = "_".join([method, *map(str, values[:3])])  # SMYRF's two cluster sizes are equal
    promised = method not in _SLOWER
    return Row(
        key=key,
        method=method,
        text=row.setting,
        apply=functools.partial(_apply, row.model, row.options),
        ideal_share=0.93 if promised else 0.85,
        efficiency=0.95 if promised else None,
        headline=key in headlines,
        published=row.id,
    )


@functools.cache
def rows(size: str) -> tuple[Row, ...]:
    """Rows of ``"l16"`` or ``"h14"``, the dense ones left out."""
    headlines = _HEADLINES if size == "l16" else _HEADLINES_H14
    found = [row for row in tables.rows() if row.id.startswith("expedit-swag/") and f"_{size}_" in row.model]
    return tuple(_row(row, headlines) for row in found if row.model != f"vit_{size}_in1k")


def cases(context: Context):
    """Cases of the family swag."""
    half = [dtype for dtype in context.dtypes if dtype == torch.bfloat16]
    for place in settings(context, L16, half if context.quick else context.dtypes, (1,) if context.quick else (1, 8)):
        yield case_of(context, place, None)
        for row in rows("l16"):
            few = context.quick or (place.batch > 1 and not context.full)
            fewer = context.quick and place.packed
            if (row.headline or not few) and (row.method == "tome" or not fewer):
                yield case_of(context, place, row)
    if context.quick:
        return
    for place in settings(context, H14, context.dtypes if context.full else half, (1, 8) if context.full else (1,)):
        yield case_of(context, place, None)
        for row in rows("h14"):
            if context.full or row.headline:
                yield case_of(context, place, row)
