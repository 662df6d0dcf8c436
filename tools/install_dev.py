# SPDX-License-Identifier: Apache-2.0
"""Install the development requirements of pyproject.toml into the running interpreter's environment."""

import re
import subprocess
import sys
from pathlib import Path


def dev_requirements(text: str) -> list[str]:
    """The `dev` list, read by pattern: tomllib needs Python 3.11."""
    block = re.search(r"^dev = \[(.*?)^\]", text, re.M | re.S).group(1)
    return re.findall(r'"([^"]+)"', block)


if __name__ == "__main__":
    requirements = dev_requirements((Path(__file__).parents[1] / "pyproject.toml").read_text())
    sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", *requirements]))
