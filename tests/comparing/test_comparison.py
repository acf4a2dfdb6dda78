"""`diffalign compare` on the shipped pipeline, with as little work as possible: what it reads, what it writes, what it refuses."""

import contextlib
import csv
import html
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from diffalign import comparing, config
from diffalign.comparing import results, wording
from diffalign.comparing.comparison import Comparison
from diffalign.comparing.statistics import Difference
from diffalign.errors import Fault, UserError
from diffalign.evaluation.intervals import Interval
from diffalign.report import latex
from diffalign.runs import session
from tests.kit.commands import diffalign

SMALL = (
    "prompts.groups=2",
    "prompts.group_size=2",
    "optimizer.micro_batch=4",
    "sampler.steps=3",
    "evaluation.prompts=8",
    "evaluation.images_per_prompt=1",
    "eval_rewards=[jpeg_compressibility, shapes_geneval]",
    "rewards={jpeg_compressibility: 1.0}",
    "output.samples=2",
    "output.checkpoint_every=1",
    "optimizer.lr=0.02",
)
METHODS = ("flow_grpo/shapes-sd3@rule.window=null", "nft/shapes-sd3@rule.times=2")
WORDS = (*METHODS, *SMALL)
GOLD = "jpeg_compressibility"


def trained(comparison: Comparison) -> None:
    """What `comparing.trained` leaves, without a process for each unit."""
    for unit in comparison.units:
        if not unit.finished:
            _, name, *overrides = unit.command()
            session.train(config.load(name, overrides), quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two methods, two seeds, two updates, evaluated after each."""
    place = tmp_path_factory.mktemp("compare") / "out"
    comparison = comparing.opened(WORDS, place, seeds="0,1", budget="updates=2", every=1)
    trained(comparison)
    comparing.reported(comparison)
    return place


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "moved")


def numbers(place) -> dict:
    """What `results.json` says but for the clock."""
    found = json.loads((place / "results.json").read_text())
    for method in found["methods"]:
        del method["seconds"]
    for costs in found["target"]["costs"].values():
        del costs["seconds"]
    return {key: value for key, value in found.items() if key != "runs"}


def test_numbers_are_those_of_the_units_files(made):
    found = json.loads((made / "results.json").read_text())
    assert [method["label"] for method in found["methods"]] == ["flow_grpo", "nft"]
    assert found["judges"] == [GOLD, "shapes_geneval"]
    means = {}
    for label in ("flow_grpo", "nft"):
        for seed in (0, 1):
            files = made / "units" / label / f"seed_{seed}" / "evaluation"
            scores = [json.loads((files / f"update_00000{k}.json").read_text())["scores"] for k in (0, 1, 2)]
            means[label, seed] = [np.mean(each[GOLD]) for each in scores]
    for method in found["methods"]:
        own = [means[method["label"], seed] for seed in (0, 1)]
        judged = method["judges"][GOLD]
        assert judged["value"]["mean"] == pytest.approx(np.mean([each[2] for each in own]))
        assert judged["gain"]["mean"] == pytest.approx(np.mean([each[2] - each[0] for each in own]))
        assert (method["updates"], method["reward_calls"]) == (2, 8)
    (pair,) = [pair for pair in found["pairs"] if pair["judge"] == GOLD]
    apart = [means["flow_grpo", seed][2] - means["nft", seed][2] for seed in (0, 1)]
    assert abs(np.mean(apart)) > 1e-4, "otherwise this says nothing"
    assert pair["difference"]["mean"] == pytest.approx(np.mean(apart))
    rows = list(csv.DictReader((made / "results.csv").open()))
    after = {(row["method"], int(row["seed"])): float(row[f"{GOLD}_after"]) for row in rows}
    assert after == pytest.approx({unit: each[2] for unit, each in means.items()})


def test_a_copy_elsewhere_says_the_same(made, copied):
    before = (copied / "results.json").read_bytes()
    (copied / "results.json").unlink()
    lines = comparing.reported(comparing.opened((), copied))
    assert (copied / "results.json").read_bytes() == before
    assert lines[:-1] == comparing.reported(comparing.opened((), made))[:-1]  # the last says where the page is


def test_the_same_command_makes_nothing_again_and_what_joins_keeps_labels(copied):
    stamps = {path: path.stat().st_mtime_ns for path in (copied / "units").rglob("*") if path.is_file()}
    again = comparing.opened(WORDS, copied, seeds="0,1", budget="updates=2", every=1)
    assert comparing.trained(again, 1, print) == {}
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    before = comparing.reported(again)
    new = "flow_grpo/shapes-sd3@rule.window=null@optimizer.lr=0.01"
    joined = comparing.opened((new, *SMALL), copied, seeds="1")
    assert [method.label for method in joined.methods] == ["flow_grpo", "nft", "flow_grpo optimizer.lr=0.01"]
    waiting = [unit.name for unit in joined.units if not unit.finished]
    assert waiting == [f"flow_grpo optimizer.lr=0.01, seed {seed}" for seed in (0, 1)]
    lines = comparing.reported(joined)
    assert "left out: flow_grpo optimizer.lr=0.01, seed 0: not begun" in lines
    assert before[2] in lines


def test_a_unit_that_was_changed_or_did_not_end_is_left_out(copied):
    written = copied / "units/nft/seed_0/config.yaml"
    written.write_text(written.read_text().replace("lr: 0.02", "lr: 0.5"))
    shutil.rmtree(copied / "units/nft/seed_1/adapter")
    lines = comparing.reported(comparing.opened((), copied))
    assert "left out: nft, seed 0: was trained with other settings: optimizer.lr: 0.02 -> 0.5" in lines
    assert "left out: nft, seed 1: not finished" in lines
    assert "nothing to compare it with" in lines[0]
    assert not (copied / "pairs.pdf").exists(), "it would show what is not in the numbers"
    shutil.rmtree(copied / "units")
    with pytest.raises(Fault, match="no unit came to its end: flow_grpo, seed 0: not begun; flow_grpo, seed 1: not"):
        comparing.reported(comparing.opened((), copied))


def test_one_seed_claims_nothing_about_others(made, tmp_path):
    comparison = comparing.opened(WORDS, tmp_path / "one", seeds="0", budget="updates=2", every=1)
    for label in ("flow_grpo", "nft"):
        shutil.copytree(made / "units" / label / "seed_0", tmp_path / "one" / "units" / label / "seed_0")
    found = results.collect(comparison)
    assert not found.methods[0].judges[GOLD].gain.known
    assert found.methods[0].judges[GOLD].gain_prompts.known
    assert not any(pair.resolved for pair in found.pairs)
    text = "\n".join(comparing.reported(comparison))
    assert "in one run of each, the interval over prompts; what another seed would give is not known" in text


def test_commands_for_elsewhere(copied):
    done = diffalign("compare", "--out", str(copied), "--print-commands", "--seeds", "5")
    assert done.returncode == 0, done.stderr
    place = copied.absolute() / "units" / "nft"
    assert done.stdout.splitlines()[1] == f"diffalign train {place}/config.yaml seed=5 run_dir={place}/seed_5"
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (METHODS, {}, "nft: evaluation.images_per_prompt: 16, flow_grpo has 32; give evaluation.images_per_prompt=..."),
        ((*METHODS, *SMALL, METHODS[0] + "@model=shapes-flux"), {}, "'shapes-flux', flow_grpo"),
        ((METHODS[1], *SMALL, METHODS[0] + "@lora.rank=2"), {}, "flow_grpo: lora.rank: 2, nft has 16"),
        ((*WORDS, METHODS[0]), {}, "flow_grpo/shapes-sd3@rule.window=null: given twice"),
        (
            (*WORDS, METHODS[0] + "@rule.clip=1e-4", METHODS[0] + "@rule.clip=0.0001"),
            {},
            "@rule.clip=0.0001: given twice",
        ),
        ((*WORDS, METHODS[0] + "@seed=1"), {}, "seed: --seeds says it, for all"),
        ((*WORDS, "updates=5"), {}, "updates: --budget says it, for all"),
        ((*WORDS, "rule.widow=1"), {}, "flow_grpo/shapes-sd3@rule.window=null: rule.widow: unknown"),
        (SMALL, {}, "compare: no CONFIG given"),
        (WORDS, {"allow": ["modl"]}, "--allow: got 'modl', no key of these configs"),
        (WORDS, {"seeds": None}, "--seeds: none given"),
        (WORDS, {"seeds": "0,0"}, "--seeds: got '0,0', allowed are different whole numbers"),
        (WORDS, {"seeds": "a"}, "--seeds: got 'a'"),
        (WORDS, {"budget": None}, "--budget: none given"),
        (WORDS, {"budget": "rows=many"}, "--budget: got 'rows=many', allowed is one of updates=N, rows=N"),
        (WORDS, {"budget": "updates=1.5"}, "--budget: got 'updates=1.5'"),
        (WORDS, {"target": "x"}, "--target: got 'x', allowed is a judge and a score"),
        ((*WORDS, "evaluation.enabled=false"), {}, "evaluation.enabled: got false"),
    ],
)
def test_what_is_refused(words, options, said, tmp_path):
    given = {"seeds": "0", "budget": "updates=2", **options}
    with pytest.raises(UserError) as error:
        comparing.opened(words, tmp_path / "out", **given)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_every_method_has_a_label_of_its_own(tmp_path):
    """Also where they differ in a section that one of them lacks."""
    sections = ["@rule.data.count=64", "@rule.data.count=64@rule.data.rows=4", "@rule.kl=1@rule.reference=base"]
    words = (METHODS[0], *(METHODS[0] + each for each in sections), *SMALL)
    made = comparing.opened(words, tmp_path / "out", seeds="0", budget="rows=1000")
    labels = [method.label for method in made.methods]
    assert len(set(labels)) == len(labels) == 4
    assert "rule.data.rows=4" in labels[2] and "rule.data.count=64" in labels[1]
    assert len({unit.place for unit in made.units}) == 4


def test_a_preset_that_differs_in_many_settings_has_its_own_name(tmp_path):
    words = ("awm/shapes-sd3", "awm/vgrpo-shapes-sd3", "awm/epg-shapes-sd3@rule.times=3")
    made = comparing.opened(words, tmp_path / "out", seeds="0", budget="rows=1000")
    labels = [method.label for method in made.methods]
    assert labels == ["awm", *words[1:]]
    assert len({unit.place for unit in made.units}) == 3
    assert labels == [method.label for method in comparing.opened((), tmp_path / "out").methods]


def test_differences_that_are_allowed(tmp_path):
    words = (*WORDS, METHODS[0] + "@lora.rank=2")
    made = comparing.opened(words, tmp_path / "out", seeds="0", budget="rows=1000", allow=["lora.rank"])
    assert [method.label for method in made.methods] == ["flow_grpo", "nft", "flow_grpo lora.rank=2"]
    assert len({unit.place for unit in made.units}) == 3
    for unit in made.units:
        _, name, *overrides = unit.command()
        own = config.load(name, overrides)
        assert (own.budget.rows, own.updates) == (1000, 1_000_000)


def test_a_folder_keeps_to_what_it_was_asked(made, tmp_path):
    for changed, said in (({"budget": "updates=3"}, "updates=2 -> updates=3"), ({"every": 2}, "--every: 1 -> 2")):
        with pytest.raises(UserError) as error:
            comparing.opened(WORDS, made, **{"seeds": "0", "budget": "updates=2", "every": 1, **changed})
        assert "holds a comparison with other settings" in str(error.value)
        assert said in str(error.value)
    with pytest.raises(UserError, match="model: 'shapes-flux', flow_grpo has 'shapes-sd3'"):
        comparing.opened((*WORDS, "model=shapes-flux"), made, seeds="0")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files and no comparison"):
        comparing.opened(WORDS, tmp_path, seeds="0", budget="updates=2")
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(UserError, match=r"comparison.json is damaged"):
        comparing.opened(WORDS, tmp_path, seeds="0", budget="updates=2")
    there = Comparison.read(made)
    with pytest.raises(UserError, match=f"--target: got 'x', allowed are {GOLD}, shapes_geneval"):
        results.collect(replace(there, asked=replace(there.asked, target=("x", 1.0))))


def test_a_unit_that_fails_is_reported_with_the_others(copied):
    place = copied / "units/nft/seed_1"
    shutil.rmtree(place)
    place.mkdir()
    (place / "checkpoints").write_text("a file where a run has a folder")
    done = diffalign("compare", "--out", str(copied))
    assert done.returncode == 3
    assert "nft, seed 1: failed with code 2: diffalign: run_dir:" in done.stderr
    assert "compare: 1 of 4 units failed; the report is of the others" in done.stderr
    assert "left out: nft, seed 1: failed: diffalign: run_dir:" in done.stdout
    found = json.loads((copied / "results.json").read_text())
    assert [method["seeds"] for method in found["methods"]] == [[0, 1], [0]]
    assert [(run["jobs"], run["units"]) for run in found["runs"]] == [(1, 1)]
    assert found["runs"][0]["packages"]["torch"]


@pytest.mark.slow
def test_killed_and_taken_up_it_says_the_same(made, tmp_path):
    asked = ["compare", *WORDS, "--out", f"{tmp_path}/out", "--budget", "updates=2", "--seeds", "0,1", "--every", "1"]
    for what in ("unit", "compare"):
        process = subprocess.Popen([sys.executable, "-m", "diffalign", *asked])
        until = time.monotonic() + 120
        while not (found := working(tmp_path / "out")) and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(found[0] if what == "unit" else process.pid, signal.SIGKILL)
        process.wait(240)
    done = subprocess.run([sys.executable, "-m", "diffalign", *asked], check=False)
    assert done.returncode == 0
    assert numbers(tmp_path / "out") == numbers(made)


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_number(made, tmp_path):
    """A unit, the comparison, or both at once, also while they import or write their last files."""
    asked = ["compare", *WORDS, "--out", f"{tmp_path}/out", "--budget", "updates=2", "--seeds", "0,1", "--every", "1"]
    rng, kills = random.Random(0), 0
    for _ in range(60):
        process = subprocess.Popen([sys.executable, "-m", "diffalign", *asked])
        try:
            process.wait(rng.uniform(1, 25))
        except subprocess.TimeoutExpired:
            what = rng.choice(["unit", "compare", "both"])
            found = working(tmp_path / "out")
            for number in [*(found if what != "compare" else []), *([process.pid] if what != "unit" else [])]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            kills += what != "unit" or bool(found)
            process.wait(240)
        if process.returncode == 0 and kills >= 10:
            break
        if process.returncode == 0:  # done too early for ten: one unit again
            shutil.rmtree(rng.choice(sorted((tmp_path / "out" / "units").glob("*/seed_*"))))
    assert kills >= 10
    done = subprocess.run([sys.executable, "-m", "diffalign", *asked], check=False)
    assert done.returncode == 0
    assert numbers(tmp_path / "out") == numbers(made)


def working(place) -> list[int]:
    """Processes that train a unit and have begun."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline") as file:
                    words = file.read().split("\0")
            except OSError:
                continue
            run = next((word.removeprefix("run_dir=") for word in words if word.startswith(f"run_dir={place}")), None)
            if run and os.path.exists(f"{run}/metrics.jsonl") and "train" in words:
                found.append(int(entry))
    return found


def test_the_page_says_everything_and_asks_for_nothing(made):
    page = (made / "index.html").read_text()
    found = json.loads((made / "results.json").read_text())
    text = html.unescape(page)
    for said in (
        found["finding"],
        *(pair["sentence"] for pair in found["pairs"]),
        "rule.window",
        "budget of a unit: 2 updates",
    ):
        assert said in text
    addresses = re.findall(r'src="([^"]{0,30})', page)
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    links = [urllib.parse.unquote(link) for link in re.findall(r'href="([^"]+)', page)]
    assert len(links) == 4  # a run's page for each method and seed
    assert all((made / link).is_file() for link in links)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    # A chart an axis and judge, a forest a judge, and a line of the key a method.
    assert page.count("<svg") == 4 * 2 + 2 + 2
    assert page.count('type="radio"') == 4
    # Two pictures of the base, and of each method at each of the moments it was drawn at.
    assert page.count("<img") == 2 * (1 + 2 * 3)
    assert 'alt="nft after 1 updates: a photo of' in page
    assert len(page) < 500_000
    for name in ("reward", "pairs"):
        assert (made / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (made / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_tuned_is_said_everywhere(copied):
    written = json.loads((copied / "comparison.json").read_text())
    facts = {
        "trials": 20,
        "failed": 1,
        "budget": {"rows": 4000.0},
        "captions": "validation",
        "judge": GOLD,
        "changed": [],
    }
    facts["ranges"] = [{"key": "optimizer.lr", "low": 1e-4, "high": 1e-2, "factors": [0.1, 10]}]
    facts["best"] = {"settings": {"optimizer.lr": 3e-3}}
    written["methods"][0]["tuned"] = facts
    (copied / "comparison.json").write_text(json.dumps(written))
    lines = comparing.reported(comparing.opened((), copied))
    said = "Settings were not tuned alike, so that a difference may be the tuning's:"
    assert said in lines
    assert "nft: not tuned" in lines
    page, found = html.unescape((copied / "index.html").read_text()), json.loads((copied / "results.json").read_text())
    assert said in page
    assert "<td>20, 1 failed</td><td>optimizer.lr</td><td>0.0001 to 0.01</td><td>0.003</td>" in page
    assert found["tuning"]["alike"] is False
    assert found["tuning"]["methods"] == {"flow_grpo": facts, "nft": None}
    written["methods"][1]["tuned"] = facts
    (copied / "comparison.json").write_text(json.dumps(written))
    effort = "20 trials of rows=4000 each, chosen by the gain of jpeg_compressibility on validation captions"
    assert f"Settings were tuned beforehand, for all methods alike: {effort}." in comparing.reported(
        comparing.opened((), copied)
    )


def test_the_table_for_papers(made):
    lines = (made / "table.tex").read_text().splitlines()
    rows = [line for line in lines if line.endswith(r" \\")]
    assert rows[2].startswith(r"flow\_grpo & 2 & ")
    assert len({row.count("&") + (row.count(r"\multicolumn") and 2) for row in rows}) == 1
    assert latex.escaped(r"a_b & 5 % of $\x ~^") == (
        r"a\_b \& 5 \% of \$\textbackslash{}x \textasciitilde{}\textasciicircum{}"
    )


def test_bold_is_what_beats_all_others():
    def pair(first, second, value, p):
        return results.Pair("j", first, second, Difference(Interval(value), 3), p)

    def found(*pairs):
        methods = [SimpleNamespace(label=label) for label in "abc"]
        return results.Results(None, ("j",), methods, pairs, None, {}).best("j")

    assert found(pair("a", "b", -0.1, 0.01), pair("a", "c", 0.1, 0.01), pair("b", "c", 0.2, 0.001)) == "b"
    assert found(pair("a", "b", -0.1, 0.06), pair("a", "c", 0.1, 0.01), pair("b", "c", 0.2, 0.001)) is None


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (
            ("nft", "awm", Difference(Interval(0.031, 0.012, 0.05), 3, 0.01, 0.019, 0.03), 0.02),
            "nft beats awm on j by 0.031 [0.012, 0.050] (Holm p 0.020, 3 seeds)",
        ),
        (
            ("nft", "awm", Difference(Interval(-0.031, -0.05, -0.012), 3, 0.01, 0.019, 0.03), 0.0001),
            "awm beats nft on j by 0.031 [0.012, 0.050] (Holm p < 0.001, 3 seeds)",
        ),
        (
            ("nft", "awm", Difference(Interval(0.004, -0.02, 0.028), 3, 0.5, 0.024, 0.041), 0.5),
            "nft and awm on j: not resolved, +0.004 [-0.020, +0.028] (Holm p 0.50); differences under 0.024 could not be seen with "
            "3 seeds, and under 0.041 would be missed in more than one of five comparisons",
        ),
    ],
)
def test_sentences(pair, said):
    first, second, difference, p = pair
    assert wording.sentence(results.Pair("j", first, second, difference, p)) == said
