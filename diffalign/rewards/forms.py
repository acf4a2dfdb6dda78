"""Pictures as rewards of other trainers take them: tensors, arrays, PIL, files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffalign.errors import Fault
from diffalign.rewards.base import to_uint8
from diffalign.rewards.takes import Takes
from diffalign.runtime.extras import missing
from diffalign.types import Media

LEAST = 8  # pixels of a side: a smaller one could as well be channels


@contextmanager
def handed(media: Media, takes: Takes, device: torch.device) -> Iterator[Any]:
    """Every sample in the form that is taken, files for as long as the context lasts.

    A batch of tensors or arrays is one of them, (N, 3, H, W), (N, H, W, 3), or with frames after N if whole clips are taken; all else is a
    list.

    Raises:
        Fault: for pictures with a side under 8 pixels.
    """
    height, width = media.pixels.shape[-2:]
    if min(height, width) < LEAST:
        raise Fault(f"pictures of {height} x {width} pixels, allowed are sides of at least {LEAST}")
    if takes.form == "path":
        with tempfile.TemporaryDirectory(prefix="diffalign-") as folder:
            yield _files(media, Path(folder), takes.clips)
    elif takes.form == "float":
        pixels = media.pixels.to(device)
        pixels = pixels * 2 - 1 if takes.signed else pixels
        yield pixels if takes.clips else pixels[:, 0]
    else:
        frames = to_uint8(media)
        yield _of_bytes(frames if takes.clips else frames[:, 0], takes, device)


def _of_bytes(frames: NDArray[np.uint8], takes: Takes, device: torch.device) -> Any:
    """Bytes (N, H, W, 3), or clips (N, F, H, W, 3), in another form."""
    if takes.form == "nhwc":
        return list(frames) if takes.one else frames
    if takes.form == "uint8":
        return torch.from_numpy(np.moveaxis(frames, -1, -3).copy()).to(device)
    return pil(frames)


def pil(frames: NDArray[np.uint8]) -> list[Any]:
    """Pictures (N, H, W, 3) as a list of PIL's, clips (N, F, H, W, 3) as a list of lists."""
    if frames.ndim == 5:
        return [pil(clip) for clip in frames]
    return [Image.fromarray(frame) for frame in frames]


def _files(media: Media, folder: Path, clips: bool) -> list[str]:
    """A file for each sample: PNG, or mp4 without loss at the clip's own speed."""
    paths = []
    for number, frames in enumerate(to_uint8(media)):
        path = folder / f"{number:05}{'.mp4' if clips else '.png'}"
        if clips:
            _film(path, frames, media.fps)
        else:
            Image.fromarray(frames[0]).save(path, compress_level=1)
        paths.append(str(path))
    return paths


def _film(path: Path, frames: NDArray[np.uint8], fps: float | None) -> None:
    if fps is None:
        raise Fault("takes files of videos, and how many frames a second they have is not said; sampler.fps says it")
    if mend := missing("imageio"):
        raise Fault(f"takes files of videos, which need imageio; {mend}")
    from imageio.v2 import mimwrite

    exact: dict[str, Any] = {"codec": "libx264rgb", "pixelformat": "rgb24", "output_params": ["-crf", "0"]}
    mimwrite(path, list(frames), fps=fps, macro_block_size=1, **exact)
