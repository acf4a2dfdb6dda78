"""The one update: plan, sample, score, credit, backward, step. No rule's name appears here."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from diffalign.errors import Unscored
from diffalign.protocols import START, TrainablePolicy
from diffalign.rewards.scorer import Scorer
from diffalign.rules import Matching, Rule
from diffalign.runtime import keys
from diffalign.runtime.distributed import ALONE, World
from diffalign.runtime.memory import fitting
from diffalign.runtime.progress import Progress, silent
from diffalign.runtime.randomness import Purpose, numpy_generator
from diffalign.training.anchor import Anchor
from diffalign.training.backward import Backward, Logged, Share, step
from diffalign.training.floors import moved
from diffalign.training.sampled import Drawn, Sampled, all_scores, drawn, recompute, settled, tallied
from diffalign.training.scoring import Clock, Sampling, appearances, describe, measured
from diffalign.training.selection import Everything, Selector
from diffalign.types import Credit, Integers, Plan, Prompts, Scores, Span, Tree, Update


class Trainer:
    """Runs a rule on a policy.

    Args:
        scorer: what is maximised.
        optimizer: over the policy's parameters; one step per `Plan.updates` entry.
        draw: update -> the prompts of that update.
        term_norms: also return the gradient norm of every term.
        world: the processes that share the work; each samples its own micro-batches, as large as the policy's are now.
        max_invalid: share of an update's samples that may be without a score.
        notify: told what a user should know.
        rate: update -> the learning rate of that update; None: it stays the optimizer's own.
        progress: told of every micro-batch.
        selector: decides which samples are drawn of the prompts; None: all.
    """

    def __init__(
        self,
        rule: Rule,
        policy: TrainablePolicy,
        scorer: Scorer,
        optimizer: torch.optim.Optimizer,
        draw: Callable[[int], Prompts],
        *,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        term_norms: bool = False,
        world: World = ALONE,
        max_invalid: float = 1.0,
        notify: Callable[[str], None] = print,
        rate: Callable[[int], float] | None = None,
        progress: Progress = silent,
        selector: Selector | None = None,
    ) -> None:
        self.rule, self.policy, self.scorer, self.optimizer, self.draw = rule, policy, scorer, optimizer, draw
        self.max_grad_norm, self.seed, self.max_invalid, self.notify = max_grad_norm, seed, max_invalid, notify
        self.world, self.dealt, self.rate, self.weights = world, policy.micro_batch, rate, dict(scorer.weights)
        self.selector: Selector = selector or Everything()
        self.sampling = Sampling(policy, scorer, rule.needs.log_probs, progress)
        self.backward = Backward(rule, policy, scorer, term_norms or rule.needs.term_norms, progress)
        self.anchor: Anchor | None = None
        if (data := rule.anchored_in) is not None:
            beside = Backward(Matching(data), policy, scorer, progress=progress)
            self.anchor = Anchor(beside, lambda update: self.draw(update), world, seed, notify)
        self.compared = False  # whether it was said how far a compiled first pass is from its rollout
        self.whole = True  # the parameters are those after some update, not those within one
        policy.add_shadows(rule.decays(0))

    def update(self, index: int) -> Update:
        """Update number `index` (0 is the first).

        Raises:
            Fault: if sampling and training disagree, or a reward fails.
        """
        clock = Clock.of(self.policy)
        self.whole = True
        if index:  # what the anchor takes counts for the first update alone, wherever a run goes on
            self.prepare()
        if self.rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(index)
        started, before = time.perf_counter(), _counters(self.policy)
        self.prepare()
        sampled = self._sample(index, clock)
        update = sampled.update
        if not update.flat:
            with clock("train"):
                update = self._train(sampled, index)
        if self.policy.lossy and not self.compared:
            self.compared = True
            self.notify(f"speed: compile: the first pass was within {self.backward.gap:.2g} of its rollout")
        self.world.check_equal(self.policy.parameters, f"update {index + 1}")
        self.policy.follow(self.rule.decays(index))
        self.rule.after_update(update)
        self.selector.after_update(update)
        update = moved(self.rule, update, f"update {index + 1}", self.notify)
        if START in self.policy.shadows:
            update = self._reset(index, update)
        if said := self.rule.remark(update):
            self.notify(f"update {index + 1}: {said}")
        self.whole = True
        seconds = {f"seconds/{phase}": value for phase, value in clock.seconds.items()}
        seconds["seconds/total"] = time.perf_counter() - started
        counted = self.world.gather([now - then for now, then in zip(_counters(self.policy), before, strict=True)])
        forward, backward, called, run = (float(sum(column)) for column in zip(*counted, strict=True))
        spent = {"nfe": forward, "nfe_backward": backward, **({keys.SPARED: 1 - run / called} if called else {})}
        rate = {keys.RATE: float(self.optimizer.param_groups[0]["lr"])}
        return replace(update, metrics={**update.metrics, **rate, **seconds, **spent})

    def prepare(self) -> None:
        """Draw what updates need besides their own samples, if there is such and it was not drawn."""
        if self.anchor is not None:
            self.anchor.draw()

    def _reset(self, index: int, update: Update) -> Update:
        """Let the reference be the present model if the rule says so, and note that."""
        if not self.rule.resets(index, update.metrics.get("kl")):
            return update
        self.policy.follow({START: 0.0})
        return replace(update, metrics={**update.metrics, keys.RESET: 1.0})

    def gradient(self, index: int) -> Update:
        """The gradient of update `index`'s first optimiser step, left in the parameters' `grad`; nothing else moves."""
        self.prepare()
        sampled = self._sample(index, Clock.of(self.policy))
        shares = settled(sampled, 0, self.backward, self.world, self.notify)
        return _with(sampled.update, self._gradient(shares, sampled, index, 0))

    def _sample(self, index: int, clock: Clock) -> Sampled:
        """Plan, sample, score and credit."""
        rng = numpy_generator(self.seed, Purpose.PLAN, index)
        plan = self.rule.plan(self.policy.schedule, index, rng)
        if self.rule.measures_units and not self.rule.units:
            steps = self.policy.schedule.steps
            self.rule.units = measured(
                self.rule, lambda given, by: self._scored(given, by, clock).scores, self.draw(0), steps, self.notify
            )
        if self.rule.measures_units or self.rule.least:
            self.scorer.weights = self.rule.weighed(self.weights)
        selected = self.selector.select(self.draw(index), plan, functools.partial(self._scouted, clock))
        prompts, chosen = selected.prompts, Update(scouted=selected.scouted, metrics=selected.metrics)
        plans = self.rule.plans(plan, self.policy.schedule, prompts.group, rng)
        parts = [self._scored(prompts, own, clock, every) for own, every in plans]
        tree = Tree.grow(len(prompts), plan.branch)
        scores = all_scores(parts, tree)
        if scores is None:
            return Sampled(parts, prompts, None, chosen, selected.uneven)
        if 1 - scores.valid.mean() > self.max_invalid or not scores.valid.any():
            raise Unscored(f"update {index + 1}: samples without a score, {self.scorer.unscored(scores.by_name)}")
        judged = prompts.select(tree.leaf_root)
        credit = self.rule.with_held(self.rule.credit(tree, scores, prompts), scores, judged.group)
        seen = [(part.rows.tolist(), part.looks) for part in parts if part.looks is not None]
        found = [each for of_process in self.world.gather(seen) for each in of_process]
        update = replace(
            chosen,
            scored=int(scores.valid.sum()),
            unscored=int((~scores.valid).sum()),
            flat=not self.rule.needs.anchored and self.anchor is None and _flat(plan, credit),
            judged=(judged, scores),
            metrics=chosen.metrics
            | describe(scores, judged.group, self.rule.settings)
            | appearances(found, tree, judged.group)
            | self.selector.compared(selected, judged, scores),
        )
        return Sampled(parts, prompts, credit, update, selected.uneven)

    def _scored(self, prompts: Prompts, plan: Plan, clock: Clock, every: Integers | None = None) -> Drawn:
        """See `drawn`."""
        cached = not self.rule.needs.exact_steps
        return drawn(self.sampling, prompts, plan, clock, self.world, self.dealt, self.notify, cached, every)

    def _scouted(self, clock: Clock, prompts: Prompts, plan: Plan, rewards: Sequence[str] | None) -> Scores:
        """Some rewards' scores of samples that nothing is learnt from."""
        sampling = Sampling(self.policy, self.scorer.only(rewards), progress=self.sampling.progress)
        scores = drawn(sampling, prompts, plan, clock, self.world, self.dealt, self.notify).scores
        assert scores is not None, "scouts are sampled to the end"
        return scores

    def _train(self, sampled: Sampled, index: int) -> Update:
        """The optimiser steps of one update; what is logged is averaged over them."""
        values: dict[str | Span, list[float]] = defaultdict(list)
        skipped = 0
        for number in range(sampled.updates):
            shares = settled(sampled, number, self.backward, self.world, self.notify)
            work = functools.partial(self._gradient, shares, sampled, index, number)
            logged = self.world.together(functools.partial(fitting, self.policy, work, self.notify))
            logged = self.world.average(logged, sampled.share)
            logged |= {} if self.anchor is None else self.anchor.noted()
            counts = tallied(self.world, self.backward.tally, self.max_invalid, f"update {index + 1}")
            norm = step(self.optimizer, list(self.policy.parameters.values()), self.max_grad_norm, self.world)
            self.whole, skipped = self.whole and norm is None, skipped + (norm is None)
            logged |= {"skipped_nonfinite": 1.0} if norm is None else {"grad_norm": norm, "skipped_nonfinite": 0.0}
            for name, value in logged.items():
                values[name].append(value)
        update = sampled.update
        if update.judged is None:  # nothing was scored beforehand
            given = {name: np.asarray(each, np.float64) for name, each in counts.values.items()}
            scored = counts.asked - counts.unscored
            update = replace(update, scored=scored, unscored=counts.unscored, values=given)
            missing = {keys.invalid(name): [float(count)] for name, count in counts.missing.items() if count}
            values.update(missing)
        update = _with(update, {name: float(np.mean(each)) for name, each in values.items()})
        return replace(update, steps=sampled.updates, nonfinite=skipped)

    def _gradient(self, shares: list[Share], sampled: Sampled, index: int, number: int) -> Logged:
        """The gradient of optimiser step `number` of update `index`, from zero."""
        self.optimizer.zero_grad(set_to_none=True)
        first, where = number == 0, f"update {index + 1}"
        if first:
            recompute(sampled.parts, self.policy, lambda line: self.notify(f"{where}: {line}"))
        now = [replace(share, rollout=part.rollout) for share, part in zip(shares, sampled.parts, strict=True)]
        logged = self.backward.accumulate(now, first=first, where=where)
        if self.anchor is not None:
            self.anchor.accumulate(index, number)
        return logged


def _counters(policy: TrainablePolicy) -> tuple[int, int, int, int]:
    """What a policy has counted so far."""
    return policy.rows_forward, policy.rows_backward, policy.parts_called, policy.parts_run


def _flat(plan: Plan, credit: Credit | None) -> bool:
    """Whether there is nothing to learn; terms that go through the reward learn without credit."""
    return credit is not None and not plan.pathwise and not plan.perturbed and not any(np.any(e) for e in credit.edges)


def _with(update: Update, logged: Logged) -> Update:
    """An update with what its steps logged."""
    norms = {span: value for span, value in logged.items() if not isinstance(span, str)}
    metrics = {name: value for name, value in logged.items() if isinstance(name, str)}
    # What a rollout's samples scored stands, where terms ask the rewards about others besides.
    return replace(update, term_norms=norms, metrics={**metrics, **update.metrics})
