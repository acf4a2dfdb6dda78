"""The 45 animals of DDPO (arXiv 2305.13301, "simple animals"); a prompt is the name alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_LIST = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant "
    "butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama "
    "camel bat gorilla hedgehog kangaroo"
)
NAMES = _LIST.split()


def prompts(tasks: Sequence[str], split: str) -> list[dict[str, Any]]:
    """31 animals to train on, 5 to validate, 9 to test; fixed for ever."""
    order = np.random.default_rng([20, 8]).permutation(len(NAMES))
    parts = {"test": order[:9], "validation": order[9:14], "train": order[14:]}
    return [{"prompt": NAMES[k]} for k in sorted(parts[split])]
