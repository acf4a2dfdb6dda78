"""Questions that hang on others (Davidsonian Scene Graph, arXiv 2310.18235): whether the hat is red counts only where there is a hat."""

from __future__ import annotations

from collections.abc import Sequence


def holding(yes: Sequence[bool], parents: Sequence[Sequence[int]]) -> list[bool]:
    """Which of a picture's questions (Q,) hold: those answered yes whose parents hold.

    In the order of the questions, as published: a parent that comes later counts by its answer alone.

    Args:
        yes: (Q,) whether each was answered yes.
        parents: (Q,) of each the places of those that it hangs on.
    """
    holds = list(yes)
    for place, own in enumerate(parents):
        holds[place] = holds[place] and all(holds[parent] for parent in own)
    return holds
