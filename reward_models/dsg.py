"""Davidsonian Scene Graph (arXiv 2310.18235): the share of a prompt's yes-no questions that hold, as DPG-Bench counts them.

A prompt's metadata say them, and which hang on which: "scene_graph": [{"question": "Is there a hat?"}, {"question": "Is the hat red?",
"parents": [0]}, ...]. The verdict on a question is the likelier of yes and no of a vision-language model in process.
"""

from __future__ import annotations

from diffalign.ops import scene_graph
from diffalign.types import Media, Prompts
from reward_models._asking import YesNo

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


class SceneGraph(YesNo):
    """Scores (N,)."""

    def __init__(self, place: str | None = None, quantize: str = "none") -> None:
        super().__init__("dsg", REPO, place, quantize)

    def __call__(self, media: Media, prompts: Prompts) -> list[float]:
        graphs = [metadata["scene_graph"] for metadata in prompts.metadata]
        questions = [(row, f"{asked['question']} {SHORT}") for row, graph in enumerate(graphs) for asked in graph]
        log_p = self.yes_no(media.pixels[:, :1], questions)
        verdicts = iter((log_p[:, 0] > log_p[:, 1]).tolist())
        scores = []
        for graph in graphs:
            holds = scene_graph.holding([next(verdicts) for _ in graph], [asked.get("parents", []) for asked in graph])
            scores.append(sum(holds) / len(holds))
        return scores
