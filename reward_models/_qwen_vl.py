"""What judges on Qwen2-VL share: a picture or video, a question, and a head on what the network holds at special tokens.

Positions are 0 to L - 1 in all three rows: the judges were trained so, by versions of transformers in which their own forward never gave
the multimodal ones. With those the states at the special tokens are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reward_models import _clip, _qwen_files
from reward_models._qwen_pixels import Form, patches
from reward_models._qwen_text import Words, settings


def form(name: str, source: str) -> Form:
    """What the preprocessor file of a base model says."""
    said = settings(name, source, "preprocessor_config.json")
    return Form(
        int(said["patch_size"]),
        int(said["merge_size"]),
        int(said["temporal_patch_size"]),
        tuple(said["image_mean"]),
        tuple(said["image_std"]),
    )


def filled(head: nn.Module, weights: _qwen_files.Weights) -> nn.Module:
    """A head with its weights, in float32, frozen.

    Raises:
        ValueError: if they are not its own, or one of its matrices is zero: all would score the same.
    """
    _qwen_files.strict(weights, head.state_dict(), "the head")
    if zero := [key for key, value in weights.items() if value.ndim == 2 and not value.any()]:
        raise ValueError(f"the head's {zero[0]} is zero: it was never trained")
    head.load_state_dict(weights)
    return head.float().requires_grad_(False).eval()


def at(
    net: Any, cut: Tensor, grid: Tensor, asked: Sequence[Sequence[int]], pad_id: int, special_ids: Sequence[int]
) -> Tensor:
    """States (N, K, D) of the last layer at the K special tokens of N questions, in float32 at least.

    cut, grid: patches of what is shown, and of each how many there are in time, height and width; asked: token ids, `pad_id` where what is
    shown stands.
    """
    longest, rows = max(map(len, asked)), torch.arange(len(asked))
    # To the right: no token sees one after it, so no mask is needed, and whatever stands there is read by nobody.
    padded = [[*ids] + [special_ids[-1]] * (longest - len(ids)) for ids in asked]
    with torch.autocast(cut.device.type, enabled=False):
        tokens = torch.tensor(padded, device=cut.device)
        embedded = net.language_model.embed_tokens(tokens)
        seen = net.visual(cut.to(embedded.dtype), grid_thw=grid).pooler_output
        shown = (tokens == pad_id)[..., None].expand_as(embedded)
        positions = torch.arange(longest, device=cut.device).expand(3, len(asked), longest)
        held = net.language_model(
            inputs_embeds=embedded.masked_scatter(shown, seen), position_ids=positions, use_cache=False
        ).last_hidden_state
    places = torch.tensor([[list(ids).index(one) for one in special_ids] for ids in asked])
    return _clip.wide(held[rows[:, None], places])


class QwenVL:
    """A Qwen2-VL with a head, on the device of what it scores: on a card in bfloat16, elsewhere as its weights are; the head in float32."""

    def __init__(self, net: Any, head: nn.Module, words: Words, form: Form, quantize: str = "none") -> None:
        self.net, self.head, self.words, self.form, self.quantize = net, head, words, form, quantize
        self._checkpointed = False

    def states(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the network holds at the special tokens, (N, K, D) in float32 at least.

        pixels: (N, F, 3, H, W) in [0, 1], in the size they are shown in; prompts: N texts.
        """
        self._move(pixels.device)
        cut, grid = patches(pixels, self.form)
        count = int(grid[0].prod()) // self.form.merge**2
        asked = [self.words(prompt, count) for prompt in prompts]
        return at(self.net, cut, grid, asked, self.words.pad_id, self.words.special_ids)

    def read(self, states: Tensor) -> Tensor:
        """The head's answer to states (..., D)."""
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states)

    def _move(self, device: torch.device) -> None:
        if device.type == "cuda" and self.quantize == "none":  # else it is in its types
            self.net.to(device, torch.bfloat16)
        else:
            self.net.to(device)
        self.head.to(device)

    def networks(self) -> list[nn.Module]:
        """What may be moved between uses."""
        return [self.net, self.head]

    def checkpoint(self) -> None:
        """Keep only the inputs of layers for the gradient; transformers' own switch does nothing in eval mode."""
        if not self._checkpointed:
            _clip.checkpointed([*self.net.visual.blocks, *self.net.language_model.layers])
        self._checkpointed = True
