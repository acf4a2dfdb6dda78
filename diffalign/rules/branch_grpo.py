"""BranchGRPO (arXiv 2509.06040): trees of samples that share their beginnings, and advantages at every depth."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diffalign import ops
from diffalign.protocols import Loss, Needs, Policy, RewardFunction
from diffalign.rules import _policy_gradient as policy_gradient
from diffalign.rules import _trust as trust
from diffalign.rules._merging import merged
from diffalign.runtime.settings import factors
from diffalign.types import Credit, Floats, Plan, Prompts, Rollout, Schedule, Scores, Term, Tree

MOST_LEAVES = 4096  # of one sample


class BranchGRPO(policy_gradient.SurrogateRule):
    """At split steps every node has several children from one network call, in sampling and in training alike.

    An edge's credit is its child's reward, fused from the leaves below, against all nodes of that depth and prompt. Pruning sets
    credit to 0 or leaves steps out of the loss; rewards and the other edges' credit do not change, nor does what is averaged over.
    """

    name: ClassVar[str] = "branch_grpo"

    class Settings(policy_gradient.SurrogateSettings, trust.TrustSettings):
        """Keys of `rule:` for branch_grpo; `window` makes it the Mix variant, with noise there and at the splits alone."""

        splits: list[int] = Field([0, 1, 2], min_length=1, description="steps where every node gets children")
        factor: int = Field(2, ge=1, description="K: children of a node at a split")
        sibling_noise: float = Field(
            4.0,
            gt=0,
            description="s: siblings' noises correlate by 1 / (1 + s^2), each stays standard normal",
            json_schema_extra=factors(0.25, 4),
        )
        fusion: float = Field(0.0, ge=0, description="beta: leaves weigh in proportion to path density^beta; 0: alike")
        normalise: Literal["depth", "leaves"] = Field(
            "depth", description="a depth's credit is divided by the std of its own nodes, or of the leaves"
        )
        average: Literal["edges", "depths"] = Field("edges", description="of the loss: edges weigh alike, or depths")
        width: Literal["all", "better_child", "extremes"] = Field(
            "all",
            description="learn after the last split from every leaf, each parent's better child, or best and worst",
        )
        extremes: int = Field(2, ge=1, description="so many best and so many worst leaves of a prompt")
        skip_depths: int = Field(
            0, ge=0, description="so many depths are not learned from, the first at the last split"
        )
        skip_every: int = Field(30, ge=1, description="updates before they move on by a step")

        def problems(self, steps: int) -> list[str]:
            """What is wrong with these settings for a sampler of `steps` steps."""
            problems = super().problems(steps)
            if self.diversity is not None:
                problems.append(
                    f"rule.diversity: got {self.diversity}, gains here are edges', not samples'; allowed is null"
                )
            if sorted(set(self.splits)) != self.splits or not 0 <= self.splits[0] <= self.splits[-1] < steps - 1:
                problems.append(
                    f"rule.splits: got {self.splits}, allowed are rising steps from 0 to {steps - 2}; the last step has no noise"
                )
            elif self.skip_depths > (most := steps - 2 - self.splits[-1]):
                problems.append(
                    f"rule.skip_depths: got {self.skip_depths}, allowed is up to the depths after the last split ({most})"
                )
            if (leaves := self.factor ** len(self.splits)) > MOST_LEAVES:
                problems.append(f"rule.splits: got {leaves} leaves a sample, allowed are up to {MOST_LEAVES}")
            if self.width != "extremes":
                problems += self.idle(("extremes",), "rule.width: extremes")
            if self.window_steps is not None and self.window is None:
                problems.append("rule.window_steps: got a number without rule.window, which makes the Mix variant")
            return problems

    settings: Settings

    @property
    def needs(self) -> Needs:
        s = self.settings
        return Needs(
            stochastic_sampler=True,
            groups=s.factor == 1,
            reference=s.kl > 0,
            log_probs=s.fusion > 0,
            anchored=s.kl > 0,
        )

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        """Noise in the window and at the splits, children at the splits, a term per noisy step that is not skipped."""
        s, steps = self.settings, schedule.steps
        first, stop = s.span(steps, update, rng)
        noisy = [k for k in range(steps - 1) if (first <= k < stop or k in s.splits) and schedule.std[k] > 0]
        begin = min(s.splits[-1] + update // s.skip_every, steps - 1 - s.skip_depths)
        learned = [k for k in noisy if not begin <= k < begin + s.skip_depths]
        branch = tuple(s.factor if k in s.splits else 1 for k in range(steps))
        edges = np.cumprod(branch)[learned]
        low, high = s.candidates(steps)
        candidates = [k for k in range(steps - 1) if (low <= k < high or k in s.splits) and schedule.std[k] > 0]
        weights = policy_gradient.step_weights(schedule, s.step_weight, learned, candidates) / len(learned)
        if s.average == "edges":
            weights = weights * edges / edges.mean()
        terms = tuple(Term(k, k + 1, "log_prob", float(w)) for k, w in zip(learned, weights, strict=True))
        return Plan(
            stop=steps,
            noise=tuple(k in noisy for k in range(steps)),
            updates=(terms,) * s.inner_updates,
            branch=branch,
            correlation=1 / (1 + s.sibling_noise**2),
            shared_start=s.shared_start,
            keep_mean=s.trust == "kl",
            keep_noise=False,
        )

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit:
        """(r(child) - mean) / std over the nodes of that depth and prompt."""
        s, leaf_group = self.settings, prompts.group[tree.leaf_root]

        def of(_: str, reward: Floats, rounding: float) -> list[Floats]:
            values, valid = ops.advantages.fuse(reward, scores.valid, tree.parent, scores.log_prob, s.fusion)
            spread = (reward, leaf_group, scores.valid) if s.normalise == "leaves" else None
            groups = [prompts.group[roots] for roots in tree.root]
            return [
                ops.advantages.group_relative(v, g, known, limit=s.advantage_limit, spread_of=spread, rounding=rounding)
                for v, g, known in zip(values[1:], groups[1:], valid[1:], strict=True)
            ]

        _, known = ops.advantages.fuse(scores.total, scores.valid, tree.parent)
        return Credit(self._pruned(merged(scores, leaf_group, s, of, known[1:]), tree, leaf_group, scores.valid))

    def _pruned(
        self,
        credit: list[Floats],
        tree: Tree,
        leaf_group: NDArray[np.int64],
        valid: NDArray[np.bool_],
    ) -> list[Floats]:
        """No credit after the last split for the leaves that are not learned from."""
        s = self.settings
        if s.width == "all":
            return credit
        last = s.splits[-1]
        siblings = tree.parent[last]  # after it every node has one child: what is true of a node is true of its leaf
        if s.width == "better_child":
            # Credit has the order of the rewards among siblings; one without a score is no better than any.
            order = np.where(valid, credit[last], -np.inf)
            best = np.full(int(siblings.max()) + 1, -np.inf)
            np.maximum.at(best, siblings, order)
            winners = np.flatnonzero(order == best[siblings])
            kept = np.zeros(len(siblings), bool)
            kept[winners[np.unique(siblings[winners], return_index=True)[1]]] = True
        else:
            # The leaves' advantages have the order of their rewards.
            kept = ops.advantages.extremes(credit[-1], leaf_group, valid, s.extremes) != 0
        return [np.where(kept, edges, 0.0) if step > last else edges for step, edges in enumerate(credit)]

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """max(-A r, -A clip(r)) + kl * divergence, averaged over the part's edges at the term's step."""
        step = trust.revisited(term.start, policy, part, credit)
        s = self.settings
        value, metrics = self.surrogate(term, policy, part, step, s.clip)
        return Loss(value, metrics, gap=step.gap, clip=s.cut)
