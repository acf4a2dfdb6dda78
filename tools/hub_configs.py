"""`python -m tools.hub_configs [--write]`: the configs for models on the hub, each a whole file, from one table of families.

Without --write it says which files differ from what the table makes. A setting that is to be another for one config alone does not belong
here: copy the config.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from diffalign.models.families import table
from diffalign.runtime.yaml_text import flow
from tools.made import keep

RULES = {
    "awm": "{name: awm}",
    "branch_grpo": "{name: branch_grpo, splits: [0, 1, 2], window: [0, 3], step_weight: equal}",
    "ddpo": "{name: ddpo}",
    "flow_grpo": "{name: flow_grpo, window: [0, 5], kl: 0.01, clip: 1.0e-4}",
    "grpo_guard": "{name: grpo_guard, window: [0, 5]}",
    "nft": "{name: nft}",
    "truncated_bp": "{name: truncated_bp, depth: 1}",
}
# prompts an update and samples each, micro-batch, learning rate
IMAGES, VIDEOS = (4, 16, 4, "3.0e-4"), (2, 8, 1, "3.0e-4")
BY_RULE = {"truncated_bp": (8, 1, 1, "1.0e-4"), "branch_grpo": (4, 2, 4, "3.0e-4")}
# what is trained on, what is held out, and a comment
JUDGES = {
    "pickscore": ("{pickscore: 1.0}", "[clipscore, hpsv2.1]       # held out"),
    "hpsv3": (
        "{hpsv3: 1.0}  # its question first: diffalign rewards fetch hpsv3",
        "[pickscore, clipscore]     # held out",
    ),
    "videoreward": (
        "{videoreward_vq: 1.0, videoreward_mq: 1.0, videoreward_ta: 1.0}  # first: diffalign rewards fetch videoreward",
        "[motion, clipscore]        # held out; videos that stand still score high",
    ),
}
PROMPTS = "source: geneval-like, tasks: [counting, colors], cache: runs/encoded"
TEMPLATE = """\
# yaml-language-server: $schema=../schema.json
# diffalign train configs/{rule}/{preset}.yaml
#
# Not run: it needs a GPU and the weights of {model}
# ({terms}; its card decides). Published: {published}
# A test trains it for two updates on a pipeline of the same class with tiny random weights.
model: {model}
rule: {rule_line}
rewards: {rewards}
eval_rewards: {held_out}
prompts: {{{prompts}, groups: {groups}, group_size: {size}}}  # or your own .txt or .jsonl
sampler:
  process: {process}
  noise_level: {noise}
  steps: {steps}
  guidance_scale: {guidance}
  pipeline_args: {call}{fps}
lora: {lora}
optimizer: {{lr: {lr}, ema: 0.9, micro_batch: {micro_batch}}}
memory: {{checkpoint: auto}}
evaluation: {{images_per_prompt: 1, prompts: 64, every: 50}}
output: {{samples: 8}}
precision: bfloat16
updates: 300
seed: 0
"""


def families() -> dict[str, dict[str, Any]]:
    """The table, by the configs' name."""
    return table()


def configs() -> dict[Path, str]:
    """Every config's path in the repository and its text."""
    made = {}
    for name, facts in families().items():
        wanted = [(name, rule, "pickscore") for rule in facts["rules"]]
        wanted += [(f"{judge}-{name}", rule, judge) for rule, judge in facts.get("judged", {}).items()]
        for preset, rule, judge in wanted:
            made[Path("configs") / rule / f"{preset}.yaml"] = text(preset, rule, judge, facts)
    return made


def text(preset: str, rule: str, judge: str, facts: dict[str, Any]) -> str:
    """One config."""
    usual = VIDEOS if "num_frames" in facts["call"] else IMAGES
    groups, size, micro_batch, lr = BY_RULE.get(rule, usual)
    written = {key: flow(facts[key]) for key in ("call", "lora", "guidance")}
    written["fps"] = f"\n  fps: {facts['fps']}" if "fps" in facts else ""
    written["noise"] = facts.get("noise", {"flow_sde": 0.7, "ddim": 1.0}.get(facts["process"]))
    rewards, held_out = JUDGES[judge]
    return TEMPLATE.format(
        **{**facts, **written},
        preset=preset,
        rule=rule,
        rule_line=facts["rules"].get(rule) or RULES[rule],
        rewards=rewards,
        held_out=held_out,
        prompts=PROMPTS,
        groups=groups,
        size=size,
        micro_batch=micro_batch,
        lr=lr,
    )


def main(write: bool) -> int:
    """Write the files, or say which differ; the exit code is how many do."""
    return keep(configs(), write)


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv))
