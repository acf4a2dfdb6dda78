"""One training run from start, or from its last checkpoint, to the adapter it leaves behind: the loop, its stop, its resumption."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from diffalign.config import Config
from diffalign.errors import Fault, Interrupted, Unscored
from diffalign.evaluation import fixed
from diffalign.evaluation.fixed import FixedSet
from diffalign.evaluation.results import Summary
from diffalign.models.notes import LORA
from diffalign.runs import choosing, devices, digests, parts
from diffalign.runs.budget import Budget, Spent
from diffalign.runs.events import Began, Ended, Evaluated, Updated
from diffalign.runs.folder import RunFolder, open_run
from diffalign.runs.guards import Guards
from diffalign.runs.introducing import introduce
from diffalign.runs.listeners import listeners
from diffalign.runs.outputs import AVERAGES, Outputs, published
from diffalign.runs.probing import probe
from diffalign.runs.progress import Reporter
from diffalign.runs.reach import Reach
from diffalign.runs.resume import DECIDED, with_kept
from diffalign.runs.savepoints import SavePoints
from diffalign.runs.stop import Stop
from diffalign.runtime import keys
from diffalign.runtime.device import undetermined
from diffalign.runtime.distributed import ALONE, World
from diffalign.runtime.memory import card_failed, card_fault, fitting
from diffalign.types import Floats, Update

NONFINITE_LIMIT = 10  # gradients in a row that are not finite and end a run


def train(
    config: Config, *, fresh: bool = False, change: bool = False, quiet: bool = False, folder: RunFolder | None = None
) -> Summary:
    """Train a config to its end, resuming what its run folder holds; returns the final evaluation's summary.

    fresh: start over, what the folder holds of a run is deleted; change: go on with other settings and files than the run began with, as
    far as docs/run-folder.md says that they may change; folder: if it was opened before, None: it is opened here.

    Raises:
        UserError: if the run folder cannot be used, or the model or a reward cannot be loaded.
        Fault: if something stopped the run; the last checkpoint is kept.
        Interrupted: on SIGTERM or Ctrl-C, after saving.
    """
    held = folder or RunFolder(Path(config.run_dir))
    try:
        world = World.join(devices.device(config) == "cuda")
    except BaseException:
        held.close()
        raise
    reporter = Reporter(quiet or not world.leads)
    try:
        devices.agreed(config, world)
        opens = folder is None and world.leads
        held = world.together(lambda: open_run(config, fresh, change) if opens else None) or held
        held.taken = taken = world.lead(lambda: held.taken)
        return Session(with_kept(config, taken.kept), held, reporter, world, change).run()
    except Fault as error:
        if world.leads:
            held.keep_error(error)
        raise
    except RuntimeError as error:
        if (mistake := undetermined(error)) is not None:
            raise mistake from error
        if not card_fault(error):
            raise
        fault = card_failed(error)
        if world.leads:
            held.keep_error(fault)
        raise fault from error
    except OSError as error:
        raise Fault(
            f"{error.filename or config.run_dir}: {error.strerror or error}; the last checkpoint is kept"
        ) from error
    finally:
        reporter.close()
        held.close()
        world.leave()


def adapter_file(config: Config) -> Path:
    """Where a finished run's adapter is."""
    return Path(config.run_dir) / "adapter" / LORA


class Session:
    """A run: what to train, where it is kept, how far it is."""

    def __init__(
        self, config: Config, folder: RunFolder, reporter: Reporter, world: World = ALONE, change: bool = False
    ) -> None:
        self.folder, self.reporter, self.world = folder, reporter, world
        devices.check(config, world)
        config = choosing.attention(config, world, reporter.say)
        if config.prompts.cache is not None:
            reporter.doing("encoding prompts")
        kept = parts.encode_first(config, world, reporter.say)
        reporter.doing(f"loading {config.model}")
        self.parts = made = world.together(lambda: parts.build(config, reporter.say, kept))
        self.policy = made.policy
        self.config = config = choosing.timed(config, made.policy, world, reporter.say)
        self.averages = {} if config.optimizer.ema is None else {AVERAGES: config.optimizer.ema}
        self.policy.add_shadows(self.averages)
        self.trainer = parts.trainer(config, made, world, reporter.say, reporter.doing)
        evaluation = config.evaluation
        judged = FixedSet(
            config.book.fixed(evaluation.images_per_prompt, evaluation.seed),
            made.judges,
            folder / "evaluation",
            evaluation.seed,
            config.scoring.max_invalid,
        )
        self.fixed = judged
        folder.logs.say = reporter.say
        # What the first process does for all.
        reporter.place = folder.path
        self.judged, self.files = world.led(judged), world.led(folder)
        outputs = self.own_outputs = Outputs(config, made, folder, judged, reporter.say)
        self.outputs = world.led(outputs)
        began = world.lead(lambda: digests.of(made, config.book.digest(judged.prompts), config.book.rest))
        self.points = SavePoints(config, folder, self.trainer, judged, outputs, world, began, reporter.say, change)
        self.guards = Guards(list(config.rewards), config.guard, reporter.say, folder.logs.rows)
        self.listeners = world.led(listeners(config, folder, reporter, self.guards))
        for key, value in folder.taken.kept.items():
            if key not in DECIDED:
                reporter.say(f"{key}: {value!r}, as the run began; this version's default is another")
        batch = self.trainer.draw(0).select(range(self.policy.micro_batch))
        introduce(config, made, batch, reporter.say)
        probe(config, made, self.trainer.draw, reporter.say)
        self.budget, self.spent = Budget.of(config), Spent()
        self.held: float | None = None  # GiB, once they were told
        self.skipped = self.nonfinite = self.unscored = 0  # updates; gradients and updates in a row
        self.stop, self.reach = Stop(), Reach(self.trainer)

    @property
    def done(self) -> int:
        """How many updates are done."""
        return self.spent.updates

    def save(self) -> None:
        """Keep everything that the run needs to go on."""
        self.reporter.doing("saving")
        self.points.save(self.spent, self.skipped)

    # -- the run

    def run(self) -> Summary:
        """Train as far as the budget goes, evaluate, and write the adapter; returns the final evaluation's summary."""
        started, world = time.perf_counter(), self.world
        self.spent, self.skipped = self.points.resume()
        self.listeners.began(Began(self.done))
        with self.stop.listening(), self._saved_if_unscored():
            if self.done == 0:
                self._samples()
                self._evaluate()
            else:
                self._evaluate_if_due()  # a reward may have failed in it
            while self.budget.allows(self.spent) and not world.lead(self.guards.end):
                update = self._update()
                self._tidy()
                self._stop_if_asked()
                self._check_scores(update)
            self.save()
            self.reporter.close()
            summary = self._finish()
        self.listeners.ended(Ended(self.done, summary, time.perf_counter() - started))
        return summary

    def _update(self) -> Update:
        self.reporter.begin(self.done, self.budget.reach(self.spent)[0])
        update = self.trainer.update(self.done)
        self.policy.follow(self.averages)
        self.spent += self.world.lead(lambda: Spent.on(update))  # by one clock
        if self.done == 1:
            self.budget.check_first(self.spent)
        self.skipped += bool(update.nonfinite)
        self.reach.check(update)
        self.nonfinite = self.nonfinite + update.nonfinite if update.nonfinite == update.steps else 0
        self.unscored = self.unscored + 1 if update.unscored else 0
        row = update.row()
        if next(iter(self.policy.parameters.values())).is_cuda:
            row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["skipped"] = float(self.skipped)
        if self.held is None and (counted := self.config.memory.counted) is not None and "memory_gib" in row:
            self.held = row["memory_gib"]
            self.reporter.say(
                f"memory: {self.held:.1f} GiB were allocated at the most so far, {counted:.1f} counted with context"
            )
        total, share = self.budget.reach(self.spent)[0], self.budget.share(self.spent)
        self.listeners.updated(Updated(self.done, total, update, row, share))
        if self.nonfinite >= NONFINITE_LIMIT:
            raise Fault(
                f"update {self.done}: {NONFINITE_LIMIT} gradients in a row were not finite; look at the reward, or lower optimizer.lr"
            )
        return update

    def _tidy(self) -> None:
        """Grids, evaluations and checkpoints that are due."""
        output = self.config.output
        last = not self.budget.allows(self.spent)
        if not last and self.done % output.sample_every == 0:
            self._samples()
        self._evaluate_if_due()
        # After grids and evaluation: a checkpoint says that everything up to it was done.
        if self.done % output.checkpoint_every == 0 or self._due or last:
            self.save()
            self.outputs.watch()

    @property
    def _due(self) -> bool:
        every = self.config.evaluation.every
        return bool(every) and self.done % every == 0

    def _evaluate_if_due(self) -> None:
        """An evaluation in between, with the adapter if it is the best so far, unless it was made."""
        between = self.budget.allows(self.spent) and self._due
        if self.config.evaluation.enabled and between and self.judged.summary(self.done) is None:
            self._evaluate()
            self.outputs.best(self.done)

    def _samples(self) -> None:
        """A grid, written by the first process; where all hold the network together, all draw it."""
        self.reporter.doing("drawing samples")
        sharded = self.config.memory.shard == "blocks"
        drawn = self.outputs.samples(self.done, self.world.together(self.own_outputs.pictures) if sharded else None)
        self.listeners.drawn(drawn)

    def _evaluate(self) -> Summary:
        """Sample the fixed set, every process its share, and judge it."""
        if not self.config.evaluation.enabled:
            return Summary()
        update, policy, prompts = self.done, self.policy, self.fixed.prompts
        self.reporter.say(f"evaluating {len(prompts)} images")
        rows = self.world.rows(len(prompts), self.trainer.dealt)

        def own() -> dict[str, Floats]:
            work = functools.partial(fixed.scores, policy, self.fixed.scorer, prompts.select(rows), self.reporter.doing)
            with published(self.config, policy):
                found = fitting(policy, work, self.reporter.say)
                if self.config.memory.shard == "blocks":
                    fixed.accompany(policy, prompts, self.world.idle(len(prompts), self.trainer.dealt))
                return found

        scores = self.world.gather((rows, self.world.together(own)))
        self.fixed.scorer.rest()
        summary = self.judged.keep(scores, update)
        self.listeners.evaluated(Evaluated(update, summary, self.spent))
        return summary

    def _finish(self) -> Summary:
        """The last evaluation, unless it was made before, and what the run leaves behind."""
        summary = self.judged.summary(self.done)
        if summary is None:
            self._samples()
            summary = self._evaluate()
        self.outputs.leave(self.done, summary)
        return summary

    # -- ends before the end

    def _stop_if_asked(self) -> None:
        codes = [code for code in self.world.gather(self.stop.code) if code is not None]
        if codes:
            self.save()
            raise Interrupted(codes[0])

    def _check_scores(self, update: Update) -> None:
        """End a run whose samples went without scores too often."""
        if self.unscored >= (limit := self.config.scoring.invalid_in_a_row):
            names = ", ".join(keys.invalids(update.metrics))
            raise Unscored(f"update {self.done}: {limit} updates in a row had samples without a score: {names}")

    @contextmanager
    def _saved_if_unscored(self) -> Iterator[None]:
        """Save before a run ends for want of scores: nothing was learnt from what has none."""
        try:
            yield
        except Unscored as error:
            # In the middle of an update of several steps the parameters are those after none.
            whole = self.trainer.whole
            if self.done and whole:
                self.save()
            kept = f"saved after update {self.done}; " if self.done and whole else ""
            raise Fault(f"{error}; {kept}the same command goes on") from error
