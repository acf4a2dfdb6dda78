"""What stands in an adapter's folder: its files, and the notes in them. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffalign.errors import one_line, shown
from diffalign.models.calls import FIXED, GIVEN
from diffalign.runtime import json_text, numbered, signed
from diffalign.runtime.files import is_file
from diffalign.runtime.precision import PRECISIONS, QUANTIZE

LORA = "pytorch_lora_weights.safetensors"  # diffusers' name for an adapter's file
PEFT_FILE = "adapter_model.safetensors"  # peft's
PEFT_CONFIG = "adapter_config.json"  # beside that, with its strengths
DDIM = "DDIMScheduler"  # in an adapter's notes: it was trained walking DDIM
FORMAT = 7  # of the notes; a change of what they mean needs a new number. 1: without a number
PLAIN_FORMAT = 3  # where nothing stands in them that readers of 3 do not know
_SINCE = {
    "fps": 7,
    "guidance_steps": 6,
    "start": 5,
    "frozen": 4,
}  # notes that are left out where they are empty, and the first format that has them
# Of peft's settings: those that say what the numbers mean. Others must be at what does nothing.
# fmt: off
_SETTINGS = {
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "lora_dropout",
    "fan_in_fan_out", "init_lora_weights", "inference_mode", "peft_type", "task_type", "peft_version", "exclude_modules", "modules_to_save",
    "base_model_name_or_path", "revision", "layers_pattern", "layers_to_transform",
}
# fmt: on
_NEUTRAL = {"megatron_core": "megatron.core", "qalora_group_size": 16}


@dataclass(frozen=True)
class Notes:
    """Where an adapter comes from and how it is called; empty where a file says nothing of that.

    base_model, base_revision, base_weights, base_weights_digest: what it was trained on: a name, a commit of the hub, a single file and
    its fingerprint; denoisers: their classes; updates: how many it was trained for; call: arguments of the pipeline's call that give what
    training saw; quantize: how the base was quantised in training; scheduler: `DDIM` if it was walked;
    frozen: adapters that were part of the base, each with place, strength and digest; start: the place, with its commit on the hub, of
    what it began with; guidance_steps: the first step with guidance and one past the last, empty: all;
    fps: frames per second of its videos, 0: not known.
    """

    base_model: str = ""
    base_revision: str = ""
    base_weights: str = ""
    base_weights_digest: str = ""
    denoisers: list[str] = field(default_factory=list)
    rule: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    updates: int = 0
    precision: str = ""
    quantize: str = ""
    diffalign_version: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: str = ""
    frozen: list[dict[str, Any]] = field(default_factory=list)
    start: str = ""
    guidance_steps: list[int] = field(default_factory=list)
    fps: float = 0.0

    def written(self) -> dict[str, str]:
        """As metadata of a safetensors file: strings."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        strings = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in values.items()}
        there = [name for name in _SINCE if getattr(self, name)]
        strings = {k: v for k, v in strings.items() if k not in _SINCE or k in there}
        return strings | {"notes_format": str(max((_SINCE[name] for name in there), default=PLAIN_FORMAT))}

    @classmethod
    def of(cls, metadata: dict[str, str]) -> Notes:
        """From a file's metadata; other tools' have none of these keys.

        Raises:
            ValueError: if they are not what `written` makes, or of a later format.
        """
        if (written := metadata.get("notes_format", "1")) not in map(str, range(1, FORMAT + 1)):
            raise ValueError(f"its notes have format {written}, this version reads up to {FORMAT}")
        kinds = {f.name: type(getattr(cls(), f.name)) for f in fields(cls)}
        values: dict[str, Any] = {}
        for name, kind in kinds.items():
            if name in metadata:
                try:
                    values[name] = metadata[name] if kind is str else json_text.parse(metadata[name])
                except ValueError as error:
                    raise ValueError(f"its note {name} is {error}") from error
                if not isinstance(values[name], kind):
                    raise ValueError(f"its note {name} is {shown(metadata[name])}, expected a {kind.__name__}")
        _check_frozen(values.get("frozen", []))
        _check_numbers(values.get("guidance_steps", []), values.get("fps", 0.0))
        if "\0" in "".join(value for value in values.values() if isinstance(value, str)):
            raise ValueError("its notes have a NUL")
        known = {*GIVEN, "negative_prompt"} - {"prompt", "generator"}
        for key in values.get("call", {}):
            if not key.isidentifier() or key in FIXED or (key in GIVEN and key not in known):
                raise ValueError(f"its note call has {shown(key)}, which is not free")
        for name, allowed in (("precision", PRECISIONS), ("quantize", QUANTIZE)):
            if values.get(name, "") not in ("", *allowed):
                raise ValueError(f"its note {name} is {shown(values[name])}, allowed are {', '.join(allowed)}")
        return cls(**values)

    @classmethod
    def read(cls, folder: Path) -> Notes:
        """Of an adapter's folder.

        Raises:
            ValueError: if its file is damaged, or its notes are.
        """
        if is_file(folder / signed.SUMS) and not signed.intact(folder):
            raise ValueError(f"{folder} is a damaged checkpoint")
        try:
            return cls.of(metadata(folder / LORA))
        except ValueError as error:
            raise ValueError(f"{folder} holds a damaged adapter: {error}") from error


def _check_numbers(steps: list[Any], fps: float) -> None:
    if steps and not (len(steps) == 2 and all(type(step) is int for step in steps) and 0 <= steps[0] <= steps[1]):
        raise ValueError(f"its note guidance_steps is {shown(steps)}, expected the first step and one past the last")
    if not 0 <= fps <= 1000:
        raise ValueError(f"its note fps is {fps}, expected frames per second, up to 1,000")


def _check_frozen(specs: list[Any]) -> None:
    for spec in specs:
        whole = isinstance(spec, dict) and {"place", "digest", "strength"} <= spec.keys()
        if not whole or not (isinstance(spec["place"], str) and isinstance(spec["digest"], str)):
            raise ValueError(f"its note frozen has {shown(spec)}, expected place, digest and strength")
        if type(spec["strength"]) not in (int, float):
            raise ValueError(f"its note frozen has strength {shown(spec['strength'])}, expected a number")


def metadata(path: Path) -> dict[str, str]:
    """A safetensors file's metadata.

    Raises:
        ValueError: if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(one_line(error)) from error


def lora_settings(notes: dict[str, str]) -> dict[str, Any]:
    """What a file's metadata wants peft to be told, by `component.key`.

    Raises:
        ValueError: if it is no object.
    """
    try:
        settings = json_text.parse(notes["lora_adapter_metadata"])
        if not isinstance(settings, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ValueError(f"its lora_adapter_metadata is {error}") from error
    return settings


def check_settings(notes: dict[str, str]) -> None:
    """Look at what a file wants peft to be told: numbers and names, and nothing that it would import or run.

    Raises:
        ValueError: for anything else.
    """
    if "lora_adapter_metadata" not in notes:
        return
    for key, value in lora_settings(notes).items():
        name = key.rpartition(".")[2]
        if name not in _SETTINGS and value not in (None, False, {}, []):
            if name in _NEUTRAL and value == _NEUTRAL[name]:
                continue
            raise ValueError(f"its lora_adapter_metadata has {shown(key)} {shown(value)}, which is not for here")
        if name in ("r", "lora_alpha") and (type(value) not in (int, float) or not 0 < value < 1e6):
            raise ValueError(f"its lora_adapter_metadata has {name} {shown(value)}, expected a number above 0")
        if name in ("rank_pattern", "alpha_pattern") and not (
            isinstance(value, dict) and all(type(v) in (int, float) and 0 < v < 1e6 for v in value.values())
        ):
            raise ValueError(f"its lora_adapter_metadata has {name} {shown(value)}, expected numbers by layer")


def lora_folder(place: str | Path) -> Path | None:
    """The folder with a LoRA that a place stands for; None if there is none.

    A run stands for the newest of its adapter and its checkpoints, RUN@130 for the checkpoint after 130 updates, RUN@best for the best
    evaluated one; an adapter's folder, and its file, for themselves.
    """
    given = Path(place)
    if _has(given):
        return given
    if given.name == LORA and is_file(given):
        return given.parent
    run, at, which = str(place).rpartition("@")
    if at and not given.exists():
        inside = {"best": Path(run, "best")}.get(which) or numbered.folders(Path(run, "checkpoints")).get(_count(which))
        return inside if inside is not None and _has(inside) else None
    saved = [folder for folder in reversed(numbered.folders(given / "checkpoints").values()) if _has(folder)]
    return max((folder for folder in (given / "adapter", *saved[:1]) if _has(folder)), key=_updates, default=None)


def foreign(place: str | Path) -> Path | None:
    """The file of another tool's LoRA that a place stands for: a .safetensors file, or peft's folder; None if there is none."""
    path = Path(place)
    if path.suffix == ".safetensors" and is_file(path):
        return path
    return path / PEFT_FILE if is_file(path / PEFT_FILE) else None


def _has(folder: Path) -> bool:
    return is_file(folder / LORA)


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else -1


def _updates(folder: Path) -> float:
    try:
        return Notes.read(folder).updates
    except ValueError:
        return float("inf")  # who opens it says what is wrong


def choices(run: Path) -> str:
    """What a run's places to sample from are, for messages."""
    saved = [str(update) for update, folder in numbered.folders(run / "checkpoints").items() if _has(folder)]
    best = ["best"] if _has(run / "best") else []
    return ", ".join(f"{run}@{which}" for which in (*saved, *best)) or "nothing yet"


def files_of(folder: Path) -> list[Path]:
    """An adapter's files: one, or one for each of two experts."""
    stem = LORA.removesuffix(".safetensors")
    return sorted(path for path in folder.glob(f"{stem}*.safetensors") if path.name[len(stem)] == ".")
