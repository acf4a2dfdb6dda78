import importlib.util
import json
import time

import pytest
import yaml

from diffalign import config
from diffalign.config.places import placed
from diffalign.errors import UserError
from diffalign.processes import PROCESSES
from diffalign.prompts import book
from diffalign.rules import RULES

NAME = "flow_grpo/shapes-sd3"
CONFIGS = sorted((config.folders()[0]).rglob("*.yaml"))


def problems(*overrides: str, name: str = NAME) -> list[str]:
    with pytest.raises(UserError) as caught:
        config.load(name, overrides)
    return list(caught.value.problems)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_begins_with_its_command(path):
    settings = config.load(str(path))
    assert config.settings(config.validate(yaml.safe_load(config.dump(settings)))) == config.settings(settings)
    assert path.read_text().splitlines()[1] == f"# diffalign train configs/{path.parent.name}/{path.name}"


def test_a_config_is_found_by_path_and_by_name():
    assert config.load(NAME) == config.load(str(config.find(NAME))) == config.load("configs/" + NAME + ".yaml")


def test_overrides_set_values_and_mappings_replace():
    settings = config.load(
        NAME, ["optimizer.lr=1e-5", "rewards={jpeg_compressibility: 2}", "seed=3", "rule.window=null"]
    )
    assert settings.optimizer.lr == 1e-5
    assert settings.rewards == {"jpeg_compressibility": 2.0}
    assert settings.seed == 3
    assert settings.make_rule().settings.window is None


def test_all_mistakes_come_at_once_each_names_its_field():
    found = problems("upates=3", "optimizer.lr=fast", "rule.clp=1", "rewards={nothing: 1}", "sampler.process=ode")
    assert len(found) == 5
    for start in ("upates:", "optimizer.lr:", "rule.clp:", "rewards: nothing:", "sampler.process:"):
        assert any(line.startswith(start) for line in found), start
    assert "did you mean updates?" in " ".join(found)
    assert "did you mean clip?" in " ".join(found)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "rule={name: flow_grp}",
            f"rule.name: got 'flow_grp', allowed are {', '.join(RULES)}; did you mean flow_grpo?",
        ),
        ("rule=3", "rule: got 3, expected a mapping"),
        ("rule={}", "rule.name: got None"),
        ("rule.window=[3, 20]", "rule.window: got [3, 20], allowed is 0 <= first < stop <= sampler.steps (10)"),
        ("rule.clip=-1", "rule.clip: got -1, allowed is greater than 0"),
        ("sampler.noise_level=0", "flow_grpo needs a stochastic sampler, flow_sde with noise_level 0 has no noise"),
        (
            "sampler.process=flowsde",
            f"sampler.process: got 'flowsde', allowed are {', '.join(PROCESSES)}; did you mean flow_sde?",
        ),
        ("optimizer.micro_batch=7", "optimizer.micro_batch: got 7, allowed are divisors of"),
        (
            "prompts.group_size=1",
            "prompts.group_size: got 1, rewards are compared within a group; allowed is 2 or more",
        ),
        ("prompts.source=nowhere.txt", "prompts.source: 'nowhere.txt' is no file"),
        ("prompts.tasks=[spelling]", "prompts.tasks.0: got 'spelling'"),
        ("rewards={shapes_geneval: 0}", "rewards: got only zero weights"),
        ("eval_rewards=[pikscore]", "eval_rewards: pikscore: unknown reward"),
        ("updates", "override: got 'updates', expected key=value"),
        ("seed.x=3", "override: seed.x: seed is not a section"),
        ("model=null", "model: got None"),
        (
            "model=shapes-sd4",
            "model: got 'shapes-sd4', allowed are embedded pipelines (shapes-flux, shapes-sd, shapes-sd3, shapes-turbo, "
            "shapes-wan), folders",
        ),
        ("model=./no/such/folder", "model: got './no/such/folder', allowed are"),
        (
            "rule={name: truncated_bp}",
            "rewards: truncated_bp needs a differentiable reward, shapes_geneval_partial is not",
        ),
        (
            "rule={name: truncated_bp, depth: 0}",
            "rule.depth: got 0, allowed are a whole number from 1, [low, high] of such, or all",
        ),
        ("rule={name: truncated_bp, depth: true}", "rule.depth: got True, allowed is a number"),
        ("rule={name: truncated_bp, depth: [1, x]}", "rule.depth: got [1, 'x'], allowed are"),
        (
            "rule={name: truncated_bp, depth: 30}",
            "rule.depth: got 30, allowed is 1 <= low <= high <= sampler.steps (10)",
        ),
        ("rule={name: ddpo, history: 4}", "rule.history_least: got 16, allowed is rule.history (4) or less"),
        ("sampler={process: ddim, noise_level: 1.5}", "sampler.noise_level: got 1.5, ddim allows 0 to 1"),
        ("rule.window=5", "rule.window: got 5, allowed is a list such as [0, 3]"),
        ("rewards={}", "rewards: got {}, allowed is at least 1 entry"),
        (
            "updates=99999999999999999999",
            "updates: got 99999999999999999999, allowed is less than or equal to 10000000",
        ),
        ("prompts.groups=90000", "prompts.group_size: got 1440000 samples per update, allowed are 100000 at most"),
        ("updates=[1", "override: updates line 1: not YAML"),
        ("optimizer.lr=.inf", "optimizer.lr: got inf"),
        ("rewards={shapes_geneval: .nan}", "rewards.shapes_geneval: got nan"),
        ("optimizer.betas=[1.5, 2]", "optimizer.betas.0: got 1.5"),
        ("sampler.steps=100000000000", "sampler.steps: got 100000000000"),
        ("seed=99999999999999999999999", "seed: got 99999999999999999999999"),
        ("lora.targets=[]", "lora.targets: got []"),
        ("run_dir=''", "run_dir: got ''"),
        ("rule.name=[]", "rule.name: got []"),
        ("rule.window=[0, x]", "rule.window.1: got 'x'"),
        ("output.trackers=[wandb]", "output.trackers: wandb is not installed; pip install 'diffalign[trackers]'"),
        ("=1", "override: got '=1', expected key=value"),
        ("model=" + "x" * 5000, "model: got 'xxx"),
        ("updates=0", "updates: got 0, allowed is greater than or equal to 1"),
    ],
)
def test_a_mistake_names_the_field_what_was_given_and_what_is_allowed(override, expected, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find_spec(name, *a))
    assert any(expected in line for line in problems(override)), problems(override)


def test_an_unknown_config_offers_the_nearest():
    assert problems(name="flow_grpo/shape-sd3") == [
        "config: no file 'flow_grpo/shape-sd3'; did you mean flow_grpo/shapes-sd3?"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '{"prompt": "a"}\nnot json\n{"caption": "b"}\n',
            ["line 2: not JSON", "line 3: got {'caption': 'b'}, expected an object"],
        ),
        ("\n", ["holds no prompt"]),
    ],
)
def test_broken_prompt_lines_are_all_named(tmp_path, text, line):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    found = problems(f"prompts.source={path}", "rewards={jpeg_compressibility: 1}", "eval_rewards=[]")
    assert len(found) == len(line)
    assert all(part in whole for part, whole in zip(line, found, strict=True))


def test_a_reward_that_needs_metadata_refuses_prompts_without(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a photo of a cat\n")
    assert any("needs 'include' in every prompt's metadata" in line for line in problems(f"prompts.source={path}"))


def test_a_rule_that_needs_gradients_refuses_a_black_box_reward(monkeypatch):
    from diffalign.protocols import Needs
    from diffalign.rules import FlowGRPO

    monkeypatch.setattr(FlowGRPO, "needs", Needs(differentiable_reward=True))
    assert any("flow_grpo needs a differentiable reward, shapes_geneval_partial is not" in line for line in problems())


def test_broken_yaml_names_the_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: a\n  rule: [\n")
    assert "line 2: not YAML" in problems(name=str(path))[0]


def test_keys_that_are_no_words_are_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("1: 2\nnull: 3\n")
    assert problems(name=str(path))[0].endswith("keys must be words, got 1, None")


def test_a_value_that_is_not_yaml_hides_no_other_mistake():
    found = problems("rewards={", "updates=0")
    assert len(found) == 2
    assert "not YAML" in found[0]


def test_a_schedule_that_a_budget_would_cut_is_refused():
    (told,) = problems("budget.rows=9", "optimizer.schedule=linear")
    assert told.startswith("optimizer.schedule: got linear, which ends with updates, and budget.rows before")
    assert config.load(NAME, ["optimizer.schedule=cosine"]).optimizer.schedule == "cosine"


def test_a_mistake_is_reported_once():
    assert len(problems("rule=3")) == 1


def test_differences_show_both_sides():
    assert config.differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == {"a.c": (2, 3)}


def test_one_mistake_in_a_rule_is_one_line():
    rule = "rule={name: truncated_bp, objective: hinge, target: x}"
    found = problems(rule, "rewards={shapes_pref: 1.0}")
    assert len(found) == 1, found
    assert found[0].startswith("rule.target: got 'x', allowed is a number")


def test_every_key_is_explained_and_the_lines_are_the_config():
    import yaml

    settings = config.load("truncated_bp/shapes-sd")
    lines = config.explained(settings)
    plain = yaml.safe_load("\n".join(lines))
    assert plain["rule"]["depth"] == 4
    (line,) = [line for line in lines if line.startswith("  depth:")]
    assert line == (
        "  depth: 4  # K: steps with gradient; [low, high]: drawn anew every update; all: exact "
        "[whole, >= 1 or [whole, >= 1, whole, >= 1] or all; default 1]"
    )
    assert config.validate(plain).model_dump() == settings.model_copy(update={"rule": plain["rule"]}).model_dump()


def test_a_large_file_is_evaluated_on_as_many_prompts_as_asked_for(tmp_path):
    many = tmp_path / "many.txt"
    many.write_text("".join(f"prompt {k}\n" for k in range(100_000)))
    few = [f"prompts.source={many}", "rewards={jpeg_compressibility: 1}", "eval_rewards=[]"]
    found = config.load("flow_grpo/shapes-sd3", [*few, "evaluation.prompts=4", "evaluation.holdout=0"]).book.evaluation
    assert [entry["prompt"] for entry in found] == ["prompt 0", "prompt 25000", "prompt 50000", "prompt 75000"]
    assert len(config.load("flow_grpo/shapes-sd3", few).book.evaluation) == 128  # evenly spread
    whole = config.load("flow_grpo/shapes-sd3", [*few, "evaluation.prompts=null"]).book
    assert len(whole.evaluation) == 10_000  # a tenth is held out
    assert config.load("flow_grpo/shapes-sd3", few).book.extent == "128 of 10000 prompts, evenly spread,"
    assert len(config.load("flow_grpo/shapes-sd3", ["evaluation.prompts=99"]).book.evaluation) == 24


def test_prompts_are_drawn_from_a_large_file_in_a_moment():
    entries = [{"prompt": f"prompt {k}"} for k in range(100_000)]
    book.draw(entries[:2], 1, 1, seed=0, update=0)  # which imports torch
    started = time.process_time()
    drawn = book.draw(entries, 48, 4, seed=0, update=3)
    assert time.process_time() - started < 0.5  # one shuffle takes 0.05 s
    assert len(set(drawn.text)) == 48


def test_a_files_prompts_are_trained_on_or_evaluated(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"thing {k}", "note": n} for k in range(40) for n in range(2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def parts(*more, source=path):
        made = config.load(
            "flow_grpo/shapes-sd3",
            [f"prompts.source={source}", "rewards={jpeg_compressibility: 1}", "eval_rewards=[]", *more],
        )
        return made.book.training, made.book.evaluation

    train, judged = parts()
    assert (len(train), len(judged)) == (64, 16)  # eight texts; both entries of a text lie on one side
    assert not {e["prompt"] for e in train} & {e["prompt"] for e in judged}
    assert sorted(map(json.dumps, [*train, *judged])) == sorted(map(json.dumps, lines))
    longer = tmp_path / "longer.jsonl"
    longer.write_text("".join(json.dumps({"prompt": f"thing {k}"}) + "\n" for k in reversed(range(44))))
    known = {e["prompt"] for e in lines} & {e["prompt"] for e in parts(source=longer)[1]}
    assert known and known <= {e["prompt"] for e in judged}  # chosen by the text, not by the line
    assert parts("evaluation.holdout=0") == (lines, lines)
    assert parts("evaluation.enabled=false")[0] == lines
    assert parts(f"evaluation.source={path}") == (lines, lines)
    assert [len(part) for part in parts("evaluation.holdout=0.5")] == [40, 40]
    assert [len(part) for part in parts("evaluation.holdout=0.999")] == [2, 78]  # one text at least is trained on
    few = tmp_path / "few.txt"
    few.write_text("\ufeffa\nb\nc\n", encoding="utf-8")
    assert [len(part) for part in parts(source=few)] == [3, 3]
    assert parts(source=few)[0][0]["prompt"] == "a"  # without the mark that some editors put before it


def test_copies_of_a_prompt_are_one_prompt_when_samples_are_compared():
    entries = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "note": 1}]
    drawn = book.fixed(entries, 2, 0)
    assert drawn.group.tolist() == [0, 0, 1, 1, 0, 0]
    assert len(set(drawn.seed.tolist())) == 6


@pytest.mark.parametrize("key", ["start", "frozen"])
def test_a_runs_checkpoint_beside_the_config_is_found(key, tmp_path):
    """RUN@130 and RUN@best with a strength too; what is no folder here is left as it is, for the hub."""
    (tmp_path / "run").mkdir()
    places = ["run@130", "run@best", "owner/name@main", *(["run@130:0.5", "run:-1"] if key == "frozen" else [])]
    for place in places:
        raw = {"lora": {key: [place] if key == "frozen" else place}}
        placed(raw, tmp_path)
        found = raw["lora"][key][0] if key == "frozen" else raw["lora"][key]
        assert found == (place if place.startswith("owner") else f"{tmp_path}/{place}")
