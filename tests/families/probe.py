"""What works for a family, tried out on its tiny pipeline."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.backends import recorder
from diffalign.backends.diffusers import DiffusersPolicy
from diffalign.models import lora as adapters
from diffalign.models import lora_files
from diffalign.ops import gaussian
from diffalign.processes import PROCESSES
from diffalign.prompts import book
from diffalign.types import Plan, Prompts
from tests.families import FAMILIES, build

STEPS = 4
LEVEL = {"flow_sde": 0.7, "ddim": 1.0}


@dataclass
class Subject:
    """A policy around a family's pipeline, and a rollout with noise on all steps but the last."""

    policy: DiffusersPolicy
    given: Prompts

    def __post_init__(self) -> None:
        self.plan = Plan(STEPS, (True,) * (STEPS - 1) + (False,), ())
        self.part = self.policy.rollout(self.given, self.plan)


def given() -> Prompts:
    """Two samples of different prompts."""
    return book.draw([{"prompt": "two stars"}, {"prompt": "a red circle and a blue square"}], 2, 1, 0, 0)


def policy(name: str, dtype: torch.dtype = torch.float32, guidance: float = 0.0, **more: Any) -> DiffusersPolicy:
    """A family's policy with a LoRA of rank 4 that has moved."""
    family, pipe = FAMILIES[name], build(name, dtype)
    call = {k: v for k, v in family.call.items() if guidance > 1 or k != "negative_prompt"}
    guided = {"guidance_scale": None, "call": {**call, family.guide: guidance}}
    trained = adapters.attach(pipe, 4, 8.0, None, 0)
    with torch.no_grad():
        for index, (key, parameter) in enumerate(trained.items()):
            if "lora_B" in key:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    return DiffusersPolicy(
        pipe,
        PROCESSES[family.process],
        steps=STEPS,
        noise_level=LEVEL[family.process],
        **guided,
        micro_batch=2,
        parameters=trained,
        **more,
    )


def subject(name: str, dtype: torch.dtype = torch.float32, guidance: float = 0.0) -> Subject:
    return Subject(policy(name, dtype, guidance), given())


def finite(subject: Subject) -> bool:
    """Sampling and decoding give pictures in [0, 1]."""
    media = subject.policy.decode(subject.part, subject.part.x[-1])
    pixels = media.pixels
    return bool(pixels.isfinite().all()) and pixels.ndim == 5 and 0 <= float(pixels.min()) <= float(pixels.max()) <= 1


def replays(subject: Subject) -> bool:
    """Spans and single steps give the rollout's values bit for bit, so that first-pass ratios are exactly 1; the prompts that
    rewards will see are as they were."""
    policy, part = subject.policy, subject.part
    spans = all(torch.equal(policy.replay(part, a, b).x, part.x[b]) for a, b in ((0, STEPS), (2, STEPS), (1, 2)))
    ratios = []
    for step in range(STEPS - 1):
        now = policy.transition(part, step)
        old = part.log_prob[step]
        assert old is not None
        ratios.append(torch.equal(gaussian.log_prob(part.x[step + 1], now.mean, now.std, "mean"), old))
    return spans and all(ratios) and part.prompts.text == given().text


def learns(subject: Subject) -> bool:
    """The gradient of a whole replay is finite and reaches the LoRA of every denoiser."""
    policy = subject.policy
    policy.replay(subject.part, 0, STEPS).x.square().mean().backward()
    reached: set[str] = set()
    for name, parameter in policy.parameters.items():
        # The last block's text half leads nowhere in some models.
        if parameter.grad is not None:
            if not parameter.grad.isfinite().all():
                return False
            if float(parameter.grad.abs().max()) > 0:
                reached.add(name.split(".")[0])
    return reached == set(adapters.denoisers(policy.pipe))


def decodes(subject: Subject) -> bool:
    """Pixels have a gradient to the latents."""
    x = subject.part.x[-1].clone().requires_grad_()
    subject.policy.decode(subject.part, x).pixels.sum().backward()
    return x.grad is not None and bool(x.grad.isfinite().all()) and float(x.grad.abs().max()) > 0


def predicts(subject: Subject) -> bool:
    """A prediction at the time of a step is that step's."""
    policy, step = subject.policy, 1
    time = torch.full((2,), float(policy.schedule.timestep[step]) / 1000)
    with torch.no_grad():
        found = policy.predict(subject.part, subject.part.x[step], time)
        wanted = policy.transition(subject.part, step).prediction
    return torch.allclose(found.float(), wanted, rtol=1e-4, atol=1e-5)


def predicts_per_sample(subject: Subject) -> bool:
    """A batch of two times gives what each time gives alone."""
    policy, part = subject.policy, subject.part
    times = torch.tensor([0.8, 0.3])
    with torch.no_grad():
        both = policy.predict(part, part.x[1], times)
        alone = [policy.predict(part, part.x[1], time.expand(2))[k] for k, time in enumerate(times)]
    return torch.allclose(both, torch.stack(alone), rtol=1e-4, atol=1e-5)


def plain(name: str) -> str:
    """Whether deterministic sampling gives the pictures of the pipeline's own call, where it takes such steps."""
    policy, prompts = subject(name).policy, given()
    pipe = policy.pipe
    if pipe.scheduler.config.get("use_flow_sigmas"):
        return "own solver"
    part = policy.rollout(prompts, Plan.deterministic(STEPS))
    ours = policy.decode(part, part.x[-1]).pixels
    assert float((ours[0] - ours[1]).abs().max()) > 1e-2, "pictures that do not differ show nothing"
    if FAMILIES[name].process == "ddim":
        pipe.scheduler = recorder.as_ddim(pipe.scheduler)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in prompts.seed]
    theirs = pipe(prompt=list(prompts.text), generator=generators, output_type="pt", **policy.arguments)[0]
    theirs = theirs[:, None] if theirs.ndim == 4 else theirs
    # float32; DDIM's own coefficients are float32 too, and x_0 is x times up to 14 there
    return "yes" if torch.allclose(ours, theirs.float(), rtol=0, atol=1e-4) else "no"


def guided(name: str) -> str:
    """What guidance does: takes two predictions (CFG), or enters the network (embedded)."""
    found = []
    for scale in (0.0, 3.0):
        other = policy(name, guidance=scale)
        part = other.rollout(given(), Plan.deterministic(STEPS))
        found.append((other.rows_forward, part.x[-1]))
    (rows, one), (more, three) = found
    if more > rows:
        return "CFG"
    return "embedded" if not torch.equal(one, three) else "none"


def saves(subject: Subject) -> bool:
    """The LoRA file loads through the pipeline's own loader, equal in weights and scale."""
    with tempfile.TemporaryDirectory() as folder:
        lora_files.save(subject.policy.pipe, Path(folder), {})
        lora_files.verify(subject.policy.pipe, Path(folder))
    return True


def checkpoints(name: str) -> bool:
    """Gradient checkpointing gives the same gradient."""
    found = []
    for checkpoint in ("none", "both"):
        one = Subject(policy(name, checkpoint=checkpoint), given())
        one.policy.replay(one.part, 0, STEPS).x.square().mean().backward()
        found.append([p.grad for p in one.policy.parameters.values() if p.grad is not None])
    return len(found[0]) == len(found[1]) and all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*found, strict=True)
    )


def tried(work: Callable[[], bool]) -> str:
    """yes, no, or no with the error's type."""
    try:
        return "yes" if work() else "no"
    except Exception as error:
        return f"no ({type(error).__name__})"


def probe(name: str) -> dict[str, str]:
    """A family's row of the table."""
    family, full = FAMILIES[name], subject(name)
    half, strong = subject(name, torch.bfloat16), subject(name, guidance=3.0)
    return {
        "pipeline": type(full.policy.pipe).__name__,
        "sampler": family.process,
        "pictures": tried(lambda: finite(full)),
        "as plain call": plain(name),
        "replay fp32": tried(lambda: replays(full)),
        "bf16": tried(lambda: replays(half)),
        "guided": tried(lambda: replays(strong)),
        "gradient": tried(lambda: learns(full)),
        "decode gradient": tried(lambda: decodes(full)),
        "any t": tried(lambda: predicts(full)),
        "t per sample": tried(lambda: predicts_per_sample(full)),
        "checkpointing": tried(lambda: checkpoints(name)),
        "guidance": guided(name),
        "LoRA file": tried(lambda: saves(full)),
    }
