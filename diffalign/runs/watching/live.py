"""What is known of a run while one looks: whether something works on it. Takes no lock, so that it is in nobody's way."""

from __future__ import annotations

import os
import time
from pathlib import Path

from diffalign.runs.folder import CONFIG, LOCK
from diffalign.runs.logs import METRICS
from diffalign.runs.watching.reading import Record
from diffalign.runtime import keys
from diffalign.runtime.words import duration

LOCKS = Path("/proc/locks")  # Linux's list of what is locked on this machine
LOOKED_AT = (CONFIG, METRICS, "adapter", "evaluation", "samples", "checkpoints", "adapter/curves.png")
PATIENCE, TIMES = (
    60.0,
    5.0,
)  # seconds, and the longest of the last updates, in which a run that is not over writes something


def stamp(place: Path) -> tuple[int, ...]:
    """What changes where a run wrote something: times and sizes of what it writes."""
    found: list[int] = []
    for name in LOOKED_AT:
        try:
            facts = (place / name).stat()
            found += [facts.st_mtime_ns, facts.st_size]
        except OSError:  # it is not there, or was replaced just now
            found += [0, 0]
    return tuple(found)


def state(record: Record, now: float | None = None) -> str:
    """`finished`, `running`, or how long nothing was written; now: seconds as `time.time` has them."""
    if record.finished:
        return "finished"
    if locked(record.place / LOCK):
        return "running"
    age = (time.time() if now is None else now) - max(stamp(record.place)[::2]) / 1e9
    slowest = max((row.get(keys.TOOK, 0.0) for row in record.updates[-10:]), default=0.0)
    return "running" if age < max(PATIENCE, TIMES * slowest) else f"stopped, quiet for {duration(age)}"


def locked(path: Path) -> bool:
    """Whether a process of this machine holds a lock file, as far as the system tells; False where it does not."""
    try:
        facts, lines = path.stat(), LOCKS.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return False
    place = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    return any(place in line.split() and "->" not in line for line in lines)
