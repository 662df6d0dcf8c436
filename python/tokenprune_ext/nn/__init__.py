# SPDX-License-Identifier: Apache-2.0
"""What models share: the token state, the branches of a pre-norm block, and deformable attention."""

from .block import AttentionBranch, BlockParts, BlockRecord, BlockRun, MlpBranch, run_block
from .deform import DeformInputs, MSDeformAttn, deform_inputs, grid_reference_points
from .packed import PackedLinear, PackedPatches, pack, run_chain, unpack
from .places import PairBias, Rotary
from .state import (
    TokenState,
    pad_rows,
    row_positions,
    sequence_of_row,
    split_prefix,
    unpad_rows,
)

__all__ = [
    "AttentionBranch",
    "BlockParts",
    "BlockRecord",
    "BlockRun",
    "DeformInputs",
    "MSDeformAttn",
    "MlpBranch",
    "PackedLinear",
    "PackedPatches",
    "PairBias",
    "Rotary",
    "TokenState",
    "deform_inputs",
    "grid_reference_points",
    "pack",
    "pad_rows",
    "row_positions",
    "run_block",
    "run_chain",
    "sequence_of_row",
    "split_prefix",
    "unpack",
    "unpad_rows",
]
