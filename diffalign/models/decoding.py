"""How a pipeline's autoencoder decodes."""

from __future__ import annotations

from typing import Any

from diffalign.errors import UserError


def cut(pipe: Any, how: str) -> None:
    """Let finished latents be decoded whole, "sliced" (sample by sample), or "tiled" (sample by sample, in overlapping tiles).

    Raises:
        UserError: if its class cannot.
    """
    vae = getattr(pipe, "vae", None)
    if how == "tiled" and type(vae).__name__ == "AutoencoderTiny":
        raise UserError(
            "memory.decode: got tiled, an AutoencoderTiny's tiles do not fit together; allowed are whole, sliced"
        )
    for name in {"whole": (), "sliced": ("enable_slicing",), "tiled": ("enable_slicing", "enable_tiling")}[how]:
        try:
            getattr(vae, name)()
        except (AttributeError, NotImplementedError) as error:
            raise UserError(
                f"memory.decode: got {how}, which a {type(vae).__name__} cannot; allowed is whole"
            ) from error
