"""diffalign: align image and video diffusion models with a reward; the update rule is one word in the config."""

__version__ = "0.1.0"
