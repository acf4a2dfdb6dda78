"""The made parts of docs/families/: facts from the table of families, counts from benchmarks/families.py, and what was tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.runtime.yaml_text import flow
from tools import hub_configs
from tools.docs.markdown import table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
# A page's stem, and the preset that it goes through.
PAGES = {
    "sd15": "ddpo/sd15",
    "sdxl": "ddpo/sdxl",
    "sd35": "flow_grpo/sd35-medium",
    "flux1": "flow_grpo/flux-dev",
    "z-image": "flow_grpo/z-image",
    "qwen-image": "flow_grpo/qwen-image",
    "wan": "flow_grpo/wan21",
    "ltx": "flow_grpo/ltx-video",
}


def _counted(page: str) -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))[PAGES[page]]


def facts(page: str) -> list[str]:
    """Of the page's model: licence, gate, size, settings, other presets."""
    name = PAGES[page].partition("/")[2]
    family, counted = hub_configs.families()[name], _counted(page)
    licence, _, gate = family["terms"].rpartition(", " if ", " in family["terms"] else "; ")
    call = family["call"]
    size = f"{call['height']} x {call['width']}" + (f", {call['num_frames']} frames" if "num_frames" in call else "")
    gib = (counted["denoiser"] + counted["encoders"]) * 1e6 * 2 / 2**30
    denoiser, encoders = f"{counted['denoiser']:,.0f}", f"{counted['encoders']:,.0f}"
    work = f"{counted['rows']:,} network rows, {counted['rows_backward']:,} with a gradient, {counted['pflop']:g} PFLOP"
    rows = {
        "model": f"[{family['model']}](https://huggingface.co/{family['model']})",
        "licence": f"{licence}; the model's card decides",
        "gated": "no" if "not gated" in gate else "yes: accept the terms on its page, then `hf auth login`",
        "size": f"{denoiser} M parameters in the denoiser, {encoders} M in text encoders: {gib:.1f} GiB in 16 bits",
        "published": family["published"].removesuffix("."),
        "the preset": f"{size}, {family['steps']} steps, LoRA {flow(family['lora']).strip('{}')}: {counted['trained']:.1f} M trained",
        "an update": f"{counted['samples']} samples, {work}",
        "presets": ", ".join(f"`{rule}/{name}`" for rule in family["rules"]),
    }
    return table(("", ""), rows.items())


def decided() -> list[str]:
    """What `auto` becomes, family by family."""

    def row(facts: dict[str, Any]) -> tuple[str, ...]:
        guidance = "the pipeline's" if facts["guidance"] is None else f"{facts['guidance']:g}"
        return (
            f"`{facts['model']}`",
            facts["process"],
            str(facts["steps"]),
            guidance,
            flow(facts["call"]).strip("{}"),
            "bfloat16",
        )

    head = ("models like", "process", "steps", "guidance", "pipeline_args", "precision")
    return table(head, map(row, hub_configs.families().values()))


def cards(page: str) -> list[str]:
    """What `plan --vram` says of each card."""
    lines = [f"$ diffalign plan {PAGES[page]} --vram N"]
    counted = list(_counted(page)["cards"].values())
    refused = [said for said in counted if len(said) == 1]
    for said in (*refused[-1:], *(said for said in counted if len(said) > 1)):  # smaller cards are refused alike
        lines += said
    return ["```text", *lines, "```"]


def tried(page: str) -> list[str]:
    """The family's row of what was tried on tiny weights."""
    family = hub_configs.families()[PAGES[page].partition("/")[2]]["tried_on"]
    row = json.loads((ROOT / "docs" / "capabilities.json").read_text(encoding="utf-8"))[family]
    kept = {key: value for key, value in row.items() if key not in ("pipeline", "sampler")}
    told = ", ".join(f"{key}: {value}" for key, value in kept.items() if value != "yes")
    works = ", ".join(key for key, value in kept.items() if value == "yes")
    return [
        f"`{row['pipeline']}` with tiny random weights, on a CPU: {works}; {told} ([what these mean](../pipelines.md))."
    ]
