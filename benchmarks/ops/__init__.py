# SPDX-License-Identifier: Apache-2.0
"""Cases of the suite "ops": one file per op family, found by its name."""
