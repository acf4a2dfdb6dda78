"""The adapter a run leaves behind: weights, metadata, a model card with the curve; reloaded and compared."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffalign
from diffalign import config as configs
from diffalign.config import Config
from diffalign.evaluation.results import Summary
from diffalign.models import lora as adapters
from diffalign.models import lora_files
from diffalign.models.notes import DDIM, Notes
from diffalign.processes import PROCESSES, linear_sigmas
from diffalign.runs.folder import RunFolder
from diffalign.runs.parts import Parts
from diffalign.runtime import keys, yaml_text
from diffalign.runtime.files import HUB_ID

CARD = """---
{facts}---
# {rule} on {model}

LoRA rank {rank}, alpha {alpha:g}, trained by diffalign {version} for {updates} updates to raise {rewards}, seed {seed}.
{history}
{best}{table}

![curves](curves.png)

```python
import numpy as np, torch
from diffusers import DiffusionPipeline{scheduler}
{imports}
pipe = DiffusionPipeline.from_pretrained({folder}){where}
{setup}pipe.load_lora_weights(".")  # this folder
image = pipe({prompt!r}, {arguments}generator=torch.Generator().manual_seed(0)).images[0]
```

The resolved config is in `config.yaml`.
"""

PATH = re.compile(r"(?:[~.]?/[^\s/'\"]+)*/([^\s/'\"]+)")  # of which the last part is told
BEST = "Chosen as the best of this run's evaluations, so its numbers below are a little too good.\n\n"
SETUP = "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)  # as in training\n"


def _is_ddim(config: Config) -> bool:
    return PROCESSES[config.sampler.process].kind == "ddpm"


def call_arguments(config: Config) -> dict[str, object]:
    """Arguments of the pipeline's call that give what training and evaluation saw."""
    sampler = config.sampler
    arguments: dict[str, object] = {
        "num_inference_steps": sampler.steps,
        **({} if sampler.guidance_scale is None else {"guidance_scale": sampler.guidance_scale}),
        **sampler.pipeline_args,
    }
    if sampler.sigmas == "linear":
        arguments["sigmas"] = linear_sigmas(sampler.steps)
    return arguments


def notes(config: Config, parts: Parts, update: int) -> Notes:
    """What an adapter's files say of the run after `update` updates."""
    place = parts.place
    return Notes(
        base_model=config.model,
        base_revision=place.commit or "",
        base_weights=config.weights or "",
        base_weights_digest=place.digest,
        denoisers=[type(module).__name__ for module in adapters.denoisers(parts.pipe).values()],
        rule=config.rule,
        rewards=config.rewards,
        seed=config.seed,
        updates=update,
        precision=config.precision,
        quantize=config.memory.quantize,
        diffalign_version=diffalign.__version__,
        call=call_arguments(config),
        scheduler=DDIM if _is_ddim(config) else "",
    )


def write_adapter(
    config: Config,
    parts: Parts,
    run: RunFolder,
    summary: Summary,
    name: str,
    update: int,
    history: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write the adapter as a folder of a run and check that it loads back as it was trained; each file is whole or as it was before.

    Raises:
        Fault: if the saved file differs from the trained weights.
    """
    folder, aside = run / name, run / f".{name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    lora_files.save(parts.pipe, aside, notes(config, parts, update).written())
    lora_files.verify(parts.pipe, aside)
    shutil.copy(run / "config.yaml", aside / "config.yaml")
    (aside / "README.md").write_text(_card(config, summary, name, update, history), encoding="utf-8")
    folder.mkdir(exist_ok=True)
    for path in sorted(aside.iterdir()):
        path.replace(folder / path.name)
    aside.rmdir()
    return folder


def _card(config: Config, summary: Summary, name: str, update: int, history: Sequence[dict[str, Any]]) -> str:
    """The model card; paths of this machine are no use to others, and stay out of it."""
    lines = ["| evaluation | after, 95 % interval | paired gain, 95 % interval |", "|---|---|---|"]
    for reward, judged in summary.rewards.items():
        gain = "-" if judged.gain is None else judged.gain.text("+.3f")
        lines.append(f"| {_escaped(keys.evaluated(public(reward)))} | {judged.value.text()} | {gain} |")
    arguments = "".join(f"{key}={value!r}, " for key, value in call_arguments(config).items() if key != "sigmas")
    if config.sampler.sigmas == "linear":
        steps = config.sampler.steps
        arguments += f"sigmas=np.linspace(1, 0, {steps + 1})[:-1], "
    rule, ddim = config.rule["name"], _is_ddim(config)
    return CARD.format(
        **_base(config.model, rule),
        rule=rule,
        model=_escaped(public(config.model)),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        version=diffalign.__version__,
        updates=update,
        best=BEST if name == "best" else "",
        setup=SETUP if ddim else "",
        scheduler=f", {DDIM}" if ddim else "",
        rewards=_escaped(
            json.dumps({public(reward): weight for reward, weight in config.rewards.items()}, ensure_ascii=False)
        ),
        seed=config.seed,
        history=_changes(history),
        table="\n".join(lines) if len(lines) > 2 else "No evaluation was made.",
        prompt=config.book.evaluation[0]["prompt"],
        arguments=arguments,
    )


def _base(model: str, rule: str) -> dict[str, str]:
    """How the base model is named and loaded: an embedded one by its name, one of the hub by its id, a folder by what it was called."""
    from diffalign.shapes import models

    facts: dict[str, Any] = {"library_name": "diffusers", "tags": ["lora", "diffalign", rule]}
    if models.path(model):
        loaded = {"imports": "from diffalign.shapes import models\n", "folder": f"models.path({model!r})", "where": ""}
    elif HUB_ID.fullmatch(model) and not Path(model).exists():
        facts = {"base_model": model, **facts}
        loaded = {"imports": "", "folder": repr(model), "where": ""}
    else:
        loaded = {"imports": "", "folder": repr(public(model)), "where": "  # where you have it"}
    return {"facts": yaml_text.dump(facts), **loaded}


def public(name: str) -> str:
    """A name that says nothing of this machine: of a path its last part."""
    if "://" in name or (HUB_ID.fullmatch(name) and not Path(name).exists()):
        return name
    before, at, place = name.rpartition("@")
    path, colon, attribute = place.rpartition(":") if ".py:" in place else (place, "", "")
    return f"{before}{at}{Path(path).name or path}{colon}{attribute}"


def _escaped(text: str) -> str:
    """A text in Markdown, as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|$~])", r"\\\1", " ".join(text.split()))


def _changes(history: Sequence[dict[str, Any]]) -> str:
    """What was changed on the way."""
    told = [
        (entry["update"], PATH.sub(r"\1", line))
        for entry in history
        for line in entry["changes"]
        if line.startswith("content of ") or configs.mark(line.partition(":")[0]) != "free"
    ]
    lines = [f"- after update {update}: {_escaped(line)}" for update, line in told]
    return "\n".join(["", "Changed on the way:", "", *lines, ""]) if lines else ""
