"""Settings of awm, and which of them go together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffalign.rules._forward import ForwardSettings
from diffalign.runtime.settings import factors


class AWMSettings(ForwardSettings):
    """Keys of `rule:` for awm."""

    weight: Literal["uniform", "t", "t2", "huber", "ghuber", "adaptive", "elbo"] = Field(
        "ghuber",
        description="w, of squared error and t; adaptive: of x_0, over its size; elbo: nats",
    )
    power: float = Field(0.25, gt=0, le=1, description="p of ghuber")
    row: Literal["clipped", "ratio", "proximal", "advantage"] = Field(
        "clipped",
        description="a row weighs A r, clipped; ratio: A r; proximal: r (A - kappa log r); advantage: A",
    )
    ratio_over: Literal["draw", "sample"] = Field(
        "draw",
        description="log r is of one draw of level and noise; sample: the mean of a sample's (V-GRPO)",
    )
    kappa: float = Field(1.0, ge=0, description="of proximal: it stops at log r = A / kappa")
    old_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of a slow policy that samples, reached in steps of 0.001; null: none",
    )
    clip: float = Field(1.0, gt=0, description="half-width of the ratio's range", json_schema_extra=factors(0.1, 10))
    anchor: float = Field(
        1.0, ge=0, description="weight of mean (v - v_anchor)^2, to a slow copy", json_schema_extra=factors(0.1, 10)
    )
    anchor_to: Literal["anchor", "old"] = Field(
        "anchor", description="the copy of it; old: what ratios are against (AdvantageFlow)"
    )
    anchor_decay: float = Field(0.3, ge=0, le=1, description="of the copy per update, reached from 0 in steps of 0.001")
    implicit: Literal["none", "group", "residual", "listwise"] = Field(
        "none",
        description="fit a group's implicit rewards: group: DGPO; residual: CRD; listwise: GDRO",
    )
    implicit_beta: float | None = Field(
        None, gt=0, description="of the implicit reward; null: 100 for group, 1 for others"
    )
    implicit_to: Literal["reference", "anchor"] = Field(
        "reference", description="whose log-density it is measured against"
    )

    @property
    def referred(self) -> bool:
        """Whether anything is held against the reference."""
        return super().referred or (self.implicit != "none" and self.implicit_to == "reference")

    @property
    def delayed(self) -> bool:
        """Whether ratios are against parameters that may differ from those trained."""
        return self.inner_updates > 1 or self.old_decay is not None

    @property
    def anchored(self) -> bool:
        """Whether there is a slow copy that only the anchor is for."""
        return self.anchor > 0 and self.anchor_to == "anchor"

    @property
    def beta(self) -> float:
        """Of the implicit reward."""
        return self.implicit_beta or {"group": 100.0}.get(self.implicit, 1.0)

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        problems = super().problems(steps)
        problems += [] if self.row == "proximal" else self.idle(("kappa",), "rule.row: proximal")
        problems += [] if self.row == "clipped" else self.idle(("clip",), "rule.row: clipped")
        problems += [] if self.weight == "ghuber" else self.idle(("power",), "rule.weight: ghuber")
        if not self.delayed:
            without = "rule.inner_updates above 1 or rule.old_decay: the old policy is the trained one"
            problems += self.idle(("ratio_over", "anchor_to"), without)
        problems += self.idle(("ratio_over",), "ratios: rule.row: advantage") if self.row == "advantage" else []
        problems += [] if self.anchor > 0 else self.idle(("anchor_to",), "rule.anchor")
        problems += self.idle(("anchor_decay",), "rule.anchor_to: anchor") if self.anchor_to == "old" else []
        problems += self._elbo_problems(steps) if self.weight == "elbo" else []
        if self.implicit == "none":
            return [*problems, *self.idle(("implicit_beta", "implicit_to"), "rule.implicit")]
        if self.implicit_to == "anchor" and not (self.anchored and self.anchor_decay > 0):
            problems.append(
                "rule.implicit_to: got anchor; allowed with rule.anchor and rule.anchor_decay above 0, and rule.anchor_to: anchor"
            )
        return problems

    def _elbo_problems(self, steps: int) -> list[str]:
        problems = []
        # narrower is a width for means over latent dimensions: of sums it would stop every row
        if self.row == "clipped" and self.clip < 1:
            problems.append(
                f"rule.clip: got {self.clip:g}, weight: elbo sums over latent dimensions; allowed is 1 or more, or another rule.row"
            )
        if len(self.candidates(steps)) == 1:
            problems.append("rule.weight: got elbo with one noise level; allowed with two or more in rule.levels")
        return problems

    def unused(self) -> set[str]:
        """Keys that nothing uses with these settings."""
        return {"clip"} if not self.delayed or self.row != "clipped" else set()  # on a first pass every ratio is 1
