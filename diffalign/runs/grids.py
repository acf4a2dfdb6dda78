"""Samples that a run kept beside its grids: always the same prompts and noises. Needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffalign.errors import Fault, one_line


def stored(path: Path) -> NDArray[np.uint8]:
    """Samples (n, H, W, 3) that were kept.

    Raises:
        Fault: if the file is damaged.
    """
    try:
        with np.load(path) as archive:
            if archive.zip.testzip() is not None:  # numpy reads an array's bytes without a look at their sum
                raise ValueError("its sum is another")
            images = archive["images"]
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"it holds {images.dtype} {images.shape}")
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise Fault(f"{path}: damaged ({one_line(error)}); delete it to go on without it") from error
    return images
