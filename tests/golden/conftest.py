# SPDX-License-Identifier: Apache-2.0
"""Says at the end which golden kinds wait for their systems."""

from collections import Counter

from tests.golden import harness
from tests.golden.not_built import NOT_BUILT


def pytest_terminal_summary(terminalreporter):
    counts = Counter(harness.kind_of(path) for path in harness.files())
    waiting = {kind: n for kind, n in counts.items() if kind in NOT_BUILT}
    late = sum(waiting.values())
    terminalreporter.write_line(
        f"golden: {sum(counts.values()) - late} files of {len(counts) - len(waiting)} kinds are compared; "
        f"{late} files of {len(waiting)} kinds wait for systems not built yet (tests/golden/not_built.py)"
    )
