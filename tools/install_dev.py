# SPDX-License-Identifier: Apache-2.0
"""Install the development requirements of pyproject.toml into the running interpreter's environment."""

import re
import subprocess
import sys
from pathlib import Path


def requirements(name: str) -> list[str]:
    """An extra of pyproject.toml, read by pattern: tomllib needs Python 3.11."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    block = re.search(rf"^{name} = \[(.*?)\]", text, re.M | re.S).group(1)
    return re.findall(r'"([^"]+)"', block)


def install(*arguments: str) -> int:
    """Exit status of pip."""
    return subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", *arguments])


if __name__ == "__main__":
    status = install(*requirements("dev"))
    # Only headers are read from this package, so its Python dependencies stay out. Without it a build leaves units out.
    if status == 0 and install("--no-deps", *requirements("cuda-units")) != 0:
        print("install_dev: no CUTLASS headers; the sm_90a units will be left out", file=sys.stderr)
    sys.exit(status)
