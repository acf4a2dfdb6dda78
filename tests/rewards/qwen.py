"""Judges on Qwen2-VL with tiny random weights, laid out as the hub lays the published ones out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel

from diffalign.rewards import catalog
from reward_models import hpsv3, videoreward
from tests.rewards.tiny_vlm import SPECIAL

CHAT = (
    "{% for m in messages %}<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% else %}<|vision_start|><|{{ c['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
QUESTIONS = {
    "hpsv3": "\nHow good?\nPrompt - {text_prompt}\n\nRate: <|Reward|>\n\nEND\n",
    "videoreward": "\nLooks: <|VQ_reward|>\nEND\nMoves: <|MQ_reward|>\nPrompt - {text_prompt}\nFits: <|TA_reward|>\nEND\n",
}
UNITS = {"VQ_mean": 1.5, "VQ_std": 0.5, "MQ_mean": -0.25, "MQ_std": 2.0, "TA_mean": 0.125, "TA_std": 4.0}
MOST = 160 * 8 * 8  # pixels of a frame: sides of 8 are a token here
RANK, ALPHA = 2, 6


def asked(monkeypatch, name: str, text: str | None = None) -> str:
    """Let a text of ours be a judge's question."""
    text = QUESTIONS[name] if text is None else text
    facts = catalog.builtin()[name].template
    monkeypatch.setitem(facts, "sha256", hashlib.sha256(text.encode()).hexdigest())
    return text


def tokenizer(place: Path) -> int:
    """Bytes as tokens with some merges, and Qwen's special tokens; returns how many there are."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("e", "d"), ("r", "ed"), ("Ġ", "red"), ("a", "t")]
    vocab = {token: k for k, token in enumerate([*letters, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    whole = PreTrainedTokenizerFast(tokenizer_object=made, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    whole.save_pretrained(place)
    return len(whole)


def config(rows: int, width: int = 16, vision: int = 16) -> Qwen2VLConfig:
    text = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": rows, "max_position_embeddings": 4096,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, width // 8 - 2] if width > 16 else [1, 1, 0]},
    }  # fmt: skip
    seen = {"depth": 2, "embed_dim": vision, "hidden_size": width, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    ids = {"image_token_id": 0, "video_token_id": 0, "vision_start_token_id": 0, "vision_end_token_id": 0}
    return Qwen2VLConfig(text_config=text, vision_config=seen, **ids)


def base(place: Path) -> tuple[Qwen2VLConfig, int]:
    """A base model's small files; its config and the size of its vocabulary."""
    place.mkdir(parents=True)
    known = tokenizer(place)
    made = config(known + 11)  # published ones have more rows than words
    made.save_pretrained(place)
    (place / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    facts = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    colours = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (place / "preprocessor_config.json").write_text(json.dumps({**facts, **colours}))
    return made, known


def random_weights(made: Qwen2VLConfig, rows: int) -> dict[str, Tensor]:
    """Of the network, under the names of the versions that the judges were trained with."""
    torch.manual_seed(0)
    made = type(made).from_dict(made.to_dict())
    made.text_config.vocab_size = rows
    net = Qwen2VLModel(made)
    with torch.no_grad():
        for parameter in net.parameters():  # such that every part of it counts
            scale = 0.1 if parameter.ndim == 1 else 0.7 / parameter.shape[-1] ** 0.5
            parameter.add_(scale * torch.randn(parameter.shape))
    old = {"language_model.": "model."}
    return {
        next((key.replace(new, was, 1) for new, was in old.items() if key.startswith(new)), key): value.clone()
        for key, value in net.state_dict().items()
    }


def hpsv3_folder(place: Path) -> Path:
    """A folder as `hpsv3@PLACE` takes it."""
    made, known = base(place / "Qwen2-VL-7B-Instruct")
    weights = random_weights(made, known + 1)
    width = made.text_config.hidden_size
    head = nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    weights |= {f"rm_head.{key}": 3 * value.detach() for key, value in head.state_dict().items()}
    weights["lm_head.weight"] = torch.zeros(known + 1, width)
    save_file({key: value.contiguous() for key, value in weights.items()}, place / hpsv3.FILE)
    (place / "template.txt").write_text(QUESTIONS["hpsv3"])
    return place


def videoreward_parts(place: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Base files and settings of `videoreward@PLACE`; the whole model's weights before LoRA, and the LoRA's."""
    made, known = base(place / "Qwen2-VL-2B-Instruct")
    weights = random_weights(made, known + 3)
    weights["rm_head.weight"] = 3 * torch.randn(3, made.text_config.hidden_size)
    weights["lm_head.weight"] = torch.zeros(known + 3, made.text_config.hidden_size)
    lora = {}
    for key in sorted(weights):
        if key.startswith("model.layers.") and key.endswith("proj.weight"):
            out, into = weights[key].shape
            layer = key.removesuffix(".weight")
            lora[f"{layer}.lora_A.weight"] = torch.randn(RANK, into) / into**0.5
            lora[f"{layer}.lora_B.weight"] = 0.1 * torch.randn(out, RANK)
    said = {
        "data_config": {"max_frame_pixels": MOST, "fps": 2.0},
        "peft_lora_config": {"lora_r": RANK, "lora_alpha": ALPHA},
        "inference_config": UNITS,
    }
    (place / videoreward.CONFIG).write_text(json.dumps(said))
    (place / "template.txt").write_text(QUESTIONS["videoreward"])
    (place / videoreward.STEP).mkdir()
    return weights, lora


def videoreward_folder(place: Path) -> Path:
    """A folder as `videoreward@PLACE` takes it, with a whole checkpoint as the hub has it."""
    weights, lora = videoreward_parts(place)
    changed = {key.removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight")}
    saved = {}
    for key, value in weights.items():
        layer, _, end = key.rpartition(".")
        saved[f"base_model.model.{layer}.base_layer.{end}" if layer in changed else f"base_model.model.{key}"] = value
    saved |= {f"base_model.model.{key.replace('.weight', '.default.weight')}": value for key, value in lora.items()}
    torch.save(saved, place / videoreward.STEP / videoreward.WHOLE)
    return place
