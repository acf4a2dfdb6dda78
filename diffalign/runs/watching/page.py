"""A run's own page, `index.html`: one file that asks for nothing from elsewhere. The same files give the same page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from diffalign import config as configs
from diffalign.errors import Fault, UserError
from diffalign.evaluation.results import Evaluation, Judged
from diffalign.report import charts, pages, pictures
from diffalign.report.figures import Points
from diffalign.runs import history
from diffalign.runs.grids import stored
from diffalign.runs.resume import DECIDED
from diffalign.runs.watching.reading import WIDTH, Record
from diffalign.runtime import keys, numbered
from diffalign.runtime.yaml_text import parse

PAGE = Path(__file__).parent / "page.html"
SHOWN, TIMES = 12, 12  # pictures, and moments of training
POINTS, MARKS = 400, 50  # of a curve: drawn, and with numbers to point at


def render(record: Record, live: str = "", version: str = "", root: str = "") -> str:
    """The page. live: what is known beside the folder while it is served, with the version that is asked again for and what leads back to
    a list of runs."""
    problems: list[str] = [*record.broken]
    grids = _pictures(record, problems)
    rewards, evaluations = history.curves(record.rows)
    names = dict.fromkeys([*map(_judge, evaluations), *keys.rewards(rewards).values()])
    number = {name: k for k, name in enumerate(names)}  # one colour a reward in all charts
    values: dict[str, Any] = {
        "record": record,
        "finding": finding(record),
        "state": state(record),
        "facts": _facts(record),
        "training": [_training(keys.rewards([key])[key], points, number) for key, points in rewards.items()],
        "evaluations": [_evaluated(_judge(key), points, number) for key, points in evaluations.items()],
        "pictures": grids,
        "commands": commands(record),
        "preset": _differences(record),
        "settings": [(key, said(value)) for key, value in configs.flat(record.settings)],
        "problems": problems,
        "live": live,
        "version": version,
        "root": root,
    }
    return pages.render(PAGE, {}, **values)


# -- in words


def state(record: Record) -> str:
    """How far it is, by its files alone."""
    if record.finished:
        return "finished"
    return "not finished" if record.done else "begun"


def finding(record: Record) -> str:
    """What came of it so far, in a sentence."""
    if record.evaluations and record.evaluations[-1][1].rewards:
        update, summary = record.evaluations[-1]
        judge, judged = next(iter(summary.rewards.items()))
        if judged.gain is not None:
            return f"{_changed(judge, judged)}{'' if update == record.done else f' after {update} updates'}."
    reward, first = record.last_reward, record.reward(record.updates[:WIDTH])
    if reward is None or first is None:
        return "No update is done yet." if not record.done else f"{record.done} updates are done."
    if len(record.updates) < 2 * WIDTH:
        return f"The training reward is {reward:.3f} so far."
    return f"The training reward is {reward:.3f}; it began at {first:.3f}."


def _changed(judge: str, judged: Judged) -> str:
    gain, value = judged.gain, judged.value.value
    assert gain is not None
    if gain.low is None or gain.high is None:
        return f"{judge} went by {gain.value:+.3f} to {value:.3f}; too few prompts to say whether that is chance"
    if gain.low <= 0 <= gain.high:
        return f"No change of {judge} is resolved: {gain.value:+.3f}, 95 % {gain.low:+.3f} to {gain.high:+.3f}"
    verb, ends = ("rose", (gain.low, gain.high)) if gain.value > 0 else ("fell", (-gain.high, -gain.low))
    return f"{judge} {verb} by {abs(gain.value):.3f} to {value:.3f} (95 % interval of the change {ends[0]:.3f} to {ends[1]:.3f})"


def _facts(record: Record) -> list[tuple[str, str]]:
    """What stands on top, by name."""
    total, reward = record.total, record.last_reward
    best = numbered.folders(record.place / "checkpoints")
    facts = [
        ("update", f"{record.done} of {total}" if total is not None else str(record.done)),
        ("time left", record.left.partition(", ")[2].removesuffix(" left") if record.left else ""),
        ("an update", record.left.partition("/update")[0] if record.left else ""),
        (f"training reward, mean of {min(WIDTH, len(record.updates))}", "" if reward is None else f"{reward:.3f}"),
        ("alarms", str(len(record.alarms))),
        ("newest checkpoint", f"after {max(best)}" if best else ""),
        ("seed", str(record.settings.get("seed", ""))),
    ]
    return [(name, value) for name, value in facts if value]


def commands(record: Record) -> list[tuple[str, str]]:
    """What to do next, each with its command."""
    run, texts = record.run_dir, _texts(record)
    prompt = texts[0] if texts else "a prompt"
    best = "@best" if (record.place / "best").is_dir() else ""
    place = shlex.quote(run)
    found = []
    if not record.finished:
        found.append(("go on, where it has stopped", f"diffalign train {shlex.quote(f'{run}/config.yaml')}"))
    if record.finished or numbered.folders(record.place / "checkpoints"):
        draw = f"diffalign sample {shlex.quote(run + best)} --prompt {shlex.quote(prompt)} -n 8 --base"
        found.append((f"draw with it, {'the best evaluation, ' if best else ''}beside the base model", draw))
        found.append(
            ("write a LoRA file for ComfyUI and others", f"diffalign export {place} --out {_file(run)}.safetensors")
        )
    if record.finished:
        more = 2 * record.done
        found.append(("train on, twice as long", f"diffalign train {shlex.quote(f'{run}/config.yaml')} updates={more}"))
    return found


def _file(run: str) -> str:
    return shlex.quote(Path(run).name or "adapter")


def said(value: Any) -> str:
    """A setting's value."""
    return json.dumps(value, ensure_ascii=False)


# -- curves


def _judge(key: str) -> str:
    """The reward of an evaluation's key."""
    place = keys.evaluation(key)
    assert place is not None, "it was made by one"
    return place[0]


def _training(name: str, points: Sequence[tuple[int, float]], numbers: Mapping[str, int]) -> dict[str, Any]:
    """A chart of a training reward: every update faint, the running mean over it."""
    number = numbers[name]
    x, y = (np.array(column, np.float64) for column in zip(*points, strict=True))
    width = min(WIDTH, len(y))
    smooth = np.convolve(y, np.ones(width) / width, "valid")
    thin, marks = pictures.spread(len(y), POINTS), pictures.spread(len(smooth), MARKS)
    raw = charts.Line(name, x[thin].tolist(), y[thin].tolist(), y[thin].tolist(), y[thin].tolist(), [], number, True)
    means, at = smooth[marks].tolist(), x[width - 1 :][marks].astype(int).tolist()
    notes = [f"{mean:.3f} after {k} updates, mean of {width}" for mean, k in zip(means, at, strict=True)]
    lines = [raw, charts.Line(name, at, means, means, means, notes, number)]
    return {"name": name, "svg": charts.lines(lines, f"{name} in training, by update", "updates"), "rows": notes}


def _evaluated(name: str, points: Points, numbers: Mapping[str, int]) -> dict[str, Any]:
    """A chart of what evaluations found."""
    x, y, low, high = (list(column) for column in zip(*points, strict=True))
    notes = [
        f"{mean:.3f}{f', 95 % {a:.3f} to {b:.3f},' if a < b else ''} after {int(k)} updates" for k, mean, a, b in points
    ]
    line = charts.Line(name, x, y, low, high, notes, numbers[name])
    return {"name": name, "svg": charts.lines([line], f"{name} of the evaluation, by update", "updates"), "rows": notes}


# -- pictures


def _texts(record: Record) -> list[str]:
    """The evaluation's prompts, one an image; none where none was made."""
    files = numbered.files(record.place / "evaluation", ".json")
    try:
        return list(json.loads(next(iter(files.values())).read_bytes()).get("prompts") or []) if files else []
    except (OSError, ValueError, AttributeError):
        return []  # `_passed` says that it is damaged


def _pictures(record: Record, problems: list[str]) -> dict[str, Any]:
    """Pictures of fixed prompts and noises before training and at several moments since."""
    files = numbered.files(record.place / "samples", ".npz")
    every = list(files)
    shots: dict[int, tuple[str, ...]] = {}
    count, wanted = 0, int((record.settings.get("output") or {}).get("samples") or 0)
    for k in pictures.spread(len(every), TIMES):
        path = files[every[k]]
        try:
            stamp = path.stat()
            count, shots[every[k]] = _addresses(path, stamp.st_mtime_ns, stamp.st_size)
        except (Fault, OSError) as error:
            problems.append(str(error))
    if not shots:
        return {}
    texts = _texts(record)
    images = pictures.spread(len(texts), wanted)[:count] if texts else np.arange(count)
    own = [int(images[k]) for k in pictures.spread(min(count, len(images)), SHOWN)]
    passed = {update: _passed(record, update, problems) for update in shots}
    rows = []
    for place, image in enumerate(own):
        cells = [
            {"after": update, "address": addresses[place], "passed": passed[update].get(image)}
            for update, addresses in shots.items()
            if place < len(addresses)
        ]
        rows.append({"text": texts[image] if texts else f"picture {place + 1}", "cells": cells})
    first, *later = shots
    return {"first": first, "moments": later, "rows": rows, "judge": _verdict(record) if any(passed.values()) else ""}


@lru_cache(maxsize=512)
def _addresses(path: Path, changed: int, size: int) -> tuple[int, tuple[str, ...]]:
    """How many samples a file holds, and some as addresses; changed, size: of the file, so that another one is read anew."""
    images = stored(path)
    return len(images), tuple(pictures.address(images[k]) for k in pictures.spread(len(images), SHOWN))


def _verdict(record: Record) -> str:
    """The reward whose verdicts are shown beside pictures."""
    return next(iter(record.settings.get("eval_rewards") or []), "")


def _passed(record: Record, update: int, problems: list[str]) -> dict[int, bool]:
    """Image -> whether it passes that reward after some updates; nothing where that was not judged, or is no verdict."""
    path = record.place / "evaluation" / numbered.name(update, ".json")
    if not path.is_file():
        return {}
    try:
        scores = Evaluation.read(path).scores.get(_verdict(record))
    except Fault as error:
        problems.append(str(error))
        return {}
    if scores is None or not np.isin(scores, (0.0, 1.0)).all():
        return {}
    return {k: bool(value > 0.5) for k, value in enumerate(scores)}


# -- settings


def _differences(record: Record) -> dict[str, Any]:
    """The preset of this rule and model that is nearest, and what differs from it; nothing where there is none."""
    nearest: dict[str, Any] = {}
    for name, preset in _presets(record.settings["rule"]["name"], record.settings["model"]):
        found = configs.differences(preset, record.settings)
        rows = [
            (key, said(was), said(now))
            for key, (was, now) in found.items()
            if key != "run_dir" and not (key in DECIDED and was == "auto")
        ]
        if not nearest or len(rows) < len(nearest["rows"]):
            nearest = {"name": name, "rows": rows}
    return nearest


@cache
def _presets(rule: str, model: str) -> list[tuple[str, dict[str, Any]]]:
    """Presets of a rule and a model, with their settings."""
    found = []
    for name, path in configs.presets().items():
        if name.startswith(f"{rule}/"):
            raw = parse(path.read_text(encoding="utf-8"), str(path))
            if raw.get("model") == model:
                try:
                    found.append((name, configs.settings(configs.load(str(path), (), ready=False))))
                except UserError:  # one that cannot be checked here, such as without the hub, is not held against
                    continue
    return found
