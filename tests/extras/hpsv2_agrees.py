"""Run where `diffalign[rewards,hpsv2]` is installed: our HPSv2 against the package's own `score`, on the same tiny random weights.

The package wants pictures as files, reads its weights anew for every one, and lacks its vocabulary, which open_clip has.
"""

import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

from diffalign.rewards.load import load
from diffalign.types import Media, Prompts
from reward_models import hpsv2 as ours

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
NAME, VOCABULARY = "tiny-hps", "bpe_simple_vocab_16e6.txt.gz"
TEXTS = ["two red stars", "a photo of a green circle left of a blue square", ""]


def package() -> tuple[Any, Any]:
    """The package's scoring module and its own copy of open_clip, with a vocabulary, which is read when they are imported."""
    spec = importlib.util.find_spec("hpsv2")
    assert spec is not None
    wanted = Path(str(spec.origin)).parent / "src" / "open_clip" / VOCABULARY
    if not wanted.exists():
        shutil.copy(Path(open_clip.__file__).parent / VOCABULARY, wanted)
    return importlib.import_module("hpsv2.img_score"), importlib.import_module("hpsv2.src.open_clip")


def main(folder: Path) -> None:
    img_score, theirs = package()
    (folder / f"{NAME}.json").write_text(json.dumps(TINY))
    for clip in (open_clip, theirs):
        clip.add_model_config(folder)
    torch.manual_seed(0)
    net, _, preprocess = theirs.create_model_and_transforms(
        NAME, None, precision="amp", device="cpu", light_augmentation=True, output_dict=True
    )  # as its initialize_model has it
    torch.save({"state_dict": net.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    img_score.model_dict.update(model=net, preprocess_val=preprocess)
    img_score.initialize_model = lambda: None
    img_score.get_tokenizer = lambda name: theirs.get_tokenizer(NAME)
    ours.HPSv2.architecture = NAME
    reward = load(f"hpsv2.1@{folder / 'HPS_v2.1_compressed.pt'}")
    keys = np.arange(3)
    for side in ((300, 200), (224, 224), (96, 160)):
        pixels = torch.rand(3, 3, *[k // 8 for k in side], generator=torch.Generator().manual_seed(1))
        smooth = torch.nn.functional.interpolate(pixels, side, mode="bilinear").mul(255).round()
        paths = []
        for number, picture in enumerate(smooth.byte().permute(0, 2, 3, 1).numpy()):
            paths.append(str(folder / f"{number}.png"))
            Image.fromarray(picture).save(paths[-1])
        expected = [
            float(img_score.score(path, text, cp=str(folder / "HPS_v2.1_compressed.pt"), hps_version="v2.1")[0])
            for path, text in zip(paths, TEXTS, strict=True)
        ]
        found = reward(Media(smooth[:, None] / 255), Prompts(TEXTS, keys, keys, keys, [{}] * 3)).tolist()
        apart, spread = float(np.abs(np.subtract(found, expected)).max()), float(np.std(expected))
        print(f"{side}: differ by {apart:.1e}, spread {spread:.1e}")
        # Only the order of float32 sums differs: smooth pictures do not overshoot [0, 1] when they are resized, where ours is clamped.
        assert apart < 1e-5 * spread, (side, found, expected)
    print("agrees")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
