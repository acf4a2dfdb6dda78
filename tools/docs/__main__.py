"""`python -m tools.docs [--write]`."""

import sys

from tools.docs import main

sys.exit(main("--write" in sys.argv))
