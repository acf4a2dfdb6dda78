"""The autoencoders: diffusers' AutoencoderTiny for pictures (67k parameters), a small AutoencoderKLWan for videos (165k)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Coder:
    """An autoencoder of diffusers with its two directions: [-1, 1] to unscaled latents, and back."""

    module: Any
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """(n, h, w, 3) or (n, f, h, w, 3) uint8 to (n, 3, ...) float in [-1, 1]."""
    return torch.from_numpy(images).movedim(-1, 1).float().div_(127.5).sub_(1)


def for_pictures(folder: Path | None = None) -> Coder:
    """Factor 4, 4 channels; untrained, or that of a pipeline made before: all pipelines for pictures draw the same ones."""
    made = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=4,
        act_fn="relu",
    )
    if folder is not None:
        made = AutoencoderTiny.from_pretrained(folder, subfolder="vae").eval().requires_grad_(False)
    # AutoencoderTiny's encoder maps [-1, 1] in and its decoder maps [-1, 1] out.
    return Coder(made, made.encoder, made.decoder)


def for_videos(folder: Path | None = None) -> Coder:
    """Factor 4 in space and 2 in time after the first frame, 8 channels; untrained, or that of a pipeline made before."""
    made = AutoencoderKLWan(
        base_dim=8,
        z_dim=8,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    if folder is not None:
        made = AutoencoderKLWan.from_pretrained(folder, subfolder="vae").eval().requires_grad_(False)
    return Coder(made, lambda x: made.encode(x).latent_dist.mode(), lambda z: made.decode(z).sample)


def train(
    coder: Coder, images: NDArray[np.uint8], steps: int, seed: int, log: Callable[[str], None], batch: int = 16
) -> None:
    """Train on L1 + 2 MSE with a little latent noise and a small penalty on the latents."""
    rng = np.random.default_rng([seed, 2])
    parameters = list(coder.module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    started = time.perf_counter()
    for step in range(steps):
        x = to_tensor(images[rng.integers(len(images), size=batch)])
        z = coder.encode(x)
        error = coder.decode(z + 0.05 * torch.randn_like(z)) - x
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-3 * z.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)  # without it some runs collapse to the background
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            log(f"vae step {step} loss {loss.item():.4f} seconds {time.perf_counter() - started:.0f}")
    coder.module.eval().requires_grad_(False)
    sample = to_tensor(images[:200])
    with torch.no_grad():
        mse = (coder.decode(coder.encode(sample)).clamp(-1, 1) - sample).div(2).square().mean()
    log(f"vae psnr {-10 * torch.log10(mse).item():.2f} dB")


@torch.no_grad()
def encode(coder: Coder, images: NDArray[np.uint8]) -> Tensor:
    """Unscaled latents (n, ...) of uint8 images."""
    return torch.cat([coder.encode(to_tensor(images[k : k + 200])) for k in range(0, len(images), 200)])


def normalise(coder: Coder, latents: Tensor, shifted: bool) -> Tensor:
    """The latents scaled to standard deviation 1 (and mean 0 if `shifted`: some pipelines ignore the shift), after writing
    how into the autoencoder's config: per channel for videos, as their pipeline wants it."""
    part = latents[:2000]
    if part.ndim == 5:
        mean, std = part.mean((0, 2, 3, 4)), part.std((0, 2, 3, 4))
        mean, std = (torch.tensor([round(v, 4) for v in values.tolist()]) for values in (mean, std))
        coder.module.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        return (latents - mean[:, None, None, None]) / std[:, None, None, None]
    shift = round(part.mean().item(), 4) if shifted else 0.0
    scale = round(1 / (part - shift).square().mean().sqrt().item(), 4)
    coder.module.register_to_config(scaling_factor=scale, shift_factor=shift)
    return (latents - shift) * scale
