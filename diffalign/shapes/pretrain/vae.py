"""The autoencoder: diffusers' AutoencoderTiny at factor 4 with 4 channels, 67k parameters."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray


def to_tensor(images: NDArray[np.uint8]) -> torch.Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) float in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def create() -> AutoencoderTiny:
    """The untrained autoencoder."""
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=4,
        act_fn="relu",
    )


def train(images: NDArray[np.uint8], steps: int, seed: int, log: Callable[[str], None]) -> AutoencoderTiny:
    """Train on L1 + 2 MSE with a little latent noise and a small penalty on the latents."""
    rng = np.random.default_rng([seed, 2])
    vae = create()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    started = time.perf_counter()
    for step in range(steps):
        x = to_tensor(images[rng.integers(len(images), size=16)])
        z = vae.encoder(x)
        error = vae.decoder(z + 0.05 * torch.randn_like(z)) - x
        # AutoencoderTiny's encoder maps [-1, 1] in and its decoder maps [-1, 1] out.
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-3 * z.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)  # without it some runs collapse to the background
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            log(f"vae step {step} loss {loss.item():.4f} seconds {time.perf_counter() - started:.0f}")
    vae.eval().requires_grad_(False)
    sample = to_tensor(images[:200])
    with torch.no_grad():
        mse = (vae.decoder(vae.encoder(sample)).clamp(-1, 1) - sample).div(2).square().mean()
    log(f"vae psnr {-10 * torch.log10(mse).item():.2f} dB")
    return vae


def normalise(vae: AutoencoderTiny, latents: torch.Tensor, shifted: bool) -> None:
    """Write the scale, and the shift where the pipeline uses one, that bring latents to mean 0 and standard deviation 1."""
    shift = round(latents.mean().item(), 4) if shifted else 0.0
    scale = 1 / (latents - shift).square().mean().sqrt().item()
    vae.register_to_config(scaling_factor=round(scale, 4), shift_factor=shift)


@torch.no_grad()
def encode(vae: AutoencoderTiny, images: NDArray[np.uint8]) -> torch.Tensor:
    """Unscaled latents (n, 4, 16, 16) of uint8 images."""
    return torch.cat([vae.encoder(to_tensor(images[k : k + 200])) for k in range(0, len(images), 200)])
