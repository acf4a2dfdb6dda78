"""Flow-GRPO (arXiv 2505.05470), and with other settings Flow-GRPO-Fast, MixGRPO (arXiv 2507.21802) and DanceGRPO (arXiv 2505.07818).

| method | settings |
|---|---|
| Flow-GRPO-Fast | window: [0, 5], window_steps: 3, fan: group size, prompts.group_size: 1; sampler.process: cps with ratio: unweighted |
| MixGRPO | window_steps: 4, window_move: sliding; Flash: flash: 0.4 |
| Flow-DPPO | trust: kl, kl_limit: 1e-5, inner_updates: 2 or more |
| Flash-GRPO | window_steps: 1, window_by: prompt, step_weight: equal, clip: 1e-3 |
| TempFlow-GRPO | window_steps: 1, fan: group size, prompts.group_size: 1, step_weight: std |
| DanceGRPO | sampler.process: dance_sde, noise_level: 0.3, shared_start: true, keep: 8 |
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from diffalign.protocols import Loss, Policy
from diffalign.rules import _policy_gradient as policy_gradient
from diffalign.rules import _trust as trust
from diffalign.types import Credit, Rollout, Term


class FlowGRPO(policy_gradient.GroupRule):
    """Group-relative advantages, the clipped surrogate on every noisy step, and a divergence from the base model."""

    name: ClassVar[str] = "flow_grpo"

    class Settings(policy_gradient.GroupSettings, trust.TrustSettings):
        """Keys of `rule:` for flow_grpo."""

        ratio: Literal["gaussian", "unweighted"] = Field(
            "gaussian", description="unweighted: log-probs without 1 / (2 std^2), as published with cps"
        )

    settings: Settings

    @property
    def power(self) -> int:
        return 1 if self.settings.ratio == "unweighted" else -1

    @property
    def keeps_mean(self) -> bool:
        return self.settings.trust == "kl"

    def clipped(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None) -> Loss:
        s = self.settings
        step = trust.revisited(term.start, policy, part, credit)
        if s.ratio == "unweighted":
            # -(x' - mu)^2 instead of -(x' - mu)^2 / (2 std^2)
            step = replace(step, log_ratio=step.log_ratio * 2 * step.now.std**2)
        value, metrics = self.surrogate(term, policy, part, step, s.clip)
        return Loss(value, metrics, gap=step.gap, clip=s.cut)
