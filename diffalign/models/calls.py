"""Arguments of a pipeline's call: which are not free, and what they say of it."""

from __future__ import annotations

import inspect
from typing import Any

# name: the config's key and the command line's option that give it
GIVEN = {
    "prompt": ("prompts.source", "--prompt"),
    "num_inference_steps": ("sampler.steps", "--steps"),
    "guidance_scale": ("sampler.guidance_scale", "--guidance"),
    "generator": ("seed", "--seed"),
    "sigmas": ("sampler.sigmas", "--steps"),
}

# What decides how noise becomes a picture, or what comes back: these are ours.
FIXED = (
    *("latents", "timesteps", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt"),
    *("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
    *(
        "prompt_embeds",
        "pooled_prompt_embeds",
        "prompt_embeds_mask",
        "prompt_attention_mask",
        "text_ids",
        "denoising_end",
    ),
    *(
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "negative_prompt_embeds_mask",
        "negative_prompt_attention_mask",
    ),
)


def films(pipe: Any) -> bool:
    """Whether a pipeline makes videos."""
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters
