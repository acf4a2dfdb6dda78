"""A run folder is the user's: whatever lies in it, or was done to it, a resume is right, or says in a line what is not."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffalign import config as configs
from diffalign.errors import UserError
from diffalign.evaluation.results import Evaluation
from diffalign.runs import session, state
from diffalign.runs.folder import RunFolder, open_run
from diffalign.runs.grids import stored
from diffalign.runs.logs import METRICS, SCORES, scanned
from diffalign.runs.progress import Reporter
from diffalign.runs.store import Store
from diffalign.runtime import numbered
from tests.kit.generators import COUNTS, promised, tried
from tests.kit.helpers import tiny_config

EVERY = (
    "evaluation.every=1",
    "evaluation.prompts=2",
    "output.checkpoint_every=1",
    "output.sample_every=1",
    "output.keep=2",
)


def config_of(folder, *more):
    return tiny_config(folder, *EVERY, *more)


def trained(folder, *more, **options):
    session.train(config_of(folder, *more), quiet=True, **options)
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    trained(folder, "updates=2")
    return folder


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("longer") / "run", "updates=3")


@pytest.fixture
def run(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def said(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(Reporter, "say", lambda reporter, line: lines.append(line))
    return lines


STRANGE = [
    "evaluation/update_000004.json.part",
    "evaluation/update_NAME.json",
    "evaluation/update_000002 (1).json",
    "evaluation/.DS_Store",
    "samples/update_NAME.png",
    "samples/update_00001.png",
    "samples/update_١٢٣٤٥٦.png",
    "samples/Thumbs.db",
    "checkpoints/update_000002.bak/state.json",
    "checkpoints/update_000099",  # a file
    "checkpoints/.DS_Store",
    "checkpoints/latest/state.json",
    "checkpoints/.update_000007.part/tensors.safetensors",
    "update_000003",
    "metrics.jsonl.part",
    "notes.txt",
    ".best.part/README.md",
]
OURS = (
    "evaluation/update_000004.json.part",
    "checkpoints/.update_000007.part/tensors.safetensors",
    "metrics.jsonl.part",
    ".best.part/README.md",
)


def test_what_is_not_ours_neither_stops_a_resume_nor_is_touched(run, longer):
    for name in STRANGE:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"not ours")
    (run / "samples/update_000003.png").mkdir()  # a folder where a file is expected later
    (run / "samples/update_000003.png").rmdir()
    assert same(trained(run, "updates=3"), longer)
    for name in STRANGE:
        assert (run / name).exists() == (name not in OURS), name


def test_the_settings_are_the_checkpoints_whatever_became_of_the_files_beside_it(run, longer, said):
    (run / "config.yaml").unlink()
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="holds a run with other settings"):
        open_run(config_of(run, "updates=3", "seed=5"))
    assert same(trained(run, "updates=3"), longer)
    assert any("metrics.jsonl is not what the run logged" in line for line in said)


def test_a_checkpoint_of_another_run_is_not_taken_up(run, tmp_path):
    trained(tmp_path / "other", "updates=3", "seed=7")
    shutil.copytree(tmp_path / "other/checkpoints/update_000003", run / "checkpoints/update_000003")
    with pytest.raises(UserError) as caught:
        open_run(config_of(run, "updates=4"))
    assert "  seed: 7 -> 0" in caught.value.problems


def test_fresh_goes_on_from_nothing_also_through_a_link_and_after_a_kill(run, tmp_path, monkeypatch):
    expected = trained(tmp_path / "alone", "updates=1", "seed=3")
    shutil.move(run / "checkpoints", tmp_path / "disk")
    os.symlink(tmp_path / "disk", run / "checkpoints")
    assert same(trained(run, "updates=1", "seed=3", fresh=True), expected)
    # Killed halfway: what is left of the old run is refused under new settings, and never mixed with them.
    shutil.copytree(run, tmp_path / "killed", symlinks=False)
    removed = []
    unlink = Path.unlink

    def dying(path, **options):
        if len(removed) == 3:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(KeyboardInterrupt):
        session.train(config_of(tmp_path / "killed", "updates=1", "seed=4"), fresh=True, quiet=True)
    monkeypatch.undo()
    assert not numbered.folders(tmp_path / "killed" / "checkpoints")
    again = tiny_config(tmp_path / "killed", *EVERY, "updates=1", "seed=4")
    session.train(again, fresh=True, quiet=True)
    alone = trained(tmp_path / "alone4", "updates=1", "seed=4")
    assert same(load_file(tmp_path / "killed/adapter/pytorch_lora_weights.safetensors"), alone)


REWARD = "def f(media, prompts):\n    return media.pixels.mean((1, 2, 3, 4))\n"


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A run with a reward, a judge's file and prompts of the user's own."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "r.py").write_text(
        "import pathlib\nHEAD = pathlib.Path(__file__).with_name('head.txt').read_text()\n" + REWARD
    )
    (folder / "head.txt").write_text("weights")
    (folder / "p.txt").write_text("".join(f"a thing {k}\n" for k in range(20)))
    train(folder, "updates=1")
    return folder


def train(folder, *more, **options):
    own = (f"rewards={{{folder}/r.py:f: 1}}", "eval_rewards=[]", f"prompts.source={folder}/p.txt", "prompts.tasks=[]")
    session.train(config_of(folder / "run", *own, *more), quiet=True, **options)


CHANGES = {
    "the reward's code": lambda at: (at / "r.py").write_text((at / "r.py").read_text().replace("return", "return -")),
    "a judge's file": lambda at: (at / "head.txt").write_text("Weights"),
    "a byte of the prompts": lambda at: (at / "p.txt").write_text(
        (at / "p.txt").read_text().replace("thing 3", "thinG 3")
    ),
}
SETTINGS = {
    "clip": ("rule.clip=0.01",),
    "learning rate": ("optimizer.lr=1e-5",),
    "pictures of the evaluation": ("evaluation.images_per_prompt=2",),
    "seed of the evaluation": ("evaluation.seed=2",),
    "prompts of the evaluation": ("evaluation.prompts=1",),
    "reward's weight": None,
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_content_is_refused_with_old_and_new_and_a_flag_accepts_it(mine, what, tmp_path, said):
    shutil.copytree(mine, tmp_path / "a")
    text = (tmp_path / "a/r.py").read_text()
    # Paths are settings: the copy is made in the run's own place.
    shutil.copytree(mine, tmp_path / "kept")
    try:
        CHANGES[what](mine)
        with pytest.raises(UserError) as caught:
            train(mine, "updates=2")
        assert any(" -> " in line and "content of" in line for line in caught.value.problems), caught.value.problems
        train(mine, "updates=2", change=True)
        assert any(line.startswith("changed after update 1: content of") for line in said)
        state_of = json.loads((mine / "run/checkpoints/update_000002/state.json").read_text())["state"]
        assert state_of["history"][0]["update"] == 1
        assert "Changed on the way" in (mine / "run/adapter/README.md").read_text()
        train(mine, "updates=3")  # it is what the run goes on with
    finally:
        shutil.rmtree(mine)
        shutil.copytree(tmp_path / "kept", mine)
    assert text == (mine / "r.py").read_text()


@pytest.mark.parametrize("what", [name for name, more in SETTINGS.items() if more])
def test_changed_settings_are_refused_or_asked_for(run, what, said):
    more = SETTINGS[what]
    key = more[0].partition("=")[0]
    with pytest.raises(UserError) as caught:
        open_run(config_of(run, "updates=3", *more))
    assert any(line.startswith(f"  {key}: ") for line in caught.value.problems)
    if configs.mark(key) == "held":
        with pytest.raises(UserError, match="holds a run with other settings"):
            open_run(config_of(run, "updates=3", *more), change=True)
    else:
        trained(run, "updates=3", *more, change=True)
        assert any(line.startswith(f"changed after update 2: {key}: ") for line in said)


@pytest.mark.parametrize(
    "more",
    [
        ("output.keep=5",), ("output.checkpoint_every=2",), ("evaluation.every=2",), ("output.samples=1",),
        ("device=cpu",), ("scoring.deadline=7",), ("output.trackers=[tensorboard]",), ("optimizer.micro_batch=2",),
    ],
    ids=lambda more: more[0],
)  # fmt: skip
def test_harmless_settings_may_change_and_are_recorded(run, longer, more, said):
    adapter = trained(run, "updates=3", *more)
    assert any(line.startswith(f"changed after update 2: {more[0].partition('=')[0]}: ") for line in said)
    if "micro_batch" in more[0]:  # sums in another order
        assert all(torch.allclose(adapter[k], longer[k], atol=2e-3) for k in longer)
    else:
        assert same(adapter, longer)


# -- killed after the last checkpoint


def test_what_was_logged_after_the_last_checkpoint_stays_with_its_evaluation_alone(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "evaluation").mkdir()
    kept = tmp_path / "evaluation" / "update_000002.json"
    for row in ({"update": 1, "x": 1.0}, {"update": 2, "x": 2.0}):
        folder.logs.append(row)
    signed = folder.logs.digests()
    for more in ([{"pictures/drift": 0.5}], [{"pictures/drift": 0.5}, {"eval/n": 4.0}], [{"eval/n": 4.0}]):
        for row in more:
            folder.logs.append({"update": 2, **row})
        kept.write_text("{}")
        RunFolder(tmp_path).rewind(2, signed)
        ended = "eval/n" in more[-1]
        assert [{k: v for k, v in row.items() if k != "update"} for row in folder.logs.rows()[2:]] == (
            more if ended else []
        )
        assert kept.exists() == ended  # one that is in no log is made again
        (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in folder.logs.rows()[:2]))


def test_a_kill_before_older_checkpoints_went_leaves_none_too_many(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    store = Store(tmp_path / "run" / "checkpoints")
    before = store.complete()
    shutil.copytree(before[-1], store.place(0))
    trained(tmp_path / "run", "updates=2")
    assert len(before) > 0 and Store(store.folder).complete() == before


# -- bit flips over every file that a resume reads


def read_back(folder):
    """All that a resume and the end of a run read, as plain data; and what was said of what was not read."""
    lines: list[str] = []
    run = open_run(config_of(folder, "updates=3"))
    try:
        run.logs.say = lines.append
        newest = run.newest()
        kept = None if newest is None else state.load(run.store, newest)
        facts = (
            None
            if kept is None
            else json.dumps([kept.facts(), {k: v.tolist() for k, v in kept.parameters.items()}], default=str)
        )
        run.rewind(2, kept.logs if kept else {})
        logs = [(folder / name).read_bytes() for name in (METRICS, SCORES)]
        evaluations = {
            update: {name: values.tolist() for name, values in Evaluation.read(path).scores.items()}
            for update, path in numbered.files(folder / "evaluation", ".json").items()
        }
        pictures = []
        for path in numbered.files(folder / "samples", ".npz").values():
            pictures.append(stored(path).tobytes())
        return [newest and newest.name, facts, logs, evaluations, pictures], lines
    finally:
        run.close()


@COUNTS
def test_no_flipped_bit_is_taken_for_what_was_written(count, short, tmp_path):
    names = [str(p.relative_to(short)) for p in sorted(short.rglob("*")) if p.is_file()]
    read = [
        n for n in names if n.startswith(("checkpoints/", "evaluation/", "samples/", "metrics", "scores", "config"))
    ]
    read = [n for n in read if not n.endswith(".png")]
    shutil.copytree(short, tmp_path / "run")
    folder = tmp_path / "run"
    whole = {name: (folder / name).read_bytes() for name in names}
    expected, _ = read_back(folder)
    whole |= {name: (folder / name).read_bytes() for name in (METRICS, SCORES)}
    seen = {"refused": 0, "said": 0, "equal": 0}

    def check(drawn):
        name, place, bit = drawn
        content = bytearray(whole[name])
        content[int(place * len(content))] ^= 1 << bit
        (folder / name).write_bytes(content)
        try:
            result = promised(lambda: read_back(folder))
            if result is None:
                seen["refused"] += 1
            elif result[0] == expected:
                seen["equal"] += 1
                # A checkpoint that is not used, settings that a checkpoint has too, a date in an archive.
                assert (
                    name.startswith(("config", "checkpoints/update_000001", "samples"))
                    or name in (METRICS, SCORES)
                    or result[1]
                ), name
            else:
                seen["said"] += 1
                # The row of the evaluation after the last update is logged after the checkpoint was signed.
                last = len(whole[METRICS]) - len(whole[METRICS].splitlines(keepends=True)[-1])
                derived = name == METRICS and int(place * len(content)) >= last
                assert derived or result[1], (
                    f"{name} byte {int(place * len(content))} bit {bit} changed what was read, silently"
                )
        finally:
            for each in (name, METRICS, SCORES):
                (folder / each).write_bytes(whole[each])

    tried(st.tuples(st.sampled_from(read), st.floats(0, 1, exclude_max=True), st.integers(0, 7)), count, check)
    assert seen["refused"] > 0
    assert seen["said"] > 0


@COUNTS
def test_no_flipped_bit_in_a_picture_is_a_traceback(count, short, tmp_path):
    archive = numbered.files(short / "samples", ".npz")[0]
    data = archive.read_bytes()
    original = np.load(archive)["images"]

    def check(drawn):
        place, bit = drawn
        changed = bytearray(data)
        changed[int(place * len(changed))] ^= 1 << bit
        (tmp_path / "s.npz").write_bytes(changed)
        images = promised(lambda: stored(tmp_path / "s.npz"))
        assert images is None or np.array_equal(images, original)

    tried(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), count, check)


def test_a_bad_byte_of_the_log_loses_its_line_alone_and_is_said(run, said):
    lines = (run / METRICS).read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"update", b"upd\xff\xfete")
    (run / METRICS).write_bytes(b"\n".join(lines))
    rows, broken = scanned(run, METRICS)
    assert broken == [2]
    assert len(rows) == len(lines) - 2
    trained(run, "updates=3")
    assert any("left out what is no row of a run: line 2" in line for line in said)


def test_a_finished_run_that_goes_on_says_nothing_of_its_log(run, said):
    trained(run, "updates=3")
    trained(run, "updates=4")
    assert not [line for line in said if "is not what the run logged" in line]


def test_somebody_elses_files_are_not_written_over(tmp_path):
    (tmp_path / "own" / "adapter").mkdir(parents=True)
    (tmp_path / "own" / "scores.jsonl").write_text("mine\n")
    (tmp_path / "own" / "adapter" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="holds scores.jsonl, adapter/README.md and no run"):
        open_run(config_of(tmp_path / "own"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "samples").write_text("a file")
    with pytest.raises(UserError, match="samples is a file, a run has a folder there"):
        open_run(config_of(tmp_path / "a"))
    (tmp_path / "b" / "config.yaml").mkdir(parents=True)
    with pytest.raises(UserError, match="config.yaml is a folder, a run has a file there"):
        open_run(config_of(tmp_path / "b"))


@pytest.mark.slow
def test_a_run_with_a_cache_of_features_resumes_bit_for_bit(tmp_path):
    """Its samples do not depend on what was drawn before."""

    def trained(place, updates):
        cached = "sampler.cache={name: first_block, threshold: 10}"  # every step but the first is spared
        flux = ("model=shapes-flux", "sampler.pipeline_args={height: 64, width: 64, max_sequence_length: 16}")
        config = tiny_config(
            place,
            cached,
            *flux,
            "evaluation.enabled=false",
            "output.samples=1",
            f"updates={updates}",
            name="nft/shapes-sd3",
        )
        session.train(config, quiet=True)
        rows, _ = scanned(place, METRICS)
        return load_file(place / "adapter" / "pytorch_lora_weights.safetensors"), rows

    straight, rows = trained(tmp_path / "straight", 2)
    trained(tmp_path / "run", 1)
    resumed, _ = trained(tmp_path / "run", 2)
    assert same(straight, resumed)
    spared = [row["cache/spared"] for row in rows if "nfe" in row]
    assert spared == pytest.approx([2 * 5 / 18] * 2)  # two of three steps, five of six blocks
