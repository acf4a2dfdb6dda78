"""GenEval's own evaluation (arXiv 2310.11513) behind a server, in the environment that its README describes (mmdet 2, CUDA).

    git clone https://github.com/djghosh13/geneval     # its environment, and `evaluation/download_models.sh MODELS`
    GENEVAL=./geneval GENEVAL_MODELS=./MODELS python examples/servers/serve_geneval.py --port 8090

Its code judges, with its thresholds; a score is 1 where it finds a picture correct, else 0. Prompts must have GenEval's metadata:
`prompts.source: geneval@evaluation_metadata.jsonl` or `geneval-like`. Not run here with the real detector; a test runs this file with a
module that has the same functions.
"""

import os
import sys
import tempfile
from types import SimpleNamespace

from standalone import serve

sys.path.insert(0, os.path.join(os.environ.get("GENEVAL", "geneval"), "evaluation"))
import evaluate_images as official
import mmdet

CONFIG = "../configs/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py"
# What its own main() sets, with its defaults.
official.args = SimpleNamespace(
    model_config=os.environ.get("GENEVAL_CONFIG", os.path.join(os.path.dirname(mmdet.__file__), CONFIG)),
    model_path=os.environ.get("GENEVAL_MODELS", "./"),
    options={},
)
official.object_detector, clip, official.classnames = official.load_models(official.args)
official.clip_model, official.transform, official.tokenizer = clip
official.THRESHOLD, official.COUNTING_THRESHOLD = 0.3, 0.9
official.MAX_OBJECTS, official.NMS_THRESHOLD, official.POSITION_THRESHOLD = 16, 1.0, 0.1


def score(frames, prompts, metadata, fps):
    """Its verdict on every sample's first frame, which it reads from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "picture.png")
        found = []
        for shots, wanted in zip(frames, metadata):  # noqa: B905 - Python 3.8 has no strict
            shots[0].save(path)
            found.append(float(official.evaluate_image(path, wanted)["correct"]))
        return found


if __name__ == "__main__":
    serve(score, name="geneval", version="djghosh13/geneval", needs=("tag", "include"), about="GenEval's own verdict")
