"""Arguments of a pipeline's call: which are not free, and what they say of it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from diffalign.errors import shortened, shown

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


def refusal(pipe: Any, what: str, arguments: dict[str, Any], error: BaseException, kind: type | None = None) -> str:
    """What to say where a pipeline's call does not take its arguments; kind: its class, if another stands in for it."""
    given = shown({key: value for key, value in arguments.items() if key != "sigmas"})
    return f"{(kind or type(pipe)).__name__} does not accept {what} with {given}: {shortened(str(error), 200)}"


def unknown(pipe: Any, arguments: Iterable[str]) -> list[str]:
    """A line for every argument that a pipeline's call has no name for, though it may swallow it."""
    taken = [
        name for name, p in inspect.signature(type(pipe).__call__).parameters.items() if p.kind is not p.VAR_KEYWORD
    ]
    lines = []
    for name in arguments:
        if name not in taken:
            close = difflib.get_close_matches(name, taken, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            lines.append(f"got {name}, which {type(pipe).__name__}'s call does not take{hint}")
    return lines


def films(pipe: Any) -> bool:
    """Whether a pipeline makes videos."""
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters
