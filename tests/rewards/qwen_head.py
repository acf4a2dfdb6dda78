"""States of a small Qwen2-VL as its judges' authors got them, by transformers 4.45.2: `python -m tests.rewards.qwen_head OUT.npz` in an
environment of that version writes what `test_qwen_vl.py` compares with. Weights and inputs are made from seeds, here and there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import torch

PAD, IMAGE, SPECIAL, ROWS = 0, 5, [48, 49, 50], 51
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": ROWS, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
}  # fmt: skip
SECTIONS = [1, 1, 2]
VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
LAYOUTS = {"still": (1, 6, 8), "clip": (2, 4, 6)}  # patches in time, height and width
FORMS = ("plain", "rounded")  # rotary frequencies in float32, and as the judges' inference has them: bfloat16
LONG = 700  # tokens of the longer question: where rounded frequencies are angles away


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """By the names of 4.45.2; every part counts."""
    made = {}
    for number, (key, shape) in enumerate(sorted(shapes.items())):
        drawn = np.random.RandomState(number).standard_normal(shape)
        norm = len(shape) == 1 and key.endswith("weight")
        sharp = 4.0 if any(part in key for part in ("q_proj", "k_proj", "qkv")) else 1.4  # where a token stands counts
        scale = 0.1 if len(shape) == 1 else 1.0 if "embed_tokens" in key else sharp / np.prod(shape[1:]) ** 0.5
        made[key] = torch.from_numpy(scale * drawn + norm).float()
    return made


def inputs(layout: str) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Patches, grid and the token ids of two questions, the second the shorter, with the padding's id within it."""
    t, h, w = LAYOUTS[layout]
    drawn = np.random.RandomState(7)
    patches = torch.from_numpy(drawn.standard_normal((2 * t * h * w, 3 * 2 * 4 * 4))).float()
    asked = []
    for length in (LONG, 60):
        ids = [int(one) for one in drawn.randint(10, 40, length)]
        ids[3:3] = [IMAGE] * (t * h * w // 4)
        ids[-12] = PAD
        if layout == "still":
            ids.append(SPECIAL[0])
        else:
            ids = [*ids[:-9], SPECIAL[0], *ids[-9:-4], SPECIAL[1], *ids[-4:], SPECIAL[2]]
        asked.append(ids)
    return patches, torch.tensor([[t, h, w]] * 2), asked


def heads(layout: str) -> torch.Tensor:
    """A head's matrix: two numbers of a still, a row for each mark of a clip."""
    return torch.from_numpy(np.random.RandomState(9).standard_normal((2 if layout == "still" else 3, 32))).float()


def special(layout: str) -> list[int]:
    return SPECIAL[:1] if layout == "still" else SPECIAL


def scores(layout: str, states: torch.Tensor) -> torch.Tensor:
    answers = states @ heads(layout).T
    return answers[:, 0] if layout == "still" else answers.diagonal(dim1=1, dim2=2)


@torch.no_grad()
def original(layout: str, form: str) -> torch.Tensor:
    """States at the special tokens by 4.45.2, called as the judges' own forward calls it: pictures put in, no positions given."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        **TEXT, vision_config=VISION, image_token_id=IMAGE, rope_scaling={"type": "mrope", "mrope_section": SECTIONS}
    )
    model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.load_state_dict(weights({key: tuple(value.shape) for key, value in model.state_dict().items()}))
    buffers = [module for module in model.eval().modules() if hasattr(module, "inv_freq")]
    for module in buffers if form == "rounded" else ():
        module.inv_freq = module.inv_freq.bfloat16()
    patches, grid, asked = inputs(layout)
    length = max(map(len, asked))
    ids = torch.tensor([one + [PAD] * (length - len(one)) for one in asked])
    mask = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in asked])
    embedded = model.model.embed_tokens(ids)
    seen = model.visual(patches, grid_thw=grid)
    embedded[ids == IMAGE] = seen
    held = model.model(inputs_embeds=embedded, attention_mask=mask)[0]
    model.to(torch.bfloat16)  # as the judges' training and inference do
    assert {module.inv_freq.dtype for module in buffers} == {torch.bfloat16}
    return torch.stack([held[k, [one.index(s) for s in special(layout)]] for k, one in enumerate(asked)])


if __name__ == "__main__":
    found = {}
    for layout in LAYOUTS:
        for form in FORMS:
            states = original(layout, form)
            found[f"{layout}/{form}/states"] = states.numpy()
            found[f"{layout}/{form}/scores"] = scores(layout, states).numpy()
    np.savez(sys.argv[1], **found)
