"""shapes-flux: a FLUX transformer, whose latents are packed into tokens, and its text encoders.

Rectified flow as in shapes-sd3. The CLIP tower gives the pooled vector, a small T5 encoder the tokens; it sees 16 of them, padding
included, in training, so calls need `max_sequence_length=16`. There is no guidance embedding, and no guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from diffalign.processes import linear_sigmas
from diffalign.shapes.pretrain import text

WIDTH = 64  # of the text encoders
SIDE = 16  # of a latent
SHIFTED = True  # the pipeline uses the autoencoder's shift_factor
GUIDANCE = (1.0,)  # evaluated
CALL = {
    "num_inference_steps": 10,
    "sigmas": linear_sigmas(10),
    "height": 64,
    "width": 64,
    "max_sequence_length": text.LENGTH,
}


@dataclass
class Model:
    """The trainable parts of a FLUX pipeline."""

    tokens: CLIPTokenizer
    encoder: CLIPTextModel
    encoder_2: T5EncoderModel
    transformer: FluxTransformer2DModel

    def modules(self) -> list[torch.nn.Module]:
        return [self.encoder, self.encoder_2, self.transformer]

    def is_matrix(self, name: str, parameter: torch.Tensor) -> bool:
        """Attention and feed-forward matrices of the blocks."""
        blocks = name.startswith(("transformer_blocks", "single_transformer_blocks"))
        return blocks and parameter.ndim == 2 and ".norm" not in name

    def loss(self, x0: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Mean squared velocity error of one batch."""
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(len(x0), generator=generator))
        ratio = t[:, None, None, None]
        context, pooled = embed(self, ids)
        v = self.transformer(
            packed((1 - ratio) * x0 + ratio * noise),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=t,
            img_ids=FluxPipeline._prepare_latent_image_ids(len(x0), SIDE // 2, SIDE // 2, x0.device, x0.dtype),
            txt_ids=x0.new_zeros(context.shape[1], 3),
            return_dict=False,
        )[0]
        return F.mse_loss(v, packed(noise - x0))

    def pipeline(self, autoencoder: AutoencoderTiny) -> FluxPipeline:
        """An ordinary FLUX pipeline around the trained parts, with FLUX.1-dev's shift by picture size."""
        return FluxPipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=autoencoder,
            text_encoder=self.encoder,
            tokenizer=self.tokens,
            text_encoder_2=self.encoder_2,
            tokenizer_2=self.tokens,
        )


def packed(x: torch.Tensor) -> torch.Tensor:
    """Latents (n, 4, 16, 16) as FLUX's tokens of 2 x 2 patches, (n, 64, 16)."""
    return FluxPipeline._pack_latents(x, *x.shape)


def create() -> Model:
    """The untrained model: 2 joint and 4 single blocks of width 96, 1.3M parameters, a CLIP tower and a T5 encoder."""
    tokens = text.tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 10, 10),
        guidance_embeds=False,
    )
    config = T5Config(
        vocab_size=len(tokens), d_model=WIDTH, d_kv=16, d_ff=4 * WIDTH, num_layers=3, num_heads=4, dropout_rate=0.0
    )
    encoder_2 = T5EncoderModel(config)
    torch.nn.init.normal_(encoder_2.shared.weight, std=1.0)
    return Model(tokens, text.clip_encoder(tokens, WIDTH, 1, CLIPTextModel), encoder_2, transformer)


def embed(model: Model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What FLUX's `encode_prompt` makes of token ids (n, 16): tokens (n, 16, 64), pooled (n, 64)."""
    return model.encoder_2(ids).last_hidden_state, model.encoder(ids).pooler_output
