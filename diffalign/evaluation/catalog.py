"""Suites by name: prompts, pictures of each, judges, how means are taken, and what is comparable with published numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Suite:
    """One suite.

    source: a set of prompts that ships, NAME@ for a published one from the user's copy or fetched, "" for the user's own; judges: rewards,
    the first is the one that counts; samples: of a prompt; columns: keys of the prompts' metadata whose values have means of their own;
    overall: whether the suite's number is the mean over samples, or that of the means of the first column's values; comparable: a line
    on published numbers.
    """

    source: str = ""
    judges: tuple[str, ...] = ()
    samples: int = 4
    columns: tuple[str, ...] = ("tag",)
    overall: Literal["samples", "columns"] = "samples"
    comparable: str = ""


SUITES = {
    "shapes": Suite("shapes", ("shapes_geneval", "shapes_geneval_strict"), overall="columns"),
    "shapes-motion": Suite("shapes-motion", ("shapes_motion", "shapes_motion_partial")),
    "geneval": Suite(
        "geneval-like",
        ("geneval_like",),
        overall="columns",
        comparable="Not comparable with published numbers: prompts and detector are others; the rules are GenEval's.",
    ),
    "pickscore": Suite("", ("pickscore", "clipscore", "hpsv2.1", "aesthetic")),
    "partiprompts": Suite(
        "partiprompts@",
        ("hpsv3", "pickscore", "imagereward", "hpsv2.1"),
        samples=1,
        columns=("tag", "challenge"),
        comparable="Comparable with published means of the same judge on all 1,632 prompts at equal picture size, steps and guidance; "
        "published PickScores are 26 times these.",
    ),
    "hpsv3": Suite(
        "hpdv3@",
        ("hpsv3",),
        samples=1,
        overall="columns",
        comparable="Overall is the mean of the categories' means, as HPSv3's table has it; comparable with it only where hpsv3 was held "
        "against the original code on this machine, and the prompts are all of the twelve published files.",
    ),
    "geneval2": Suite(
        "geneval2@",
        ("soft_tifa", "soft_tifa_am"),
        samples=1,
        overall="columns",
        comparable="Comparable with published Soft-TIFA (GM) if the judge is Qwen3-VL-8B-Instruct in process with its own pixels; "
        "published numbers are 100 times these. Not with a smaller judge, nor with a server's top 20 tokens.",
    ),
    "dpg": Suite(
        "dpg@",
        ("dsg",),
        comparable="Not comparable with published numbers: those are 100 times the verdicts of modelscope's mPLUG, without the table's "
        "first row. Prompts, questions and how they hang together are DPG-Bench's, the answers another model's.",
    ),
    "compbench": Suite(
        "compbench@",
        ("vlm_ask", "clipscore@openai/clip-vit-base-patch32"),
        samples=10,
        overall="columns",
        comparable="Not comparable with published numbers but for non_spatial by CLIP ViT-B/32, which is their formula: color, shape and "
        "texture are published by BLIP-VQA on noun phrases, spatial, 3d_spatial and numeracy by UniDet, complex by a mean of three.",
    ),
    "diversity": Suite(
        "",
        ("diversity", "diversity_clip"),
        samples=8,
        comparable="Comparable within one report: distances depend on prompts and size. Noise and broken pictures are far apart too: read "
        "them beside a judge of quality.",
    ),
    "hpsv2": Suite(
        "hpdv2@",
        ("hpsv2.1", "hpsv2"),
        samples=1,
        comparable="Published numbers are 100 times these; versions 2.0 and 2.1 are two scales. Comparable but for the resize of the "
        "original's torchvision, which has no antialias in older versions.",
    ),
    "drawbench": Suite(
        "drawbench@",
        ("hpsv3", "pickscore", "imagereward", "hpsv2.1"),
        comparable="With care: published means differ in pictures a prompt, size, steps and guidance; published PickScores are 26 times "
        "these.",
    ),
    "ocr": Suite(
        "ocr-prompts@",
        ("ocr", "ocr_exact"),
        samples=1,
        comparable="Not comparable across readers and their versions: published numbers are PaddleOCR's.",
    ),
}
