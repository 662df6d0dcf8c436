# SPDX-License-Identifier: Apache-2.0
"""Our ops and models beside what a user would otherwise pick: ``python -m benchmarks --help``."""
