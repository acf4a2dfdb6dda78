"""What a config leaves to its model, and short forms."""

import json

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign import config
from diffalign.config.short import written_out
from diffalign.errors import UserError
from diffalign.models import families
from diffalign.runs.resume import take_up
from diffalign.shapes import models
from tests.families import folder

FIVE = "model: {model}\nrule: {rule}\nrewards: jpeg_compressibility\nprompts: mine.txt\nrun_dir: out\n"
KEYS = ("process", "noise_level", "steps", "guidance_scale", "pipeline_args")


@pytest.fixture
def five(tmp_path, monkeypatch):
    """Writes a config of five lines; nothing can be fetched."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch_nothing)
    (tmp_path / "mine.txt").write_text("a cat\na dog\n")

    def write(model, rule="flow_grpo", more=""):
        (tmp_path / "five.yaml").write_text(FIVE.format(model=model, rule=rule) + more)
        return str(tmp_path / "five.yaml")

    return write


def fetch_nothing(*args, **kwargs):
    raise ConnectionError("no network")


@pytest.mark.parametrize("name", families.table())
def test_five_lines_are_sampled_as_the_familys_preset_is(five, name):
    facts = families.table()[name]
    rule = next(iter(facts["rules"]))
    loaded, preset = config.load(five(facts["model"], rule)), config.load(f"{rule}/{name}")
    for key in KEYS:
        assert getattr(loaded.sampler, key) == getattr(preset.sampler, key), key
    assert (loaded.precision, loaded.memory.checkpoint) == (preset.precision, "auto")
    assert loaded.told[0].startswith(f"auto, by the family {name}: process {facts['process']}, ")


def published(tmp_path, facts):
    """A folder laid out and named as the hub's, as far as it says what it is."""
    tmp_path = tmp_path / facts["model"].rpartition("/")[2]
    tmp_path.mkdir(parents=True)
    index = {"_class_name": facts["class"]}
    for place, value in facts.get("when", {}).items():
        component, _, key = place.partition(".")
        if component == "model_index":
            index |= {} if value is None else {key: ["diffusers", value]}
            continue
        (tmp_path / component).mkdir(exist_ok=True)
        (tmp_path / component / "config.json").write_text(json.dumps({key: value}))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize("name", families.table())
def test_a_copy_in_a_folder_is_of_its_family(tmp_path, name):
    assert families.usual(str(published(tmp_path, families.table()[name]))).source == f"the family {name}"


@pytest.mark.parametrize("name", families.table())
def test_of_a_model_that_no_family_has_the_scheduler_says_the_process(name):
    """Tiny forms have the families' schedulers and other sizes; those of a family without sizes to tell are that family's."""
    facts = families.table()[name]
    found = families.usual(str(folder(facts["tried_on"])))
    said = families.table()[found.family]["process"] if found.family else facts["process"].replace("cps", "flow_sde")
    assert found.process == said  # cps is a family's choice, of which no scheduler's config knows
    if found.source == "its scheduler's config":
        assert (found.steps, found.guidance_scale, found.pipeline_args) == (10, None, {})


@pytest.mark.parametrize("name", models.names())
def test_embedded_ones_are_sampled_as_they_were_made(name):
    found = families.usual(name)
    assert found.process == ("ddim" if name == "shapes-sd" else "flow_sde")
    assert (found.guidance_scale, found.precision) == (1.0, "float32")
    assert (found.steps, found.distilled) == ((4, "its name (turbo)") if name == "shapes-turbo" else (10, ""))
    rule, reward = ("ddpo" if name == "shapes-sd" else "flow_grpo"), "jpeg_compressibility"
    raw = {"model": name, "rule": rule, "rewards": reward, "run_dir": "out"}
    assert config.validate(raw).memory.checkpoint == "none"


def test_what_is_named_stays_and_auto_is_the_same_as_nothing(five):
    own = "sampler: {process: auto, steps: 7, pipeline_args: {height: 768, width: 768}}\nprecision: auto\nmemory: {checkpoint: none}\n"
    loaded = config.load(five("stable-diffusion-v1-5/stable-diffusion-v1-5", "ddpo", own))
    assert (loaded.sampler.process, loaded.sampler.steps, loaded.sampler.noise_level) == ("ddim", 7, 1.0)
    assert (loaded.sampler.pipeline_args, loaded.precision) == ({"height": 768, "width": 768}, "bfloat16")
    assert loaded.memory.checkpoint == "none"
    assert set(loaded.decided) == {"sampler.process", "sampler.noise_level", "sampler.guidance_scale", "precision"}
    assert {"sampler.steps", "sampler.pipeline_args.height", "memory.checkpoint"} <= set(config.given(loaded))
    assert not set(loaded.decided) & set(config.given(loaded))
    noisier = config.load(five("shapes-sd3", "flow_grpo", "sampler: {process: cps}\n"))
    assert noisier.sampler.noise_level == 0.7


def test_a_model_that_nothing_is_known_of_is_refused_unless_all_is_named(five):
    with pytest.raises(UserError) as refused:
        config.load(five("somebody/something"))
    assert list(refused.value.problems) == [
        "sampler: what suits 'somebody/something' is not known here and its configs cannot be fetched (ConnectionError: no network); name "
        "sampler.process, steps, guidance_scale, pipeline_args and precision"
    ]
    named = "sampler: {process: ddim, noise_level: 1.0, steps: 5, guidance_scale: null, pipeline_args: {}}\nprecision: float32\n"
    assert config.load(five("somebody/something", "ddpo", named)).decided == {"memory.checkpoint": "auto"}


def test_configs_of_a_model_on_the_hub_are_fetched(five, monkeypatch, tmp_path):
    (tmp_path / "hub").mkdir()
    there = published(tmp_path / "hub", families.table()["sdxl"])
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(there))
    loaded = config.load(five("somebody/an-xl", "ddpo", "revision: abc\n"))
    assert loaded.sampler.pipeline_args == {"height": 1024, "width": 1024}
    assert asked[0][0] == ("somebody/an-xl",) and asked[0][1]["revision"] == "abc"
    assert not any("safetensors" in pattern for pattern in asked[0][1]["allow_patterns"])


def test_a_wrong_model_is_the_only_thing_that_is_said_of_it(five):
    with pytest.raises(UserError) as refused:
        config.load(five("shapes-sd4", more="sampler: {steps: auto}\n"))
    assert len(refused.value.problems) == 1 and "did you mean shapes-sd" in refused.value.problems[0]


def test_a_run_goes_on_as_it_began_when_a_family_changes(five, monkeypatch):
    began = config.load(five("stable-diffusion-v1-5/stable-diffusion-v1-5", "ddpo"))
    changed = {**families.table()["sd15"], "guidance": 9.0}
    monkeypatch.setitem(families.table(), "sd15", changed)
    now = config.load(five("stable-diffusion-v1-5/stable-diffusion-v1-5", "ddpo"))
    assert now.sampler.guidance_scale == 9.0
    taken = take_up("out", config.settings(began), config.given(began), now, change=False)
    assert taken.kept == {"sampler.guidance_scale": 5.0} and taken.changes == ()


def test_short_forms_in_a_file_and_on_the_command_line(five):
    short = five("shapes-sd3", more="eval_rewards: clipscore\noutput: {trackers: tensorboard}\n")
    loaded = config.load(short)
    assert (loaded.rule["name"], loaded.rewards) == ("flow_grpo", {"jpeg_compressibility": 1.0})
    assert (loaded.eval_rewards, loaded.output.trackers) == (["clipscore"], ["tensorboard"])
    loaded = config.load(short, ["rewards=[jpeg_compressibility, jpeg_incompressibility]", "rule=nft", "rule.beta=0.5"])
    assert loaded.rewards == {"jpeg_compressibility": 1.0, "jpeg_incompressibility": 1.0}
    assert loaded.rule == {"name": "nft", "beta": 0.5}
    with pytest.raises(UserError, match="rewards: got .*, allowed are keys and values"):
        config.load(short, ["rewards=[jpeg_incompressibility, jpeg_incompressibility]"])


def test_a_file_of_prompts_on_the_command_line_leaves_the_rest_of_the_section(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("a\nb\n")
    loaded = config.load(
        "flow_grpo/shapes-sd3",
        ["prompts=own.txt", "prompts.tasks=[]", "rewards=jpeg_incompressibility", "eval_rewards=[]"],
    )
    assert (
        loaded.prompts.source.endswith("own.txt")
        and loaded.prompts.group_size == config.load("flow_grpo/shapes-sd3").prompts.group_size
    )


VALUES = st.one_of(st.none(), st.text(max_size=3), st.integers(), st.lists(st.text(max_size=2), max_size=3))


@given(st.dictionaries(st.sampled_from(["rule", "prompts", "rewards", "eval_rewards", "output", "model"]), VALUES))
def test_what_is_written_out_is_in_full(raw):
    whole = written_out(raw)
    assert written_out(whole) == whole and whole.keys() == raw.keys()
    assert not isinstance(whole.get("rule"), str) and not isinstance(whole.get("prompts"), str)
