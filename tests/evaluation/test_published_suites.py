"""Suites of published prompts: the copy and its licence, columns and means, tables, judges of the trained family."""

import csv
import hashlib
import json
import re
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.evaluation import found, tables
from diffalign.evaluation.catalog import SUITES
from diffalign.evaluation.task import task_of
from diffalign.prompts.files import read
from diffalign.prompts.sets import fetching, published
from diffalign.rewards import catalog
from diffalign.runs import session
from tests.kit.helpers import tiny_config

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "a red circle\tAnimals\tBasic\tx\n"
    'two "blue" squares\tAnimals\tQuantity\tx\n'
    "a green star\tArts & Co_1\tBasic\tx\n"
)


@pytest.fixture(scope="module")
def parti(tmp_path_factory):
    place = tmp_path_factory.mktemp("parti") / "PartiPrompts.tsv"
    place.write_text(PARTI)
    return place


@pytest.fixture(scope="module")
def out(parti, tmp_path_factory):
    """A suite on an adapter that was trained on its first judge, with the base beside."""
    place = tmp_path_factory.mktemp("suite")
    loud = ["optimizer.lr=0.3", "optimizer.ema=null", "rewards={jpeg_compressibility: 1.0}"]
    session.train(tiny_config(place / "tuned", "evaluation.enabled=false", *loud), quiet=True)
    few = ["--steps", "3", "--batch", "3", "--no-drift", "--out", place / "out"]
    (place / "mine.py").write_text("def mean(media, prompts):\n    return media.pixels.flatten(1).mean(1)\n")
    judges = ["--judges", f"jpeg_compressibility,{place}/mine.py:mean"]
    command = ["evaluate", place / "tuned", "--suite", "partiprompts", "--prompts", parti, *judges, *few]
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output
    return place / "out"


def test_a_suite_has_its_columns_and_says_what_it_is(out):
    report = json.loads((out / "report.json").read_text())
    assert report["samples_per_prompt"] == 1  # the suite's, not the command's
    assert report["columns"] == {"tag": {"Animals": 2, "Arts & Co_1": 1}, "challenge": {"Basic": 2, "Quantity": 1}}
    assert report["comparable"].startswith("Not comparable with published numbers: these are not the published")
    digest = hashlib.sha256(PARTI.encode()).hexdigest()
    assert report["prompts"]["published"] == {
        "name": "partiprompts",
        "digest": digest,
        "whole": False,
        "licence": "Apache-2.0",
    }
    base, tuned = report["models"]
    assert [score["mark"] for score in tuned["scores"].values()] == ["trained on", ""]
    assert [score["mark"] for score in base["scores"].values()] == ["", ""]
    assert tuned["trained_on"] == ["jpeg_compressibility"]
    page = (out / "index.html").read_text()
    assert "jpeg_compressibility by challenge" in page
    assert "licence Apache-2.0" in page
    assert "Arts &amp; Co_1" in page
    assert re.search(
        r'<tr class="quiet"><th scope="row">[^<]+</th><td>[^<]*tuned <span class="quiet">\(trained on\)', page
    )


def test_the_csv_has_every_number_of_the_report(out):
    report = json.loads((out / "report.json").read_text())
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert len(rows) == 2 * 2 * (1 + 2 * (1 + 2))  # models, judges; all, and columns with two parts each
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    for row in rows:
        wanted = {"": (0, 1, 2), "Animals": (0, 1), "Arts & Co_1": (2,), "Basic": (0, 2), "Quantity": (1,)}[row["part"]]
        values = [line["scores"][row["judge"]] for line in lines if line["model"] == row["model"]]
        if row["column"] and not row["part"]:  # the mean of two parts' means
            parts = {"tag": ((0, 1), (2,)), "challenge": ((0, 2), (1,))}[row["column"]]
            expected = np.mean([np.mean([values[k] for k in part]) for part in parts])
        else:
            expected = np.mean([values[k] for k in wanted])
        assert float(row["mean"]) == pytest.approx(expected)
        assert (row["gain"] == "") == (row["model"] == report["models"][0]["label"])


def test_the_latex_is_as_wide_as_it_says_and_escaped(out):
    text = (out / "table.tex").read_text()
    tabulars = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.S)
    assert len(tabulars) == 3  # judges, and each by its first column
    for columns, body in tabulars:
        for line in (line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line):
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1, line
    assert r"Arts \& Co\_1" in text


def task(entries, suite, judge="jpeg_compressibility"):
    made = task_of("shapes", None, (judge,), "test", 1, 0, 4)
    return replace(made, entries=entries, suite=SUITES[suite], samples=2)


def test_the_suites_number_is_of_categories_or_of_samples():
    """Three prompts of one category, one of another, two pictures each: 1/4 over samples, 1/2 over categories."""
    entries = [{"prompt": name, "tag": name[0]} for name in ("a1", "a2", "a3", "b1")]
    values = np.array([0.0] * 6 + [1.0] * 2)
    by_category, by_sample = task(entries, "hpsv3"), task(entries, "hpsv2")
    assert (by_category.overall, by_sample.overall) == ("tag", None)
    score = found._score(by_category, values, None)
    assert found.at(score, by_category.overall)["mean"]["mean"] == 0.5
    assert found.at(score, by_sample.overall)["mean"]["mean"] == 0.25
    # a lost picture leaves its prompt's mean, and no mean takes it for 0
    lost = found._score(by_category, np.where(np.arange(8) == 7, np.nan, values), None)
    assert found.at(lost, "tag")["mean"]["mean"] == 0.5
    assert lost["unscored"] == 1


def test_gains_of_a_part_are_paired():
    entries = [{"prompt": f"p{k}", "tag": "ab"[k % 2]} for k in range(20)]
    asked = task(entries, "hpsv3")
    rng = np.random.default_rng(0)
    before = rng.normal(size=40) * 100  # so wide that unpaired nothing would be found
    after = before + 1 + rng.normal(size=40) * 0.01
    score = found._score(asked, after, before)
    for place in (score, found.at(score, "tag"), found.at(score, "tag", "a")):
        assert place["gain"]["mean"] == pytest.approx(1, abs=0.02)  # 5 standard errors of .01 / sqrt(20)
        assert place["gain"]["high"] - place["gain"]["low"] < 0.05


def test_columns_that_count_are_in_their_order():
    entries = [{"prompt": str(k), "tag": f"{k} atoms"} for k in (10, 3, 7)]
    assert task(entries, "geneval2").columns()["tag"][1] == ["3 atoms", "7 atoms", "10 atoms"]


# -- the copy of published prompts


def test_published_layouts_are_read(tmp_path):
    (tmp_path / "benchmark_Arts.json").write_text('["a b", {"prompt": "c"}]')
    (tmp_path / "benchmark_Food.json").write_text('[{"caption": " d ", "id": 1}]')
    assert read(f"hpdv3@{tmp_path}", (), "test") == [
        {"prompt": "a b", "tag": "Arts"},
        {"prompt": "c", "tag": "Arts"},
        {"prompt": "d", "tag": "Food"},
    ]
    (tmp_path / "benchmark_Food.json").write_text('[{"text": "d"}]')
    with pytest.raises(UserError, match=r"benchmark_Food.json is no list of texts, or of objects with a prompt"):
        read(f"hpdv3@{tmp_path}", (), "test")
    line = {"prompt": "seven cows", "atom_count": 2, "vqa_list": [["How many?", "seven"]], "skills": ["count"]}
    (tmp_path / "g.jsonl").write_text(json.dumps(line) + "\n")
    questions = [{"question": "How many?", "answer": "seven", "skill": "count"}]
    assert read(f"geneval2@{tmp_path}/g.jsonl", (), "test") == [{**line, "questions": questions, "tag": "2 atoms"}]
    assert task_of("geneval2", f"{tmp_path}/g.jsonl", (), "test", None, 0, 4).rewards == ("soft_tifa", "soft_tifa_am")
    (tmp_path / "g.jsonl").write_text(json.dumps({**line, "skills": []}) + "\n")
    with pytest.raises(UserError, match="line 1: vqa_list is no list of questions with answers, or skills has not one"):
        read(f"geneval2@{tmp_path}/g.jsonl", (), "test")
    (tmp_path / "g.jsonl").write_text('{"prompt": "seven cows"}\n')
    with pytest.raises(UserError, match="line 1 is no object with prompt, atom_count and vqa_list"):
        read(f"geneval2@{tmp_path}/g.jsonl", (), "test")
    (tmp_path / "o.txt").write_text('a sign "Hi"\n')
    assert read(f"ocr-prompts@{tmp_path}/o.txt", (), "test") == [{"prompt": 'a sign "Hi"'}]
    (tmp_path / "o.txt").write_text("a sign\n")
    with pytest.raises(UserError, match="got 'a sign', without a text in"):
        read(f"ocr-prompts@{tmp_path}/o.txt", (), "test")


TABLE = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
    "whoops3,x,,1,0,entity,whole,entity - whole (hat),Is there a hat?\n"
    'whoops3,x,,2,1,attribute,color,"attribute - color (hat, red)","Is the hat, all of it, red?"\n'
    'whoops3,x,,4,"1, 2",relation,spatial,relation - spatial (hat),Is it on the dog?\n'
    "7,y,,1,0,entity,whole,entity - whole (cat),Is there a cat?\n"
)


@pytest.fixture
def dpg(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "dpg_bench.csv").write_text(TABLE)
    (tmp_path / "prompts" / "whoops3.txt").write_text("A red hat.\n")
    (tmp_path / "prompts" / "7.txt").write_text("A cat.")
    return tmp_path


def test_dpgs_questions_know_what_they_hang_on(dpg):
    first, second = read(f"dpg@{dpg}", (), "test")
    assert first["prompt"] == "A red hat." and first["tag"] == "whoops" and second["tag"] == "numbered"
    assert first["scene_graph"] == [
        {"question": "Is there a hat?", "parents": []},
        {"question": "Is the hat, all of it, red?", "parents": [0]},
        {"question": "Is it on the dog?", "parents": [0, 1]},  # 1 and 2 of the table
    ]
    made = task_of("dpg", str(dpg), (), "test", None, 0, 4)
    assert (made.rewards, made.samples, made.copy.whole) == (("dsg",), 4, None)
    assert made.comparable.startswith("Not comparable with published numbers")
    before = made.copy.digest
    (dpg / "prompts" / "7.txt").write_text("A dog.")
    assert task_of("dpg", str(dpg), (), "test", None, 0, 4).copy.digest != before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"1, 2"', '"1, 9"', "whoops3 has a proposition_id or dependency that is none of its own"),
        ("whoops3,x,,4", "whoops3,x,,1", "whoops3 has two rows of one proposition_id"),
        ("7,y,,1", "8,y,,1", "No such file.*8.txt"),
        ("dependency", "parents", "it has no 'dependency'"),
    ],
)
def test_a_dpg_table_that_is_none_is_refused(dpg, old, new, said):
    (dpg / "dpg_bench.csv").write_text(TABLE.replace(old, new))
    with pytest.raises(UserError, match=said):
        read(f"dpg@{dpg}", (), "test")


def test_compbenchs_categories_are_files_and_its_copy_is_known(tmp_path, monkeypatch):
    for name in published.CATEGORIES:
        (tmp_path / f"{name}_val.txt").write_bytes(f"a {name} thing \r\n\r\ntwo of them".encode())
        (tmp_path / f"{name}_train.txt").write_text("not to be drawn")
    made = asked("compbench", str(tmp_path))
    assert [(entry["tag"], entry["prompt"]) for entry in made.entries[:3]] == [
        ("color", "a color thing"),
        ("color", "two of them"),
        ("shape", "a shape thing"),
    ]
    assert (len(made.entries), made.samples, made.overall, made.copy.whole) == (16, 10, "tag", False)
    whole = b"".join(f"a {name} thing \n\ntwo of them".encode() for name in published.CATEGORIES)
    known = replace(published.PUBLISHED["compbench"], digest=hashlib.sha256(whole).hexdigest())
    monkeypatch.setitem(published.PUBLISHED, "compbench", known)
    assert asked("compbench", str(tmp_path)).copy.whole
    (tmp_path / "shape_val.txt").write_text("\n")
    with pytest.raises(UserError, match="shape_val.txt has no prompt"):
        asked("compbench", str(tmp_path))


@pytest.fixture
def web(tmp_path, monkeypatch, parti):
    """The set's published place, on this machine, and the user's cache."""
    there = tmp_path / "there" / "PartiPrompts.tsv"
    there.parent.mkdir()
    there.write_bytes(PARTI.replace("\n", "\r\n").encode())  # line ends are not what makes it another file
    digest = hashlib.sha256(PARTI.encode()).hexdigest()
    known = replace(published.PUBLISHED["partiprompts"], url=there.as_uri(), digest=digest)
    monkeypatch.setitem(published.PUBLISHED, "partiprompts", known)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return there


def asked(suite, prompts=None, say=print):
    return task_of(suite, prompts, ("jpeg_compressibility",), "test", None, 0, 16, say=say)


def test_published_prompts_are_fetched_once_and_their_licence_is_said(web, tmp_path):
    said = []
    made = asked("partiprompts", say=said.append)
    assert [entry["challenge"] for entry in made.entries] == ["Basic", "Quantity", "Basic"]
    assert made.copy.whole
    assert made.comparable.startswith("Comparable with published means")
    assert re.fullmatch(r"partiprompts: fetched file://.*, sha256 \w{12}\.\.\., licence Apache-2.0, to .*tsv", said[0])
    web.unlink()
    assert asked("partiprompts", say=said.append).entries == made.entries
    assert len(said) == 1
    (place,) = (tmp_path / "cache" / "diffalign" / "prompts" / "partiprompts").iterdir()
    place.write_text("spoilt")
    with pytest.raises(UserError, match=r"partiprompts cannot be fetched \(.*\); download file://.* and give its path"):
        asked("partiprompts")


def test_another_file_than_the_published_one_is_not_taken_for_it(web):
    web.write_text(PARTI.replace("green", "grey"))
    with pytest.raises(UserError, match=r"has sha256 \w{12}\.\.\., what was published has \w{12}"):
        asked("partiprompts")
    assert not asked("partiprompts", str(web)).copy.whole  # of the user's own it is said


def test_what_cannot_be_fetched_says_where_it_is_and_what_it_should_be(monkeypatch):
    def never(*_, **__):
        raise AssertionError("nothing is fetched")

    monkeypatch.setattr(urllib.request, "urlopen", never)
    with pytest.raises(
        UserError, match=r"hpdv3 is not fetched; see https://.*HPDv3.*licence: MIT; allowed is a folder"
    ):
        asked("hpsv3")
    with pytest.raises(UserError, match="compbench is not fetched; see https://.*licence: MIT; allowed is the folder"):
        asked("compbench")
    with pytest.raises(UserError, match="drawbench is not fetched; .*licence: none is stated"):
        fetching.fetched("drawbench", "--prompts")


def test_other_prompts_by_name_go_to_a_suites_judges():
    made = asked("partiprompts", "animals")
    assert made.source == "animals"
    assert made.copy is None


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_has_judges_that_exist_and_fit_its_prompts(name):
    suite = SUITES[name]
    fetched = suite.source.removesuffix("@")
    assert fetched == suite.source or fetched in published.PUBLISHED
    entries = read(suite.source, (), "test") if suite.source and fetched == suite.source else []
    assert suite.judges
    for judge in suite.judges:
        if judge not in catalog.builtin() and fetched != suite.source:
            continue  # a judge of a published suite that does not ship yet is refused when the suite is asked for
        others, unfit = catalog.problems(judge, entries)
        assert not unfit, unfit
        assert not [p for p in others if not p.startswith(" needs ")]  # an extra that is not installed


def test_a_judge_without_any_score_leaves_the_tables_whole(parti):
    made = asked("partiprompts", str(parti))
    score = found._score(made, np.full(3, np.nan), None) | {"mark": ""}
    report = {
        "suite": "partiprompts",
        "diffalign": "0",
        "comparable": "",
        "overall": "",
        "column": None,
        "columns": {"tag": {"Animals": 2, "Arts": 1}},
        "prompts": {"count": 3},
        "samples_per_prompt": 1,
        "rewards": ["j"],
        "models": [{"label": "m", "scores": {"j": score}}],
    }
    assert "--" in tables.latex(report)
    assert len(tables.text(report).splitlines()) == 2
