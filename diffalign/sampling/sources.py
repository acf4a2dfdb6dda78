"""What to sample from: a run, adapters or a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.errors import UserError, shown
from diffalign.models import families
from diffalign.models.calls import FIXED, GIVEN
from diffalign.models.notes import DDIM, Notes, choices, lora_folder
from diffalign.models.places import Adapter, given
from diffalign.processes import linear_sigmas
from diffalign.runtime.files import HUB_ID, fingerprint, home, is_file
from diffalign.runtime.precision import QUANTIZE
from diffalign.runtime.yaml_text import parse
from diffalign.sampling import adapters

GUIDED = "guidance_steps"  # beside a call's arguments: the first step with guidance and one past the last


def _not_free(key: str) -> str:
    """Why an argument cannot be set; empty if it can."""
    if key in GIVEN:
        return f"given with {GIVEN[key][1]}"
    return "given with --negative" if key == "negative_prompt" else "not free here" if key in FIXED else ""


@dataclass(frozen=True)
class Source:
    """What to sample from: a model, adapters on it, the call's arguments, with `guidance_steps` where guidance is not on all, whether they
    were trained walking DDIM, the model's commit on the hub, None for the newest, the single file of its denoiser, None for its own, and
    what it is loaded in.

    trained_on: how the bases of its adapters were quantised, where something is known of that; frozen: adapters that are part of the base;
    negative: one for what guidance leads away from; mix: whether adapters act at once, by their weights, or `predictions` are mixed.
    fps: frames per second of its videos, None where nobody says it.
    """

    model: str
    adapters: tuple[Adapter, ...]
    call: dict[str, Any]
    ddim: bool = False
    revision: str | None = None
    weights: str | None = None
    precision: str = "float32"
    quantize: str = "none"
    trained_on: tuple[str, ...] = ()
    frozen: tuple[Adapter, ...] = ()
    fps: float | None = None
    negative: Adapter | None = None
    mix: str = "weights"

    @property
    def told(self) -> str:
        """Its adapters, in words."""
        each = ", ".join(f"{a.folder} at {a.strength:g}" for a in self.adapters) or "none"
        mixed = ", mixed by predictions" if self.mix == "predictions" else ""
        return (
            each
            + mixed
            + ("" if self.negative is None else f"; led away from {self.negative.folder} at {self.negative.strength:g}")
        )

    @property
    def remark(self) -> str:
        """What the user should know of the pictures; empty if nothing."""
        under = ", ".join(f"{a}:{a.strength:g}" for a in self.frozen)
        on = f"on top of {under}, as it was trained" if under else ""
        others = sorted(set(self.trained_on) - {self.quantize, ""})
        if not others:
            return on
        told = {kind: f"an {kind} base" for kind in QUANTIZE} | {"none": "a base that is not quantised"}
        were = " and ".join(told[kind] for kind in others)
        differ = f"an adapter was trained on {were}, here it is on {told[self.quantize]}: pictures differ as the two do"
        return f"{on}; {differ}" if on else differ


def resolve(
    target: str, strength: float = 1.0, more: Sequence[str] = (), negative: str | None = None, mix: str = "weights"
) -> Source:
    """A run folder, a folder with a LoRA written by `train`, or a model; `more` adapters as FOLDER or FOLDER:STRENGTH, and one for what
    guidance leads away from.

    Raises:
        UserError: if there is nothing of that kind, or an adapter belongs to another model.
    """
    source = _target(home(target), strength)
    others = [given(text) for text in more]
    away = None if negative is None else given(negative, "--negative-adapter")
    for adapter in (*others, *(() if away is None else (away,))):
        notes = adapters.notes(adapter)
        base = notes.base_model or source.model
        if base != source.model:
            key = "--negative-adapter" if adapter is away else "--adapter"
            raise UserError(f"{key}: {adapter} belongs to {base}, the pictures come from {source.model}")
        under = [each for each in adapters.frozen(adapter.folder, notes) if each not in source.frozen]
        source = replace(source, trained_on=(*source.trained_on, notes.quantize), frozen=(*source.frozen, *under))
    return replace(source, adapters=(*source.adapters, *others), negative=away, mix=mix)


def with_options(
    source: Source, options: Sequence[str], precision: str | None = None, quantize: str | None = None
) -> Source:
    """The source with further arguments of the pipeline's call, KEY=VALUE with YAML values, in another precision, quantised otherwise.

    Raises:
        UserError: for anything else.
    """
    free: dict[str, Any] = {}
    for option in options:
        key, sign, text = option.partition("=")
        if not sign or not key.isidentifier():
            raise UserError(f"--set: got {shown(option)}, allowed is KEY=VALUE, such as height=512")
        if why := _not_free(key):
            raise UserError(f"--set: got {shown(option)}, {key} is {why}")
        free[key] = parse(text, f"--set: got {shown(option)}, its value")
    return replace(
        source,
        call={**source.call, **free},
        precision=precision or source.precision,
        quantize=quantize or source.quantize,
    )


def _target(target: str, strength: float) -> Source:
    from diffalign.shapes import models

    path = Path(target)
    if folder := lora_folder(path):
        notes = adapters.notes(Adapter(folder))
        if not notes.base_model:
            raise UserError(
                f"sample: {folder} does not say its base model; give the model, and this folder with --adapter"
            )
        adapter = Adapter(folder, strength)
        _check_weights(folder, notes)
        return Source(
            notes.base_model,
            (adapter,),
            {**notes.call, **({GUIDED: notes.guidance_steps} if notes.guidance_steps else {})},
            notes.scheduler == DDIM,
            notes.base_revision or None,
            notes.base_weights or None,
            notes.precision or "float32",
            notes.quantize or "none",
            (notes.quantize,),
            adapters.frozen(folder, notes),
            notes.fps or families.fps(notes.base_model),
        )
    if is_file(path / "config.yaml"):
        raise UserError(f"sample: the run {target} has no adapter yet; it has its first at a checkpoint")
    run, at, _ = target.rpartition("@")
    if at and is_file(Path(run) / "config.yaml"):
        raise UserError(f"sample: got {shown(target)}, allowed are {choices(Path(run))}")
    if strength != 1:
        raise UserError(
            f"--strength: got {strength:g}, {target} has no adapter of its own; use --adapter FOLDER:STRENGTH"
        )
    if models.path(target) or is_file(path / "model_index.json"):
        return Source(target, (), models.call(target), fps=families.fps(target))
    if (
        not HUB_ID.fullmatch(target) or path.exists() or path.parent.is_dir()
    ):  # a mistyped folder beside others is no hub id
        known = ", ".join(models.names())
        raise UserError(
            f"sample: got {shown(target)}, which is no run, adapter, model folder or hub id; embedded are {known}"
        )
    return Source(target, (), {}, fps=families.fps(target))


def _check_weights(folder: Path, notes: Notes) -> None:
    """The single file an adapter was trained on, still there and the same."""
    place = notes.base_weights
    if not place:
        return
    if not is_file(Path(place)):
        raise UserError(f"sample: {folder} was trained on {place}, which is not there; restore the file")
    if notes.base_weights_digest not in ("", fingerprint(Path(place))):
        raise UserError(f"sample: {folder} was trained on {place}, which is another file now; restore it")


def call_of(source: Source, steps: int | None, guidance: float | None, negative: str | None) -> dict[str, Any]:
    """The arguments of a source's call with those that the user changed.

    Raises:
        UserError: for a negative prompt where it has no effect.
    """
    call = dict(source.call)
    if guidance is not None:
        call["guidance_scale"] = guidance
    if steps is not None:
        call["num_inference_steps"] = steps
        if "sigmas" in call:
            call["sigmas"] = linear_sigmas(steps)
    if negative is not None:
        if call.get("guidance_scale", 2) <= 1:
            raise UserError(
                f"--negative: no effect at guidance {call['guidance_scale']:g}; allowed with --guidance above 1"
            )
        call["negative_prompt"] = negative
    return call


def check(source: Source) -> str:
    """The device that a source is drawn on.

    Raises:
        UserError: if its model cannot be quantised so there.
    """
    import torch

    from diffalign.models import quantizing

    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantizing.check(source.quantize, device, "--quantize")
    return device


def pipeline(source: Source) -> Any:
    """The pipeline of a source with its adapters, on the GPU where there is one.

    Raises:
        UserError: if the model or an adapter does not load.
    """
    import torch

    from diffalign.backends import recorder
    from diffalign.models import loading, merging

    device, dtype = check(source), getattr(torch, source.precision)
    pipe, _ = loading.load(source.model, dtype, device, source.revision, source.weights, source.quantize)
    if source.ddim:
        pipe.scheduler = recorder.as_ddim(pipe.scheduler)
    try:
        merging.merge(pipe, source.frozen)
    except ValueError as error:
        raise UserError(f"sample: {error}") from error
    adapters.put(pipe, (*source.adapters, *(() if source.negative is None else (source.negative,))), source.model)
    return pipe


def check_negative(pipe: Any, call: dict[str, Any]) -> None:
    """Refuse a negative prompt that a pipeline takes no notice of.

    Raises:
        UserError: where guidance is the network's own (FLUX), and the pipeline's other one is not asked for.
    """
    if "negative_prompt" not in call:
        return
    parameters = inspect.signature(type(pipe).__call__).parameters
    name = type(pipe).__name__
    if "negative_prompt" not in parameters:
        raise UserError(f"--negative: {name} takes none")
    true = parameters.get("true_cfg_scale")
    if true is not None and call.get("true_cfg_scale", true.default) <= 1:
        raise UserError(
            f"--negative: no effect, {name}'s guidance is the network's own; allowed with --set true_cfg_scale=2, which takes twice as long"
        )
