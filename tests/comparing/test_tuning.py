"""`diffalign tune`: what is tried, what ends it, what it leaves; most of it with trials whose scores are a formula of their settings."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from diffalign import comparing, config
from diffalign.comparing import tuned
from diffalign.comparing.methods import Method
from diffalign.comparing.tuning import spaces
from diffalign.errors import Fault, UserError
from diffalign.evaluation.results import Evaluation
from diffalign.rules import RULES
from diffalign.runs import session
from tests.kit.helpers import THREE_STEPS

optuna = pytest.importorskip("optuna")
from diffalign.comparing import tuning  # noqa: E402
from diffalign.comparing.running import Runner  # noqa: E402
from diffalign.comparing.tuning.study import STORAGE, Search, storage  # noqa: E402

SMALL = (
    "prompts.groups=2",
    "prompts.group_size=2",
    "optimizer.micro_batch=4",
    "sampler.steps=3",
    "evaluation.prompts=8",
    "evaluation.images_per_prompt=1",
    "eval_rewards=[shapes_geneval]",
    "rewards={jpeg_compressibility: 2.0}",
    "output.samples=2",
    "optimizer.lr=0.01",
    "optimizer.ema=null",
)
FLOW, NFT = "flow_grpo/shapes-sd3@rule.window=null", "nft/shapes-sd3@rule.times=2"
ASKED = {"trials": 5, "budget": "updates=2"}
BEST_RATE = 0.003  # of the formula


class Done:
    """A trial that has ended."""

    seconds = 0.0

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code

    def tell(self, number):
        pass


class Formula:
    """Leaves what a run leaves, with a gain that is highest at `BEST_RATE`. begun: places, in their order; codes: place's name -> code."""

    begins = "begins"

    def __init__(self, codes=None, collapsed=()):
        self.begun, self.codes, self.collapsed = [], codes or {}, collapsed

    def begin(self, unit):
        name = "/".join(unit.place.parts[-3:-1])
        self.begun.append(name)
        if code := self.codes.get(name):
            (unit.place / "log.txt").write_text("diffalign: update 3: gradients were not finite\n")
            return Done(code)
        settings = unit.method.settings
        shutil.copy(unit.place.parent / "config.yaml", unit.place / "config.yaml")
        gain = -abs(math.log(settings["optimizer"]["lr"] / BEST_RATE))
        noise = np.random.default_rng(0).normal(0, 0.01, 16)
        for update, own in ((0, 0.0), (2, gain)):
            scores = {"jpeg_compressibility": noise * own + own, "shapes_geneval": np.full(16, -own)}
            path = unit.place / "evaluation" / f"update_{update:06d}.json"
            Evaluation(update, scores, np.arange(16)).save(path, seed=1, prompts=["a"] * 16)
        rows = [
            {"update": k, "lr": 0.1, "pictures/diversity": 0.1 if name in self.collapsed and k > 2 else 1.0}
            for k in range(1, 9)
        ]
        (unit.place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (unit.place / "adapter").mkdir()
        (unit.place / "adapter" / "curves.png").write_bytes(b"")
        return Done(0)


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr("diffalign.comparing.running.PAUSE", 0.0)


def tune(place, words=(FLOW, NFT, *SMALL), where=None, said=None, **asked):
    opened = tuning.opened(words, place, **{**ASKED, **asked})
    killed = tuning.tried(opened, 1, (said if said is not None else []).append, where or Formula())
    return opened, killed, tuning.reported(opened)


def trials(place):
    return {each["label"]: each["trials"] for each in json.loads((place / "trials.json").read_text())["methods"]}


def test_every_rule_declares_what_is_tried():
    for name, rule in RULES.items():
        settings = [f"rule={{name: {name}}}", *SMALL, *THREE_STEPS[name]]
        rewarded = [each for each in settings if not each.startswith("rewards=")]
        settings = [*settings, "rewards={shapes_pref: 1.0}"] if rule().needs.rewards else rewarded
        settings += ["rule.inner_updates=2"] if "inner_updates" in rule.Settings.model_fields else []
        settings += ["rule.estimator=importance"] if name == "ddpo" else []
        made = config.load(f"{name}/shapes-sd3", [*settings[1:]])
        found = spaces.ranges(made, lambda key, value: True)
        assert found[0].key.startswith(("sampler.", "optimizer."))
        assert any(each.key.startswith("rule.") for each in found) or name == "distil", name
        for each in found:
            assert each.low <= each.start <= each.high
            assert each.start == config.at(config.settings(made), each.key)


def test_ranges_are_around_the_configs_own_values_and_within_what_it_allows():
    words = [*SMALL, "rule.window=null", "rule.kl=0.01"]
    found = {each.key: each for each in spaces.ranges(config.load("flow_grpo/shapes-sd3", words), lambda *_: True)}
    assert (found["optimizer.lr"].low, found["optimizer.lr"].high) == (0.001, 0.1)
    assert (found["rule.kl"].low, found["rule.kl"].high) == (0.001, 0.1)
    assert "rule.clip" not in found, "on a first pass ratios are 1 and nothing is clipped"
    assert "sampler.noise_level" not in {
        each.key for each in spaces.ranges(config.load("nft/shapes-sd3"), lambda *_: True)
    }
    file, words = "truncated_bp/shapes-sd3", ["sampler.steps=3", "rule.depth=2"]
    depth = spaces.ranges(config.load(file, words), spaces.checker(file, words))[-1]
    assert (depth.key, depth.low, depth.high, depth.whole) == ("rule.depth", 1, 3, True)
    assert spaces.Range("a", 1.0, 2.0, 1.5).value(1.23456) == 1.23
    assert spaces.Range("a", 1.2345, 2.0, 1.5).value(1.2345) == 1.2345


def test_all_methods_get_the_same_and_the_best_is_the_highest(tmp_path):
    place, where, said = tmp_path / "out", Formula(), []
    _, killed, lines = tune(place, where=where, said=said)
    assert killed == []
    # In turn, so that a stop leaves as many of each; the config as it is comes first.
    assert where.begun[:4] == ["flow_grpo/trial_000", "nft/trial_000", "flow_grpo/trial_001", "nft/trial_001"]
    assert len(where.begun) == len(set(where.begun)) == 10
    for label, own in trials(place).items():
        assert own[0]["settings"]["optimizer.lr"] == 0.01
        assert len({each["settings"]["optimizer.lr"] for each in own}) == 5
        for each in own:
            written = config.load(str(place / label / f"trial_{each['trial']:03d}" / "config.yaml"))
            assert (written.evaluation.split, written.updates) == ("validation", 2)
            assert written.optimizer.lr == each["settings"]["optimizer.lr"]
            # Twice: the reward's weight. The noise has mean 0 but for this draw's own.
            gain = -2 * abs(math.log(written.optimizer.lr / BEST_RATE))
            assert each["score"]["mean"] == pytest.approx(
                gain * (1 + np.random.default_rng(0).normal(0, 0.01, 16).mean())
            )
            assert gain == 0 or each["score"]["low"] < each["score"]["mean"] < each["score"]["high"]
        top = max(own, key=lambda each: each["score"]["mean"])
        best = config.load(str(place / label / "best.yaml"))
        assert best.optimizer.lr == top["settings"]["optimizer.lr"]
        # What trials alone have is not in it.
        assert (best.evaluation.split, best.updates) == ("test", config.load(f"{label}/shapes-sd3").updates)
        assert any(line.startswith(f"{label}: trial {top['trial']} of 5, gain") for line in lines)
    rows = list(csv.DictReader((place / "trials.csv").open()))
    assert [float(row["optimizer.lr"]) for row in rows if row["method"] == "nft"] == [
        each["settings"]["optimizer.lr"] for each in trials(place)["nft"]
    ]


def test_a_trial_that_fails_counts_as_the_worst_and_ends_nothing(tmp_path):
    where = Formula({"flow_grpo/trial_001": 3}, collapsed=["flow_grpo/trial_002"])
    said = []
    opened, _, lines = tune(tmp_path / "out", where=where, said=said)
    own = trials(tmp_path / "out")["flow_grpo"]
    assert [each["failed"] for each in own] == [False, True, True, False, False]
    assert own[1]["why"] == "diffalign: update 3: gradients were not finite"
    assert own[2]["why"].startswith("pictures of a prompt have become alike")
    assert "flow_grpo, trial 1: counts as the worst: diffalign: update 3: gradients were not finite" in said
    assert any("failed: pictures of a prompt" in line for line in lines)
    study = optuna.load_study(storage=storage(tmp_path / "out"), study_name="flow_grpo")
    assert [trial.value for trial in study.trials][1:3] == [-math.inf, -math.inf]
    assert json.loads((tmp_path / "out/flow_grpo/tuned.json").read_text())["failed"] == 2
    tuning.complete(opened, [])
    opened, *_ = tune(tmp_path / "all", (NFT, *SMALL), Formula({f"nft/trial_00{k}": 3 for k in range(5)}))
    with pytest.raises(Fault, match="every trial failed of nft; there is no best.yaml of these"):
        tuning.complete(opened, [])


def test_it_goes_on_where_it_was_stopped_with_the_same_trials(tmp_path):
    tune(tmp_path / "whole")
    # A process that is gone in the midst leaves a trial that was drawn and has no score.
    place = tmp_path / "parts"
    killed = Formula({"nft/trial_001": -9, "flow_grpo/trial_003": 143})
    opened, names, _ = tune(place, where=killed, trials=3)
    assert names == ["nft, trial 1"]
    with pytest.raises(Fault, match="ended from outside: nft, trial 1; the same command takes them up again"):
        tuning.complete(opened, names)
    stamps = {path: path.stat().st_mtime_ns for path in place.rglob("update_*.json")}
    again = Formula()
    _, names, _ = tune(place, (), again, trials=3, budget=None)
    assert (again.begun, names) == (["nft/trial_001"], [])
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert trials(place)["flow_grpo"] == trials(tmp_path / "whole")["flow_grpo"][:3]
    more = Formula()
    tune(place, (), more, budget=None)
    assert more.begun == [f"{rule}/trial_00{k}" for k in (3, 4) for rule in ("flow_grpo", "nft")]


def test_a_trial_whose_process_outlived_the_command_is_taken_as_it_is(tmp_path):
    opened = tuning.opened((NFT, *SMALL), tmp_path / "out", **ASKED)
    unit = next(Search(opened, 1, print).units(Runner(1, print)))  # drawn, and nobody waits for it
    unit.place.mkdir(parents=True)
    Formula().begin(unit)
    with (tmp_path / "out" / STORAGE).open("ab") as file:
        file.write(b'{"op_code": 4, "wor')  # and a kill cut a line short
    where = Formula()
    tuning.tried(opened, 1, lambda _: None, where)
    assert where.begun == [f"nft/trial_00{k}" for k in (1, 2, 3, 4)]


def test_compare_says_what_was_tried(tmp_path):
    place = tmp_path / "tuned"
    tune(place)
    words = [str(place / rule / "best.yaml") for rule in ("flow_grpo", "nft")]
    asked = {"seeds": "0", "budget": "updates=2"}
    methods = comparing.opened(words, tmp_path / "a", **asked).methods
    effort = "5 trials of updates=2 each, chosen by the gain of the training reward on validation captions"
    assert tuned.said(methods) == [f"Settings were tuned beforehand, for all methods alike: {effort}."]
    assert tuned.table(methods)[0][:3] == ("flow_grpo", "5", "sampler.noise_level")
    plain = comparing.opened((words[0], NFT, *SMALL), tmp_path / "b", **asked).methods
    assert not tuned.alike(plain)
    assert tuned.said(plain)[0] == "Settings were not tuned alike, so that a difference may be the tuning's:"
    assert tuned.said(plain)[2] == "nft: not tuned"
    changed = comparing.opened((words[0], f"{words[1]}@optimizer.lr=0.5"), tmp_path / "c", **asked).methods
    assert tuned.said(changed)[2] == f"nft: optimizer.lr changed after tuning ({effort})"
    tune(place, (), trials=6, budget=None)
    facts = json.loads((place / "nft/tuned.json").read_text())
    facts["ranges"][0]["factors"] = [0.5, 2]
    (place / "nft/tuned.json").write_text(json.dumps(facts))
    assert not tuned.alike(comparing.opened(words, tmp_path / "d", **asked).methods)
    assert tuned.said([Method("a", "a", {})]) == []
    (place / "nft/tuned.json").write_text("{}")
    with pytest.raises(UserError, match=r"tuned.json: damaged"):
        comparing.opened(words, tmp_path / "e", **asked)


@pytest.mark.parametrize(
    ("words", "asked", "said"),
    [
        (SMALL, {}, "tune: no CONFIG given"),
        ((NFT, *SMALL), {"trials": None}, "--trials: none given, such as 20"),
        ((NFT, *SMALL), {"budget": None}, "--budget: none given"),
        ((NFT, *SMALL), {"on": "test"}, "--on: got 'test', allowed are validation and a file of prompts"),
        (
            (NFT, *SMALL),
            {"judge": "x"},
            "--judge: got 'x', allowed for nft/shapes-sd3@rule.times=2 are jpeg_compressibility",
        ),
        ((NFT, *SMALL, "evaluation.split=validation"), {}, "evaluation.split: --on says it, for all"),
        ((NFT, *SMALL, "evaluation.every=1"), {}, "evaluation.every: tune says it, for all"),
        ((NFT, *SMALL, "updates=9"), {}, "updates: --budget says it, for all"),
        ((NFT, FLOW, *SMALL[:-5]), {}, "eval_rewards"),
        ((NFT, *SMALL, "rule.beeta=1"), {}, "rule.beeta: unknown"),
    ],
)
def test_what_is_refused(words, asked, said, tmp_path):
    with pytest.raises(UserError) as error:
        tuning.opened(words, tmp_path / "out", **{**ASKED, **asked})
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_prompts_of_ones_own_are_not_tuned_on_and_judged_by(tmp_path):
    (tmp_path / "mine.txt").write_text("".join(f"a photo of {k} stars\n" for k in range(2, 40)))
    (tmp_path / "tune.txt").write_text("a photo of a star\na photo of a square\n")
    words = (NFT, *SMALL, "eval_rewards=[]", f"prompts.source={tmp_path}/mine.txt")
    with pytest.raises(UserError, match="which has no such part; allowed is a file of prompts to tune on"):
        tuning.opened(words, tmp_path / "out", **ASKED)
    opened = tuning.opened(words, tmp_path / "out", **ASKED, on=str(tmp_path / "tune.txt"))
    made = opened.config(opened.methods[0], {}, trial=True)
    assert {entry["prompt"] for entry in made.book.evaluation} == {"a photo of a star", "a photo of a square"}
    assert opened.config(opened.methods[0], {}, trial=False).evaluation.source is None
    with pytest.raises(UserError, match="holds a tuning with other settings"):
        tuning.opened(words, tmp_path / "out", budget="updates=3")


def test_optuna_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"tune: it needs optuna, which is not installed: pip install 'diffalign\[tune\]'"
    ):
        tuning.opened((NFT, *SMALL), tmp_path / "out", **ASKED)


class InThisProcess:
    """Trains for real, without a process for each trial."""

    begins = "begins"

    def begin(self, unit):
        _, name, *overrides = unit.command()
        session.train(config.load(name, overrides), quiet=True)
        return Done(0)


def test_real_trials_score_as_their_evaluations_say(tmp_path):
    place = tmp_path / "out"
    tune(place, (NFT, *SMALL), InThisProcess(), trials=1, budget="updates=1", judge="jpeg_compressibility")
    for each in trials(place)["nft"]:
        folder = place / "nft" / f"trial_{each['trial']:03d}" / "seed_0" / "evaluation"
        before, after = (json.loads((folder / f"update_00000{k}.json").read_text()) for k in (0, 1))
        apart = np.subtract(*(part["scores"]["jpeg_compressibility"] for part in (after, before)))
        assert each["score"]["mean"] == pytest.approx(apart.mean())
        assert each["spent"]["reward_calls"] == 4
    texts = {entry["prompt"] for entry in config.load("nft/shapes-sd3").book.evaluation}
    assert texts.isdisjoint(after["prompts"]), "chosen on what compare judges by"


@pytest.mark.slow
def test_killed_and_taken_up_it_says_the_same(tmp_path):
    words = ["tune", NFT, *SMALL, "--trials", "3", "--budget", "updates=2", "--out"]
    commands = {name: [sys.executable, "-m", "diffalign", *words, f"{tmp_path}/{name}"] for name in ("a", "b")}
    assert subprocess.run(commands["a"], check=False).returncode == 0
    for k in (0, 2):
        process = subprocess.Popen(commands["b"])
        begun = tmp_path / "b/nft" / f"trial_00{k}" / "seed_0/metrics.jsonl"
        until = time.monotonic() + 180
        while not begun.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert begun.exists()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(commands["b"], check=False).returncode == 0

    def numbers(place):
        found = trials(place)["nft"]
        return [{**each, "spent": {**each["spent"], "seconds": None}} for each in found]

    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
