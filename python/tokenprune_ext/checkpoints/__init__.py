# SPDX-License-Identifier: Apache-2.0
"""Official checkpoint files of every system, into our models. A file added to this folder is found by itself.

A source offers ``matches(state) -> bool``: whether a state dict has its layout, and ``convert(state, model) -> dict``: the
same weights under the model's names. Either may raise ValueError to refuse a file by name.
"""

from ._base import load_checkpoint, read_checkpoint, sources

__all__ = ["load_checkpoint", "read_checkpoint", "sources"]
