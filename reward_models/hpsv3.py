"""HPSv3 (arXiv 2508.03789): a Qwen2-VL-7B and a head, trained whole on what people preferred.

The package `hpsv3` needs transformers 4.45.2; this is its formula on today's, read from its wheel. The question that it asks is its
authors' text: `diffalign rewards fetch hpsv3` takes it from there.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from diffalign.rewards import templates
from diffalign.rewards.base import Reward
from diffalign.types import Media, Prompts
from reward_models import _clip, _qwen_files, _qwen_vl
from reward_models._qwen_pixels import resized
from reward_models._qwen_text import Words

REWARDS = {
    "hpsv3": {
        "object": "HPSv3",
        "differentiable": True,
        "modality": "image",
        "about": "human preference, version 3: mu of a language model that sees the picture; differences are log-odds",
        "range": "unbounded, usually 0 to 13",
        "memory": 14.4,
        "kept": 1.0,
        "narrow": True,
        "weights": "MizzenAI/HPSv3 and Qwen/Qwen2-VL-7B-Instruct",
        "licence": "Apache-2.0",
        "family": "HPD",
        "ordered": True,
        "template": {
            "file": "hpsv3/dataset/data_collator_qwen.py",
            "names": ["INSTRUCTION", "prompt_with_special_token"],
            "sha256": "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c",
            "package": "hpsv3",
        },
    }
}
NAME, REPO, BASE, FILE = "hpsv3", "MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct", "HPSv3.safetensors"
SPECIAL = ("<|Reward|>",)
TOKENS = 256  # that a picture is made into, as nearly as its sides allow: 448 x 448 pixels
WIDTHS = (1024, 16, 2)  # of the head's layers; the two numbers are mu and the logarithm of sigma


class HPSv3(_qwen_vl.QwenVL, Reward):
    """Scores (N,), mu, with gradient to the pixels.

    PLACE is a folder with `HPSv3.safetensors` and, in `Qwen2-VL-7B-Instruct`, the base's small files: config, tokenizer, chat template,
    preprocessor; its weights are not needed.
    """

    def __init__(self, place: str | None = None, quantize: str = "none") -> None:
        source = _qwen_files.base(NAME, place, BASE)
        words = Words(NAME, source, templates.of(NAME, place), SPECIAL, "image")
        path = _clip.fetched(NAME, None if place is None else str(Path(place) / FILE), REPO, FILE)
        body, top = _qwen_files.renamed(_qwen_files.read(path))
        net = _qwen_files.network(source, body, words.rows, quantize)
        head = _qwen_vl.filled(_head(net.config.text_config.hidden_size), top)
        super().__init__(net, head, words, _qwen_vl.form(NAME, source), quantize)

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        return self.score(_clip.wide(media.pixels), prompts.text)[:, 0]

    def score(self, pixels: Tensor, texts: list[str]) -> Tensor:
        """mu and log sigma (N, 2) of pixels (N, 1, 3, H, W) in [0, 1]."""
        size = TOKENS * self.form.factor**2
        return self.read(self.states(resized(pixels, size, size, self.form.factor), texts)[:, 0])


def _head(width: int) -> nn.Module:
    """Under the names of the authors' layers; what stands at 2 there acts in their training alone."""
    a, b, c = WIDTHS
    layers = (nn.Linear(width, a), nn.ReLU(), nn.Identity(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c))
    return nn.Sequential(*layers)
