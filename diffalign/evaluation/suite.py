"""`diffalign evaluate`: models and adapters on a suite of prompts, with the same noises for all, judged by rewards.

Samples are drawn by the plain diffusers pipeline, kept as PNG files and judged as such; what is there already is not made again, so a
command that was stopped goes on where it was. Several processes share the work (accelerate launch, torchrun).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import Fault, UserError, one_line
from diffalign.evaluation import exporting, found, judging, report, samples
from diffalign.evaluation.naming import labels
from diffalign.evaluation.samples import Drawn
from diffalign.evaluation.task import Task, task_of
from diffalign.models.notes import files_of
from diffalign.rewards.load import Judges
from diffalign.rewards.load import load as load_reward
from diffalign.rewards.scorer import Scorer
from diffalign.runtime import json_text
from diffalign.runtime.device import on_cards
from diffalign.runtime.distributed import World
from diffalign.runtime.extras import missing
from diffalign.runtime.files import make_folder, write_text
from diffalign.runtime.progress import Progress, silent
from diffalign.sampling import sources
from diffalign.types import chunks

LABEL = re.compile(r"\d+-[A-Za-z0-9._-]*", re.ASCII)  # of a model's folder, as `labels` makes it
MANIFEST = "manifest.json"
MOST_UNSCORED = 0.05  # share of a model's samples


def evaluate(
    targets: Sequence[str],
    suite: str,
    out: Path | str,
    *,
    prompts: str | None = None,
    judges: Sequence[str] = (),
    split: str = "test",
    samples: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    arguments: Sequence[str] = (),
    precision: str | None = None,
    quantize: str | None = None,
    batch: int = 16,
    drift: bool = True,
    fresh: bool = False,
    export: str | None = None,
    fps: float | None = None,
    say: Callable[[str], None] = print,
    progress: Progress = silent,
) -> Path:
    """Judge models and adapters on a suite of prompts; returns the page to look at, which has `report.json` beside it.

    Args:
        targets: runs, adapters, models; before the first adapter of a model, that model without is judged too.
        suite: a name of `catalog.SUITES`, a set of prompts or a file of them; prompts: the published ones' copy, or others.
        judges: rewards that judge instead of the suite's.
        samples: of every prompt, None: as many as the suite has; batch: how many are drawn at a time.
        steps, guidance, arguments (KEY=VALUE), precision, quantize: of the pipelines and their calls, where they are not to be as trained.
        drift: also compare predictions with the base model's, which is twice the work.
        fresh: make again what `out` holds.
        export: also write the samples as others' tools want them, vbench.
        fps: frames per second of videos; None: as trained, or the model's own.

    Raises:
        UserError, Fault: see `run`.
    """
    if export is not None and (mend := missing("imageio")):
        raise UserError(f"--export: {export} needs imageio; {mend}")
    models = models_of(targets, arguments, steps, guidance, precision, quantize, fps)
    slowest = min((model.fps or 0 for model in models), default=0) or None
    task = task_of(suite, prompts, judges, split, samples, seed, batch, drift, say, slowest)
    return run(task, models, Path(out), fresh, say, progress, export is not None)


def models_of(
    targets: Sequence[str],
    options: Sequence[str],
    steps: int | None,
    guidance: float | None,
    precision: str | None = None,
    quantize: str | None = None,
    fps: float | None = None,
) -> list[sources.Source]:
    """What to sample from: every target, and before the first adapter of a model, that model without."""
    models: list[sources.Source] = []
    for target in targets:
        source = sources.with_options(sources.resolve(target), options, precision, quantize)
        source = replace(source, call=sources.call_of(source, steps, guidance, None), fps=fps or source.fps)
        for one in (replace(source, adapters=(), trained_on=()), source):
            if one not in models:
                models.append(one)
    return models


def run(
    task: Task,
    models: list[sources.Source],
    out: Path,
    fresh: bool,
    say: Callable[[str], None],
    progress: Progress = silent,
    exported: bool = False,
) -> Path:
    """Evaluate models on a task; returns the page to look at. exported: whether videos are written for VBench.

    Raises:
        UserError: if `out` holds another evaluation or cannot be written, or a model or reward does not load.
        Fault: if a reward fails or leaves more than 5 % of a model's samples without a score (the report is there then), or memory
            does not suffice.
    """
    world = World.join(on_cards())
    tell = say if world.leads else lambda line: None
    for model in models:
        sources.check(model)
    remarks = [*(model.remark for model in models), *(found.warning(task, found.trained_on(model)) for model in models)]
    for line in dict.fromkeys(filter(None, remarks)):
        tell(line)
    try:
        facts = world.lead(lambda: _checked(task, models, out, fresh))
        scorer = world.together(lambda: _scorer(task, tell))
        # What is there is deleted once the first model is loaded too, and takes its call.
        first = world.together(lambda: samples.opened(models[0])) if fresh else None
        world.lead(lambda: _begin(facts, models, out, fresh))
        drawn = [
            _one(task, model, out / label, scorer, world, tell, progress, None if number else first)
            for number, (label, model) in enumerate(labels(models).items())
        ]
        page = world.lead(lambda: report.write(task, list(labels(models)), models, drawn, out))
        tell(str(page))
        if exported:
            folders = {out / label: model.fps for label, model in labels(models).items()}
            for place in world.lead(lambda: exporting.vbench(task, folders, out, tell)):
                tell(str(place))
        world.lead(lambda: _complete(drawn, scorer))
        return page
    finally:
        world.leave()


def _scorer(task: Task, say: Callable[[str], None]) -> Scorer:
    try:
        judges: Judges = {}
        scorer = Scorer({name: load_reward(name, judges=judges) for name in task.rewards})
        for name, reward in scorer.rewards.items():
            if reward.grouped and min(sizes := tuple({len(rows) for rows in task.together()})) < 2:
                raise UserError(
                    f"rewards: {name} compares the samples of a prompt, got one alone; allowed is -n 2 or more"
                )
            reward.sizes = sizes if reward.grouped else ()
        scorer.greet(say)
    except UserError as error:
        raise UserError(*(line.replace("rewards: ", "--judges: ", 1) for line in error.problems)) from error
    return scorer


def _complete(drawn: Sequence[Drawn | None], scorer: Scorer) -> None:
    """Refuse to call an evaluation done whose means are of too few samples."""
    for one in filter(None, drawn):
        if any((~np.isfinite(values)).mean() > MOST_UNSCORED for values in one.scores.values()):
            raise Fault(
                f"{one.folder.name}: samples without a score, {scorer.unscored(one.scores)}; allowed are {MOST_UNSCORED:.0%}. "
                "The report is of the others, and the same command asks again for those"
            )


def _facts(task: Task, models: Sequence[sources.Source]) -> dict[str, Any]:
    """What samples depend on: with other facts they would have to be made again."""

    def facts_of(model: sources.Source) -> dict[str, Any]:
        adapters = []
        for adapter in model.adapters:
            content = hashlib.sha256(b"".join(path.read_bytes() for path in files_of(adapter.folder))).hexdigest()
            adapters.append({"folder": str(adapter.folder), "strength": adapter.strength, "content": content})
        facts = {**asdict(model), "adapters": adapters}
        del facts["frozen"], facts["fps"]  # what is drawn does not depend on it
        if model.frozen:  # evaluations from before there were any go on
            facts["frozen"] = [{"strength": each.strength, "content": each.digest} for each in model.frozen]
        return facts

    return {
        "prompts": task.digest(),
        "samples": task.samples,
        "seed": task.seed,
        "models": {label: facts_of(model) for label, model in labels(models).items()},
    }


def _checked(task: Task, models: Sequence[sources.Source], out: Path, fresh: bool) -> dict[str, Any]:
    """What samples depend on, as the manifest has it; refuses a folder that holds something else, before judges are loaded."""
    make_folder(out, "--out")
    facts: dict[str, Any] = json.loads(json.dumps(_facts(task, models)))
    path = out / MANIFEST
    if path.is_file() and not fresh:
        before = _manifest(path)
        drawn = any(any((out / label).glob("*.png")) for label in before["models"] if LABEL.fullmatch(label))
        if drawn and (changed := [name for name in facts if before.get(name) != facts[name]]):
            raise UserError(
                f"--out: {out} holds an evaluation with other {', '.join(changed)}; choose another folder, or --fresh"
            )
    elif not path.is_file() and any(out.iterdir()):
        raise UserError(f"--out: {out} holds other files; choose another folder")
    return facts


def _begin(facts: dict[str, Any], models: Sequence[sources.Source], out: Path, fresh: bool) -> None:
    """Write down what is evaluated, once everything has loaded; with `fresh`, delete what was there."""
    path = out / MANIFEST
    if fresh:
        _clear(out, path, [*labels(models)])
    write_text(path, json.dumps(facts, indent=1) + "\n")


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json_text.parse(path.read_bytes())
        if not isinstance(manifest, dict) or not isinstance(manifest.get("models"), dict):
            raise ValueError("it lacks its models")
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {path} is damaged ({one_line(error)}); choose another folder, or --fresh") from error
    return manifest


def _clear(out: Path, path: Path, own: list[str]) -> None:
    """Delete an earlier evaluation: its samples, whatever its models were, and its scores."""
    with suppress(UserError):  # damaged: it is written anew
        own += _manifest(path)["models"] if path.is_file() else []
    for label in dict.fromkeys(own):
        # What a manifest names must be a folder of ours in it, not `..`.
        if LABEL.fullmatch(label) and (out / label).is_dir() and not (out / label).is_symlink():
            for file in (out / label).glob("*.png"):
                if samples.NAME.fullmatch(file.name):
                    file.unlink()
    for file in out.glob("scores.sqlite*"):
        file.unlink()


def _one(
    task: Task,
    model: sources.Source,
    folder: Path,
    scorer: Scorer,
    world: World,
    say: Callable[[str], None],
    progress: Progress,
    opened: samples.Opened | None,
) -> Drawn | None:
    """Draw and judge one model's samples, opened: if it was before; what the first process gets, the others get nothing."""
    rows = world.rows(task.total, task.batch)
    measured = task.drift and model.adapters
    missing = {
        row
        for row in rows
        if not samples.path(folder, row).is_file() or (measured and np.isnan(samples.drift(folder, row)))
    }
    say(f"{folder.name}: {task.total} samples, {sum(world.gather(len(missing)))} of them to draw")
    if missing:
        world.together(lambda: samples.draw(task, model, folder, rows, missing, progress, opened))
    else:
        world.together(lambda: None)
    prompts = task.together()
    parts = {
        False: [[rows[k] for k in part] for part in chunks(len(rows), task.batch)],
        True: [prompts[k] for k in world.rows(len(prompts), 1)],
    }
    whole = {name: np.full(task.total, np.nan) for name in scorer.rewards}
    for grouped, own in parts.items():
        asked = {name: reward for name, reward in scorer.rewards.items() if reward.grouped == grouped}
        judged = functools.partial(judging.scores, task, folder, own, asked, model.fps, progress)
        for places, columns in world.gather(world.together(judged)):
            for name, values in columns.items():
                whole[name][places] = values
    if not world.leads:
        return None
    means = ", ".join(f"{name} {np.nanmean(values):.3f}" for name, values in whole.items() if np.isfinite(values).any())
    say(f"{folder.name}: {means or 'no scores'}")
    return Drawn(folder, whole)
