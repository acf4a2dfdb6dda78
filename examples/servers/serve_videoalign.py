"""VideoAlign's VideoReward (arXiv 2501.13918) behind a server, in an environment of its own.

    git clone https://github.com/KwaiVGI/VideoAlign    # its environment.yaml, and its checkpoints, as its README says
    VIDEOALIGN=./VideoAlign VIDEOALIGN_CHECKPOINTS=./checkpoints python examples/servers/serve_videoalign.py --port 8090

Needs imageio with ffmpeg besides. Scores are visual quality + motion quality + text alignment, each standardised by the checkpoint's own
numbers; VIDEOALIGN_SCORE=VQ, MQ or TA serves one of them. A failure is no score: the public trainer that made it -1 could not be told from
one that met bad videos. Not run here with the real model; a test runs this file with one that has the same functions.
"""

import os
import sys
import tempfile

import imageio.v2 as imageio
import numpy as np
from standalone import serve

sys.path.insert(0, os.environ.get("VIDEOALIGN", "VideoAlign"))
from inference import VideoVLMRewardInference

KINDS = ("Overall", "VQ", "MQ", "TA")
kind = os.environ.get("VIDEOALIGN_SCORE", "Overall")
if kind not in KINDS:
    sys.exit(f"VIDEOALIGN_SCORE: got {kind!r}, allowed are {', '.join(KINDS)}")
judge = VideoVLMRewardInference(
    os.environ.get("VIDEOALIGN_CHECKPOINTS", "checkpoints"), device=os.environ.get("VIDEOALIGN_DEVICE", "cuda")
)


def score(frames, prompts, metadata, fps):
    """One score a video, which the model reads from an mp4 file."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, shots in enumerate(frames):
            paths.append(os.path.join(folder, f"{number}.mp4"))
            imageio.mimwrite(paths[-1], [np.asarray(shot) for shot in shots], fps=fps, macro_block_size=2, quality=10)
        return [one[kind] for one in judge.reward(paths, prompts, use_norm=True)]


if __name__ == "__main__":
    serve(score, name=f"videoalign-{kind}", version="VideoReward", about="VideoAlign's VideoReward")
