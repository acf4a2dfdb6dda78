"""A plain call of a pipeline, by its own scheduler, with guidance on some steps only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.backends import recorder
from diffalign.backends.guiding import GuidedSteps
from diffalign.backends.seam import Seam
from diffalign.processes.table import Kind


class PartlyGuided:
    """Called like a pipeline, it gives what the pipeline gives, and on steps outside [first, stop) without guidance.

    The pipeline's call is run over stretches of the steps, see `Seam`; between them its own scheduler keeps what it remembers.

    Args:
        pipe: the pipeline; kind: of its scheduler; arguments: of its call.
        steps: the first step with guidance, and one past the last.

    Raises:
        UserError: where guidance is no second prediction, or the pipeline cannot be called so.
    """

    def __init__(self, pipe: Any, kind: Kind, arguments: dict[str, Any], steps: Sequence[int]) -> None:
        self.seam = Seam(pipe, kind, "pipeline", arguments)
        self.seam.leave_out_guidance(steps)
        self.pieces = GuidedSteps(steps, self.seam.timesteps).pieces()

    @torch.no_grad()
    def __call__(
        self, *, prompt: list[str], generator: list[torch.Generator], output_type: str, **arguments: Any
    ) -> tuple[Any]:
        """Samples as the pipeline returns them, in a tuple; arguments: those of the constructor, for as many prompts as there are."""
        self.seam.arguments = arguments
        x = self.seam.start(prompt, generator)
        own = recorder.original(self.seam.recorder)

        def step(number: int, prediction: Tensor, latent: Tensor) -> Tensor:
            nonlocal x
            x = own.step(prediction, own.timesteps[number], latent, return_dict=False)[0]
            return x

        for steps, guided in self.pieces:
            self.seam.run(prompt, x, steps, step, guided=guided)
        return (self.seam.run(prompt, x, (), None, output=output_type),)
