"""What happens in a run, and who hears of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffalign.runs.budget import Spent
from diffalign.types import Update

if TYPE_CHECKING:  # the folder is opened before anything heavy is imported
    import numpy as np
    from numpy.typing import NDArray

    from diffalign.evaluation.results import Summary


@dataclass(frozen=True)
class Began:
    """A run begins, or is taken up, after `number` updates: whatever was written of later ones will come again."""

    number: int


@dataclass(frozen=True)
class Updated:
    """An update is done, the `number`-th of `total`, as far as that can be told; row: what is logged of it; share: how much of its budget
    the run has spent, where that is not a number of updates."""

    number: int
    total: int
    update: Update
    row: dict[str, float]
    share: str = ""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation after `number` updates is done; spent: what they took."""

    number: int
    summary: Summary
    spent: Spent = field(default_factory=Spent)


@dataclass(frozen=True)
class Drawn:
    """A grid was drawn after `number` updates: pictures (n, H, W, 3) uint8 of fixed prompts and noises, and their captions.

    drift: how far they are from those before training, root mean square of thumbnails; None where there are none.
    """

    number: int
    images: NDArray[np.uint8]
    captions: Sequence[str]
    drift: float | None = None


@dataclass(frozen=True)
class Ended:
    """The run came to its end after `number` updates, in `seconds` since it was taken up."""

    number: int
    summary: Summary
    seconds: float


class Listener:
    """Hears of a run's events, in the process that writes; each does nothing unless said otherwise.

    A run that is taken up begins again, and one that was finished and is asked for again ends again. A file of a listener's own is named in
    `folder.FILES`, so that `--fresh` deletes it.
    """

    def began(self, event: Began) -> None: ...
    def updated(self, event: Updated) -> None: ...
    def evaluated(self, event: Evaluated) -> None: ...
    def drawn(self, event: Drawn) -> None: ...
    def ended(self, event: Ended) -> None: ...


class Listeners(Listener):
    """Several, in order."""

    def __init__(self, members: Sequence[Listener]) -> None:
        self.members = list(members)

    def began(self, event: Began) -> None:
        for member in self.members:
            member.began(event)

    def updated(self, event: Updated) -> None:
        for member in self.members:
            member.updated(event)

    def evaluated(self, event: Evaluated) -> None:
        for member in self.members:
            member.evaluated(event)

    def drawn(self, event: Drawn) -> None:
        for member in self.members:
            member.drawn(event)

    def ended(self, event: Ended) -> None:
        for member in self.members:
            member.ended(event)
