"""Any diffusers pipeline as a policy, through the scheduler seam. Nothing here names a model family."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as rerun

from diffalign.backends import first_latent, recorder
from diffalign.backends.chain import ChainPolicy
from diffalign.backends.guiding import rows_of
from diffalign.backends.seam import Seam
from diffalign.backends.walk import OnStep
from diffalign.models import caching
from diffalign.models import lora as adapters
from diffalign.models.caching import Cache
from diffalign.models.checkpointing import by_blocks
from diffalign.models.encoders import PROBE
from diffalign.models.encodings import Kept
from diffalign.models.graphs import Graphs
from diffalign.models.recordings import Tools
from diffalign.processes import Process
from diffalign.protocols import BASE
from diffalign.types import Media, Prompts, Rollout


def call_arguments(steps: int, guidance_scale: float | None, call: dict[str, Any] | None) -> dict[str, Any]:
    """What a pipeline's call is given in every run of it."""
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    return {**(call or {}), "num_inference_steps": steps, **guidance}


class DiffusersPolicy(ChainPolicy):
    """A pipeline with LoRA, run through its own `__call__`.

    Args:
        pipe: the pipeline; its scheduler is replaced by a recording one, see `plain`.
        steps, guidance_scale, call: arguments of the pipeline's `__call__`; guidance_scale None: the pipeline's own.
        sigmas: "pipeline" for the scheduler's own noise levels, "linear" for evenly spaced ones.
        parameters: what is trained, from `adapters.attach`; empty to sample only.
        checkpoint: what runs again for the gradient: "blocks" of networks, "spans" (whole calls), "both", or "none".
        stretches: first steps of the stretches that prompts with stages tell apart.
        kept: where texts' encodings are, for a pipeline without its text encoders.
        recorder: what records the networks' calls, see `models.graphs`; None: they run one kernel at a time.
        lossy: whether a replay may differ from a rollout in its last bits: compiled blocks.
        cache: of features, for rollouts within `cached`; None: there is none.
        fps: frames per second of its videos, None: not known.
        guidance_steps: the first step with guidance and one past the last, None: all.
        one_latent: whether only the first latent of a video is decoded, unless all of it is asked for.
        frozen: peft's names of adapters that `weights` takes, by their names there.

    Raises:
        UserError: for a pipeline that cannot be called so, or not with such a cache, or whose first frame needs other latents too.
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
        kept: Kept | None = None,
        recorder: Tools | None = None,
        lossy: bool = False,
        cache: Cache | None = None,
        fps: float | None = None,
        guidance_steps: Sequence[int] | None = None,
        one_latent: bool = False,
        frozen: dict[str, str] | None = None,
    ) -> None:
        arguments = call_arguments(steps, guidance_scale, call)
        self.seam = seam = Seam(pipe, process.kind, sigmas, arguments, kept)
        self.pipe, self.arguments, self.fps = pipe, arguments, fps
        self.parameters, self.adapters = parameters or {}, frozen or {}
        if guidance_steps is not None:
            seam.leave_out_guidance(guidance_steps)
        self.one_latent = one_latent
        if one_latent:
            first_latent.check(seam)
        self.scale = seam.recorder.config.num_train_timesteps
        super().__init__(
            seam.timesteps, seam.levels, process, noise_level, micro_batch, stretches, guidance_steps, self.scale
        )
        blocks, spans = checkpoint in ("blocks", "both"), checkpoint in ("spans", "both")
        self.lossy = lossy
        self.remarks: list[str] = []
        self.notify: Callable[[str], None] = self.remarks.append
        self._lora_layers = adapters.layers(pipe)
        self.graphs: list[Graphs] = []
        self.cache, self._caching = cache, False
        if cache is not None:
            caching.try_out(adapters.denoisers(pipe), self._two_steps)
        for name, module in adapters.denoisers(pipe).items():
            able = blocks and by_blocks(module)
            if blocks and not able:
                self.remarks.append(
                    f"memory.checkpoint: the {name} cannot run block by block, its calls run again whole"
                )
            whole = spans or (blocks and not able)
            network: Callable[..., Any] = self._recorded(name, module, recorder, not whole)
            # Pipelines and peft look at the signature.
            module.forward = functools.wraps(module.forward)(self._counted(network, whole))
        self._checkpoint_decoder = spans or (blocks and not by_blocks(getattr(pipe, "vae", None)))

    def _recorded(self, name: str, module: Any, tools: Tools | None, trains: bool) -> Callable[..., Any]:
        """A network's forward as recordings. trains: calls with gradient too; what runs again whole has no use for them."""
        forward: Callable[..., Any] = module.forward
        if tools is None:
            return forward
        own = [p for key, p in self.parameters.items() if key.startswith(name + ".")]
        graphs = Graphs(name, module, forward, own, self._adapters, lambda line: self.notify(line), trains, tools)
        self.graphs.append(graphs)
        return graphs

    def _adapters(self) -> Any:
        """Which adapters act, as far as that changes: it is the same for all layers."""
        return tuple((x.disable_adapters, tuple(x.active_adapters)) for x in self._lora_layers[:1])

    def forget(self) -> bool:
        """Give back the memory of recorded calls, and record no more; whether there were any."""
        held = sum(graphs.recorded for graphs in self.graphs)
        for graphs in self.graphs:
            graphs.forget()
        return bool(held)

    def _counted(self, forward: Callable[..., Any], checkpointing: bool) -> Callable[..., Any]:
        """A network's forward that counts its rows, those that checkpointing runs again included."""

        def run(args: tuple[Any, ...], kwargs: dict[str, Any], again: bool = False) -> Any:
            self.count(rows_of(args, kwargs), again)
            return forward(*args, **kwargs)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not (checkpointing and torch.is_grad_enabled()):
                return run(args, kwargs)
            again = itertools.chain([False], itertools.repeat(True))
            return rerun(lambda *a, **k: run(a, k, next(again)), *args, use_reentrant=False, **kwargs)

        return counted

    # -- features kept between steps

    @contextmanager
    def cached(self) -> Iterator[None]:
        self._caching = self.cache is not None
        try:
            yield
        finally:
            self._caching = False

    @contextmanager
    def _features_kept(self) -> Iterator[None]:
        """An empty cache for the length of a trajectory, if it is to have one; what runs is then decided by values, and not recorded."""
        if self.cache is None or not self._caching:
            yield
            return
        recording = [graphs for graphs in self.graphs if graphs.on]
        for graphs in recording:
            graphs.on = False
        try:
            with self.cache.on(adapters.denoisers(self.pipe).values()):
                yield
        finally:
            self.parts_called, self.parts_run = self.cache.called, self.cache.run
            for graphs in recording:
                graphs.on = True

    def _two_steps(self) -> None:
        with torch.no_grad():
            self.seam.run([PROBE], None, (0, 1), lambda step, prediction, latent: latent)

    # -- what a chain needs

    def start(self, prompts: Prompts, seeds: Sequence[int]) -> Tensor:
        """The pipeline's own initial latents: image k is what `generator=torch.Generator().manual_seed(seeds[k])` gives."""
        return self.seam.start(prompts.text, [torch.Generator().manual_seed(seed) for seed in seeds])

    def drive(self, prompts: Prompts, x: Tensor, steps: Sequence[int], on_step: OnStep) -> None:
        with self._features_kept():
            self.seam.run(prompts.text, x, steps, on_step, guided=self.guided(steps[0]))

    def predict(self, part: Rollout, x: Tensor, time: Tensor) -> Tensor:
        prompts = part.prompts.select(part.tree.leaf_root)

        def run(rows: Tensor | None, guided: bool) -> Tensor:
            if rows is None:
                return self._predict(prompts.text, x, time, guided)
            return self._predict(prompts.select(rows.tolist()).text, x[rows], time[rows], guided)

        return self.guided.apart(time, run)

    def _predict(self, text: list[str], x: Tensor, time: Tensor, guided: bool) -> Tensor:
        seen: list[Tensor] = []

        def keep(_: int, prediction: Tensor, latent: Tensor) -> Tensor:
            seen.append(prediction)
            return latent

        # Timesteps of shape (1, N) reach the network as one timestep per sample.
        times = time.float() * self.scale
        forced = times.expand(len(x))[None] if time.unique().numel() > 1 else times[:1]
        self.seam.run(text, x, (0,), keep, forced=forced, guided=guided)
        return seen[0]

    def pixels(self, prompts: Prompts, x: Tensor, whole: bool = True) -> Media:
        def decode(latent: Tensor) -> Tensor:
            if self.one_latent and not whole:
                return first_latent.decode(self.seam, prompts.text, latent)
            return self.seam.run(prompts.text, latent, (), None, output="pt")

        wanted = self._checkpoint_decoder and torch.is_grad_enabled() and x.requires_grad
        decoded = rerun(decode, x, use_reentrant=False) if wanted else decode(x)
        frames = decoded[:, None] if decoded.ndim == 4 else decoded
        return Media(frames.float(), self.fps)

    @contextmanager
    def weights(self, name: str, guidance: float | None = None) -> Iterator[None]:
        layers = self._lora_layers
        acting = adapters.disabled(layers) if name == BASE else adapters.acting(layers, [self.adapters[name]])
        with acting, nullcontext() if guidance is None else self.seam.guided_by(guidance):
            yield
