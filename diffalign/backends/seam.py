"""A pipeline's own `__call__` over some of its steps: what a policy asks of a pipeline, and all that is replaced while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from diffalign.backends import guiding, recorder
from diffalign.backends.walk import OnStep
from diffalign.errors import UserError
from diffalign.models import calls
from diffalign.models import lora as adapters
from diffalign.models.encoders import PROBE, device_known
from diffalign.models.encodings import Encodings, Kept
from diffalign.processes.table import Kind
from diffalign.runtime.memory import out_of_memory


class Seam:
    """Calls of a pipeline with a recording scheduler, latents swapped in where it prepares its own, and prompts encoded once.

    Args:
        pipe: the pipeline; kind: of the sampler that its scheduler is to be, see `recorder.stand_in`.
        sigmas: "pipeline" for the scheduler's own noise levels, "linear" for evenly spaced ones.
        arguments: of the pipeline's `__call__`, its number of steps included.
        kept: where its texts' encodings are, if it comes without its text encoders.

    Raises:
        UserError: for a pipeline that cannot be called so, or does not take these arguments.
    """

    def __init__(
        self, pipe: Any, kind: Kind, sigmas: recorder.Sigmas, arguments: dict[str, Any], kept: Kept | None = None
    ) -> None:
        if problems := recorder.unfit(pipe):
            raise recorder.refused(pipe, "; ".join(problems))
        self.pipe, self.arguments = pipe, arguments
        self.unguided: dict[str, Any] = {}  # what changes of them where guidance is left out
        # Undecorated: `__call__` runs under no_grad, what it wraps does not.
        self._call = inspect.unwrap(type(pipe).__call__)
        calls = (self._call, type(pipe.scheduler).set_timesteps)
        if sigmas == "linear" and not all("sigmas" in inspect.signature(call).parameters for call in calls):
            # Trained so, its adapter could not be sampled so by a plain call.
            raise UserError(
                f"sampler.sigmas: got 'linear', this {type(pipe).__name__} cannot be told its levels; allowed is pipeline"
            )
        self._own_scheduler = pipe.scheduler
        self._own_class, self._quick_class = type(pipe), device_known(pipe, pipe._execution_device)
        self.recorder = recorder.stand_in(pipe.scheduler, kind, sigmas)
        self._latent: Tensor | None = None
        self._prepared: Tensor | None = None
        self._prepare = pipe.prepare_latents
        self._forms: dict[
            str, Any
        ] = {}  # what `prepare_latents` returned, its latents without memory, by its arguments
        encode = getattr(pipe, "encode_prompt", None)
        self.encodings = encode and (Encodings(encode) if kept is None else Encodings.of(encode, kept))
        with torch.no_grad(), self.accepting(PROBE):  # the pipeline sets its timesteps as it would to sample
            self.run([PROBE], None, (), None)
        self._check_contract()
        self.timesteps = self.recorder.full_timesteps.double().cpu().numpy()
        self.levels = recorder.levels(self.recorder, kind)
        with torch.no_grad(), self.accepting(PROBE):  # a size that the network has no positions for is found out now
            self.run([PROBE], None, (0,), lambda step, prediction, latent: latent)

    def run(
        self,
        text: list[str],
        x: Tensor | None,
        steps: Sequence[int],
        on_step: OnStep | None,
        *,
        generators: list[torch.Generator] | None = None,
        output: str = "latent",
        forced: Tensor | None = None,
        guided: bool = True,
        changed: dict[str, Any] | None = None,
    ) -> Any:
        """The call over some steps, from latents x where given; every prediction goes to `on_step`. forced: other timesteps; guided: with
        guidance, as far as the arguments ask for it; changed: arguments that are others this time."""
        arguments = {**self.arguments, **({} if guided else self.unguided), **(changed or {})}
        self.recorder.steps, self.recorder.forced = list(steps), forced
        self.recorder.on_step = on_step or recorder._unexpected
        self._latent = x
        if generators is None:
            # Where a start is drawn that is swapped out, it must not touch the global generator.
            generators = [torch.Generator().manual_seed(0) for _ in text]
        with self._hooks():
            try:
                # A copy: some pipelines write their chat template into the list.
                result = self._call(self.pipe, prompt=list(text), generator=generators, output_type=output, **arguments)
            except recorder.ContractError as error:
                raise recorder.refused(self.pipe, str(error)) from error
        if steps and self.recorder.cursor < len(steps):
            raise recorder.refused(
                self.pipe, f"it calls scheduler.step {self.recorder.cursor} times for {len(steps)} timesteps"
            )
        return result[0]

    def leave_out_guidance(self, steps: Sequence[int]) -> None:
        """Find out what `guided=False` is; steps: those that will be guided, for the message.

        Raises:
            UserError: where guidance is no second prediction.
        """

        def rows(changed: dict[str, Any]) -> list[int]:
            self.unguided, found = changed, []
            for step in (0, len(self.timesteps) - 1):  # of pipelines with two experts, one each
                with guiding.counting(adapters.denoisers(self.pipe).values()) as seen:
                    self.run([PROBE], None, (step,), lambda step, prediction, latent: latent, guided=False)
                found.append(sum(seen))
            return found

        with torch.no_grad(), self.accepting(PROBE):
            self.unguided = guiding.switch(self.pipe, steps, rows)

    @contextmanager
    def guided_by(self, scale: float) -> Iterator[None]:
        """Guidance of another scale for the length of the context."""
        own = self.arguments
        self.arguments = {**own, "guidance_scale": scale}
        try:
            yield
        finally:
            self.arguments = own

    def start(
        self, text: list[str], generators: list[torch.Generator], changed: dict[str, Any] | None = None
    ) -> Tensor:
        """The pipeline's own initial latents."""
        # Not what the call returns: some pipelines unpack their latents before they hand them out.
        with self.accepting("these prompts"):  # arguments that fit the first, short text may not fit others
            self.run(text, None, (), None, generators=generators, changed=changed)
        assert self._prepared is not None
        return self._prepared

    @contextmanager
    def accepting(self, what: str) -> Iterator[None]:
        """Say of what a pipeline does not take that it is the user's to mend."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            if out_of_memory(error):
                raise
            why = calls.refusal(self.pipe, what, self.arguments, error, self._own_class)
            raise UserError(f"sampler.pipeline_args: {why}") from error

    def _check_contract(self) -> None:
        """Refuse a pipeline whose call went past what the seam replaced."""
        if self._prepared is None:
            raise recorder.refused(self.pipe, "its call does not use its prepare_latents")
        if not hasattr(self.recorder, "full_timesteps"):
            raise recorder.refused(self.pipe, "its call does not set its scheduler's timesteps")

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Everything that is replaced, for the length of a call."""
        pipe = self.pipe
        pipe.scheduler = self.recorder
        pipe.prepare_latents = self._prepare_latents
        pipe.__class__ = self._quick_class
        if self.encodings is not None:
            pipe.encode_prompt = self.encodings
        try:
            yield
        finally:
            pipe.__class__ = self._own_class
            pipe.scheduler = self._own_scheduler
            for name in ("prepare_latents", "encode_prompt"):
                pipe.__dict__.pop(name, None)
            self.recorder.on_step = recorder._unexpected
            self._latent = None

    def _prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        if self._latent is None:
            output = self._prepare(*args, **kwargs)
            self._prepared = recorder.first(output)
            return output
        # A start that is swapped out takes as long to draw as one that is used: it is drawn once for each form.
        given = [*args, *kwargs.items()]
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(given)):
            return recorder.swap_first(self._prepare(*args, **kwargs), self._latent)
        name = repr([item for item in given if "Generator" not in repr(item)])
        if name not in self._forms:
            output = self._prepare(*args, **kwargs)
            first = recorder.first(output)
            form = first.new_empty(1).expand(first.shape)  # no memory
            self._forms[name] = recorder.swap_first(output, form)
        return recorder.swap_first(self._forms[name], self._latent)
