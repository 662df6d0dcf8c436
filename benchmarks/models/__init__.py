# SPDX-License-Identifier: Apache-2.0
"""Cases of the suite "models": one file per system, found by its name."""
