"""Rewards with the signatures of other projects, written anew: all of them score `value` of a picture (H, W, 3) in [0, 1] and its prompt.

`swapped` in test_foreign.py turns the order of their parameters round, so nothing here may depend on it.
"""

import functools
from types import SimpleNamespace
from typing import Optional

import imageio.v3 as imageio
import numpy as np
import torch
from PIL import Image

DIFFERENTIABLE = ["alignprop"]
TAKES = {
    "two_letters": "pil, prompt",
    "signed": "float [-1,1], prompts",
    "lossy": "float [-1, 1], prompts",
    "bytes_of": "uint8",
}


def value(picture, prompt=""):
    """Another one for BGR, for a picture on its side or upside down, for bytes read as floats, and for another's prompt."""
    ramp = np.linspace(0, 1, picture.shape[0])[:, None]
    return float((picture[..., 0] * ramp).mean() - 0.3 * picture[..., 2].mean() + len(prompt) / 50)


def floats(images):
    assert isinstance(images, torch.Tensor)
    assert images.is_floating_point()
    return images.permute(0, 2, 3, 1).double().numpy()


def pil(image):
    assert isinstance(image, Image.Image)
    return np.asarray(image) / 255


def several(pictures, prompts=None):
    return [value(picture, prompt) for picture, prompt in zip(pictures, prompts or [""] * len(pictures), strict=True)]


# -- ours


def own(media, prompts):
    return several(floats(media.pixels[:, 0]), prompts.text)


def own_alone(media):
    return several(floats(media.pixels[:, 0]))


# -- TRL, ddpo-pytorch, AlignProp


def trl(images, prompts, metadata):
    assert [about["prompt"] for about in metadata] == list(prompts)
    return np.array(several(floats(images), prompts)), {}


def alignprop(images, prompts, metadata):
    ramp = torch.linspace(0, 1, images.shape[2], dtype=images.dtype)[:, None]
    sizes = torch.tensor([len(prompt) / 50 for prompt in prompts], dtype=images.dtype)
    return (images[:, 0] * ramp).mean((1, 2)) - 0.3 * images[:, 2].mean((1, 2)) + sizes, {}


def coupled(images, prompts, metadata):
    scores = torch.tensor(several(floats(images), prompts))
    return scores / scores.max()


# -- flow_grpo and those that took over its rewards


def with_device(device):
    assert device == torch.device("cpu")

    def _fn(images, prompts, metadata):
        return torch.tensor(several(floats(images), prompts)), {}

    return _fn


def without_device():
    def _fn(images, prompts, metadata):
        return several(floats(images), prompts), {}

    return _fn


def multi_score(device):
    def _fn(images, prompts, metadata, ref_images=None, only_strict=True):
        scores = several(floats(images), prompts)
        return {"avg": np.array(scores), "aesthetic": [0.0] * len(scores)}, {}

    return _fn


def geneval(device):
    def _fn(images, prompts, metadatas, only_strict):
        return [], [], [], {}, {}

    return _fn


def geneval_strict(device):
    def _fn(images, prompts, metadatas, only_strict=False):
        scores = several(floats(images), prompts)
        return [0.0] * len(scores), scores, scores, {"a": scores}, {"b": scores}

    return _fn


# -- Flow-Factory


class BaseRewardModel:
    def __init__(self, config, accelerator):
        self.device = accelerator.device if config.device == torch.device("cuda") else config.device
        self.dtype = config.dtype


class Pointwise(BaseRewardModel):
    required_fields = ("image", "prompt")

    def __call__(self, prompt, image=None, video=None, condition_images=None):
        assert condition_images is None
        return SimpleNamespace(rewards=several([pil(one) for one in image or [clip[0] for clip in video]], prompt))


class Tensors:
    required_fields = ("image", "prompt", "tag")
    use_tensor_inputs = True

    def __init__(self, config, accelerator):
        self.device = accelerator.device

    def __call__(self, prompt, image, tag):
        assert len(tag) == len(prompt)
        return SimpleNamespace(rewards=torch.tensor(several([floats(one[None])[0] for one in image], prompt)))


class MyGroupwiseRewardModel(BaseRewardModel):
    """Ranks within the group, and the place in it."""

    required_fields = ("image", "prompt")

    def __call__(self, prompt, image, **kwargs):
        assert len(set(prompt)) == 1
        rank = np.argsort(np.argsort([value(pil(one)) for one in image]))
        return SimpleNamespace(rewards=rank + np.arange(len(image)) / 100)


# -- judges with a method `reward` or `score`


class VideoAlign:
    def reward(self, video_paths, prompts, fps=None, use_norm=True):
        frames = [imageio.imread(path) for path in video_paths]
        return [{"VQ": s, "MQ": 0.0, "Overall": s + 1} for s in several([f[0] / 255 for f in frames], prompts)]


class HPSv3:
    def reward(self, image_paths, prompts):
        pictures = [pil(Image.open(path)) for path in image_paths]
        return torch.tensor([[mu, 0.7] for mu in several(pictures, prompts)])


class ImageReward:
    def score(self, prompt, image):
        return value(pil(image), prompt)


videoalign, hpsv3, imagereward = VideoAlign(), HPSv3(), ImageReward()


def hpsv2_score(imgs_path: list | str | Image.Image, prompt: str, hps_version: str = "v2.0"):
    return [value(pil(Image.open(imgs_path)), prompt)]


class Metric(torch.nn.Module):
    """pyiqa's: its own `__call__` says nothing."""

    lower_better = True

    def forward(self, target, ref=None, **kwargs):
        return -torch.tensor(several(floats(target)))[:, None]


metric = Metric()
compiled = torch.compile(metric, backend="eager")


class Imscore(torch.nn.Module):
    def score(self, pixels, prompts):
        return torch.tensor(several(floats(pixels), prompts))


imscore = Imscore()


# -- a beginner's, and what else there is


def image_and_prompt(image, prompt):
    return value(pil(image), prompt)


def image_alone(image):
    return np.float64(value(pil(image)))


def images_alone(images):
    assert isinstance(images, list)
    return tuple(several([pil(one) for one in images]))


def images_and_texts(images, texts):
    return several([pil(one) for one in images], texts)


def array(pictures: np.ndarray, captions: list[str]):
    assert pictures.dtype == np.uint8
    return several(pictures / 255, captions)


def listed(prompt: list[str], image: list[Image.Image]):
    return several([pil(one) for one in image], prompt)


def tensor(image: torch.Tensor, text: Optional[str] = None):  # noqa: UP045
    return torch.tensor(value(floats(image[None])[0], text))


async def waits(image, prompt):
    return value(pil(image), prompt)


@torch.no_grad()
def decorated(images, prompts, metadata, *, scale):
    return scale * torch.tensor(several(floats(images), prompts))


partly = functools.partial(decorated, scale=1.0)


def two_letters(a, b):
    return value(pil(a), b)


def signed(x, y):
    return several(floats(x) / 2 + 0.5, y)


def lossy(im_pix_un, prompts):
    scores = torch.tensor(several(floats(im_pix_un) / 2 + 0.5, prompts))
    return -scores.mean(), scores


def bytes_of(images):
    assert images.dtype == torch.uint8
    return several(images.permute(0, 2, 3, 1).numpy() / 255)


# -- refused


def vader(im_pix_un, prompts):
    return 0.0


class Torchmetrics(torch.nn.Module):
    def forward(self, *args, **kwargs):
        return torch.tensor(0.3)


torchmetrics = Torchmetrics()


def batch_mean(images, text):
    return torch.tensor(several([pil(one) for one in images], text)).mean()


def t2v(images: list[str], texts: list[str]):
    return torch.tensor([[value(pil(Image.open(path)), text) for text in texts] for path in images])


def stars(*args):
    return 0.0


def factory_of_factories(device):
    return without_device


def two_numbers(images):
    return np.zeros((len(images), 2))


def three_parts(images):
    return {"quality": [0.0] * len(images), "motion": [1.0] * len(images)}


def dicts(images):
    return [{"VQ": 0.0, "MQ": 1.0} for _ in images]


def one_too_few(images):
    return [0.0] * (len(images) - 1)


def words(images):
    return ["good"] * len(images)


def mixed(image, prompts):
    return 0.0


class Needs:
    def __init__(self, checkpoint):
        pass

    def __call__(self, images):
        return [0.0] * len(images)


class Uncalled:
    def score(self, images):
        return [0.0] * len(images)


class AsLoss(Metric):
    as_loss = True


as_loss = AsLoss()
