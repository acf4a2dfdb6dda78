"""Prompt sets by name: GenEval's rules and numbers, published layouts, splits that share nothing."""

import itertools
import json
import sys

import numpy as np
import pytest

from diffalign import config
from diffalign.errors import UserError
from diffalign.ops.geneval import Detection, official
from diffalign.prompts import files as prompts
from diffalign.prompts.sets import SETS, animals, geneval_like, published


def key(entry):
    """What an entry asks for, whatever its wording."""
    things = []
    for clause in entry["include"]:
        thing = [clause["class"], clause["count"], clause.get("color")]
        things.append(thing)
    relation = next((c["position"][0] for c in entry["include"] if "position" in c), None)
    if relation is None:
        return entry["tag"], tuple(sorted(map(tuple, things), key=str))
    order = things[::-1]  # subject, reference
    if relation in ("right of", "below"):
        order, relation = things, {"right of": "left of", "below": "above"}[relation]
    return entry["tag"], relation, tuple(map(tuple, order))


def test_there_are_as_many_prompts_of_a_task_as_published():
    entries = geneval_like.prompts((), "test")
    published_tags = [json.loads(line)["tag"] for line in published_geneval().splitlines()]
    assert {task: sum(e["tag"] == task for e in entries) for task in geneval_like.TEST} == {
        task: published_tags.count(task) for task in geneval_like.TEST
    }
    assert len(entries) == 553
    assert len({e["prompt"] for e in entries}) == 553


def test_splits_share_no_combination():
    parts = {split: {key(e) for e in geneval_like.prompts((), split)} for split in ("train", "validation", "test")}
    for a, b in itertools.combinations(parts.values(), 2):
        assert not a & b
    assert len(parts["train"]) > 5000
    assert all(len(part) == len(geneval_like.prompts((), split)) for split, part in parts.items())


def test_prompts_are_worded_as_geneval_words_them():
    made = geneval_like._entry
    assert made("single_object", "airplane", False)["prompt"] == "a photo of an airplane"
    counted = made("counting", ("bus", 3), False)
    assert counted["prompt"] == "a photo of three buses"
    assert counted["exclude"] == [{"class": "bus", "count": 4}]
    assert made("colors", ("cat", "orange"), False)["include"] == [{"class": "cat", "count": 1, "color": "orange"}]
    placed = made("position", (("dog", "teddy bear"), "left of"), False)
    assert placed["prompt"] == "a photo of a dog left of a teddy bear"
    assert placed["include"][1] == {"class": "dog", "count": 1, "position": ["left of", 0]}
    turned = made("position", (("dog", "teddy bear"), "left of"), True)
    assert turned["prompt"] == "a photo of a teddy bear right of a dog"
    both = made("color_attr", (("apple", "cup"), ("black", "pink")), True)
    assert both["prompt"] == "a photo of a pink cup and a black apple"
    assert len(geneval_like.OBJECTS) == len(set(geneval_like.OBJECTS)) == 80
    assert not any(
        "person" in e["prompt"] for task in ("colors", "color_attr") for e in geneval_like.prompts([task], "test")
    )


def test_a_scene_as_asked_passes_the_published_verdict():
    """Objects put where the metadata says pass; the mirrored scene of a position does not."""
    boxes = {
        "left of": (0, 40, 20, 60),
        "right of": (80, 40, 100, 60),
        "above": (40, 0, 60, 20),
        "below": (40, 80, 60, 100),
    }
    for entry in geneval_like.prompts((), "validation"):
        found = []
        for clause in entry["include"]:
            for n in range(clause["count"]):
                box = boxes[clause["position"][0]] if "position" in clause else (40 + n, 40, 60 + n, 60)
                found.append(Detection(clause["class"], clause.get("color", "red"), box))
        assert official(found, entry).correct, entry
        if entry["tag"] == "position":
            relation = entry["include"][1]["position"][0]
            other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
            found[-1] = Detection(found[-1].name, "red", boxes[other])
            assert not official(found, entry).correct


def test_animals_are_kept_apart():
    parts = [{e["prompt"] for e in animals.prompts((), split)} for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [31, 5, 9]
    assert set.union(*parts) == set(animals.NAMES)
    assert len(animals.NAMES) == 45


def test_published_sets_are_read_as_they_are_laid_out(tmp_path):
    (tmp_path / "drawbench.csv").write_text('Prompts,Category\n"A red car, parked.",Colors\nTwo cats,Counting\n')
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\tChallenge\tNote\na bee\tAnimals\tBasic\tbees\n")
    for style in published.STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} one", f"{style} two"]))

    def read(source):
        return prompts.read(source, (), "test")

    assert read(f"drawbench@{tmp_path}/drawbench.csv")[0] == {"prompt": "A red car, parked.", "tag": "Colors"}
    assert read(f"partiprompts@{tmp_path}/parti.tsv") == [{"prompt": "a bee", "tag": "Animals", "challenge": "Basic"}]
    assert len(read(f"hpdv2@{tmp_path}")) == 8
    assert config.load(
        "flow_grpo/shapes-sd3",
        [f"prompts.source=hpdv2@{tmp_path}", "rewards={jpeg_compressibility: 1}", "eval_rewards=[]"],
    )


def published_geneval() -> str:
    """GenEval's file as its generator writes it: n = 100 draws a task from one generator of seed 43, doubles left out."""
    rng, names, colours = np.random.default_rng(43), geneval_like.OBJECTS, geneval_like.COLOURS
    relations, numerals = ("left of", "right of", "above", "below"), {2: "two", 3: "three", 4: "four"}

    def a(name):
        return f"an {name}" if name[0] in "aeiou" else f"a {name}"

    def two(count):
        return (int(k) for k in rng.choice(count, size=2, replace=False))

    def entry(tag, include, prompt, **more):
        return {"tag": tag, "include": include, **more, "prompt": f"a photo of {prompt}"}

    found = [
        entry("single_object", [{"class": names[k], "count": 1}], a(names[k]))
        for k in rng.choice(len(names), size=len(names), replace=False)
    ]
    for _ in range(100):
        x, y = (names[k] for k in two(len(names)))
        found.append(entry("two_object", [{"class": n, "count": 1} for n in (x, y)], f"{a(x)} and {a(y)}"))
    for _ in range(100):
        name, count = names[rng.choice(len(names))], int(rng.integers(2, 4, endpoint=True))
        plural = name + ("es" if name.endswith("s") else "s")
        more = {"exclude": [{"class": name, "count": count + 1}]}
        found.append(entry("counting", [{"class": name, "count": count}], f"{numerals[count]} {plural}", **more))
    for _ in range(100):  # a person, the first name, has no colour
        name, colour = names[1 + rng.choice(len(names) - 1)], colours[rng.choice(len(colours))]
        found.append(entry("colors", [{"class": name, "count": 1, "color": colour}], f"{a(colour)} {name}"))
    for _ in range(100):
        x, y = (names[k] for k in two(len(names)))
        relation = relations[rng.choice(4)]
        include = [{"class": y, "count": 1}, {"class": x, "count": 1, "position": (relation, 0)}]
        found.append(entry("position", include, f"{a(x)} {relation} {a(y)}"))
    for _ in range(100):
        pair = [names[1 + k] for k in two(len(names) - 1)]
        both = [colours[k] for k in two(len(colours))]
        include = [{"class": n, "count": 1, "color": c} for n, c in zip(pair, both, strict=True)]
        found.append(entry("color_attr", include, " and ".join(f"{a(c)} {n}" for n, c in zip(pair, both, strict=True))))
    return "".join(dict.fromkeys(json.dumps(one) + "\n" for one in found))


def test_geneval_s_own_file_and_no_other_is_taken_for_it(tmp_path):
    """The hash is that of the file which the published rules give."""
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(published_geneval())
    found = prompts.read(f"geneval@{path}", (), "test")
    tags = [entry["tag"] for entry in found]
    assert {tag: tags.count(tag) for tag in tags} == geneval_like.TEST
    assert found[0] == {
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
        "prompt": "a photo of a bench",
    }
    path.write_bytes(published_geneval().replace("\n", "\r\n").encode())
    assert prompts.read(f"geneval@{path}", (), "test") == found
    path.write_text(published_geneval().replace("pink car", "pink cat"))
    with pytest.raises(UserError, match=r"its sha256 is \w{12}\.\.\., GenEval's is 5c48e0813e81"):
        prompts.read(f"geneval@{path}", (), "test")


def test_pick_a_pic_has_splits_and_each_caption_once(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    rows = {"train-00000-of-00002": ["a cat", "a dog", "a cat"], "train-00001-of-00002": ["", None, "a dog ", "a bee"]}
    for name, captions in {**rows, "test_unique-00000-of-00001": ["a fox"]}.items():
        table = pyarrow.table({"caption": captions, "jpg_0": [b"x"] * len(captions)})
        parquet.write_table(table, tmp_path / "data" / f"{name}.parquet")
    source = f"pickapic@{tmp_path}"
    assert [e["prompt"] for e in prompts.read(source, (), "train")] == ["a cat", "a dog", "a bee"]
    settings = config.load(
        "flow_grpo/shapes-sd3", [f"prompts.source={source}", "rewards={jpeg_compressibility: 1}", "eval_rewards=[]"]
    )
    assert [len(settings.book.training), len(settings.book.evaluation)] == [3, 1]  # nothing more is held out
    with pytest.raises(UserError, match=r"expected Pick-a-Pic's folder.*it has no validation_unique-\*.parquet"):
        prompts.read(source, (), "validation")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"read with pyarrow; pip install 'diffalign\[prompts\]'"):
        prompts.read(source, (), "train")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("drawbench@nowhere.csv", "expected a CSV file with the columns Prompts and Category"),
        ("partiprompts@{bad}", "expected a TSV file"),
        ("geneval@{bad}", "expected GenEval's evaluation_metadata.jsonl"),
        ("hpdv2@{bad}", "expected a folder with anime.json"),
        ("drawbanch@{bad}", f"allowed are {', '.join(SETS)}"),
        (
            "drawbench",
            "NAME@PLACE of drawbench, partiprompts, hpdv2, hpdv3, geneval, geneval2, dpg, compbench, ocr-prompts, pickapic",
        ),
    ],
)
def test_what_is_laid_out_otherwise_is_refused(source, problem, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("something\nelse\n")
    with pytest.raises(UserError, match=problem):
        prompts.read(source.format(bad=bad), (), "test")


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_prompts_in_three_splits_that_share_none(name):
    splits = [prompts.read(name, (), split) for split in ("train", "validation", "test")]
    texts = [{entry["prompt"] for entry in entries} for entries in splits]
    assert all(texts)
    assert all(isinstance(text, str) and text.strip() for split in texts for text in split)
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
