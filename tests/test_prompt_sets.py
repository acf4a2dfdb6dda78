"""Prompt sets by name: GenEval's rules and numbers, published layouts, splits that share nothing."""

import itertools
import json

import pytest

from diffalign import config, prompts
from diffalign.ops.geneval import Detection, official
from diffalign.prompt_sets import animals, geneval_like, published
from diffalign.types import UserError


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
    assert {task: sum(e["tag"] == task for e in entries) for task in geneval_like.TEST} == published.GENEVAL
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
    assert read(f"partiprompts@{tmp_path}/parti.tsv") == [{"prompt": "a bee", "tag": "Animals"}]
    assert len(read(f"hpdv2@{tmp_path}")) == 8
    assert config.load(
        "flow_grpo/shapes-sd3",
        [f"prompts.source=hpdv2@{tmp_path}", "rewards={jpeg_compressibility: 1}", "eval_rewards=[]"],
    )


def test_geneval_s_own_file_is_held_against_its_published_numbers(tmp_path):
    whole = geneval_like.prompts((), "test")
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in whole))
    assert prompts.read(f"geneval@{path}", (), "test") == whole
    path.write_text("".join(json.dumps(entry) + "\n" for entry in whole[1:]))
    with pytest.raises(UserError, match="'single_object': 79.* published are"):
        prompts.read(f"geneval@{path}", (), "test")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("drawbench@nowhere.csv", "expected a CSV file with the columns Prompts and Category"),
        ("partiprompts@{bad}", "expected a TSV file"),
        ("geneval@{bad}", "expected GenEval's evaluation_metadata.jsonl"),
        ("hpdv2@{bad}", "expected a folder with anime.json"),
        ("drawbanch@{bad}", "allowed are shapes, shapes-motion, geneval-like, animals"),
        ("drawbench", "NAME@FILE of drawbench, partiprompts, hpdv2, geneval"),
    ],
)
def test_what_is_laid_out_otherwise_is_refused(source, problem, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("something\nelse\n")
    with pytest.raises(UserError, match=problem):
        prompts.read(source.format(bad=bad), (), "test")
