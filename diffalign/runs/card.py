"""The adapter a run leaves behind: weights, metadata, a model card with the curve; reloaded and compared."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import diffalign
from diffalign import config as configs
from diffalign.config import Config
from diffalign.evaluation.results import Summary
from diffalign.models import lora as adapters
from diffalign.models import lora_files
from diffalign.models.calls import films
from diffalign.models.file_notes import public
from diffalign.models.notes import DDIM, Notes
from diffalign.processes import PROCESSES, linear_sigmas
from diffalign.runs.folder import RunFolder
from diffalign.runs.parts import Parts
from diffalign.runtime import keys, yaml_text
from diffalign.runtime.files import HUB_ID

CARD = """---
{facts}---
# {rule} on {model}

LoRA rank {rank}, alpha {alpha:g}, trained by diffalign {version} for {updates} updates {aim}, seed {seed}.
{under}{guided}{history}
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
UNDER = "\nTrained on top of {}, which was part of the base: load and fuse that first.\n"
GUIDED = (
    "\nTrained and evaluated with guidance on steps [{}, {}) alone (`sampler.guidance_steps`). The plain call below guides at every step "
    "and gives other pictures; `diffalign sample` gives those of training.\n"
)
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
        frozen=[{"place": a.place, "strength": a.strength, "digest": a.digest} for a in parts.frozen],
        start="" if parts.start is None else parts.start.place,
        guidance_steps=list(config.sampler.guidance_steps or ()),
        fps=config.sampler.fps or 0.0,
    )


def write_adapter(
    config: Config,
    parts: Parts,
    run: RunFolder,
    summary: Summary,
    name: str,
    update: int,
    history: Sequence[dict[str, Any]] = (),
    gallery: Sequence[tuple[str, NDArray[np.uint8]]] = (),
) -> Path:
    """Write the adapter as a folder of a run and check that it loads back as it was trained; each file is whole or as it was before.
    gallery: captions and pictures (H, W, 3) for its page.

    Raises:
        Fault: if the saved file differs from the trained weights.
    """
    folder, aside = run / name, run / f".{name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    lora_files.save(parts.pipe, aside, notes(config, parts, update).written())
    lora_files.verify(parts.pipe, aside)
    shutil.copy(run / "config.yaml", aside / "config.yaml")
    shots = _gallery(aside, gallery)
    page = _card(config, summary, name, update, history, {**facts(config, parts.pipe, summary), **shots})
    (aside / "README.md").write_text(page, encoding="utf-8")
    folder.mkdir(exist_ok=True)
    if (aside / "images").is_dir():
        shutil.rmtree(folder / "images", ignore_errors=True)
    for path in sorted(aside.iterdir()):
        path.replace(folder / path.name)
    aside.rmdir()
    return folder


def _gallery(folder: Path, gallery: Sequence[tuple[str, NDArray[np.uint8]]]) -> dict[str, Any]:
    """Pictures for a page, and how the hub is told of them."""
    if not gallery:
        return {}
    (folder / "images").mkdir()
    for number, (_, image) in enumerate(gallery):
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
    return {"widget": [{"text": text, "output": {"url": f"images/{k}.png"}} for k, (text, _) in enumerate(gallery)]}


def facts(config: Config, pipe: Any, summary: Summary) -> dict[str, Any]:
    """What the hub is told of an adapter, see its model cards; results have one number each, so intervals are in their names."""
    from huggingface_hub import EvalResult, ModelCardData

    from diffalign.shapes import models

    task = "text-to-video" if films(pipe) else "text-to-image"
    known = bool(models.path(config.model)) or bool(HUB_ID.fullmatch(config.model) and not Path(config.model).exists())
    results = [
        EvalResult(
            task_type=task,
            dataset_type="prompts",
            dataset_name=config.book.extent.strip(","),
            metric_type=public(name),
            metric_value=round(judged.value.value, 4),
            metric_name=f"{public(name)}: {judged.value.text()}"
            + (f", paired gain {judged.gain.text('+.3f')}" if judged.gain is not None else ""),
        )
        for name, judged in summary.rewards.items()
    ]
    data = ModelCardData(
        base_model=config.model if known else None,
        library_name="diffusers",
        pipeline_tag=task,
        tags=[task, "lora", "diffusers", "template:sd-lora", "diffalign", config.rule["name"]],
        model_name=f"{config.rule['name']} on {public(config.model)}" if results else None,
        eval_results=results or None,
    )
    return data.to_dict() | ({"base_model_relation": "adapter"} if known else {})


def _card(
    config: Config, summary: Summary, name: str, update: int, history: Sequence[dict[str, Any]], told: dict[str, Any]
) -> str:
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
        facts=yaml_text.dump(told),
        under=UNDER.format(", ".join(f"`{public(text)}`" for text in config.lora.frozen)) if config.lora.frozen else "",
        guided=GUIDED.format(*config.sampler.guidance_steps) if config.sampler.guidance_steps is not None else "",
        **_base(config.model),
        rule=rule,
        model=_escaped(public(config.model)),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        version=diffalign.__version__,
        updates=update,
        best=BEST if name == "best" else "",
        setup=SETUP if ddim else "",
        scheduler=f", {DDIM}" if ddim else "",
        aim=_aim(config),
        seed=config.seed,
        history=_changes(history),
        table="\n".join(lines) if len(lines) > 2 else "No evaluation was made.",
        prompt=config.book.evaluation[0]["prompt"],
        arguments=arguments,
    )


def _aim(config: Config) -> str:
    """What it was trained for: its rewards with their weights, or the tags of prompts that its teachers taught."""
    if config.rewards:
        weights = {public(reward): weight for reward, weight in config.rewards.items()}
        return f"to raise {_escaped(json.dumps(weights, ensure_ascii=False))}"
    return f"to predict as its teachers do, of prompts with tag {_escaped(', '.join(config.rule['teachers']))}"


def _base(model: str) -> dict[str, str]:
    """How the base model is named and loaded: an embedded one by its name, one of the hub by its id, a folder by what it was called."""
    from diffalign.shapes import models

    if models.path(model):
        return {"imports": "from diffalign.shapes import models\n", "folder": f"models.path({model!r})", "where": ""}
    if HUB_ID.fullmatch(model) and not Path(model).exists():
        return {"imports": "", "folder": repr(model), "where": ""}
    return {"imports": "", "folder": repr(public(model)), "where": "  # where you have it"}


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
