# SPDX-License-Identifier: Apache-2.0
"""Token-reduction methods, one file each. A file added to this folder is found by itself."""

from ._base import Reducer, create, discover, get, names, register

globals().update(discover(__name__, __path__))

__all__ = ["Reducer", "create", "discover", "get", "names", "register"]
