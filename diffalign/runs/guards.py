"""Alarms: signs that a run is going wrong, looked for after every update and evaluation, each said once with what to try.

A watch is a function of what was logged so far; another one is a function here and a place in `WATCHES`. Thresholds are from runs on the
embedded pipelines, healthy ones and ones broken by a hundredfold learning rate (docs/metrics.md).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from diffalign.config.limits import GuardConfig
from diffalign.evaluation.intervals import Interval
from diffalign.evaluation.results import Judged, Summary
from diffalign.runs.events import Began, Drawn, Evaluated, Listener, Updated
from diffalign.runtime import keys

Row = dict[str, float]
FIRST = 2  # updates that later ones are compared with: the first is the base model's, a broken run's third can be gone already
ALIKE, FLAT, CLIPPED, BLANK = 0.6, 0.9, 0.9, 0.1
ESTRANGED = 0.1  # of the matching loss on the base model's samples: what DDRL's authors take for a sign of hacking
# norm_ratio and norm_radial: runs whose gold held stayed below 1.17 and above -0.19 (docs/choosing-a-rule.md)
LONGER, BACKWARD = 1.2, -0.25
DRIFTED, STEEP = 2.0, 30.0  # of latents' size either way, and of the gradient's norm, against the first updates


@dataclass
class Seen:
    """What a run logged so far: rows of updates, evaluations, drift of the last grid; `trained`: the rewards that it trains on;
    `last`: over how many updates numbers are averaged; `patience`: in how many evaluations in a row a reward must be below its best."""

    trained: frozenset[str]
    last: int
    rows: list[Row] = field(default_factory=list)
    evaluations: list[Summary] = field(default_factory=list)
    drift: float | None = None
    patience: int = 2

    def add(self, row: Row) -> None:
        """One more row of a log."""
        if keys.DRIFT in row:
            self.drift = row[keys.DRIFT]
        elif keys.is_update(row):
            self.rows.append(row)
        else:
            self.evaluations.append(Summary.of_row(row))

    def mean(self, key: str, rows: Sequence[Row]) -> float | None:
        """Of a number over some rows; None where none of them has it."""
        values = [row[key] for row in rows if key in row]
        return sum(values) / len(values) if values else None

    def then_and_now(self, key: str) -> tuple[float, float] | None:
        """A number's mean over the first and the last updates; None while these overlap."""
        if len(self.rows) < FIRST + self.last:
            return None
        pair = self.mean(key, self.rows[:FIRST]), self.mean(key, self.rows[-self.last :])
        return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])


def collapsed(seen: Seen) -> str:
    """Pictures of a prompt have become alike."""
    pair = seen.then_and_now(keys.DIVERSITY)
    if pair is None or pair[1] >= ALIKE * pair[0]:
        return ""
    return (
        f"pictures of a prompt have become alike ({keys.DIVERSITY} {pair[0]:.2f} -> {pair[1]:.2f}): go back to an earlier checkpoint, "
        "halve optimizer.lr, or raise rule.kl"
    )


def without_spread(seen: Seen) -> str:
    """Groups have equal rewards."""
    pair = seen.then_and_now("groups_flat")
    if pair is None or pair[1] < FLAT:
        return ""
    return (
        f"{100 * pair[1]:.0f} % of prompts have samples of equal reward, which teach nothing: a reward of finer steps, other prompts, "
        "or, where pictures broke, half of optimizer.lr"
    )


def clipped(seen: Seen) -> str:
    """Nearly every ratio is cut."""
    pairs = [seen.then_and_now(key) for key in ("clip_low", "clip_high")]
    now = sum(pair[1] for pair in pairs if pair is not None)
    if now < CLIPPED:
        return ""
    return f"{100 * now:.0f} % of ratios are cut at rule.clip: halve optimizer.lr, or take fewer rule.inner_updates"


def hacked(seen: Seen) -> str:
    """A held-out reward is below its best, evaluation after evaluation and by more than chance at last, while one that is trained on has
    risen since the beginning."""
    if len(seen.evaluations) < seen.patience:
        return ""
    latest = [evaluation.rewards for evaluation in seen.evaluations[-seen.patience :]]
    rose = [n for n, judged in latest[-1].items() if n in seen.trained and _above(judged.gain)]
    fell = [
        name
        for name in latest[-1]
        if name not in seen.trained
        and _below(latest[-1][name].since_best)
        and all(_less(found, name) for found in latest)
    ]
    if not (rose and fell):
        return ""
    fall = latest[-1][fell[0]].since_best
    assert fall is not None
    return (
        f"{rose[0]} rises and {fell[0]}, which is held out, falls ({fall.text('+.3f')} since its best): the reward is being tricked; "
        "look at samples/, take best/, stop earlier, raise rule.kl, or add a second reward"
    )


def _less(found: Mapping[str, Judged], name: str) -> bool:
    """Whether an evaluation's mean of a reward is less than the best before it."""
    change = found[name].since_best if name in found else None
    return change is not None and change.value < 0


def _above(interval: Interval | None) -> bool:
    return interval is not None and interval.low is not None and interval.low > 0


def _below(interval: Interval | None) -> bool:
    return interval is not None and interval.high is not None and interval.high < 0


def blank(seen: Seen) -> str:
    """Pictures of one colour appear."""
    pair = seen.then_and_now(keys.BLANK)
    if pair is None or pair[1] - pair[0] < BLANK:
        return ""
    return (
        f"{100 * pair[1]:.0f} % of pictures are of one colour: go back to an earlier checkpoint, halve optimizer.lr; a decoder that "
        "overflows needs precision: float32"
    )


def drifted(seen: Seen) -> str:
    """Finished latents have another size than they began with."""
    pair = seen.then_and_now(keys.LATENT)
    if pair is None or 1 / DRIFTED < pair[1] / max(pair[0], 1e-12) < DRIFTED:
        return ""
    return (
        f"finished latents have left the size they had ({keys.LATENT} {pair[0]:.2f} -> {pair[1]:.2f}), so pictures are too strong or too "
        "weak in colour: halve optimizer.lr, or raise rule.kl"
    )


def estranged(seen: Seen) -> str:
    """The base model's own samples are denoised clearly worse than by the base model."""
    own, base = (seen.mean(key, seen.rows[-seen.last :]) for key in (keys.DATA, keys.DATA_BASE))
    if len(seen.rows) < seen.last or own is None or base is None or own < (1 + ESTRANGED) * base:
        return ""
    return (
        f"samples of the base model are denoised {100 * (own / base - 1):.0f} % worse than by it ({keys.DATA} {own:.3g}), a sign that the "
        "reward is being tricked: look at samples/, take best/, or raise rule.data.weight"
    )


def outgrown(seen: Seen) -> str:
    """Predictions are much longer than the reference's, or have turned away from them."""
    ratio, radial = (seen.mean(key, seen.rows[-seen.last :]) for key in ("norm_ratio", "norm_radial"))
    if len(seen.rows) < seen.last or ratio is None or radial is None or (ratio < LONGER and radial > BACKWARD):
        return ""
    return (
        f"predictions have left the reference's (norm_ratio {ratio:.2f}, norm_radial {radial:+.2f}), which pictures do not "
        "survive long: go back to an earlier checkpoint, halve optimizer.lr, or raise rule.kl"
    )


def steep(seen: Seen) -> str:
    """Gradients have become far longer than they were."""
    pair = seen.then_and_now("grad_norm")
    if pair is None or pair[1] <= STEEP * pair[0]:
        return ""
    return f"gradients are {pair[1] / max(pair[0], 1e-12):.0f} times as long as at first: halve optimizer.lr"


def replaced(seen: Seen) -> str:
    """Pictures are as far from those before training as pictures of a prompt are from one another."""
    apart = seen.mean(keys.DIVERSITY, seen.rows[:FIRST])
    if seen.drift is None or apart is None or seen.drift < apart:
        return ""
    return (
        f"pictures are as far from those before training ({keys.DRIFT} {seen.drift:.2f}) as different pictures of a prompt were from one "
        f"another ({apart:.2f}): look at samples/"
    )


WATCHES: dict[str, Callable[[Seen], str]] = {
    "collapsed": collapsed,
    "without_spread": without_spread,
    "clipped": clipped,
    "hacked": hacked,
    "replaced": replaced,
    "blank": blank,
    "drifted": drifted,
    "steep": steep,
    "estranged": estranged,
    "outgrown": outgrown,
}


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong, after which update it was seen first, and what to try."""

    name: str
    update: int
    line: str


def alarms(rows: Sequence[Row], trained: Sequence[str], settings: GuardConfig) -> list[Alarm]:
    """What a run raises that logs these rows, in their order; trained: the rewards that it trains on."""
    seen, found = Seen(frozenset(trained), settings.last, patience=settings.patience), list[Alarm]()
    for row in rows:
        seen.add(row)
        found += _new(seen, {alarm.name for alarm in found}, int(row["update"]))
    return found


def _new(seen: Seen, known: Container[str], update: int) -> list[Alarm]:
    """Alarms that are not known yet."""
    lines = ((name, watch(seen)) for name, watch in WATCHES.items() if name not in known)
    return [Alarm(name, update, line) for name, line in lines if line]


class Guards(Listener):
    """Hears a run and raises alarms.

    trained: rewards that it trains on; say: told of each alarm once; logged: the rows that a run has logged, read when it is taken up.
    """

    def __init__(
        self,
        trained: Sequence[str],
        settings: GuardConfig,
        say: Callable[[str], None],
        logged: Callable[[], list[Row]] = list,
    ) -> None:
        self.seen, self.stop, self.say, self.logged = (
            Seen(frozenset(trained), settings.last, patience=settings.patience),
            settings.stop,
            say,
            logged,
        )
        self.raised: dict[str, int] = {}  # alarm -> after which update

    def began(self, event: Began) -> None:
        self.seen.rows, self.seen.evaluations = [], []
        for row in self.logged():
            self.seen.add(row)

    def updated(self, event: Updated) -> None:
        self.seen.rows.append(event.row)
        self._look(event.number)

    def evaluated(self, event: Evaluated) -> None:
        self.seen.evaluations.append(event.summary)
        self._look(event.number)

    def drawn(self, event: Drawn) -> None:
        self.seen.drift = event.drift
        self._look(event.number)

    def end(self) -> bool:
        """Whether an alarm ends the run here."""
        ends = self.stop and bool(self.raised)
        if ends:
            last = max(self.raised.values())
            self.say(
                f"guard.stop: the run ends after update {last}; where evaluation.every is above 0, best/ has the best adapter"
            )
        return ends

    def _look(self, number: int) -> None:
        for alarm in _new(self.seen, self.raised, number):
            self.raised[alarm.name] = number
            self.say(f"update {number}: {alarm.line}")
