"""The adapter a run leaves behind: weights, metadata, a model card with the curve; reloaded and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffalign
from diffalign.config import Config
from diffalign.evaluation.results import Summary
from diffalign.models import lora as adapters
from diffalign.models import lora_files
from diffalign.models.notes import DDIM, Notes
from diffalign.processes import PROCESSES, linear_sigmas
from diffalign.runs.folder import RunFolder
from diffalign.runs.parts import Parts
from diffalign.runtime import keys

CARD = """---
base_model: {model}
library_name: diffusers
tags: [lora, diffalign, {rule}]
---
# {rule} on {model}

LoRA rank {rank}, alpha {alpha:g}, trained by diffalign {version} for {updates} updates to raise {rewards}, seed {seed}.

{best}{table}

![curves](curves.png)

```python
import numpy as np, torch
from diffusers import DiffusionPipeline{scheduler}

pipe = DiffusionPipeline.from_pretrained({folder!r})
{setup}pipe.load_lora_weights({adapter!r})
image = pipe({prompt!r}, {arguments}generator=torch.Generator().manual_seed(0)).images[0]
```

The resolved config is in `config.yaml`.
"""

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
        diffalign_version=diffalign.__version__,
        call=call_arguments(config),
        scheduler=DDIM if _is_ddim(config) else "",
    )


def write_adapter(config: Config, parts: Parts, run: RunFolder, summary: Summary, name: str, update: int) -> Path:
    """Write the adapter as a folder of a run and check that it loads back as it was trained; each file is whole or as it was before.

    Raises:
        Fault: if the saved file differs from the trained weights.
    """
    folder, aside = run / name, run / f".{name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    lora_files.save(parts.pipe, aside, notes(config, parts, update).written())
    lora_files.verify(parts.pipe, aside)
    for file in ("curves.png", "config.yaml"):
        shutil.copy(run / file, aside / file)
    (aside / "README.md").write_text(_card(config, summary, folder, update), encoding="utf-8")
    folder.mkdir(exist_ok=True)
    for path in sorted(aside.iterdir()):
        path.replace(folder / path.name)
    aside.rmdir()
    return folder


def _card(config: Config, summary: Summary, folder: Path, update: int) -> str:
    from diffalign.shapes import models

    lines = ["| evaluation | after, 95 % interval | paired gain, 95 % interval |", "|---|---|---|"]
    for name, judged in summary.rewards.items():
        gain = "-" if judged.gain is None else judged.gain.text("+.3f")
        lines.append(f"| {keys.evaluated(name)} | {judged.value.text()} | {gain} |")
    arguments = "".join(f"{key}={value!r}, " for key, value in call_arguments(config).items() if key != "sigmas")
    if config.sampler.sigmas == "linear":
        steps = config.sampler.steps
        arguments += f"sigmas=np.linspace(1, 0, {steps + 1})[:-1], "
    return CARD.format(
        model=config.model,
        folder=str(models.path(config.model) or config.model),
        adapter=str(folder),
        rule=config.rule["name"],
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        version=diffalign.__version__,
        updates=update,
        best=BEST if folder.name == "best" else "",
        setup=SETUP if _is_ddim(config) else "",
        scheduler=f", {DDIM}" if _is_ddim(config) else "",
        rewards=json.dumps(config.rewards),
        seed=config.seed,
        table="\n".join(lines) if len(lines) > 2 else "No evaluation was made.",
        prompt=config.book.evaluation[0]["prompt"],
        arguments=arguments,
    )
