"""VideoReward (VideoAlign, arXiv 2501.13918): a Qwen2-VL-2B with LoRA that gives a video three marks, each at a token of its own.

Its authors' code needs transformers 4.45.2; this is its formula on today's, read from theirs. Frames are taken by time, so a run says how
many a second are (`sampler.fps`). The question is their text: `diffalign rewards fetch videoreward` takes it from a checkout of theirs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.rewards import templates
from diffalign.rewards.base import Judge
from diffalign.types import Media, Prompts
from reward_models import _clip, _qwen_files, _qwen_vl
from reward_models._qwen_pixels import moments, resized
from reward_models._qwen_text import Words, settings

REWARDS = {
    "videoreward": {
        "object": "VideoReward",
        "differentiable": True,
        "modality": "video",
        "about": "VideoAlign's overall mark: visual quality + motion quality + text alignment",
        "range": "about -9 to 9",
        "memory": 4.1,
        "kept": 0.4,
        "narrow": True,
        "timed": True,
        "column": "sum",
        "weights": "KwaiVGI/VideoReward and Qwen/Qwen2-VL-2B-Instruct",
        "licence": "Apache-2.0",
        "family": "VideoAlign",
        "template": {
            "file": "prompt_template.py",
            "names": ["DETAILED_PROMPT_WITH_SPECIAL_TOKEN"],
            "sha256": "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700",
        },
    },
    "videoreward_vq": {
        "object": "VideoReward",
        "differentiable": True,
        "modality": "video",
        "about": "VideoAlign's visual quality: each frame by itself",
        "range": "about -3 to 3",
        "memory": 4.1,
        "kept": 0.4,
        "narrow": True,
        "timed": True,
        "column": "VQ",
        "weights": "KwaiVGI/VideoReward and Qwen/Qwen2-VL-2B-Instruct",
        "licence": "Apache-2.0",
        "family": "VideoAlign",
    },
    "videoreward_mq": {
        "object": "VideoReward",
        "differentiable": True,
        "modality": "video",
        "about": "VideoAlign's motion quality: steady, natural, and enough of it",
        "range": "about -3 to 3",
        "memory": 4.1,
        "kept": 0.4,
        "narrow": True,
        "timed": True,
        "column": "MQ",
        "weights": "KwaiVGI/VideoReward and Qwen/Qwen2-VL-2B-Instruct",
        "licence": "Apache-2.0",
        "family": "VideoAlign",
    },
    "videoreward_ta": {
        "object": "VideoReward",
        "differentiable": True,
        "modality": "video",
        "about": "VideoAlign's text alignment: what is shown, how it moves, and the camera",
        "range": "about -3 to 3",
        "memory": 4.1,
        "kept": 0.4,
        "narrow": True,
        "timed": True,
        "column": "TA",
        "weights": "KwaiVGI/VideoReward and Qwen/Qwen2-VL-2B-Instruct",
        "licence": "Apache-2.0",
        "family": "VideoAlign",
    },
}
NAME, REPO, BASE = "videoreward", "KwaiVGI/VideoReward", "Qwen/Qwen2-VL-2B-Instruct"
CONFIG, STEP, WHOLE = "model_config.json", "checkpoint-11352", "model.pth"
ADAPTER, OTHERS = "adapter_model.safetensors", "non_lora_state_dict.pth"
MARKS = ("VQ", "MQ", "TA")
SPECIAL = tuple(f"<|{mark}_reward|>" for mark in MARKS)
LEAST = 128  # tokens that a frame is made into; the most is the checkpoint's own


class VideoReward(_qwen_vl.QwenVL, Judge):
    """Marks (N, 4), VQ, MQ and TA in units of the authors' data and their sum, with gradient to the pixels.

    PLACE is a folder with `model_config.json`, one `checkpoint-N` and, in `Qwen2-VL-2B-Instruct`, the base's small files. The checkpoint is
    whole (`model.pth`), or an adapter with what was trained beside it; then the base's weights are needed too.
    """

    columns = (*MARKS, "sum")

    def __init__(self, place: str | None = None, quantize: str = "none") -> None:
        source = _qwen_files.base(NAME, place, BASE)
        words = Words(NAME, source, templates.of(NAME, place), SPECIAL, "video")
        said = settings(NAME, REPO if place is None else place, CONFIG)
        body, top = _qwen_files.renamed(_weights(place, source, _scale(said)))
        net = _qwen_files.network(source, body, words.rows, quantize)
        width, rows = net.config.text_config.hidden_size, len(top.get("weight", ()))
        if rows not in (1, len(MARKS)):
            raise ValueError(f"the head has {rows} rows, allowed are 1 and {len(MARKS)}")
        head = _qwen_vl.filled(nn.Linear(width, rows, bias=False), top)
        super().__init__(net, head, words, _qwen_vl.form(NAME, source), quantize)
        self.most = int(_said(said, "data_config", "max_frame_pixels"))
        units = [
            [float(_said(said, "inference_config", f"{mark}_{part}")) for mark in MARKS] for part in ("mean", "std")
        ]
        self.mean, self.std = (torch.tensor(values) for values in units)

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        if not media.fps:
            raise ValueError(f"got videos of {media.fps} frames a second, allowed are numbers above 0: sampler.fps")
        pixels = media.pixels
        seen = pixels[:, moments(pixels.shape[1], media.fps).to(pixels.device)]
        factor = self.form.factor
        marks = self.marks(resized(_clip.wide(seen), LEAST * factor**2, self.most, factor), prompts.text)
        marks = (marks - self.mean.to(marks)) / self.std.to(marks)
        return torch.cat([marks, marks.sum(1, keepdim=True)], dim=1)

    def marks(self, pixels: Tensor, texts: list[str]) -> Tensor:
        """Raw marks (N, 3) of frames (N, F, 3, H, W) as they are shown."""
        answers = self.read(self.states(pixels, texts))
        # Of a head with a row for each mark, row k at token k.
        return answers.diagonal(dim1=1, dim2=2) if answers.shape[2] > 1 else answers[..., 0]


def _said(settings: dict[str, Any], section: str, key: str) -> Any:
    try:
        return settings[section][key]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{CONFIG} lacks {section}.{key}") from error


def _scale(said: dict[str, Any]) -> float:
    """What the checkpoint's LoRA is multiplied by."""
    rank, alpha = (float(_said(said, "peft_lora_config", f"lora_{key}")) for key in ("r", "alpha"))
    return alpha / math.sqrt(rank) if said["peft_lora_config"].get("use_rslora") else alpha / rank


def _weights(place: str | None, source: str, scale: float) -> _qwen_files.Weights:
    """All weights under their first names, with the LoRA merged in."""
    if place is None:
        fetched = _clip.fetched(NAME, None, REPO, f"{STEP}/{WHOLE}")
        return _qwen_files.merged(_qwen_files.unwrapped(_qwen_files.read(fetched)), scale)
    steps = sorted(Path(place).glob("checkpoint-*"))
    if len(steps) != 1:
        found = ", ".join(step.name for step in steps) or "none"
        raise ValueError(f"{place} holds {found}, allowed is one checkpoint-N")
    if (whole := steps[0] / WHOLE).is_file():
        return _qwen_files.merged(_qwen_files.unwrapped(_qwen_files.read(whole)), scale)
    if not Path(source).is_dir():
        raise FileNotFoundError(
            f"{steps[0]} is an adapter: {place}/{BASE.rpartition('/')[2]} with the base's weights is needed"
        )
    parts = [_qwen_files.read(path) for path in sorted(Path(source).glob("*.safetensors"))]
    parts += [_qwen_files.unwrapped(_qwen_files.read(steps[0] / file)) for file in (ADAPTER, OTHERS)]
    return _qwen_files.merged({key: value for part in parts for key, value in part.items()}, scale)
