"""How a model is sampled in training unless a config says otherwise: by its family, or what its own files say. Needs no torch.

`families.yaml` is the table; what is in it and why stands at its head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from diffalign.errors import UserError, one_line
from diffalign.models import few_steps
from diffalign.runtime.files import is_file
from diffalign.runtime.yaml_text import parse
from diffalign.shapes import models

INDEX = "model_index.json"
STEPS = 10  # of a model that no family says it of


@dataclass(frozen=True)
class Usual:
    """How a model is sampled in training. source: what says so, in words; guidance_scale None: the pipeline's own default; family: its name
    in the table, empty if it has none; distilled: what says that it was distilled to few steps, in words, empty if nothing does;
    noise_level None: what is usual for its process."""

    source: str
    process: str
    steps: int = STEPS
    guidance_scale: float | None = None
    pipeline_args: dict[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    family: str = ""
    distilled: str = ""
    noise_level: float | None = None


@cache
def table() -> dict[str, dict[str, Any]]:
    """The families, by the name of their presets."""
    path = Path(__file__).parent / "families.yaml"
    return dict(parse(path.read_text(encoding="utf-8"), str(path)))


def usual(model: str, revision: str | None = None) -> Usual:
    """How an embedded pipeline, a folder, or a model on the hub is sampled; of one that no family has, its index and scheduler are read,
    from the hub's cache or the hub if they are not here.

    Raises:
        UserError: if they cannot be had or say nothing of the kind.
    """
    if (own := models.path(model)) is not None:
        process = "flow_sde" if _flows(_config(own, "scheduler")) else "ddim"
        steps = models.call(model).get("num_inference_steps", STEPS)
        return Usual("an embedded pipeline", process, steps, guidance_scale=1.0, distilled=distilled(model))
    listed = next((name for name, facts in table().items() if facts["model"] == model), None)
    if listed is not None:
        return _of_family(listed, distilled(model))
    folder = Path(model) if is_file(Path(model) / INDEX) else _fetched(model, revision)
    sign = distilled(model, folder)
    alike = [name for name, facts in table().items() if _is(folder, facts)]
    if alike:
        name = min(alike, key=lambda name: bool(distilled(table()[name]["model"])) != bool(sign))
        few = sign and not distilled(table()[name]["model"])
        family = _of_family(name, sign)
        return replace(family, steps=few_steps.USUAL) if few else family
    scheduler = _config(folder, "scheduler")
    if not scheduler:
        raise UserError(f"sampler.process: missing, and {model} has no scheduler's config that would say it")
    found = Usual("its scheduler's config", "flow_sde" if _flows(scheduler) else "ddim", distilled=sign)
    return replace(found, steps=few_steps.USUAL, guidance_scale=few_steps.GUIDANCE) if sign else found


def distilled(model: str, folder: Path | None = None) -> str:
    """What says of a model that it was distilled to few steps, in words: its name, or its files where they are here; empty if nothing
    does. Fetches nothing."""
    place = folder or models.path(model) or Path(model)
    return few_steps.by_name(model) or few_steps.by_files(_read(place / INDEX), _config(place, "scheduler"))


def fps(model: str) -> float | None:
    """Frames per second of a family's videos; None of other models, and of one on the hub that the table does not list by name."""
    folder = Path(model)
    for facts in table().values():
        if facts["model"] == model or (is_file(folder / INDEX) and _is(folder, facts)):
            return facts.get("fps")
    return None


def _of_family(name: str, sign: str) -> Usual:
    facts = table()[name]
    return Usual(
        f"the family {name}",
        facts["process"],
        facts["steps"],
        facts["guidance"],
        dict(facts["call"]),
        "bfloat16",
        name,
        sign,
        facts.get("noise"),
    )


def _is(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether a folder's pipeline is of a family's class and has the facts that tell it from others of that class."""
    if _read(folder / INDEX).get("_class_name") != facts["class"]:
        return False
    for place, value in facts.get("when", {}).items():
        component, _, key = place.partition(".")
        held = _read(folder / INDEX) if component == "model_index" else _config(folder, component)
        found = held.get(key)
        if isinstance(found, list) and component == "model_index":  # [library, class]
            found = found[1]
        if found != value:
            return False
    return True


def _flows(scheduler: dict[str, Any]) -> bool:
    """Whether a scheduler's noise levels are a rectified flow's."""
    named = str(scheduler.get("_class_name", "")).startswith("FlowMatch")
    return named or bool(scheduler.get("use_flow_sigmas")) or scheduler.get("prediction_type") == "flow_prediction"


def _config(folder: Path, component: str) -> dict[str, Any]:
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    return _read(folder / component / name)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's mapping, empty where there is none: what is wrong with a model is said when it is loaded."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _fetched(model: str, revision: str | None) -> Path:
    """A folder of the hub's cache with a model's configs, a few kilobytes.

    Raises:
        UserError: if they are not there and cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    files = [INDEX, "scheduler/*.json", "unet/config.json", "transformer/config.json"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=files))
    except Exception as error:  # each of hub, cache and connection has its own
        keys = "sampler.process, steps, guidance_scale, pipeline_args and precision"
        raise UserError(
            f"sampler: what suits {model!r} is not known here and its configs cannot be fetched ({one_line(error)}); name {keys}"
        ) from error
