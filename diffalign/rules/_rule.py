"""What every rule is: settings, three hooks, and defaults for what only some rules do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from diffalign.errors import UserError
from diffalign.protocols import GraphBytes, Loss, Needs, Policy, RewardFunction
from diffalign.rules._data import DataSettings
from diffalign.rules._floors import PATIENCE, Floor
from diffalign.rules._gate import LEAST, MOST, Gate, GateSettings, held, overrated
from diffalign.runtime.settings import Settings
from diffalign.types import Credit, Floats, Integers, Plan, Prompts, Rollout, Schedule, Scores, Term, Tree, Update

if TYPE_CHECKING:
    from torch import Tensor


class RuleSettings(Settings):
    """A rule's settings: the keys of `rule:` in a config besides `name`."""

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        return []

    def unused(self) -> set[str]:
        """Keys that nothing uses with these settings, so that there is no use in trying other values."""
        return set()

    def idle(self, names: Iterable[str], without: str) -> list[str]:
        """A problem for every key that was changed though nothing uses it."""
        changed = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        given = self.model_dump(mode="json", include=set(changed))
        return [f"rule.{name}: got {given[name]}, has no effect without {without}" for name in changed]


class RewardSettings(RuleSettings):
    """Keys of what is made of rewards' values: what they are divided by, and what they are kept above."""

    unit: Literal["auto"] | None = Field(
        None,
        description="auto: rewards are divided by their mean std within prompts before training; null: by 1",
    )
    floors: dict[str, float] = Field(
        {}, description="reward: least; its weight grows by a multiplier while its mean is below that"
    )
    floor_rate: float = Field(0.1, gt=0, description="a multiplier's growth per update and std below the floor")
    floor_cap: float = Field(10.0, gt=0, description="largest multiplier")
    data: DataSettings | None = Field(
        None, description="count, rows, times, weight: matching loss on the base model's samples too (DDRL)"
    )

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        idle = [] if self.floors else self.idle(("floor_rate", "floor_cap"), "rule.floors")
        data = [] if self.data is None else self.data.problems(steps)
        return [*super().problems(steps), *idle, *data]


def check_known(key: str, named: Iterable[str], rewards: Mapping[str, Any]) -> None:
    """That the rewards which a setting names are this run's.

    Raises:
        UserError: if one is not.
    """
    if unknown := [name for name in named if name not in rewards]:
        raise UserError(f"{key}: got {unknown[0]!r}, allowed are this run's rewards: {', '.join(rewards)}")


class ReferenceSettings(RuleSettings):
    """Keys of rules with a divergence: what it pulls to. `kl`, its weight, is a rule's own."""

    kl: float
    reference: Literal["auto", "base", "start", "moving"] = Field(
        "auto",
        description="kl pulls to base: the bare model; start: lora.start (auto: if any); moving: as last reset",
    )
    reference_every: int | None = Field(None, ge=1, description="updates after which a moving reference is reset")
    reference_limit: float | None = Field(
        None, ge=0, description="mean kl of an update above which a moving reference is reset"
    )

    kl_gate: GateSettings | None = Field(
        None, description="share, by, adapt: kl only on samples that others rate lower (GARDO); null: on all"
    )

    @property
    def referred(self) -> bool:
        """Whether anything is held against the reference."""
        return self.kl > 0

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        moved = ("reference_every", "reference_limit")
        gate = self.kl_gate
        idle = self.idle(("kl_gate",), "rule.kl") if self.kl == 0 else []
        if gate is not None and gate.adapt and not LEAST <= gate.share <= MOST:
            idle.append(
                f"rule.kl_gate.share: got {gate.share:g}, one that adapts is in [{LEAST:g}, {MOST:g}]; allowed is that, or adapt: false"
            )
        return [*idle, *self._reference_problems(steps, moved)]

    def _reference_problems(self, steps: int, moved: tuple[str, ...]) -> list[str]:
        if not self.referred:
            return [*super().problems(steps), *self.idle(("reference", *moved), "rule.kl")]
        if self.reference != "moving":
            return [*super().problems(steps), *self.idle(moved, "rule.reference: moving")]
        never = [
            "rule.reference: got moving, which neither rule.reference_every nor rule.reference_limit resets; allowed with one or both"
        ]
        return [*super().problems(steps), *(never if self.reference_every is self.reference_limit is None else [])]

    def resets(self, done: int, kl: float | None) -> bool:
        """Whether a moving reference is reset after `done` updates, the last of which had a mean kl."""
        if self.reference != "moving":
            return False
        due = self.reference_every is not None and done % self.reference_every == 0
        return due or (self.reference_limit is not None and kl is not None and kl > self.reference_limit)


class Rule(ABC):
    """An update rule: `plan` says how far to sample, where noise goes and which terms make up each optimiser step, `credit` turns scores
    into a number per edge, `loss` is one term on one part of the rollout.

    Noise that a loss needs is drawn with `randomness.normal(part.prompts.seed, shape, ...)`, so that it depends on the sample and the
    update alone, not on how a batch is cut.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[RuleSettings]] = RuleSettings
    settings: RuleSettings

    def __init__(self, settings: Any = None) -> None:
        self.settings = settings or self.Settings()
        self.units: dict[str, float] = {}  # what each reward is divided by, once that was measured
        self.floors = {name: Floor() for name in self.least}
        self.gate = None if self.gated is None else Gate(self.gated.share)

    @property
    def needs(self) -> Needs:
        """What it cannot do without."""
        return Needs()

    @property
    def measures_units(self) -> bool:
        """Whether rewards are to be divided by what their spread was before training, measured once and kept."""
        return isinstance(self.settings, RewardSettings) and self.settings.unit == "auto"

    @property
    def gated(self) -> GateSettings | None:
        """Which samples its divergence is on; None: on all."""
        return self.settings.kl_gate if isinstance(self.settings, ReferenceSettings) else None

    @property
    def anchored_in(self) -> DataSettings | None:
        """What of the base model's own samples every optimiser step learns besides; None: nothing."""
        return self.settings.data if isinstance(self.settings, RewardSettings) else None

    @property
    def least(self) -> dict[str, float]:
        """What some rewards are to be kept above."""
        return self.settings.floors if isinstance(self.settings, RewardSettings) else {}

    def weighed(self, weights: dict[str, float]) -> dict[str, float]:
        """The weights that rewards have now: by their units, with their floors' multipliers.

        Raises:
            UserError: if a floor is of a reward that is not among them.
        """
        check_known("rule.floors", self.least, weights)
        now = {
            name: weight + self.floors[name].multiplier if name in self.least else weight
            for name, weight in weights.items()
        }
        return {name: weight / self.units.get(name, 1.0) for name, weight in now.items()}

    def with_held(self, credit: Credit | None, scores: Scores, group: Integers) -> Credit | None:
        """The credit with what each leaf's divergence weighs, where that differs; group: the leaves' (N,)."""
        if credit is None or self.gated is None or self.gate is None:
            return credit
        rows = held(overrated(scores, self.gated.by, group), self.gate.share)
        return replace(credit, rows={**credit.rows, "held": rows})

    def move_gate(self, scores: Scores, group: Integers) -> dict[str, float]:
        """Let the gate see an update's scores and the groups they are of (N,); returns numbers for the log: the share as it was."""
        if self.gated is None or self.gate is None:
            return {}
        apart, share = overrated(scores, self.gated.by, group), self.gate.share
        mean = float(apart[apart > 0].mean()) if (apart > 0).any() else 0.0
        if self.gated.adapt:
            self.gate = self.gate.after(mean)
        return {"gate_share": share, "overrated": mean}

    def move_floors(self, values: Mapping[str, Floats]) -> list[str]:
        """Let floors see an update's scores (N,) by name; returns those that were found not to hold now."""
        if not isinstance(self.settings, RewardSettings):
            return []
        s, before = self.settings, self.floors
        moved = {
            n: before[n].after(values[n], f, s.floor_rate, s.floor_cap) for n, f in self.least.items() if n in values
        }
        self.floors = {**before, **moved}
        return [name for name, floor in moved.items() if before[name].stuck < PATIENCE <= floor.stuck]

    def renoises(self, steps: int) -> bool:
        """Whether it learns at finished samples with noise drawn anew, in a sampler's second half too: what blurs a distilled model."""
        return False

    @abstractmethod
    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        """What update number `update` does; draws come from `rng`, which is the update's own."""

    def plans(
        self, plan: Plan, schedule: Schedule, group: Integers, rng: np.random.Generator
    ) -> list[tuple[Plan, Integers]]:
        """Where groups are sampled differently: a plan, in place of `plan`, for some of the samples each: rising indices of `group` (N,),
        of whole groups. All branch alike and have equally many optimiser steps."""
        return [(plan, np.arange(len(group)))]

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit | None:
        """How much better than expected every edge was; None: the rule learns without. Changes nothing."""
        return None

    def look(self, term: Term, policy: Policy, part: Rollout) -> dict[str, Tensor]:
        """Numbers (n,) about a part's leaves at the present parameters, without gradient, before an optimiser step; where `needs.looks`."""
        return {}

    def settle(
        self, terms: Sequence[Term], looked: Sequence[dict[str, Floats]], credit: Credit, group: Integers
    ) -> list[dict[str, Floats]]:
        """From what `look` gave for each term of an optimiser step, of all leaves (N,), and their groups, to numbers that join
        `credit.rows` in its loss; one for each term."""
        return [{} for _ in terms]

    @abstractmethod
    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """One term on one part of the rollout, averaged over the part's samples or edges."""

    def decays(self, update: int) -> dict[str, float]:
        """The shadows it keeps of the parameters, and how slowly each follows after update number `update`: 0 copies, 1 freezes."""
        return {}

    def fit(self, measured: GraphBytes, steps: int) -> None:
        """Choose how much graph to hold at once, before the first plan of a run of `steps` steps; where `needs.graph_bytes`."""

    def resets(self, update: int, kl: float | None) -> bool:
        """Whether what a divergence pulls to becomes the present model after update number `update`, whose mean divergence is given."""
        return isinstance(self.settings, ReferenceSettings) and self.settings.resets(update + 1, kl)

    def after_update(self, update: Update) -> None:
        """Learn from what an update did."""

    def remark(self, update: Update) -> str:
        """What a user should be told after an update; mostly nothing."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept to go on, JSON-serialisable."""
        floors = {name: asdict(floor) for name, floor in self.floors.items()}
        gate = {} if self.gate is None else {"gate": asdict(self.gate)}
        return {**({"units": self.units} if self.units else {}), **({"floors": floors} if floors else {}), **gate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.units = dict(state.get("units", {}))
        kept = state.get("floors", {})
        self.floors = {name: Floor(**kept[name]) if name in kept else Floor() for name in self.least}
        if self.gated is not None and "gate" in state:
            self.gate = Gate(state["gate"]["share"], tuple(state["gate"]["past"]))
