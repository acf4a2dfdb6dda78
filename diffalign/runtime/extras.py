"""Optional parts: which module belongs to which package and extra of this one. The only table of them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """An optional module: the package that brings it, and the extra of ours that installs that."""

    package: str
    extra: str

    @property
    def install(self) -> str:
        """The command."""
        return f"pip install 'diffalign[{self.extra}]'"


# module -> where it comes from
PARTS = {
    "open_clip": Part("open_clip_torch", "rewards"),
    "torchvision": Part("torchvision", "rewards"),
    "hpsv2": Part("hpsv2", "hpsv2"),
    "rapidocr": Part("rapidocr", "ocr"),
    "onnxruntime": Part("onnxruntime", "ocr"),
    "xformers": Part("xformers", "xformers"),
    "torchao": Part("torchao", "quantize"),
    "bitsandbytes": Part("bitsandbytes", "quantize"),
    "imageio": Part("imageio", "video"),
    "fastapi": Part("fastapi", "server"),
    "uvicorn": Part("uvicorn", "server"),
    "pyarrow": Part("pyarrow", "prompts"),
    "tensorboard": Part("tensorboard", "trackers"),
    "wandb": Part("wandb", "trackers"),
    "trackio": Part("trackio", "trackio"),
    "optuna": Part("optuna", "tune"),
    "ray": Part("ray", "ray"),
}


def missing(module: str) -> str:
    """The command that installs an optional module that is not there; empty if it is."""
    return "" if importlib.util.find_spec(module) is not None else PARTS[module].install
