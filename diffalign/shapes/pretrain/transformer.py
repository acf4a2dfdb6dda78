"""shapes-sd3: the flow-matching transformer and its text encoders.

Rectified flow: x_t = (1 - t) x_0 + t n, the network predicts v = n - x_0, t ~ logit-normal(0, 1) (arXiv 2403.03206).

A plain `pipe(prompt)` appends 256 identical zero tokens for T5; `max_sequence_length=1` appends one. Text tokens carry no
position, so n identical tokens act exactly as one whose attention logit grows by log n. Training draws n from {1, 256} and
adds that logit, so both calls are in distribution at the price of one token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.processes import linear_sigmas
from diffalign.shapes.pretrain import text

WIDTH = 96
SHIFTED = True  # the pipeline uses the autoencoder's shift_factor
GUIDANCE = (1.0, 3.0)  # evaluated
CALL = {
    "num_inference_steps": 10,
    "sigmas": linear_sigmas(10),
    "max_sequence_length": 1,
}


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


@dataclass
class Model:
    """The trainable parts of a Stable Diffusion 3 pipeline."""

    tokens: CLIPTokenizer
    encoder: CLIPTextModelWithProjection
    encoder_2: CLIPTextModelWithProjection
    transformer: SD3Transformer2DModel
    attention: CountedAttention = field(default_factory=CountedAttention)

    def modules(self) -> list[torch.nn.Module]:
        return [self.encoder, self.encoder_2, self.transformer]

    def is_matrix(self, name: str, parameter: torch.Tensor) -> bool:
        """Attention and feed-forward matrices of the blocks."""
        return name.startswith("transformer_blocks") and parameter.ndim == 2 and ".norm" not in name

    def loss(self, x0: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Mean squared velocity error of one batch."""
        self.attention.count = 256 if torch.rand((), generator=generator) < 0.3 else 1
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(len(x0), generator=generator))
        ratio = t[:, None, None, None]
        context, pooled = embed(self, ids)
        v = self.transformer((1 - ratio) * x0 + ratio * noise, context, pooled, t * 1000, return_dict=False)[0]
        return F.mse_loss(v, noise - x0)

    def pipeline(self, autoencoder: AutoencoderTiny) -> StableDiffusion3Pipeline:
        """An ordinary Stable Diffusion 3 pipeline around the trained parts."""
        tokens_3, encoder_3 = text.silent_t5(WIDTH)
        self.transformer.set_attn_processor(JointAttnProcessor2_0())
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=autoencoder,
            text_encoder=self.encoder,
            tokenizer=self.tokens,
            text_encoder_2=self.encoder_2,
            tokenizer_2=self.tokens,
            text_encoder_3=encoder_3,
            tokenizer_3=tokens_3,
        )


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
    model = Model(tokens, text.clip_encoder(tokens, 64, 3), text.clip_encoder(tokens, 32, 1), transformer)
    transformer.set_attn_processor(model.attention)
    return model


def embed(model: Model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What SD3's `encode_prompt` makes of token ids (n, 16): tokens (n, 17, 96) with one T5 zero, pooled (n, 96)."""
    first = model.encoder(ids, output_hidden_states=True)
    second = model.encoder_2(ids, output_hidden_states=True)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    context = F.pad(context, (0, WIDTH - context.shape[-1], 0, 1))
    return context, torch.cat([first.text_embeds, second.text_embeds], -1)
