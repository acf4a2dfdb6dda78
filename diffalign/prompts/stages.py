"""Stage prompts: what the sampler is told instead of a prompt on each stretch of the chain."""

from __future__ import annotations

from collections.abc import Callable

from diffalign.errors import UserError
from diffalign.prompts.files import Entry, read

Stages = dict[str, tuple[str, ...]]  # prompt -> what the sampler is told instead, on each stretch of the chain
Table = Callable[[str], "tuple[str, ...] | None"]


def table(source: str, field: str = "prompts.stages") -> Table:
    """Where each prompt's stages are looked up: the shapes world by name, or JSON lines of objects with `prompt` and `stages`.

    Raises:
        UserError: naming the file and what is broken.
    """
    if source == "shapes":
        from diffalign.shapes import captions

        return captions.stages
    staged: Stages = {}
    for entry in read(source, (), "", field):
        texts = entry.get("stages")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"{field}: {source}: {entry['prompt']!r} has stages {texts!r}, expected a list of texts")
        if staged.setdefault(entry["prompt"], tuple(texts)) != tuple(texts):
            raise UserError(f"{field}: {source} has {entry['prompt']!r} twice, with different stages")
    return staged.get


def of(written: Table | None, entries: list[Entry], source: str | None, field: str = "prompts.stages") -> Stages:
    """Each entry's stage prompts; none without a table.

    Raises:
        UserError: if the table lacks some, or their numbers differ.
    """
    if written is None:
        return {}
    staged = {entry["prompt"]: written(entry["prompt"]) for entry in entries}
    if missing := [prompt for prompt, texts in staged.items() if texts is None]:
        raise UserError(f"{field}: {source} lacks {len(missing)} of {len(staged)} prompts, such as {missing[0]!r}")
    whole = {prompt: texts for prompt, texts in staged.items() if texts is not None}
    if len(counts := {len(texts) for texts in whole.values()}) > 1:
        raise UserError(f"{field}: {source} has {min(counts)} to {max(counts)} stages a prompt; allowed is one number")
    return whole


def misfits(stretches: list[int] | None, evaluated: bool, counts: set[int], steps: int) -> list[str]:
    """What is wrong with stretches over `steps` steps, where prompts have so many stages (no `counts`: no stages at all).

    evaluated: whether evaluations are to be sampled with stages too.
    """
    if not counts:
        problems = [] if stretches is None else [f"prompts.stretches: got {stretches} without prompts.stages"]
        return [*problems, "evaluation.stages: got true without prompts.stages"] if evaluated else problems
    if len(counts) > 1:
        return [f"prompts.stages: got {min(counts)} to {max(counts)} stages a prompt; allowed is one number for all"]
    count = max(counts)
    if count > steps:
        return [f"prompts.stages: got {count} stages, allowed are up to sampler.steps ({steps})"]
    rising = stretches is not None and stretches[:1] == [0] and sorted(set(stretches)) == stretches
    if stretches is None or (rising and stretches[-1] < steps and len(stretches) == count):
        return []
    allowed = f"{count} rising steps from 0 to less than sampler.steps ({steps})"
    return [f"prompts.stretches: got {stretches}, allowed are {allowed}"]
