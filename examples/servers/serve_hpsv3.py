"""HPSv3 (arXiv 2508.03789) behind a server, in an environment of its own: it needs transformers 4.45.

    python -m venv hpsv3 && hpsv3/bin/pip install hpsv3
    hpsv3/bin/python examples/servers/serve_hpsv3.py --port 8090

Scores are the mean mu of its Gaussian, about -5 to 15. It has been seen to give broken pictures more than 15: do not train on it alone.
Not run here with the real package; a test runs this file with one that has the same functions.
"""

import os
import tempfile

from hpsv3 import HPSv3RewardInferencer
from standalone import serve

judge = HPSv3RewardInferencer(device=os.environ.get("HPSV3_DEVICE", "cuda"))


def score(frames, prompts, metadata, fps):
    """mu of every sample's first frame."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, shots in enumerate(frames):
            paths.append(os.path.join(folder, f"{number}.png"))
            shots[0].save(paths[-1])
        # By keyword: the order of the two changed between its versions.
        found = judge.reward(prompts=prompts, image_paths=paths)
        return [float(one[0]) for one in found]  # mu and sigma


if __name__ == "__main__":
    serve(score, name="hpsv3", version="HPSv3.safetensors", about="HPSv3: mu, first frame of a video")
