"""Names for the content of what a run is begun with: a run that is taken up with other content is another run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from diffalign.models.loading import Place
from diffalign.rewards import content
from diffalign.rewards.scorer import Scorer
from diffalign.runs.parts import Parts
from diffalign.runtime.files import fingerprint


def of(parts: Parts, prompts: str, held_out: str) -> dict[str, str]:
    """What it is -> digest; `prompts` is that of all prompts and stages that are used, `held_out` that of all that might be evaluated."""
    found = {
        "prompts": prompts,
        "held-out prompts": held_out,
        "weights": parts.place.digest,
        "model": model(parts.place),
        **{f"lora.frozen {k}": adapter.digest for k, adapter in enumerate(parts.frozen)},
        **{f"rule.teachers {name}": adapter.digest for name, adapter in parts.beside.items()},
    }
    for scorer in (parts.scorer, parts.judges):
        found |= _rewards(scorer)
    return found


def _rewards(scorer: Scorer) -> dict[str, str]:
    """Of the user's files behind each reward that has some."""
    return {f"rewards.{name}": content.digest(reward.files) for name, reward in scorer.rewards.items() if reward.files}


def model(place: Place) -> str:
    """Of a model's folder: the hub's commit, or the size and ends of every file that pipelines are loaded from."""
    if place.commit is not None:
        return place.commit
    folder, hashed = Path(place.folder), hashlib.sha256()
    kinds = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
    found = {path for kind in kinds for path in folder.rglob(kind) if path.is_file()}
    # Of the folder itself the index alone: what else lies there is not loaded.
    for path in sorted(path for path in found if path.parent != folder or path.name == "model_index.json"):
        hashed.update(f"{path.relative_to(folder).as_posix()} {fingerprint(path)}\n".encode())
    return hashed.hexdigest()
