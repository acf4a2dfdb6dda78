"""An anchor in data beside a rule's own loss: the matching loss on samples of the bare base model (DDRL, arXiv 2512.04332).

A divergence from the base model asks it about states that the policy came to, and that it may never have seen; a matching loss asks at
its own samples. The optimum of a reward under such a loss is p_data exp(reward / weight) as well.
"""

from __future__ import annotations

from pydantic import Field

from diffalign.runtime.settings import Settings, factors


class DataSettings(Settings):
    """Keys of `data:`."""

    count: int = Field(256, ge=1, le=100_000, description="samples of the base model, drawn once, before training")
    rows: int = Field(32, ge=1, description="of them in an optimiser step, drawn anew for each")
    times: int = Field(1, ge=1, description="noise levels that these are noised to")
    weight: float = Field(0.1, gt=0, description="of their loss", json_schema_extra=factors(0.1, 10))

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        rows = f"rule.data.rows: got {self.rows}, allowed is up to rule.data.count ({self.count})"
        times = f"rule.data.times: got {self.times}, allowed is up to the noise levels ({steps - 1})"
        return [*([rows] if self.rows > self.count else []), *([times] if self.times >= steps else [])]
