"""Davidsonian Scene Graph (arXiv 2310.18235): the share of a prompt's yes-no questions that hold, as DPG-Bench counts them.

A prompt's metadata say them, and which hang on which: "scene_graph": [{"question": "Is there a hat?"}, {"question": "Is the hat red?",
"parents": [0]}, ...]. The verdict on a question is the likelier of yes and no of a vision-language model in process.
"""

from __future__ import annotations

from typing import ClassVar

from diffalign.ops import scene_graph
from diffalign.types import Media, Prompts
from reward_models import _first_token
from reward_models._first_token import Asking, FirstToken, Question, said

REWARDS = {
    "dsg": {
        "object": "SceneGraph",
        "differentiable": False,
        "modality": "image",
        "needs": ["scene_graph"],
        "about": "share of a prompt's yes-no questions that hold; one that hangs on another holds only if that does",
        "range": "0 to 1",
        "memory": 16.3,
        "kept": 2.3,
        "weights": "Qwen/Qwen3-VL-8B-Instruct",
        "licence": "Apache-2.0",
        "family": "zero-shot VLM",
        "ordered": True,
    }
}
REPO = str(REWARDS["dsg"]["weights"])
SHORT = "Please answer yes or no."
YES, NO = said("yes"), said("no")


class SceneGraph(Asking):
    """Scores (N,)."""

    words: ClassVar[str] = "yes and no"

    def __init__(self, place: str | None = None, quantize: str = "none") -> None:
        self.model = FirstToken.load("dsg", REPO, place, quantize)
        self.model.apart(YES, NO)

    def __call__(self, media: Media, prompts: Prompts) -> list[float]:
        graphs = [metadata["scene_graph"] for metadata in prompts.metadata]
        questions = [
            Question(row, f"{asked['question']} {SHORT}", (YES, NO))
            for row, graph in enumerate(graphs)
            for asked in graph
        ]
        log_p = self.model.ask(media.pixels[:, :1], questions)
        self.left = _first_token.outside(log_p)
        verdicts = iter((log_p[:, 0] > log_p[:, 1]).tolist())
        scores = []
        for graph in graphs:
            holds = scene_graph.holding([next(verdicts) for _ in graph], [asked.get("parents", []) for asked in graph])
            scores.append(sum(holds) / len(holds))
        return scores
