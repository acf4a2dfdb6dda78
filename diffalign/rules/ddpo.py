"""DDPO (arXiv 2305.13301): the score-function and the importance-sampled estimator, with per-prompt running statistics."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diffalign import ops
from diffalign.protocols import Loss, Needs, Policy, RewardFunction
from diffalign.rules import _policy_gradient as policy_gradient
from diffalign.rules import _trust as trust
from diffalign.rules._merging import columns, merged
from diffalign.rules._rule import Rule
from diffalign.runtime.settings import factors
from diffalign.types import Credit, Floats, Plan, Prompts, Rollout, Schedule, Scores, Term, Tree, Update


class DDPO(Rule):
    """Advantages against what a prompt's rewards were so far, on every noisy step.

    Log-probs average over latent dimensions, as in the authors' code: the clip range of 1e-4 belongs to that.
    """

    name: ClassVar[str] = "ddpo"

    class Settings(policy_gradient.PolicyGradientSettings, trust.TrustSettings):
        """Keys of `rule:` for ddpo."""

        estimator: Literal["importance", "score"] = Field(
            "importance", description="importance: DDPO-IS, clipped ratios; score: DDPO-SF, REINFORCE"
        )
        clip: float = Field(
            1e-4,
            gt=0,
            description=f"{policy_gradient.CLIP}; of the importance estimator",
            json_schema_extra=factors(0.1, 10),
        )
        history: int = Field(32, ge=2, description="last rewards of a prompt that its statistics are made of")
        history_least: int = Field(16, ge=2, description="with fewer, the batch's statistics are used")

        def unused(self) -> set[str]:
            """Keys that nothing uses with these settings."""
            return super().unused() | ({"clip"} if self.estimator == "score" else set())

        def problems(self, steps: int) -> list[str]:
            """What is wrong with these settings for a sampler of `steps` steps."""
            problems = super().problems(steps)
            if self.history_least > self.history:
                problems.append(
                    f"rule.history_least: got {self.history_least}, allowed is rule.history ({self.history}) or less"
                )
            if self.floors and self.combine == "sum":
                problems.append(
                    f"rule.floors: got {self.floors} with combine sum, a prompt's history would mix sums of other multipliers; "
                    "allowed with rule.combine: normalised or gdpo, which keep each reward's own"
                )
            if self.estimator == "score" and self.inner_updates > 1:
                problems.append(
                    f"rule.inner_updates: got {self.inner_updates}, the score estimator is on-policy; allowed is 1, or "
                    "rule.estimator: importance"
                )
            return problems

    settings: Settings

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        # The last `history` of each prompt, oldest first, by reward; "total" is their weighted sum.
        self.rewards: dict[str, dict[str, list[float]]] = {}

    @property
    def needs(self) -> Needs:
        return Needs(stochastic_sampler=True)

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        s = self.settings
        span = s.span(schedule.steps, update, rng)
        return policy_gradient.plan(schedule, s, span, keep_mean=s.trust == "kl")

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit:
        """(r - mean) / std of the prompt's last rewards, these included; of the batch while they are few."""
        texts, group = [prompts.text[root] for root in tree.leaf_root], prompts.group[tree.leaf_root]

        def of(name: str, reward: Floats, _: float) -> list[Floats]:
            return [self._standardised(self._joined(name, texts, reward, scores.valid), texts, reward, scores.valid)]

        (advantage,) = merged(scores, group, self.settings, of)
        return Credit(ops.advantages.average_to_parents(advantage, tree.parent)[1:])

    def _joined(self, name: str, texts: list[str], reward: Floats, valid: NDArray[np.bool_]) -> dict[str, list[float]]:
        """The last rewards of each of some prompts, with these (N,) among them."""
        before = self.rewards.get(name, {})
        joined = {text: list(before.get(text, ())) for text in dict.fromkeys(texts)}
        for text, value, given in zip(texts, reward.tolist(), valid, strict=True):
            if given:
                joined[text].append(value)
        return {text: values[-self.settings.history :] for text, values in joined.items()}

    def _standardised(
        self, history: dict[str, list[float]], texts: list[str], reward: Floats, valid: NDArray[np.bool_]
    ) -> Floats:
        """Advantages of rewards (N,) among their prompts' `history`."""
        s = self.settings
        advantage = np.zeros(len(reward))
        names, number = np.unique(np.asarray(texts, object), return_inverse=True)
        members = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
        for text, mine in zip(names, members, strict=True):
            rows = mine[valid[mine]]
            own = np.asarray(history[text])
            compared = own if len(own) >= s.history_least else reward[valid]
            advantage[rows] = ops.advantages.standardised(reward[rows], compared, limit=s.advantage_limit)
        return advantage

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """At the term's step, -A log p (score) or max(-A r, -A clip(r)) (importance), averaged over the part."""
        step = trust.revisited(term.start, policy, part, credit)
        if self.settings.estimator == "score":
            return Loss(-(step.advantage * step.log_prob).mean(), step.metrics, gap=step.gap)
        s = self.settings
        value, metrics = trust.bounded(step, part, term.start, s.clip, s)
        return Loss(value, metrics, gap=step.gap, clip=s.cut)

    def after_update(self, update: Update) -> None:
        """The update's rewards join their prompts' history."""
        if update.judged is None:
            return
        prompts, scores = update.judged
        for name, reward in columns(scores, prompts.group, self.settings).items():
            joined = self._joined(name, prompts.text, reward, scores.valid)
            self.rewards.setdefault(name, {}).update({text: last for text, last in joined.items() if last})

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rewards": self.rewards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rewards = {
            name: {text: list(values) for text, values in past.items()} for name, past in state["rewards"].items()
        }
