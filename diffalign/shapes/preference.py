"""A small preference network on 64 x 64 pictures and what their captions ask for: the shapes world's PickScore.

Densities of the 24 kinds of object (shape and colour) over a 16 x 16 grid are added up into those that fit each clause of the
caption and the rest; their counts and centres meet the caption in a small head. Every operation is smooth, so the score has a
gradient to the pixels everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.shapes.captions import RELATIONS
from diffalign.shapes.world import COLOURS, SHAPES
from diffalign.shapes.world import SIZE as SIZE

KINDS = len(SHAPES) * len(COLOURS)
GRID = SIZE // 4
FOLDER = Path(__file__).parent / "weights" / "preference"
COUNTS = 4  # a caption asks for one to four of a kind
SLOT = len(SHAPES) + len(COLOURS) + 1 + COUNTS
FEATURES = 2 * SLOT + len(RELATIONS)


def features(metadata: list[dict[str, Any]]) -> Tensor:
    """What captions ask for, (n, 34) of 0 and 1: shape, colour or none, count of two clauses, and the second's relation.

    Raises:
        ValueError: if a caption has more than two clauses or words of another world.
    """
    rows = torch.zeros(len(metadata), FEATURES)
    for row, wanted in zip(rows, metadata, strict=True):
        if len(wanted["include"]) > 2:
            raise ValueError(f"{wanted.get('prompt')!r} has more than two clauses")
        for slot, clause in enumerate(wanted["include"]):
            start, colour = slot * SLOT, clause.get("color")
            row[start + SHAPES.index(clause["class"])] = 1
            row[start + len(SHAPES) + (COLOURS.index(colour) if colour else len(COLOURS))] = 1
            row[start + SLOT - COUNTS + min(int(clause["count"]), COUNTS) - 1] = 1
            if "position" in clause:
                row[2 * SLOT + list(RELATIONS).index(clause["position"][0])] = 1
    return rows


def matching(wanted: Tensor) -> Tensor:
    """Which kinds fit each clause, (n, 2, 24) of 0 and 1, from caption features; without a colour every one fits."""
    slots = wanted[:, : 2 * SLOT].unflatten(1, (2, SLOT))
    shape, colour = slots[..., : len(SHAPES)], slots[..., len(SHAPES) : len(SHAPES) + len(COLOURS)]
    any_colour = slots[..., len(SHAPES) + len(COLOURS), None]
    return (shape[..., :, None] * (colour + any_colour)[..., None, :]).flatten(2)


class PreferenceNet(nn.Module):
    """Scores (n,) of pictures (n, 3, 64, 64) in [0, 1] for caption features (n, 34); a right picture is near 1, any other near 0.

    Args:
        widths: channels at 32, 16 and 16 pixels.
        kernel: of the first convolution.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, widths: tuple[int, int, int], kernel: int) -> None:
        super().__init__()
        first, second, third = widths
        self.trunk = nn.Sequential(
            nn.Conv2d(3, first, kernel, stride=2, padding=kernel // 2),
            nn.SiLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(second, third, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(third, third, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(third, third, 3, padding=1),
            nn.SiLU(),
        )
        self.density = nn.Conv2d(third, KINDS, 1)
        self.head = nn.Sequential(
            nn.Linear(4 * 3 + third + FEATURES, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 1)
        )
        grid = torch.linspace(-1, 1, GRID)
        self.register_buffer("grid", torch.stack(torch.meshgrid(grid, grid, indexing="xy")), persistent=False)
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        nn.init.constant_(self.density.bias, -7.0)  # type: ignore[arg-type]

    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Density of every kind (n, 24, 16, 16), and the mean of what was seen (n, channels)."""
        seen = self.trunk(2 * pixels - 1)
        return F.softplus(self.density(seen)), seen.mean((2, 3))

    def judge(self, density: Tensor, seen: Tensor, wanted: Tensor) -> Tensor:
        """Scores (n,) before calibration."""
        both = matching(wanted)
        rest = 1 - both.sum(1, keepdim=True).clamp(max=1)
        groups = torch.cat([both, rest], 1)  # kinds of the first clause, of the second, of neither
        maps = torch.einsum("ngk,nkhw->nghw", groups, density)
        counts = maps.sum((2, 3))
        centres = torch.einsum("nghw,chw->ngc", maps, self.grid) / (counts[..., None] + 0.1)
        peaks = torch.einsum("nghw,nghw->ng", maps, maps)  # one sharp object is not four faint ones
        pooled = [counts, centres.flatten(1), peaks, seen, wanted]
        return self.head(torch.cat(pooled, 1))[:, 0]

    def forward(self, pixels: Tensor, wanted: Tensor) -> Tensor:
        return (self.judge(*self.look(pixels), wanted) - self.offset) * self.scale


NETS: dict[str, dict[str, Any]] = {
    "shapes_pref": {"widths": (16, 32, 48), "kernel": 5},
    "shapes_judge": {"widths": (20, 24, 40), "kernel": 3},
}


def load(name: str) -> PreferenceNet:
    """A shipped network, frozen."""
    from safetensors.torch import load_file

    net = PreferenceNet(**NETS[name])
    net.load_state_dict({key: value.float() for key, value in load_file(FOLDER / f"{name}.safetensors").items()})
    return net.eval().requires_grad_(False)
