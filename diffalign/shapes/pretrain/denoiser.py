"""The flow-matching transformer and its text encoders, trained together.

Rectified flow: x_t = (1 - t) x_0 + t n, the network predicts v = n - x_0, t ~ logit-normal(0, 1) (arXiv 2403.03206).

A plain `pipe(prompt)` appends 256 identical zero tokens for T5; `max_sequence_length=1` appends one. Text tokens carry no
position, so n identical tokens act exactly as one whose attention logit grows by log n. Training draws n from {1, 256} and
adds that logit, so both calls are in distribution at the price of one token.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.shapes.pretrain import text

WIDTH = 96


@dataclass
class Model:
    """The trainable parts of a Stable Diffusion 3 pipeline."""

    tokens: CLIPTokenizer
    encoder: CLIPTextModelWithProjection
    encoder_2: CLIPTextModelWithProjection
    transformer: SD3Transformer2DModel

    def modules(self) -> list[torch.nn.Module]:
        return [self.encoder, self.encoder_2, self.transformer]


def create() -> Model:
    """The untrained model: 4 joint blocks of width 96, 1.3M parameters, and two CLIP towers."""
    tokens = text.tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        caption_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return Model(tokens, text.clip_encoder(tokens, 64, 3), text.clip_encoder(tokens, 32, 1), transformer)


class CountedAttention:
    """SD3's joint attention where the last text token stands for `count` identical ones (logit + log count)."""

    def __init__(self) -> None:
        self.count = 1

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):  # type: ignore[no-untyped-def]
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        x, c = hidden_states, encoder_hidden_states
        q = torch.cat([attn.norm_q(heads(attn.to_q(x))), attn.norm_added_q(heads(attn.add_q_proj(c)))], 2)
        k = torch.cat([attn.norm_k(heads(attn.to_k(x))), attn.norm_added_k(heads(attn.add_k_proj(c)))], 2)
        v = torch.cat([heads(attn.to_v(x)), heads(attn.add_v_proj(c))], 2)
        bias = None
        if self.count != 1:
            bias = q.new_zeros(1, 1, 1, k.shape[2])
            bias[..., -1] = math.log(self.count)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        image, context = out[:, : x.shape[1]], out[:, x.shape[1] :]
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return attn.to_out[0](image), context


def embed(model: Model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What SD3's `encode_prompt` makes of token ids (n, 16): tokens (n, 17, 96) with one T5 zero, pooled (n, 96)."""
    first = model.encoder(ids, output_hidden_states=True)
    second = model.encoder_2(ids, output_hidden_states=True)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    context = F.pad(context, (0, WIDTH - context.shape[-1], 0, 1))
    return context, torch.cat([first.text_embeds, second.text_embeds], -1)


def optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' attention and feed-forward matrices, AdamW on everything else."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters():
            block = name.startswith("transformer_blocks") and parameter.ndim == 2 and ".norm" not in name
            (matrices if block else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, ns_steps=4),
        torch.optim.AdamW(rest, lr=1.5e-3, weight_decay=1e-3),
    ]


def rate(step: int, steps: int) -> float:
    """Learning-rate factor: 200 steps of warm-up, flat to 60 %, then linear to 2 %."""
    decay = min(1.0, (steps - step) / (0.4 * steps))
    return min(1.0, (step + 1) / 200) * max(0.02, decay)


def train(
    latents: torch.Tensor, prompts: list[str], steps: int, seed: int, log: Callable[[str], None], batch: int = 64
) -> Model:
    """Train on scaled latents (n, 4, 16, 16) and return the model with averaged weights (EMA 0.999)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = create()
    attention = CountedAttention()
    model.transformer.set_attn_processor(attention)
    ids = model.tokens(
        [*prompts, ""], padding="max_length", max_length=text.LENGTH, truncation=True, return_tensors="pt"
    )
    ids = ids.input_ids
    average = copy.deepcopy(model)
    tuners = optimizers(model)
    base = [[group["lr"] for group in tuner.param_groups] for tuner in tuners]
    started = time.perf_counter()
    for step in range(steps):
        for tuner, rates in zip(tuners, base, strict=True):
            for group, lr in zip(tuner.param_groups, rates, strict=True):
                group["lr"] = lr * rate(step, steps)
        picks = torch.randint(len(latents), (batch,), generator=generator)
        rows = torch.where(torch.rand(batch, generator=generator) < 0.1, len(prompts), picks)  # caption dropout
        attention.count = 256 if torch.rand((), generator=generator) < 0.3 else 1
        loss = flow_loss(model, latents[picks], ids[rows], generator)
        for tuner in tuners:
            tuner.zero_grad()
        loss.backward()
        for tuner in tuners:
            tuner.step()
        follow(average, model, min(0.999, (step + 1) / (step + 10)))
        if step % 100 == 0 or step == steps - 1:
            log(f"denoiser step {step} loss {loss.item():.4f} seconds {time.perf_counter() - started:.0f}")
    for module in average.modules():
        module.eval().requires_grad_(False)
    return average


def flow_loss(model: Model, x0: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean squared velocity error of one batch."""
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(x0), generator=generator))
    ratio = t[:, None, None, None]
    context, pooled = embed(model, ids)
    v = model.transformer((1 - ratio) * x0 + ratio * noise, context, pooled, t * 1000, return_dict=False)[0]
    return F.mse_loss(v, noise - x0)


@torch.no_grad()
def follow(average: Model, model: Model, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model."""
    for slow, fast in zip(average.modules(), model.modules(), strict=True):
        torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - decay)
