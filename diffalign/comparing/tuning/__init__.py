"""Hyper-parameters for each method by trials: the same small budget, the same number, the same judge on prompts that compare does not use.

`opened`, `tried`, `reported` and `complete` are `diffalign tune`, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.errors import Fault, UserError
from diffalign.runtime import launcher
from diffalign.runtime.extras import missing

if TYPE_CHECKING:
    from diffalign.comparing.running import Where
    from diffalign.comparing.tuning.folder import Tuning


def opened(
    words: Sequence[str],
    out: Path,
    trials: int | None = None,
    on: str | None = None,
    budget: str | None = None,
    seed: int | None = None,
    judge: str | None = None,
    allow: Sequence[str] = (),
) -> Tuning:
    """The tuning in a folder, made or gone on with; what is None is as it was asked before.

    Raises:
        UserError: with every mistake; if Optuna is not installed.
    """
    from diffalign.comparing.tuning.folder import Wish, open_tuning
    from diffalign.comparing.words import budget_of

    if launcher.several():
        raise UserError("tune: it starts its own processes; run it without a launcher")
    if mend := missing("optuna"):
        raise UserError(f"tune: it needs optuna, which is not installed: {mend}")
    wish = Wish(None if budget is None else budget_of(budget), on, judge, seed, tuple(allow), trials)
    return open_tuning(words, wish, out)


def tried(tuning: Tuning, jobs: int, say: Callable[[str], None], where: Where | None = None) -> list[str]:
    """Make the trials that are not finished; those that a signal ended, by name: the same command takes them up again.

    where: what trains them, None: this machine.

    Raises:
        Interrupted: on SIGINT or SIGTERM, once all have saved.
        UserError: if another process trains in the folder.
    """
    from diffalign.comparing.running import Runner, held
    from diffalign.comparing.tuning.study import Search

    with held(tuning.place):
        runner = Runner(jobs, say, where)
        search = Search(tuning, jobs, say)
        try:
            runner.run(search.units(runner))
        finally:
            search.settle(runner)
        return search.killed


def reported(tuning: Tuning) -> list[str]:
    """Write what was tried, and each method's best settings as a config; what to print."""
    from diffalign.comparing.tuning import records

    return records.write(tuning)


def complete(tuning: Tuning, killed: Sequence[str]) -> None:
    """Refuse to call a tuning done that lacks trials, or in which all trials of a method failed.

    Raises:
        Fault: with which.
    """
    from diffalign.comparing.tuned import BEST
    from diffalign.comparing.tuning import records

    if killed:
        raise Fault(f"tune: ended from outside: {', '.join(killed)}; the same command takes them up again")
    if barren := records.barren(tuning):
        raise Fault(f"tune: every trial failed of {', '.join(barren)}; there is no {BEST} of these")
