"""Decoding in parts gives the picture that decoding whole does."""

import pytest
import torch

from diffalign.errors import UserError
from diffalign.models import decoding, loading
from tests.families import build


@pytest.mark.parametrize(("name", "latent"), [("SD 1.5", (2, 4, 16, 16)), ("Wan 2.1", (2, 16, 2, 16, 16))])
def test_m23_parts_equal_the_whole(name, latent):
    pipe = build(name)
    channels = getattr(pipe.vae.config, "latent_channels", None) or pipe.vae.config.z_dim
    x = torch.randn(latent[0], channels, *latent[2:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = pipe.vae.decode(x, return_dict=False)[0]
        decoding.cut(pipe, "sliced")
        sliced = pipe.vae.decode(x, return_dict=False)[0]
        decoding.cut(pipe, "tiled")
        tiled = pipe.vae.decode(x, return_dict=False)[0]
    for parts in (sliced, tiled):
        assert parts.shape == whole.shape
        # A norm of hardly anything makes much of a rounding here and there.
        assert float((parts - whole).norm() / whole.norm()) < 1e-3


def test_what_cannot_be_cut_says_so():
    class Pipe:
        vae = torch.nn.Identity()

    with pytest.raises(UserError, match=r"memory\.decode: got tiled, which a Identity cannot"):
        decoding.cut(Pipe(), "tiled")
    decoding.cut(Pipe(), "whole")


@pytest.mark.parametrize("name", ["shapes-sd3", "shapes-sd", "shapes-flux"])
def test_tiles_of_a_tiny_autoencoder_are_refused(name):
    """They are pieced together at another size than they are decoded at."""
    pipe, _ = loading.load(name)
    with pytest.raises(UserError, match=r"memory\.decode: got tiled, an AutoencoderTiny's tiles do not fit together"):
        decoding.cut(pipe, "tiled")
    decoding.cut(pipe, "sliced")
