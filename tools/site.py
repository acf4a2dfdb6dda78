"""`python -m tools.site OUT`: the pages as a site. What is wrong with one, a link or an anchor that leads nowhere too, is an error.

`pip install -e '.[docs]'`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(out: Path) -> int:
    """Build; returns sphinx's exit code."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", "docs", ".", str(out)]
    return subprocess.run([*command, "-d", str(out / ".doctrees")], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
