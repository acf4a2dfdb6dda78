"""One training run from start, or from its last checkpoint, to the adapter it leaves behind."""

from __future__ import annotations

import functools
import hashlib
import json
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from diffalign.runs import checkpoint, outputs as figures, trackers
from diffalign.evaluation import fixed as evaluate
from diffalign.training import fitting as measure
from diffalign.prompts import files as prompts
from diffalign.runs.parts import build
from diffalign.runs.card import write_adapter
from diffalign.config import Config
from diffalign.runtime.distributed import ALONE, World
from diffalign.runs.progress import Reporter
from diffalign.runtime.randomness import numpy_generator
from diffalign.runs.folder import RunFolder, open_run
from diffalign.training.trainer import Metrics, Trainer
from diffalign.errors import Fault, Unscored, UserError, one_line
from diffalign.report import pictures

NONFINITE_LIMIT = 10  # updates in a row without a finite gradient that end a run


class Interrupted(Exception):
    """A signal ended the run; its state is saved. `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"interrupted, saved; the same command resumes (exit code {code})")
        self.code = code


def train(config: Config, *, fresh: bool = False, quiet: bool = False) -> dict[str, float]:
    """Train a config to its end, resuming what its run folder holds; returns the final evaluation's summary.

    Raises:
        UserError: if the run folder cannot be used, or the model or a reward cannot be loaded.
        Fault: if something stopped the run; the last checkpoint is kept.
        Interrupted: on SIGTERM or Ctrl-C, after saving.
    """
    world = World.join()
    reporter = Reporter(quiet or not world.leads)
    folder = RunFolder(Path(config.run_dir))
    try:
        opened = world.together(lambda: open_run(config, fresh) if world.leads else None)
        folder = opened or folder
        return Session(config, folder, reporter, world).run()
    except OSError as error:
        raise Fault(
            f"{error.filename or config.run_dir}: {error.strerror or error}; the last checkpoint is kept"
        ) from error
    finally:
        reporter.close()
        folder.close()
        world.leave()


class Session:
    """A run: what to train, where it is kept, how far it is."""

    def __init__(self, config: Config, folder: RunFolder, reporter: Reporter, world: World = ALONE) -> None:
        self.config, self.folder, self.reporter, self.world = config, folder, reporter, world
        if (most := config.samples_per_update // config.optimizer.micro_batch) < world.size:
            raise UserError(
                f"optimizer.micro_batch: got {config.optimizer.micro_batch}, {most} of them an update for {world.size} processes; "
                "allowed is at least one each"
            )
        self.parts = world.together(lambda: build(config))
        self.policy, self.rule = self.parts.policy, config.make_rule()
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters.values(), lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )
        self.averages = {} if optimizer.ema is None else {"ema": optimizer.ema}
        self.policy.add_shadows(self.averages)
        self.trainer = Trainer(
            self.rule,
            self.policy,
            self.parts.rewards,
            config.rewards,
            self.optimizer,
            functools.partial(config.book.draw, config.prompts.groups, config.prompts.group_size, config.seed),
            micro_batch=optimizer.micro_batch,
            max_grad_norm=optimizer.max_grad_norm,
            seed=config.seed,
            world=world,
            max_invalid=config.scoring.max_invalid,
            notify=reporter.say,
        )
        settings = config.evaluation
        self.fixed = config.book.fixed(settings.images_per_prompt, settings.seed)
        if settings.enabled and config.book.shared:
            reporter.say("evaluating on prompts that are trained on: scores do not say what is true of others")
        self.prompts_digest = config.book.digest(self.fixed)
        self._store_prompts()
        self._fit()
        if self.parts.place.commit is not None:
            reporter.say(f"{config.model} at commit {self.parts.place.commit}")
        if self.parts.place.file:
            reporter.say(f"from {config.weights}: {self.parts.place.file}")
        self.done = 0
        self.skipped = self.unscored = 0
        self.saved = -1
        self.stop_code: int | None = None

    def _write_adapter(self, summary: dict[str, float], name: str) -> None:
        write_adapter(self.config, self.policy, self.folder, summary, name, self.done, self.parts.place)

    def _store_prompts(self) -> None:
        """Encode all prompts of the run beforehand and let the text encoders go, if the config has a cache for it."""
        settings, world, policy = self.config.prompts, self.world, self.policy
        if settings.cache is None:
            return
        texts = self.config.book.texts
        folder, budget = Path(settings.cache).expanduser(), settings.cache_gib * 2**30
        self.reporter.say(f"encoding {len(texts)} prompts, or finding them in {folder}")
        mine = texts[world.rank :: world.size]
        answers = world.gather(world.together(lambda: policy.store_prompts(folder, budget, texts, mine)))
        if why_not := next(filter(None, answers), ""):
            self.reporter.say(f"text encoders stay: {why_not}")
        else:
            self.reporter.say(f"text encoders leave memory: {policy.leave_encoders() / 2**20:.0f} MiB")

    def _fit(self) -> None:
        """Let the rule fit its terms into memory if it does, and refuse settings that this sampler cannot run."""
        batch = self.trainer.draw(0).select(range(self.policy.micro_batch))
        fitted = measure.fit(self.rule, self.policy, self.parts.rewards, batch)
        plan = self.rule.plan(self.policy.schedule, 0, numpy_generator(self.config.seed, 15, 0))
        if fitted:
            self.reporter.say(f"fitted into memory: {', '.join(map(str, plan.updates[0]))}")

    # -- state

    def state(self) -> checkpoint.State:
        rule_state = self.rule.state_dict() if hasattr(self.rule, "state_dict") else {}
        return checkpoint.State(
            self.done,
            dict(self.policy.parameters),
            self.policy.shadows,
            self.optimizer.state_dict(),
            {
                "rule": rule_state,
                "skipped": self.skipped,
                "prompts": self.prompts_digest,
                "weights": self.parts.place.digest,
                "micro_batch": self.trainer.micro_batch,
            },
        )

    def save(self) -> None:
        if self.saved != self.done:
            keep, folder = self.config.output.keep, self.folder / "checkpoints"
            self.world.lead(lambda: checkpoint.save(folder, self.state(), keep, best=self.best()))
            self.saved = self.done

    def _newest(self) -> Path | None:
        """The newest whole checkpoint, if there is one; without, the run's rows are taken back."""
        whole = checkpoint.complete(self.folder / "checkpoints")
        damaged = sorted(set((self.folder / "checkpoints").glob("update_*")) - set(whole))
        for path in damaged:
            self.reporter.say(f"{path} is damaged and passed over")
        if damaged and not whole:
            raise UserError(
                f"run_dir: no checkpoint of {self.folder.path} is whole; choose another run_dir, or --fresh to start over"
            )
        if not whole:
            if self.folder.rows():
                self.reporter.say("no whole checkpoint: starting from the beginning")
            self.folder.rewind(-1)
            return None
        return whole[-1]

    def resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one; processes may be more or fewer than before."""
        newest = self.world.lead(self._newest)
        if newest is None:
            return
        state = checkpoint.load(newest)
        if state.notes["prompts"] != self.prompts_digest:
            raise UserError("prompts.source: the prompts are not those the run began with; restore them, or --fresh")
        if state.notes["weights"] != self.parts.place.digest:
            raise UserError(
                f"weights: {self.config.weights} is not the file the run began with; restore it, or --fresh"
            )
        with torch.no_grad():
            for name, parameter in self.policy.parameters.items():
                parameter.copy_(state.parameters[name])
        self.policy.shadows.update(
            {
                name: {k: v.to(self.policy.parameters[k].device) for k, v in s.items()}
                for name, s in state.shadows.items()
            }
        )
        self.optimizer.load_state_dict(state.optimizer)
        if hasattr(self.rule, "load_state_dict"):
            self.rule.load_state_dict(state.notes["rule"])
        self.done = self.saved = state.update
        self.skipped = state.notes["skipped"]
        self.trainer.micro_batch = self.policy.micro_batch = state.notes["micro_batch"]
        self.world.lead(lambda: self.folder.rewind(self.done))
        self.reporter.say(f"resuming after update {self.done} from {newest}")

    def best(self) -> int | None:
        """The update whose evaluation has the highest mean of the first judging reward; None before the second one."""
        name = next(iter(self.parts.eval_rewards))
        found: dict[int, float] = {}
        for path in sorted((self.folder / "evaluation").glob("update_*.json")):
            evaluation = evaluate.Evaluation.read(path)
            if evaluation.update > 0 and np.isfinite(evaluation.scores[name]).any():
                found[evaluation.update] = float(np.nanmean(evaluation.scores[name]))
        return max(found, key=lambda update: (found[update], -update)) if found else None

    # -- the run

    def run(self) -> dict[str, float]:
        """Train to `config.updates`, evaluate, and write the adapter; returns the final evaluation's summary."""
        started = time.perf_counter()
        self.world.lead(lambda: self.folder.begin(self.config))
        self.resume()
        with self._signals(), self._saved_if_unscored():
            if self.done == 0:
                self._look(0)
            for index in range(self.done, self.config.updates):
                row = self._update(index)
                self.world.lead(functools.partial(self._note, row))
                self._tidy()
                codes = [code for code in self.world.gather(self.stop_code) if code is not None]
                if codes:
                    self.save()
                    raise Interrupted(codes[0])
                if self.unscored >= (limit := self.config.scoring.invalid_in_a_row):
                    names = ", ".join(key.removeprefix("invalid/") for key in row if key.startswith("invalid/"))
                    raise Unscored(f"update {self.done}: {limit} updates in a row had samples without a score: {names}")
            self.save()
            self.reporter.close()
            summary = self._finish()
        self.reporter.say(f"done: {self.done} updates, {time.perf_counter() - started:.0f} s, {self.folder.path}")
        return summary

    @contextmanager
    def _saved_if_unscored(self) -> Iterator[None]:
        """Save before a run ends for want of scores: nothing was learnt from what has none."""
        try:
            yield
        except Unscored as error:
            if self.done:
                self.save()
            kept = f"saved after update {self.done}; " if self.done else ""
            raise Fault(f"{error}; {kept}the same command goes on") from error

    def _update(self, index: int) -> Metrics:
        with self.reporter.update(index, self.config.updates) as shown:
            row = self.trainer.update(index)
            self.policy.follow(self.averages)
            shown.update(row)
        self.done = index + 1
        missing = round((1 - row.get("reward/valid", 1.0)) * self.config.samples_per_update)
        self.unscored = self.unscored + 1 if missing else 0
        if missing:
            self.reporter.say(f"update {self.done}: {missing} samples have no score and carry no weight")
        if row.get("skipped_flat"):
            self.reporter.say(f"update {self.done}: every group has equal rewards, nothing to learn; skipped")
        if row.get("skipped_nonfinite"):
            self.skipped += 1
            self.reporter.say(f"update {self.done}: the gradient is not finite; skipped ({self.skipped} so far)")
            if self.trainer.nonfinite_in_a_row >= NONFINITE_LIMIT:
                raise Fault(
                    f"update {self.done}: {NONFINITE_LIMIT} gradients in a row were not finite; look at the reward, or lower optimizer.lr"
                )
        if torch.cuda.is_available():
            row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["skipped"] = float(self.skipped)
        self.world.lead(lambda: self.tracker.log(row, self.done))
        return row

    def _note(self, row: Metrics) -> None:
        """An update's metrics and, where it was scored, its scores into the run's files."""
        if self.trainer.judged is not None:
            self.folder.append_scores(self.done, *self.trainer.judged)
        self.folder.append({"update": self.done, **row})

    def _tidy(self) -> None:
        output, every = self.config.output, self.config.evaluation.every
        last = self.done == self.config.updates
        if not last and self.done % output.sample_every == 0:
            self.world.lead(lambda: self._samples(self.done))
        judged = bool(every) and self.done % every == 0
        if judged and not last:
            self._evaluate(self.done)
            if self.config.evaluation.enabled:
                self.world.lead(lambda: self._write_best() if self.best() == self.done else None)
        # After grids and evaluation: a checkpoint says that everything up to it was done.
        if self.done % output.checkpoint_every == 0 or judged or last:
            self.save()

    def _write_best(self) -> None:
        """The adapter of the best evaluation so far, as a folder `best/` of its own."""
        summary = evaluate.Evaluation.read(self._evaluation_path(self.done)).summary(self._baseline())
        self._curves()
        with self._published():
            self._write_adapter(summary, "best")

    def _published(self) -> AbstractContextManager[None]:
        """The weights that are evaluated and saved: averaged ones if the config asks for them."""
        return self.policy.shadow("ema") if self.averages else nullcontext()

    def _look(self, update: int) -> None:
        """Sample grid and evaluation."""
        self.world.lead(lambda: self._samples(update))
        self._evaluate(update)

    def _shown(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Which evaluation images the grids show: spread over prompts."""
        count = min(self.config.output.samples, len(self.fixed))
        return np.linspace(0, len(self.fixed) - 1, count).astype(np.int64)

    def _samples(self, update: int) -> None:
        with self._published():
            shown = self.fixed.select(self._shown())
            images = self.trainer.fitting(lambda: evaluate.pictures(self.policy, shown, self.trainer.micro_batch))
        path = self.folder / "samples"
        path.mkdir(exist_ok=True)
        pictures.grid(images).save(path / f"update_{update:06d}.png")
        np.savez_compressed(path / f"update_{update:06d}.npz", images=images)

    def _evaluation_path(self, update: int) -> Any:
        return self.folder / "evaluation" / f"update_{update:06d}.json"

    def _baseline(self) -> evaluate.Evaluation | None:
        """What gains are measured against: the evaluation before training, None if it is gone."""
        path = self._evaluation_path(0)
        return evaluate.Evaluation.read(path) if path.is_file() else None

    def _evaluate(self, update: int) -> dict[str, float]:
        if not self.config.evaluation.enabled:
            return {}
        self.reporter.say(f"evaluating {len(self.fixed)} images")
        with self._published():
            rows, trainer = self.world.rows(len(self.fixed), self.trainer.dealt), self.trainer
            own = self.fixed.select(rows)
            scores = self.world.together(
                lambda: trainer.fitting(
                    lambda: evaluate.scores(self.policy, self.parts.eval_rewards, own, trainer.micro_batch)
                )
            )
        found = evaluate.joined(
            self.world.gather((rows, scores)),
            self.fixed,
            update,
            self.parts.eval_rewards,
            self.config.scoring.max_invalid,
        )
        return self.world.lead(lambda: self._judged(found))

    def _judged(self, found: evaluate.Evaluation) -> dict[str, float]:
        """Keep an evaluation and say what it found."""
        update = found.update
        found.save(self._evaluation_path(update), seed=self.config.evaluation.seed, prompts=self.fixed.text)
        summary = found.summary(self._baseline() if update else None)
        self.folder.append({"update": update, **summary})
        self.tracker.log(summary, update)
        self.reporter.evaluated(update, summary)
        return summary

    def _finish(self) -> dict[str, float]:
        path = self._evaluation_path(self.done)
        if self.world.lead(path.is_file):
            summary = self.world.lead(lambda: evaluate.Evaluation.read(path).summary(self._baseline()))
        else:
            self.world.lead(lambda: self._samples(self.done))
            summary = self._evaluate(self.done)
        self.world.lead(lambda: self._leave(summary))
        return summary

    def _leave(self, summary: dict[str, float]) -> None:
        """Curves, pictures and the adapter."""
        self._curves()
        self._before_after()
        with self._published():
            self._write_adapter(summary, "adapter")
        if self.config.evaluation.every and self.best() == self.done:
            self._write_best()

    def _title(self) -> str:
        return f"{self.config.rule['name']} on {self.config.model}, seed {self.config.seed}"

    def _curves(self) -> None:
        figures.curves(self.folder.rows(), self.folder / "curves.png", self._title())

    def _before_after(self) -> None:
        samples = [self.folder / "samples" / f"update_{update:06d}.npz" for update in (0, self.done)]
        if not all(path.is_file() for path in samples):
            return
        try:
            before, after = (np.load(path)["images"] for path in samples)
        except (OSError, ValueError, KeyError) as error:
            raise Fault(f"{samples[0].parent}: damaged ({one_line(error)}); delete it to go on without it") from error
        shown = self._shown()
        passed = None
        paths = [self._evaluation_path(update) for update in (0, self.done)]
        if self.config.eval_rewards and all(path.is_file() for path in paths):
            name = self.config.eval_rewards[0]
            columns = [evaluate.Evaluation.read(path).scores[name][shown] for path in paths]
            passed = (columns[0], columns[1]) if all(np.isin(c, (0, 1)).all() for c in columns) else None
        figures.before_after(
            before, after, [self.fixed.text[k] for k in shown], passed, self.folder / "before_after.png", self._title()
        )

    @cached_property
    def tracker(self) -> trackers.Trackers:
        """Opened at its first use, when the run folder is in its final state."""
        return trackers.Trackers(list(self.config.output.trackers), self.folder / "trackers")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C finish the update, save, and leave with 143 and 130."""

        def note(number: int, frame: FrameType | None) -> None:
            self.stop_code = 128 + number
            self.reporter.say("stopping after this update")

        old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
