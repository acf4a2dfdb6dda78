"""The keys of a config that say how trajectories are sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from diffalign.config.kinds import ASKED, HELD
from diffalign.runtime.settings import Settings, factors


class CacheConfig(Settings):
    """Keys of `sampler.cache:`."""

    name: Literal["first_block"] = Field(
        description="first_block: where the first block's change is nearly that of the step before, the others are not run"
    )
    threshold: float = Field(
        0.1, ge=0, le=10, description="difference of the two changes, relative, below which they are left out; 0: never"
    )


class SamplerConfig(Settings):
    """How trajectories are sampled, in training and evaluation."""

    model_config = ConfigDict(json_schema_extra=HELD)

    process: str = Field("flow_sde", description="how a step follows from a prediction")
    noise_level: float = Field(
        0.7,
        ge=0,
        le=100,
        description="a of flow_sde, eta of dance_sde and ddim",
        json_schema_extra=ASKED | factors(0.5, 2),
    )
    steps: int = Field(10, ge=2, le=1000, description="calls of the network a sample")
    guidance_scale: float | None = Field(
        1.0, ge=0, description="how far the prompt pulls; 1: not; null: not passed on, the pipeline's own default"
    )
    guidance_steps: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="first with guidance and one past the last; others predict once; null: all",
    )
    sigmas: Literal["pipeline", "linear"] = Field("pipeline", description="noise levels: the scheduler's, or even")
    cache: CacheConfig | None = Field(
        None,
        description="training samples by features kept between steps: sooner, and others; nft, awm; null: none",
        json_schema_extra=ASKED,
    )
    pipeline_args: dict[str, Any] = Field(
        {}, description="further arguments of the pipeline's call: height, width, ..."
    )
    fps: float | None = Field(
        None, gt=0, le=1000, description="frames per second of videos, for rewards that go by time; null: not known"
    )


def unguided(sampler: SamplerConfig, encoded: bool) -> list[str]:
    """What cannot go with guidance on some steps only; encoded: texts come from a cache."""
    if sampler.guidance_steps is None:
        return []
    first, stop = sampler.guidance_steps
    got, problems = f"sampler.guidance_steps: got [{first}, {stop}]", []
    if not first <= stop <= sampler.steps:
        problems.append(
            f"{got}, allowed are the first step with guidance and one past the last, 0 <= first <= last <= {sampler.steps}"
        )
    if encoded:  # a call without guidance asks for other encodings, in another form
        problems.append(
            f"{got} with prompts.cache, which keeps the texts of a call with guidance alone; allowed is one of the two"
        )
    # The call is run over stretches of the steps: what counts its turns would begin anew in each.
    problems += [
        f"{got} with {key} in sampler.pipeline_args, which goes by the turns of the pipeline's loop; allowed is one of the two"
        for key in sampler.pipeline_args
        if key.startswith("skip_")
    ]
    return problems
