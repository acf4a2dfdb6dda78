"""GenEval's verdict (arXiv 2310.11513) with a detector that installs: Mask2Former of transformers finds objects, CLIP names their colours.

GenEval's own detector is Mask2Former Swin-S of mmdet 2, which today's packages cannot install; this one is trained on the same data, its
confidences differ, and scores are "GenEval-like": not comparable with published ones. Thresholds, cap and verdict are the published rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign.ops import geneval
from diffalign.ops.geneval import Detection
from diffalign.rewards.base import Reward, to_uint8
from diffalign.types import Media, Prompts
from reward_models import _clip

REWARDS = {
    "geneval_like": {
        "object": "Official",
        "differentiable": False,
        "modality": "image",
        "needs": ["include", "tag"],
        "about": "GenEval's verdict by another detector: not comparable with published scores",
        "family": "Mask2Former",
        "range": "0 or 1",
        "weights": "facebook/mask2former-swin-small-coco-instance and openai/clip-vit-large-patch14",
        "licence": "MIT",
        "memory": 2.0,
        "extra": "open_clip",
        "shown": "sign",
    },
    "geneval_like_partial": {
        "object": "Partial",
        "differentiable": False,
        "modality": "image",
        "needs": ["include", "tag"],
        "about": "share of what the caption asks for, by the same detector: a training signal",
        "family": "Mask2Former",
        "range": "0 to 1",
        "weights": "facebook/mask2former-swin-small-coco-instance and openai/clip-vit-large-patch14",
        "licence": "MIT",
        "memory": 2.0,
        "extra": "open_clip",
        "shown": "sign",
    },
}
DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # COCO's -> GenEval's
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
CONFIDENT, COUNTED = 0.3, 0.9  # a detection counts above; the second where objects are counted
GREY = 0x99  # what colours are judged against


class Official(Reward):
    """Scores (N,) of first frames, 0 or 1. PLACE is a folder with the detector in `mask2former` and the CLIP in `clip`."""

    def __init__(self, place: str | None = None) -> None:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        own = {part: None if place is None else str(Path(place) / part) for part in ("mask2former", "clip")}
        source = _clip.fetched("geneval_like", own["mask2former"], DETECTOR)
        try:
            net = Mask2FormerForUniversalSegmentation.from_pretrained(source, dtype=torch.float32)
            self.detector = net.requires_grad_(False).eval()
            self.processor = AutoImageProcessor.from_pretrained(source)
        except OSError as error:
            raise FileNotFoundError(_clip.missing("geneval_like", source)) from error
        self.clip = _clip.Towers("geneval_like", CLIP, own["clip"])

    def __call__(self, media: Media, prompts: Prompts) -> list[float]:
        device = media.pixels.device
        pairs = zip(to_uint8(media)[:, 0], prompts.metadata, strict=True)
        return [self.verdict(self.found(picture, wanted, device), wanted) for picture, wanted in pairs]

    def networks(self) -> list[torch.nn.Module]:
        """What may be moved between uses."""
        return [self.detector, self.clip.net]

    def verdict(self, found: list[Detection], wanted: dict[str, Any]) -> float:
        """The published rule."""
        return float(geneval.official(found, wanted).correct)

    def found(self, picture: NDArray[np.uint8], wanted: dict[str, Any], device: torch.device) -> list[Detection]:
        """Detections of the classes that are asked for in a picture (H, W, 3), above the task's threshold."""
        asked = {clause["class"] for clause in (*wanted["include"], *wanted.get("exclude", ()))}
        coloured = {clause["class"] for clause in wanted["include"] if "color" in clause}
        detections = []
        for name, score, mask in self.masks(picture, device):
            if name in asked and mask.any():
                colour = self.colour(picture, mask, name, device) if name in coloured else ""
                detections.append(Detection(name, colour, box(mask), score))
        return geneval.keep(detections, COUNTED if wanted["tag"] == "counting" else CONFIDENT)

    @torch.no_grad()
    def masks(self, picture: NDArray[np.uint8], device: torch.device) -> list[tuple[str, float, NDArray[np.bool_]]]:
        """GenEval's class name, confidence and mask (H, W) of every instance."""
        given = self.processor(images=picture, return_tensors="pt").to(device)
        out = self.detector.to(device)(**given)
        (result,) = self.processor.post_process_instance_segmentation(
            out, threshold=CONFIDENT, target_sizes=[picture.shape[:2]], return_binary_maps=True
        )
        maps, labels = result["segmentation"], self.detector.config.id2label
        if not result["segments_info"]:
            return []  # `maps` is then an empty picture instead
        facts = [(labels[int(item["label_id"])], float(item["score"])) for item in result["segments_info"]]
        return [(NAMES.get(n, n), score, np.asarray(m.cpu()) > 0) for (n, score), m in zip(facts, maps, strict=True)]

    @torch.no_grad()
    def colour(self, picture: NDArray[np.uint8], mask: NDArray[np.bool_], name: str, device: torch.device) -> str:
        """The colour that CLIP gives an object cut out on grey, over three templates."""
        left, top, right, bottom = (int(edge) for edge in box(mask))
        cut = np.where(mask[..., None], picture, GREY)[top:bottom, left:right]
        pixels = torch.from_numpy(cut).permute(2, 0, 1)[None].to(device).float() / 255
        texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
        words = self.clip.text(texts).to(device).reshape(len(COLOURS), len(TEMPLATES), -1).mean(1)
        likeness: Tensor = torch.nn.functional.normalize(words, dim=-1) @ self.clip.image(pixels)[0]
        return COLOURS[int(likeness.argmax())]


class Partial(Official):
    """The same with a share of what is asked for, in [0, 1]."""

    def networks(self) -> list[torch.nn.Module]:
        """What may be moved between uses."""
        return [self.detector, self.clip.net]

    def verdict(self, found: list[Detection], wanted: dict[str, Any]) -> float:
        return geneval.partial(found, wanted)


def box(mask: NDArray[np.bool_]) -> geneval.Box:
    """Left, top, right and bottom edge of a mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
