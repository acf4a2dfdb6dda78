"""shapes-sd: a U-Net with epsilon prediction and its text encoder, as in Stable Diffusion 1.x.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n with the scaled-linear betas of Stable Diffusion; the network predicts n. Errors are
weighted by min(SNR, 5) / SNR (min-SNR, arXiv 2303.09556), else the nearly clean timesteps drown the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffalign.shapes.pretrain import text

WIDTH = 64
SNR_LIMIT = 5.0
SHIFTED = False  # the pipeline ignores the autoencoder's shift_factor
GUIDANCE = (1.0, 3.0, 5.0)  # evaluated
CALL = {"num_inference_steps": 10}


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas. Timesteps end at 999 ("trailing"): with few steps, none is spent on nearly clean pictures."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


@dataclass
class Model:
    """The trainable parts of a Stable Diffusion 1.x pipeline."""

    tokens: CLIPTokenizer
    encoder: CLIPTextModel
    unet: UNet2DConditionModel
    signal: torch.Tensor  # (1000,) abar

    def modules(self) -> list[torch.nn.Module]:
        return [self.encoder, self.unet]

    def is_matrix(self, name: str, parameter: torch.Tensor) -> bool:
        """Convolutions, attention and feed-forward matrices of the blocks."""
        return name.split("_")[0] in ("down", "mid", "up") and parameter.ndim > 1 and "time_emb" not in name

    def loss(self, x0: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Weighted mean squared error of the predicted noise of one batch."""
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(len(self.signal), (len(x0),), generator=generator)
        abar = self.signal[t][:, None, None, None]
        context = self.encoder(ids).last_hidden_state
        found = self.unet(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t, context, return_dict=False)[0]
        snr = abar / (1 - abar)
        return (snr.clamp(max=SNR_LIMIT) / snr * (found - noise) ** 2).mean()

    def pipeline(self, autoencoder: AutoencoderTiny) -> StableDiffusionPipeline:
        """An ordinary Stable Diffusion pipeline around the trained parts."""
        return StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=self.encoder,
            tokenizer=self.tokens,
            unet=self.unet,
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def create() -> Model:
    """The untrained model: three resolutions of 32, 64, 64 channels, 1.7M parameters, and a CLIP tower."""
    tokens = text.tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # heads, in this class
        norm_num_groups=8,
    )
    return Model(tokens, text.clip_encoder(tokens, WIDTH, 3, CLIPTextModel), unet, scheduler().alphas_cumprod)
