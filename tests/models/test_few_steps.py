"""Whether a model was distilled, by its name and its files, and how one that was is sampled."""

import json

import pytest

from diffalign.models import families, few_steps
from tests.config.test_decided import published

DISTILLED = {"flux-schnell", "flux2-klein-4b", "sd35-large-turbo", "sdxl-turbo", "z-image-turbo"}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("stabilityai/sdxl-turbo", "its name (turbo)"),
        ("ByteDance/SDXL-Lightning", "its name (lightning)"),
        ("black-forest-labs/FLUX.1-schnell", "its name (schnell)"),
        ("black-forest-labs/FLUX.2-klein-4B", "its name (klein)"),
        ("black-forest-labs/FLUX.2-klein-base-4B", ""),
        ("SimianLuo/LCM_Dreamshaper_v7", "its name (lcm)"),
        ("ByteDance/Hyper-SD", "its name (hyper)"),
        ("Lightricks/LTX-Video-0.9.7-distilled", "its name (distilled)"),
        ("tianweiy/DMD2", "its name (dmd)"),
        ("somebody/fast-4steps", "its name (4steps)"),
        ("somebody/slow-28-steps", ""),
        ("somebody/hyperrealistic-turbofan", ""),
        ("/data/turbo/plain", ""),
        ("stabilityai/stable-diffusion-3.5-medium", ""),
        ("shapes-sd3", ""),
    ],
)
def test_a_name_says_it_by_a_part_of_its_own(model, said):
    assert families.distilled(model) == said


@pytest.mark.parametrize("name", families.table())
def test_no_family_is_taken_for_distilled_but_those_whose_name_says_so(name):
    assert bool(families.distilled(families.table()[name]["model"])) == (name in DISTILLED)


@pytest.mark.parametrize(
    ("index", "scheduler", "said"),
    [
        ({"is_distilled": True}, {}, "its index (is_distilled)"),
        ({"is_distilled": False}, {}, ""),
        ({}, {"_class_name": "LCMScheduler"}, "its scheduler (LCMScheduler)"),
        ({}, {"_class_name": "EulerDiscreteScheduler", "timesteps": [999, 749]}, "its scheduler (timesteps, a table)"),
        ({}, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.25}, "its scheduler (shift_terminal 0.25)"),
        ({}, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1}, ""),  # LTX-Video's
        ({}, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": None}, ""),
    ],
)  # fmt: skip
def test_files_say_it_where_a_name_does_not(tmp_path, index, scheduler, said):
    assert few_steps.by_files(index, scheduler) == said
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert families.distilled(str(tmp_path)) == said


def test_a_distilled_copy_of_a_family_takes_few_steps_and_others_stay(tmp_path):
    facts = families.table()["sd35-medium"]
    plain, few = (
        families.usual(str(published(tmp_path, {**facts, "model": name}))) for name in ("me/mine", "me/mine-turbo")
    )
    assert (plain.steps, plain.distilled) == (facts["steps"], "")
    assert (few.steps, few.distilled, few.family) == (4, "its name (turbo)", "sd35-medium")


def test_of_two_families_with_the_same_files_the_name_says_which(tmp_path):
    facts = families.table()["sdxl"]
    plain, few = (
        families.usual(str(published(tmp_path, {**facts, "model": name})))
        for name in ("me/an-xl", "me/an-xl-lightning")
    )
    assert (plain.family, few.family, few.guidance_scale) == ("sdxl", "sdxl-turbo", 0.0)


def test_a_distilled_model_of_no_family_takes_few_steps_without_guidance(tmp_path):
    place = tmp_path / "mine-lightning"
    (place / "scheduler").mkdir(parents=True)
    (place / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline"}))
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    found = families.usual(str(place))
    assert (found.process, found.steps, found.guidance_scale) == ("ddim", 4, 1.0)
