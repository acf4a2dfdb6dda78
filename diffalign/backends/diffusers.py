"""Any diffusers pipeline as a policy, through the scheduler seam. Nothing here names a model family."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as rerun

from diffalign.backends import recorder
from diffalign.backends.chain import ChainPolicy
from diffalign.backends.walk import OnStep
from diffalign.errors import UserError, shortened, shown
from diffalign.models import lora as adapters
from diffalign.models.checkpointing import by_blocks
from diffalign.models.encodings import TextEncoders
from diffalign.processes import Process
from diffalign.runtime.memory import out_of_memory
from diffalign.types import Media, Prompts, Rollout


class DiffusersPolicy(ChainPolicy):
    """A pipeline with LoRA, run through its own `__call__`.

    Args:
        pipe: the pipeline; its scheduler is replaced by a recording one, see `plain`.
        steps, guidance_scale, call: arguments of the pipeline's `__call__`; guidance_scale None: the pipeline's own.
        sigmas: "pipeline" for the scheduler's own noise levels, "linear" for evenly spaced ones.
        parameters: what is trained, from `adapters.attach`; empty to sample only.
        checkpoint: what runs again for the gradient: "blocks" of networks, "spans" (whole calls), "both", or "none".
        stretches: first steps of the stretches that prompts with stages tell apart.
    """

    def __init__(
        self,
        pipe: Any,
        process: Process,
        *,
        steps: int,
        noise_level: float = 0.0,
        guidance_scale: float | None = 1.0,
        sigmas: recorder.Sigmas = "pipeline",
        call: dict[str, Any] | None = None,
        micro_batch: int = 8,
        parameters: dict[str, Tensor] | None = None,
        checkpoint: str = "none",
        stretches: Sequence[int] = (0,),
    ) -> None:
        if problems := recorder.unfit(pipe):
            raise recorder.refused(pipe, "; ".join(problems))
        self.pipe = pipe
        self.parameters = parameters or {}
        guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        self.arguments = {**(call or {}), "num_inference_steps": steps, **guidance}
        # Undecorated: `__call__` runs under no_grad, what it wraps does not.
        self._call = inspect.unwrap(type(pipe).__call__)
        calls = (self._call, type(pipe.scheduler).set_timesteps)
        if sigmas == "linear" and not all("sigmas" in inspect.signature(call).parameters for call in calls):
            # Trained so, its adapter could not be sampled so by a plain call.
            raise UserError(
                f"sampler.sigmas: got 'linear', this {type(pipe).__name__} cannot be told its levels; allowed is pipeline"
            )
        self._own_scheduler = pipe.scheduler
        self._recorder = recorder.stand_in(pipe.scheduler, process.kind, sigmas)
        self._latent: Tensor | None = None
        self._prepared: Tensor | None = None
        self._prepare = pipe.prepare_latents
        self.texts = TextEncoders(pipe, self._empty_run)
        with torch.no_grad(), self._accepting("a"):  # the pipeline sets its timesteps as it would to sample
            self._empty_run("a")
        self._check_contract()
        timestep = self._recorder.full_timesteps.double().cpu().numpy()
        levels = recorder.levels(self._recorder, process.kind)
        with torch.no_grad(), self._accepting("a"):  # a size that the network has no positions for is found out now
            self._run(["a"], None, (0,), lambda step, prediction, latent: latent, None, "latent")
        super().__init__(timestep, levels, process, noise_level, micro_batch, stretches)
        blocks, spans = checkpoint in ("blocks", "both"), checkpoint in ("spans", "both")
        self.remarks: list[str] = []
        for name, module in adapters.denoisers(pipe).items():
            able = blocks and by_blocks(module)
            if blocks and not able:
                self.remarks.append(
                    f"memory.checkpoint: the {name} cannot run block by block, its calls run again whole"
                )
            module.forward = self._counted(module.forward, spans or (blocks and not able))
        self._lora_layers = adapters.layers(pipe)
        self._checkpoint_decoder = spans or (blocks and not by_blocks(getattr(pipe, "vae", None)))

    def _counted(self, forward: Callable[..., Any], checkpointing: bool) -> Callable[..., Any]:
        """A network's forward that counts its rows, those that checkpointing runs again included."""

        def run(args: tuple[Any, ...], kwargs: dict[str, Any], again: bool = False) -> Any:
            self.count(len(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))), again)
            return forward(*args, **kwargs)

        @functools.wraps(forward)  # pipelines and peft look at the signature
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not (checkpointing and torch.is_grad_enabled()):
                return run(args, kwargs)
            again = itertools.chain([False], itertools.repeat(True))
            return rerun(lambda *a, **k: run(a, k, next(again)), *args, use_reentrant=False, **kwargs)

        return counted

    # -- the seam

    def _run(
        self,
        text: list[str],
        x: Tensor | None,
        steps: Sequence[int],
        on_step: OnStep | None,
        generators: list[torch.Generator] | None,
        output: str,
        forced: Tensor | None = None,
    ) -> Any:
        """The pipeline's own `__call__` over some steps, from latents x where given."""
        self._recorder.steps, self._recorder.forced = list(steps), forced
        self._recorder.on_step = on_step or recorder._unexpected
        self._latent = x
        if generators is None:
            # prepare_latents draws a start that is swapped out; it must not touch the global generator.
            generators = [torch.Generator().manual_seed(0) for _ in text]
        with self._hooks():
            # A copy: some pipelines write their chat template into the list.
            try:
                result = self._call(
                    self.pipe, prompt=list(text), generator=generators, output_type=output, **self.arguments
                )
            except recorder.ContractError as error:
                raise recorder.refused(self.pipe, str(error)) from error
        if steps and self._recorder.cursor < len(steps):
            raise recorder.refused(
                self.pipe, f"it calls scheduler.step {self._recorder.cursor} times for {len(steps)} timesteps"
            )
        return result[0]

    def _check_contract(self) -> None:
        """Refuse a pipeline whose call went past what the seam replaced."""
        if self._prepared is None:
            raise recorder.refused(self.pipe, "its call does not use its prepare_latents")
        if not hasattr(self._recorder, "full_timesteps"):
            raise recorder.refused(self.pipe, "its call does not set its scheduler's timesteps")

    def _empty_run(self, text: str) -> None:
        """The pipeline's `__call__` without a step."""
        self._run([text], None, (), None, [torch.Generator().manual_seed(0)], "latent")

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Recording scheduler, latents swapped in `prepare_latents`, prompts encoded once; all undone afterwards."""
        self.pipe.scheduler = self._recorder
        self.pipe.prepare_latents = self._prepare_latents
        if self.texts.encodings is not None:
            self.pipe.encode_prompt = self.texts.encodings
        try:
            yield
        finally:
            self.pipe.scheduler = self._own_scheduler
            for name in ("prepare_latents", "encode_prompt"):
                self.pipe.__dict__.pop(name, None)
            self._recorder.on_step = recorder._unexpected
            self._latent = None

    def _prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        output = self._prepare(*args, **kwargs)
        self._prepared = recorder.first(output)
        return output if self._latent is None else recorder.swap_first(output, self._latent)

    @contextmanager
    def _accepting(self, what: str) -> Iterator[None]:
        """Say of what a pipeline does not take that it is the user's to mend."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            if out_of_memory(error):
                raise
            given = shown({key: value for key, value in self.arguments.items() if key != "sigmas"})
            why = f"{type(self.pipe).__name__} does not accept {what} with {given}: {shortened(str(error), 200)}"
            raise UserError(f"sampler.pipeline_args: {why}") from error

    # -- what a chain needs

    def start(self, prompts: Prompts, seeds: Sequence[int]) -> Tensor:
        """The pipeline's own initial latents: image k is what `generator=torch.Generator().manual_seed(seeds[k])` gives."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # Not what the call returns: some pipelines unpack their latents before they hand them out.
        with self._accepting("these prompts"):  # arguments that fit the first, short text may not fit others
            self._run(prompts.text, None, (), None, generators, "latent")
        assert self._prepared is not None
        return self._prepared

    def drive(self, prompts: Prompts, x: Tensor, steps: Sequence[int], on_step: OnStep) -> None:
        self._run(prompts.text, x, steps, on_step, None, "latent")

    def predict(self, part: Rollout, x: Tensor, time: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def keep(_: int, prediction: Tensor, latent: Tensor) -> Tensor:
            seen.append(prediction)
            return latent

        # Timesteps of shape (1, N) reach the network as one timestep per sample.
        scale = self._recorder.config.num_train_timesteps
        forced = (time.float() * scale).expand(len(x))[None] if time.unique().numel() > 1 else time[:1].float() * scale
        prompts = part.prompts.select(part.tree.leaf_root)
        self._run(prompts.text, x, (0,), keep, None, "latent", forced=forced)
        return seen[0]

    def pixels(self, prompts: Prompts, x: Tensor) -> Media:
        def decode(latent: Tensor) -> Tensor:
            return self._run(prompts.text, latent, (), None, None, "pt")

        wanted = self._checkpoint_decoder and torch.is_grad_enabled() and x.requires_grad
        decoded = rerun(decode, x, use_reentrant=False) if wanted else decode(x)
        frames = decoded[:, None] if decoded.ndim == 4 else decoded
        return Media(frames.float())

    @contextmanager
    def reference(self) -> Iterator[None]:
        with adapters.disabled(self._lora_layers):
            yield
