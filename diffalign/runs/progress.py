"""What a person sees of a run: bars with reward and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.progress import Progress

from diffalign.runs.events import Ended, Evaluated, Listener, Updated
from diffalign.runtime import keys
from diffalign.runtime.display import LATER, SOON, Display
from diffalign.runtime.words import duration

LINES = 20  # lines that updates print where there is no terminal


class Pace:
    """How long updates take, by the last of them."""

    def __init__(self, recent: int = 20) -> None:
        self.recent = recent
        self.seconds: list[float] = []

    def told(self, left: int) -> str:
        """Seconds an update, and what so many more take."""
        last = self.seconds[-self.recent :]
        pace = sum(last) / len(last)
        return f"{duration(pace) if pace >= 10 else f'{pace:.2f} s'}/update, {duration(pace * left)} left"


class Reporter(Display, Listener):
    """Says what happens, on standard error; never silent for long."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(quiet)
        self._training: Any = None
        self.place: Any = ""  # the run's folder, for the last line
        self._pace, self._rewards, self._lines = Pace(), list[float](), 0

    def add_tasks(self, bar: Progress) -> None:
        self._training = bar.add_task("updates", total=None, note="", visible=False)

    def begin(self, done: int, total: int) -> None:
        """An update begins."""
        if self._pulse is not None:
            self._pulse.place, self._pulse.patience = f"update {done + 1}/{total}: ", SOON if not self._lines else LATER
        elif self.draws:
            self.bars().update(self._training, completed=done, total=total, visible=True)

    # -- what has happened

    def updated(self, event: Updated) -> None:
        """The bar moves, or now and then there is a line."""
        row, total = event.row, event.total
        self._pace.seconds.append(row["seconds/total"])
        self._rewards.append(row.get(keys.TOTAL, float("nan")))
        recent = [value for value in self._rewards[-10:] if value == value]
        reward = f"{sum(recent) / len(recent):.3f}" if recent else "-"
        share = f" ({event.share})" if event.share else ""
        left = self._pace.told(total - event.number)
        if self.draws:
            note = f"reward {reward}{share}"
            self.bars().update(self._training, completed=event.number, total=total, note=note, left=left)
        elif not self._lines or event.number % max(1, total // LINES) == 0 or event.number == total:
            self._lines += 1
            phases = ", ".join(
                f"{key.removeprefix('seconds/')} {value:.2f}"
                for key, value in row.items()
                if key.startswith("seconds/") and key != "seconds/total"
            )
            self.say(f"update {event.number}/{total}{share}  reward {reward}  {left} ({phases})")
        if self._pulse is not None:
            self._pulse.place, self._pulse.patience = "", SOON
        self._remark(event)

    def _remark(self, event: Updated) -> None:
        """What a user should know of an update."""
        update = event.update
        if update.unscored:
            self.say(f"update {event.number}: {update.unscored} samples have no score and carry no weight")
        if update.flat:
            self.say(f"update {event.number}: every group has equal rewards, nothing to learn; skipped")
        if update.nonfinite:
            so_far = int(event.row["skipped"])
            self.say(f"update {event.number}: the gradient is not finite; skipped ({so_far} so far)")

    def evaluated(self, event: Evaluated) -> None:
        """One line a reward, with intervals and, after the first, the paired gain."""
        for name, judged in event.summary.rewards.items():
            line = f"update {event.number}  {keys.evaluated(name)} {judged.value.text()}"
            if judged.gain is not None:
                line += f"  gain {judged.gain.text('+.3f')}"
            self.say(line)

    def ended(self, event: Ended) -> None:
        for name, judged in event.summary.rewards.items():
            if judged.gain is not None and judged.gain.value < 0:
                high = judged.gain.high
                how = "on too few prompts for an interval" if high is None else "though its interval reaches above 0"
                how = "and its interval is below 0" if high is not None and high < 0 else how
                self.say(
                    f"{name} is lower than before training, {how}: look at curves.png and samples/ before using it"
                )
        self.say(f"done: {event.number} updates, {duration(event.seconds)}, {self.place}")
