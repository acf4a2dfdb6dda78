"""What methods must have alike to be compared: model, data, judges and how samples that are judged are drawn. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffalign import config as configs
from diffalign.errors import UserError, shown

# Keys, or whole sections. How samples are drawn in training is a method's own: its process, its noise, its groups.
ALIKE = (
    *("model", "revision", "weights", "precision", "memory.quantize", "memory.decode", "memory.judge_precision"),
    *("prompts.source", "prompts.tasks", "prompts.split", "evaluation", "rewards", "eval_rewards", "scoring.frames"),
    *(
        "scoring.reduce",
        "sampler.steps",
        "sampler.guidance_scale",
        "sampler.guidance_steps",
        "sampler.sigmas",
        "sampler.pipeline_args",
    ),
    *("lora.rank", "lora.targets", "lora.start", "lora.frozen", "updates", "budget"),
)


def check(methods: Sequence[tuple[str, dict[str, Any]]], allow: Sequence[str]) -> None:
    """Refuse what cannot be compared.

    methods: labels and resolved settings; allow: keys or sections that they may differ in.

    Raises:
        UserError: with every difference that is not allowed.
    """
    first, base = methods[0]
    known = {key for _, settings in methods for key, _ in configs.flat(settings)}
    problems = [
        f"--allow: got {shown(name)}, no key of these configs"
        for name in allow
        if not any(configs.within(key, [name]) for key in known)
    ]
    for label, settings in methods:
        if not settings["evaluation"]["enabled"]:
            problems.append(f"{label}: evaluation.enabled: got false, and a comparison is of evaluations")
        for key, (was, now) in configs.differences(base, settings).items():
            if configs.within(key, ALIKE) and not configs.within(key, allow):
                problems.append(
                    f"{label}: {key}: {shown(now)}, {first} has {shown(was)}; give {key}=... for all, or --allow {key}"
                )
    if problems:
        raise UserError(*dict.fromkeys(problems))
