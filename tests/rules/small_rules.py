"""Small forms of the rules the protocol must carry: each as short as its mathematics, for the conformance test."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from diffalign import ops
from diffalign.protocols import Loss, Needs, Policy, RewardFunction
from diffalign.rules import Rule
from diffalign.runtime.randomness import normal
from diffalign.types import Credit, Plan, Prompts, Rollout, Schedule, Scores, Term, Tree, Update


class TruncatedBP(Rule):
    """The reward's gradient through the last `depth` steps (all of them: exact)."""

    name: ClassVar[str] = "small_truncated_bp"
    needs = Needs(stochastic_sampler=True, differentiable_reward=True)

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        T = schedule.steps
        return Plan(T - self.depth, (True,) * (T - 1) + (False,), ((Term(T - self.depth, T, "reward"),),))

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        x = policy.replay(part, term.start, term.stop).x
        return Loss(-reward(policy.decode(part, x)).mean())


class FullTruncatedBP(TruncatedBP):
    """Truncated BP that samples to the end, so that its replay reuses every noise."""

    name: ClassVar[str] = "small_bp"

    def __init__(self, depth: int, noisy: int | None = None) -> None:
        super().__init__(depth)
        self.noisy = noisy

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        T = schedule.steps
        noisy = T - 1 if self.noisy is None else self.noisy
        return Plan(T, (True,) * noisy + (False,) * (T - noisy), ((Term(T - self.depth, T, "reward"),),))


class Reinforce(Rule):
    """The score function on every noisy step, leave-one-out baseline, log-probs summed over dimensions."""

    name: ClassVar[str] = "small_reinforce"
    needs = Needs(stochastic_sampler=True)

    def __init__(self, noisy: int | None = None) -> None:
        super().__init__()
        self.noisy = noisy  # steps with noise; None: all but the last

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        T = schedule.steps
        noisy = T - 1 if self.noisy is None else self.noisy
        terms = tuple(Term(k, k + 1, "log_prob") for k in range(noisy))
        return Plan(T, (True,) * noisy + (False,) * (T - noisy), (terms,))

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit:
        advantage = ops.advantages.leave_one_out(scores.total, prompts.group[tree.leaf_root], scores.valid)
        return Credit(ops.advantages.average_to_parents(advantage, tree.parent)[1:])

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        assert credit is not None
        span = policy.replay(part, term.start, term.stop)
        eps = part.eps[term.stop - 1]
        assert eps is not None
        advantage = span.mean.new_tensor(credit.edges[term.stop - 1])
        return Loss(-(advantage * ops.gaussian.score_inner(span.mean, eps, span.std)).mean())


class RLR(Reinforce):
    """A pathwise last step, likelihood-ratio spans of h steps with borrowed noise before it, each step covered once."""

    name: ClassVar[str] = "small_rlr"
    needs = Needs(stochastic_sampler=True, differentiable_reward=True)

    def __init__(self, h: int = 2, cover: bool = True) -> None:
        super().__init__()
        self.h, self.cover = h, cover

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        T = schedule.steps
        spans = [(T - 1 - self.h, T - 1)] + ([(k, k + 1) for k in range(T - 1 - self.h)] if self.cover else [])
        terms = (Term(T - 1, T, "reward"), *(Term(a, b, "log_prob") for a, b in spans))
        return Plan(T, (True,) * (T - 1) + (False,), (terms,))

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        if term.through == "log_prob":
            return super().loss(term, policy, part, credit, reward)
        return TruncatedBP(term.stop - term.start).loss(term, policy, part, None, reward)


class Branching(Reinforce):
    """A tree: two children at the first two steps, leaf advantages averaged to their parents."""

    name: ClassVar[str] = "small_branching"

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        T = schedule.steps
        terms = tuple(Term(k, k + 1, "log_prob") for k in range(T - 1))
        noise = (True,) * (T - 1) + (False,)
        return Plan(T, noise, (terms,), branch=(2, 2, *[1] * (T - 2)), correlation=0.2)

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        assert credit is not None
        step = term.start
        now, eps, parent = policy.transition(part, step), part.eps[step], part.tree.parent[step]
        assert eps is not None
        score = ops.gaussian.score_inner(now.mean[parent], eps, now.std)
        return Loss(-(score.new_tensor(credit.edges[step]) * score).mean())


class Matching(Rule):
    """Advantage-weighted velocity matching on noised finished samples, held near a shadow; counts its updates, which weigh its loss."""

    name: ClassVar[str] = "small_matching"

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0

    def decays(self, update: int) -> dict[str, float]:
        return {"old": 0.5}

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        T = schedule.steps
        terms = tuple(Term(k, k, "forward", weight=0.5) for k in range(2))
        return Plan(T, (False,) * T, (terms,))

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit:
        advantage = ops.advantages.group_relative(scores.total, prompts.group[tree.leaf_root], scores.valid)
        return Credit(ops.advantages.average_to_parents(advantage, tree.parent)[1:])

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        assert credit is not None
        x0 = part.x[-1]
        seeds = [int(seed) for seed in part.prompts.seed]
        noise = normal(seeds, x0.shape[1:], 77, term.start, like=x0)
        time = normal(seeds, (1,), 78, term.start, like=x0)[:, 0].sigmoid()
        at = time[:, None]
        xt = (1 - at) * x0 + at * noise
        predicted = policy.predict(part, xt, time)
        with policy.shadow("old"):
            old = policy.predict(part, xt, time)
        error = ops.matching.error(predicted, noise - x0)
        drift = ops.matching.error(predicted, old)
        advantage = error.new_tensor(credit.edges[-1])
        return Loss((advantage * error + (2 + 0.1 * self.updates) * drift).mean(), {"drift": drift.mean().detach()})

    def after_update(self, update: Update) -> None:
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
