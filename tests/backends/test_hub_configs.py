"""Configs of pipelines on the hub: two updates each on a pipeline of the same class with tiny random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from diffalign import config
from diffalign.models import encoders
from diffalign.planning import cost
from diffalign.runs.folder import open_run, read_rows
from diffalign.runs.progress import Reporter
from diffalign.runs.session import Session
from diffalign.shapes import models
from tests.families import FAMILIES, folder
from tests.kit import ROOT
from tests.kit.helpers import SMALL, THREE_STEPS
from tools import hub_configs

HUB = {facts["model"]: facts["tried_on"] for facts in hub_configs.families().values()}  # hub id -> the tiny form
CONFIGS = [
    str(path.relative_to(config.folders()[0]).with_suffix(""))
    for path in sorted(config.folders()[0].rglob("*.yaml"))
    if config.load(str(path)).model not in models.names()
]


def test_the_configs_are_what_the_table_of_families_makes():
    """`python -m tools.hub_configs --write` makes them."""
    made = hub_configs.configs()
    assert sorted(str(path.relative_to("configs").with_suffix("")) for path in made) == sorted(CONFIGS)
    assert [path for path, text in made.items() if (ROOT / path).read_text() != text] == []


def test_every_family_has_a_tiny_form_and_a_config():
    assert set(HUB.values()) == set(FAMILIES)


def tiny(name: str, run_dir: Path) -> config.Config:
    """A hub config as it is, but for what makes it small and for rewards without weights."""
    published = config.load(name)
    family, rule = HUB[published.model], name.split("/")[0]
    guide = {k: v for k, v in published.sampler.pipeline_args.items() if k in ("true_cfg_scale", "negative_prompt")}
    reward = "soft_colour" if rule in ("truncated_bp", "rlr") else "jpeg_compressibility"
    return config.load(
        name,
        [
            *SMALL,
            *THREE_STEPS.get(rule, []),
            f"model={folder(family)}",
            f"sampler.pipeline_args={json.dumps({**FAMILIES[family].call, **guide})}",
            f"rewards={{{reward}: 1.0}}",
            "eval_rewards=[]",
            "prompts.source=shapes",  # fewer to encode
            "prompts.tasks=[]",
            "lora.rank=4",
            "evaluation.enabled=false",
            *(["sampler.steps=4"] if family == "Wan 2.2" else []),  # the last noisy one is the second expert's
            f"run_dir={run_dir}",
            f"prompts.cache={run_dir.parent / 'encoded'}",
        ],
    )


# Of each kind of network and text one, in every run of the suite: ten seconds each.
FEW = {"SDXL", "FLUX.1-dev", "Z-Image", "CogView4", "Wan 2.2"}


def one_a_family() -> list:
    """Every config; after a family's first the others are slow."""
    seen: set[str] = set()
    params = []
    for name in CONFIGS:
        family = HUB[config.load(name).model]
        others = [] if family in FEW else [pytest.mark.wide]
        params.append(pytest.param(name, marks=[pytest.mark.slow] if family in seen else others))
        seen.add(family)
    return params


@pytest.mark.parametrize("name", one_a_family())
def test_a_config_for_the_hub_trains_its_kind_of_pipeline(name, tmp_path):
    settings = tiny(name, tmp_path / "run")
    made = Session(settings, open_run(settings, fresh=False), Reporter(quiet=True))
    assert encoders.present(made.parts.pipe) == [] or "cogview4" in name
    made.run()
    made.folder.close()
    files = sorted((tmp_path / "run" / "adapter").glob("*.safetensors"))
    assert len(files) == (2 if "wan22" in name else 1)
    for file in files:
        assert any(tensor.abs().max() > 0 for key, tensor in load_file(file).items() if "lora_B" in key or "up" in key)
    rows = [row for row in read_rows(tmp_path / "run") if "seconds/total" in row]
    assert len(rows) == 2
    assert all(np.isfinite(row["grad_norm"]) for row in rows)
    planned = cost.count(settings)
    assert (planned.rows_forward, planned.rows_backward) == (rows[0]["nfe"], rows[0]["nfe_backward"])


def test_every_family_has_configs_for_two_rules_at_least():
    found = [config.load(name).model for name in CONFIGS]
    assert set(found) == set(HUB)
    assert set(HUB.values()) == set(FAMILIES)
    assert all(found.count(model) >= 2 for model in HUB)
