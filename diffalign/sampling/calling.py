"""One call of a source's pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from diffalign.errors import Fault, UserError, one_line, shown
from diffalign.models import calls
from diffalign.processes.table import Kind
from diffalign.sampling.sources import GUIDED, Source


def drawer(pipe: Any, source: Source) -> Callable[[Sequence[str], Sequence[int]], Any]:
    """What draws a loaded source: (prompts, seeds) -> see `shots`.

    Raises:
        UserError: for arguments that the call does not take, or guidance on some steps where the pipeline or its call does not allow that.
    """
    call = dict(source.call)
    steps = call.pop(GUIDED, None)
    if steps is None:
        _check(pipe, call)
        return functools.partial(shots, pipe, pipe, call)
    from diffalign.backends.plain import PartlyGuided

    count = call.get("num_inference_steps", 0)
    if not (isinstance(steps, list) and len(steps) == 2 and all(type(step) is int for step in steps)) or not (
        0 <= steps[0] <= steps[1] <= count
    ):
        raise UserError(
            f"{GUIDED}: got {shown(steps)} with {count} steps; allowed are the first step with guidance and one past the last, --steps at "
            f"most, or --set {GUIDED}=null for guidance on all"
        )
    _check(pipe, call)
    kind: Kind = "ddpm" if source.ddim else "flow"
    partly = PartlyGuided(pipe, kind, _for(1, call), steps)
    return functools.partial(shots, pipe, partly, call)


def _check(pipe: Any, call: dict[str, Any]) -> None:
    if unknown := calls.unknown(pipe, call):
        raise UserError(*(f"sample: {line}" for line in unknown))


def _for(count: int, call: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments for so many prompts."""
    return {key: [value] * count if key == "negative_prompt" else value for key, value in call.items()}


def shots(
    pipe: Any, run: Callable[..., Any], call: dict[str, Any], prompts: Sequence[str], seeds: Sequence[int]
) -> Any:
    """One call of a pipeline: n pictures (H, W, 3) or videos (F, H, W, 3) with values in [0, 1], each from a seed of its own.

    run: the pipeline, or what is called in its place.

    Raises:
        UserError: if the pipeline refuses the call.
        Fault: if memory does not suffice.
    """
    import torch

    from diffalign.runtime.memory import out_of_memory

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        return run(prompt=list(prompts), generator=generators, output_type="np", **_for(len(seeds), call))[0]
    except UserError:
        raise
    except Exception as error:  # whatever a pipeline does with arguments that are not for it
        if out_of_memory(error):
            raise Fault(f"sample: out of memory with {len(seeds)} at a time: {one_line(error)}") from error
        raise UserError(f"sample: {type(pipe).__name__} does not accept this: {_shortened(error)}") from error


def _shortened(error: Exception) -> str:
    """An error in one line, however many it takes to say something."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
