"""`python train.py CONFIG [key=value ...]`: the same as `diffalign train`."""

import sys

from diffalign.cli import main

main(["train", *sys.argv[1:]])
