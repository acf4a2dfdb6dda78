"""Distillation of adapters into one, on the student's own states (on-policy; Flow-OPD, arXiv 2605.08063, DiffusionOPD, 2605.15055).

Of the two forms only the matching loss is here. The other, a policy gradient whose advantage is the distance to the teacher, depends on the
state alone: detached, its expectation is 0; not detached, it is the matching loss with the noise of a score function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from diffalign import ops
from diffalign.errors import UserError
from diffalign.protocols import BASE, Loss, Needs, Policy, RewardFunction
from diffalign.rules._forward import drawn_levels
from diffalign.rules._rule import Rule, RuleSettings
from diffalign.types import Credit, Integers, Plan, Prompts, Rollout, Schedule, Term

if TYPE_CHECKING:
    from torch import Tensor

OTHERS = "*"  # in place of a tag: prompts that have no teacher of their own
TAG = "tag"  # of a prompt's metadata, what it is taught by


class Distil(Rule):
    """The student samples, and at a few of its states learns what its prompt's teacher would predict there; no reward is asked.

    x_t carries no gradient, nor does the teacher: L = w_t mean over dims of (p_student(x_t) - p_teacher(x_t))^2.
    """

    name: ClassVar[str] = "distil"

    class Settings(RuleSettings):
        """Keys of `rule:` for distil."""

        teachers: dict[str, str] = Field(
            {}, description="tag of prompts: run or adapter that teaches them, or base; '*' for all others"
        )
        teacher_guidance: float | None = Field(
            None, ge=0, description="the teachers' guidance_scale; null: the sampler's, which the student has"
        )
        times: int = Field(3, ge=1, description="steps of a sample that are matched, drawn anew for every update")
        weight: Literal["prediction", "mean", "clean"] = Field(
            "prediction",
            description="what is compared: predictions, means of steps (times b^2), clean samples (c^2)",
        )
        noise: bool = Field(False, description="sample with the process's noise; false: deterministically")

        def problems(self, steps: int) -> list[str]:
            """What is wrong with these settings for a sampler of `steps` steps."""
            problems = super().problems(steps)
            if not self.teachers:
                problems.append("rule.teachers: got {}, allowed is at least one, such as {'*': runs/a}")
            if self.times > steps:
                problems.append(f"rule.times: got {self.times}, allowed is up to sampler.steps ({steps})")
            return problems

    settings: Settings

    @property
    def needs(self) -> Needs:
        s = self.settings
        adapters = tuple(dict.fromkeys(teacher for teacher in s.teachers.values() if teacher != BASE))
        return Needs(stochastic_sampler=s.noise, rewards=False, adapters=adapters)

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        """Sample to the last of the drawn steps and no further: there is nothing to be scored.

        Raises:
            UserError: for clean samples of epsilon prediction at a level without signal.
        """
        s, steps = self.settings, schedule.steps
        if s.weight == "clean" and schedule.prediction == "epsilon" and schedule.alpha[0] == 0:
            raise UserError("rule.weight: got clean, epsilon says nothing about x_0 in pure noise; allowed is mean")
        drawn = drawn_levels(np.arange(steps), s.times, False, rng)
        terms = tuple(Term(step, step, "state", weight) for step, weight in drawn)
        noise = tuple(s.noise and k < steps - 1 for k in range(steps))
        return Plan(drawn[-1][0], noise, (terms,), keep_noise=False)

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """w_t mean (p_student - p_teacher)^2 over the part, whose rows each have their own teacher."""
        errors: list[Tensor] = []
        for teacher, rows in self.taught(part.prompts):
            own = part.select(rows)  # both on the same rows: equal weights are then equal to the last bit
            predicted = policy.transition(own, term.start).prediction
            with policy.weights(teacher, self.settings.teacher_guidance):
                wanted = policy.transition(own, term.start).prediction
            errors.append(ops.matching.error(predicted, wanted).sum() / len(part.prompts))
        value = self._scale(policy, part, term.start) * sum(errors[1:], errors[0])
        return Loss(value, {"distance": value.detach()})

    def taught(self, prompts: Prompts) -> list[tuple[str, Integers]]:
        """Every teacher and the rows of its prompts.

        Raises:
            UserError: if a prompt has none.
        """
        own = [self.teacher(metadata.get(TAG)) for metadata in prompts.metadata]
        return [(each, np.flatnonzero([name == each for name in own])) for each in dict.fromkeys(own)]

    def teacher(self, tag: object) -> str:
        """Who teaches prompts with a tag.

        Raises:
            UserError: if nobody does.
        """
        teachers = self.settings.teachers
        found = teachers.get(str(tag), teachers.get(OTHERS))
        if found is None:
            raise UserError(f"rule.teachers: nobody teaches prompts with tag {tag!r}; allowed is one for {OTHERS!r}")
        return found

    def _scale(self, policy: Policy, part: Rollout, step: int) -> float:
        """Of a squared difference of predictions: that of what is compared, by what a prediction is multiplied by there."""
        if self.settings.weight == "prediction":
            return 1.0
        if self.settings.weight == "mean":
            return policy.table(part.plan, step)[1] ** 2
        schedule = policy.schedule
        alpha, sigma = float(schedule.alpha[step]), float(schedule.sigma[step])
        return ops.matching.implied(alpha, sigma, schedule.prediction) ** 2
