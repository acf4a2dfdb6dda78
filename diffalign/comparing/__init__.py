"""Instruments that compare rules: their gradients on one batch, and what they learn at equal budgets.

`opened`, `trained`, `reported` and `complete` are `diffalign compare`, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.errors import Fault, UserError
from diffalign.runtime import launcher

if TYPE_CHECKING:
    from diffalign.comparing.comparison import Comparison
    from diffalign.comparing.methods import Unit


def opened(
    words: Sequence[str],
    out: Path,
    seeds: str | None = None,
    budget: str | None = None,
    every: int | None = None,
    allow: Sequence[str] = (),
    target: str | None = None,
) -> Comparison:
    """The comparison in a folder, made or gone on with; what is None is as it was asked before.

    Raises:
        UserError: with every mistake.
    """
    from diffalign.comparing.comparison import Wish, open_comparison
    from diffalign.comparing.words import budget_of, seeds_of, target_of

    if launcher.several():
        raise UserError("compare: it starts its own processes; run it without a launcher")
    wish = Wish(
        None if budget is None else budget_of(budget),
        every,
        tuple(allow),
        None if target is None else target_of(target),
    )
    return open_comparison(words, () if seeds is None else seeds_of(seeds), wish, out)


def trained(
    comparison: Comparison, jobs: int | None, say: Callable[[str], None], ray: str | None = None
) -> dict[Unit, str]:
    """Train the units that are not finished; those that failed, with what they said last.

    jobs: units at a time, None: one on this machine, on a cluster as many as it has room for; ray: the cluster's address, None: this
    machine trains.

    Raises:
        Interrupted: on SIGINT or SIGTERM, once all have saved.
        UserError: if another process compares in the folder, or there is no such cluster.
    """
    from diffalign.comparing import facts
    from diffalign.comparing.cluster import connected
    from diffalign.comparing.running import Runner, held

    with held(comparison.place):
        waiting = [unit for unit in comparison.units if not unit.finished]
        if not waiting:
            return {}
        if ray is None:
            comparison.noted(facts.of_run(jobs or 1, len(waiting)))
            return Runner(jobs or 1, say).run(waiting)
        with connected(ray, jobs) as cluster:
            cluster.check(waiting)
            comparison.noted({**facts.of_run(jobs, len(waiting)), "machine": cluster.said})
            return Runner(jobs or len(waiting), say, cluster).run(waiting)


def reported(comparison: Comparison, failed: Mapping[Unit, str] | None = None) -> list[str]:
    """Write everything that is read from the units into the folder; what to print.

    Raises:
        Fault: if no unit came to its end.
    """
    from diffalign.comparing import figures, files, page, results, wording
    from diffalign.comparing.comparison import Comparison

    found = results.collect(Comparison.read(comparison.place), failed)
    for part in (files, figures, page):
        part.write(found, comparison.place)
    return [*wording.lines(found), "", str(comparison.place / "index.html")]


def complete(comparison: Comparison, failed: Mapping[Unit, str]) -> None:
    """Refuse to call a comparison done whose units failed.

    Raises:
        Fault: with how many.
    """
    if failed:
        raise Fault(
            f"compare: {len(failed)} of {len(comparison.units)} units failed; the report is of the others, and the same command tries again"
        )
