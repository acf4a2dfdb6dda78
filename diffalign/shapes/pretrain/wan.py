"""shapes-wan: a Wan transformer for videos of 5 frames of 32 x 32 pixels, and its UMT5 text encoder.

Rectified flow as in shapes-sd3, on latents (8, 3, 8, 8). Wan's pipeline cuts a text's embedding at its end and pads with zeros; the
network sees 16 tokens in training, so calls need `max_sequence_length=16`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import CLIPTokenizer, UMT5Config, UMT5EncoderModel

from diffalign.shapes import motion
from diffalign.shapes.pretrain import text

WIDTH = 64  # of the text encoder
SHIFTED = True
GUIDANCE = (1.0, 3.0)  # evaluated
CALL = {
    "num_inference_steps": 10,
    "height": motion.SIZE,
    "width": motion.SIZE,
    "num_frames": motion.FRAMES,
    "max_sequence_length": text.LENGTH,
}


@dataclass
class Model:
    """The trainable parts of a Wan pipeline."""

    tokens: CLIPTokenizer
    encoder: UMT5EncoderModel
    transformer: WanTransformer3DModel

    def modules(self) -> list[torch.nn.Module]:
        return [self.encoder, self.transformer]

    def is_matrix(self, name: str, parameter: torch.Tensor) -> bool:
        """Attention and feed-forward matrices of the blocks."""
        return name.startswith("blocks") and parameter.ndim == 2 and ".norm" not in name

    def loss(self, x0: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Mean squared velocity error of one batch."""
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(len(x0), generator=generator))
        ratio = t[:, None, None, None, None]
        v = self.transformer((1 - ratio) * x0 + ratio * noise, t * 1000, embed(self, ids), return_dict=False)[0]
        return F.mse_loss(v, noise - x0)

    def pipeline(self, autoencoder: AutoencoderKLWan) -> WanPipeline:
        """An ordinary Wan pipeline around the trained parts, with its solver and no shift."""
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, num_train_timesteps=1000
        )
        return WanPipeline(
            tokenizer=self.tokens,
            text_encoder=self.encoder,
            transformer=self.transformer,
            vae=autoencoder,
            scheduler=scheduler,
        )


def create() -> Model:
    """The untrained model: 4 blocks of width 96 and a UMT5 encoder of 3 layers."""
    tokens = text.tokenizer(text.motion_words())
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=8,
        out_channels=8,
        text_dim=WIDTH,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        rope_max_seq_len=32,
    )
    config = UMT5Config(
        vocab_size=len(tokens), d_model=WIDTH, d_kv=16, d_ff=4 * WIDTH, num_layers=3, num_heads=4, dropout_rate=0.0
    )
    encoder = UMT5EncoderModel(config)
    torch.nn.init.normal_(encoder.shared.weight, std=1.0)
    return Model(tokens, encoder, transformer)


def embed(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """What Wan's `encode_prompt` makes of token ids (n, 16): tokens (n, 16, 64), zeros after the end of the text."""
    ended = (ids == model.tokens.eos_token_id).cumsum(1)
    mask = (ended - (ids == model.tokens.eos_token_id).long() == 0).long()  # the first end belongs to the text
    return model.encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]
