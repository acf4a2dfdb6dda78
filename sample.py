"""`python sample.py RUN --prompt "..."`: the same as `diffalign sample`."""

import sys

from diffalign.cli import main

main(["sample", *sys.argv[1:]])
