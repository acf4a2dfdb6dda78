"""ImageReward v1.0 (arXiv 2304.05977): BLIP's text encoder looks at the picture, a small head turns its first token into a score.

The package `image-reward` does not import beside today's transformers; this is its formula on BLIP's parts of transformers, read from its
file. Prompts longer than 35 tokens are cut, as there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.types import Media, Prompts
from reward_models import _clip

REWARDS = {
    "imagereward": {
        "object": "ImageReward",
        "differentiable": True,
        "modality": "image",
        "about": "human preference of ImageReward's raters, standardised",
        "family": "ImageReward",
        "range": "about -2 to 2, mean 0 over its own data",
        "weights": "zai-org/ImageReward and google-bert/bert-base-uncased",
        "licence": "Apache-2.0",
        "memory": 1.8,
        "ordered": True,
    }
}
REPO, FILE = "zai-org/ImageReward", "ImageReward.pt"
WORDS, VOCABULARY = "google-bert/bert-base-uncased", "vocab.txt"
LENGTH = 35  # tokens of a prompt
MEAN, STD = 0.16717, 1.03334  # of the authors' data: score = (r - mean) / std
HEAD = 64  # numbers of an attention head, in BERT and in the ViT alike
ADDED = 2  # tokens that BLIP adds to BERT's vocabulary
# BLIP's own names of the picture's side -> those of transformers
NAMES = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("blocks.", "encoder.layers."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.", ".self_attn."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
Weights = dict[str, Tensor]


class ImageReward(Reward):
    """Scores (N,) with gradient to the pixels. PLACE is a folder with `ImageReward.pt` and BERT's `vocab.txt`."""

    def __init__(self, place: str | None = None) -> None:
        own = {file: None if place is None else str(Path(place) / file) for file in (FILE, VOCABULARY)}
        path = _clip.fetched("imagereward", own[FILE], REPO, FILE)
        words = Path(_clip.fetched("imagereward", own[VOCABULARY], WORDS, VOCABULARY))
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            self.picture, self.text = _vision(_part(weights, "blip.visual_encoder.")), _text(weights)
            self.head = _clip.head(weights, "mlp.")
        except Exception as error:  # torch's own message advises to run whatever the file holds
            raise ValueError(f"{path} is not {FILE}: it lacks BLIP's weights or its head's") from error
        self.tokens = _tokenizer(words, self.text.config.vocab_size - ADDED)
        self.size: int = self.picture.config.image_size

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        return self.score(media.pixels[:, 0].float(), prompts.text)

    def score(self, pixels: Tensor, texts: list[str]) -> Tensor:
        """Scores (N,) of pixels (N, 3, H, W) in [0, 1]."""
        device = pixels.device
        seen = self.picture.to(device)(_clip.normalised(_clip.crop(pixels, self.size))).last_hidden_state
        encoded = self.tokens(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        x = self.text.to(device)(
            encoded["input_ids"].to(device), encoded["attention_mask"].to(device), encoder_hidden_states=seen
        ).last_hidden_state[:, 0]
        return (_clip.through(self.head, x) - MEAN) / STD

    def networks(self) -> list[torch.nn.Module]:
        """What may be moved between uses."""
        return [self.picture, self.text]

    def checkpoint(self) -> None:
        """Keep only the inputs of layers for the gradient."""
        _clip.checkpointed([*self.picture.encoder.layers, *self.text.encoder.layer])


def _part(weights: Weights, prefix: str) -> Weights:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _depth(weights: Weights, pattern: str) -> int:
    return 1 + max(int(found.group(1)) for key in weights if (found := re.match(pattern, key)))


def _vision(weights: Weights) -> Any:
    """BLIP's ViT, as large as its weights say."""
    from transformers import BlipVisionConfig, BlipVisionModel

    patches, width = weights["pos_embed"].shape[1:]
    patch = weights["patch_embed.proj.weight"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_depth(weights, r"blocks\.(\d+)\."),
        num_attention_heads=width // HEAD,
        patch_size=patch,
        image_size=patch * round((patches - 1) ** 0.5),
        layer_norm_eps=1e-6,
    )
    renamed = {}
    for key, value in weights.items():
        for theirs, ours in NAMES:
            key = key.replace(theirs, ours)
        renamed[f"post_layernorm.{key.removeprefix('norm.')}" if key.startswith("norm.") else key] = value
    return _filled(BlipVisionModel(config), renamed)


def _text(weights: Weights) -> Any:
    """BLIP's BERT with attention to the picture, as large as its weights say."""
    from transformers import BlipTextConfig, BlipTextModel

    own = _part(weights, "blip.text_encoder.")
    vocabulary, width = own["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=own["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=own["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_depth(own, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=width // HEAD,
        max_position_embeddings=own["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id")),  # it writes nothing
        is_decoder=True,  # which adds the attention to the picture; it runs without a causal mask
    )
    own.pop("embeddings.position_ids", None)
    return _filled(BlipTextModel(config, add_pooling_layer=False), own)


def _filled(model: torch.nn.Module, weights: Weights) -> torch.nn.Module:
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval()


def _tokenizer(path: Path, expected: int) -> Any:
    """BERT's, from its vocabulary, one word a line."""
    from transformers import BertTokenizer

    words = path.read_text(encoding="utf-8").splitlines()
    if len(words) != expected:
        raise ValueError(f"{path} holds {len(words)} words, the weights know {expected}; allowed is that of {WORDS}")
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})
