"""What a person sees of a run while it goes on: lines, numbers, curves, trackers."""

import sys
import time
import types

import numpy as np
import pytest
from PIL import Image

from diffalign import config as configs
from diffalign.evaluation.intervals import Interval
from diffalign.evaluation.results import Judged, Summary
from diffalign.rewards import distances
from diffalign.runs import outputs
from diffalign.runs.events import Began, Drawn, Ended, Updated
from diffalign.runs.folder import read_rows
from diffalign.runs.progress import Pace, Reporter
from diffalign.runs.session import train
from diffalign.runs.trackers import Trackers
from diffalign.runtime.display import Pulse
from diffalign.types import Update

NAME = "flow_grpo/shapes-sd3"
SMALL = ("sampler.steps=3", "rule.window=null", "prompts.groups=2", "prompts.group_size=4", "optimizer.micro_batch=4")


def test_silence_is_ended_once_and_then_seldom():
    said = []
    pulse = Pulse(said.append, soon=0.08, later=0.4)
    pulse.doing("loading x", 0, 0)
    time.sleep(0.04)
    pulse.doing("evaluating", 1, 8)  # the first took no time
    time.sleep(0.25)
    assert len(said) == 1 and said[0].startswith("evaluating 1/8, 0.")
    pulse.doing("evaluating", 5, 8)
    time.sleep(0.45)
    assert len(said) == 2 and said[1].startswith("evaluating 5/8, 0.")
    pulse.stop()
    time.sleep(0.5)
    assert len(said) == 2


def test_a_pace_reads_well():
    pace = Pace()
    pace.seconds += [100.0, *[0.5] * 20]  # the first one is long ago
    assert pace.told(100) == "0.50 s/update, 50 s left"
    pace.seconds = [52.0]
    assert pace.told(300) == "52 s/update, 4.3 h left"


def test_a_run_that_ends_lower_than_it_began_says_so(capsys):
    reporter = Reporter()
    summary = Summary(
        8,
        {
            "a": Judged(Interval(0.5), Interval(-0.2, -0.3, -0.1)),
            "b": Judged(Interval(0.5), Interval(-0.01, -0.1, 0.1)),
            "c": Judged(Interval(0.5), Interval(0.2, 0.1, 0.3)),
            "d": Judged(Interval(0.5), Interval(-0.2)),
        },
    )
    reporter.ended(Ended(5, summary, 100.0))
    reporter.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == [
        "a is lower than before training, and its interval is below 0",
        "b is lower than before training, though its interval reaches above 0",
        "d is lower than before training, on too few prompts for an interval",
    ]
    assert lines[3].startswith("done: 5 updates, 1.7 min")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four updates with a grid every two and a tracker."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    own = ("updates=4", "output.sample_every=2", "output.samples=4", "output.checkpoint_every=1")
    few = ("evaluation.prompts=8", "evaluation.images_per_prompt=1", "optimizer.warmup=2", "optimizer.schedule=linear")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "WAIT", 0.0)
        real = outputs.Outputs.curves
        patch.setattr(outputs.Outputs, "curves", lambda self: drawn.append(1) or real(self))
        train(
            configs.load(NAME, [*SMALL, *own, *few, f"run_dir={folder}", "output.trackers=[tensorboard]"]), quiet=True
        )
    return folder, len(drawn)


def test_rates_diversity_and_drift_are_logged(run):
    rows = read_rows(run[0])
    updates = [row for row in rows if "lr" in row]
    lr = configs.load(NAME).optimizer.lr
    assert [row["lr"] for row in updates] == pytest.approx([lr / 3, lr * 2 / 3, lr, lr / 2])
    assert all(0 < row["pictures/diversity"] < 1 for row in updates)
    drift = {row["update"]: row["pictures/drift"] for row in rows if "pictures/drift" in row}
    assert sorted(drift) == [2, 4]
    images = {k: np.load(run[0] / f"samples/update_{k:06}.npz")["images"].astype(float) / 255 for k in (0, 4)}
    blocks = [each.reshape(4, 16, 4, 16, 4, 3).mean((2, 4)) for each in images.values()]  # 64 x 64 pixels to 16 x 16
    expected = np.sqrt(((blocks[1] - blocks[0]) ** 2).mean((1, 2, 3))).mean()
    assert drift[4] == pytest.approx(expected, rel=1e-6)  # float32 means against float64


def test_curves_are_drawn_while_it_goes_on(run):
    assert run[1] >= 4 and Image.open(run[0] / "curves.png").size[0] > 100


def test_a_tracker_gets_pictures_and_the_config(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (place,) = {path.parent for path in (run[0] / "trackers").rglob("events*")}
    events = EventAccumulator(str(place), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()
    assert {"lr", "pictures/diversity", "pictures/drift", "reward/total"} <= set(events.Tags()["scalars"])
    assert {event.step for event in events.Images("samples")} == {0, 2, 4}
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "optimizer.warmup: 2" in text and "rule.name: flow_grpo" in text


def test_other_trackers_get_a_run_of_its_own_name_that_goes_on(monkeypatch, tmp_path):
    opened, logged = [], []

    class Run:
        def log(self, values, step=None, **_):
            logged.append((step, values))

    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.init = lambda **given: opened.append(given) or Run()
        module.Image = lambda image, caption: (image.shape, caption)
        monkeypatch.setitem(sys.modules, name, module)
    for _ in range(2):
        trackers = Trackers(["wandb", "trackio"], tmp_path / "mine/trackers", "mine", {"seed": 3})
        trackers.began(Began(0))
        trackers.updated(Updated(1, 2, Update(), {"lr": 0.1}))
        trackers.drawn(Drawn(1, np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], 0.5))
    names = [given["name"] for given in opened]
    wandb = [given for given in opened if "id" in given]
    assert names == ["mine"] * 4 and len(wandb) == 2 and wandb[0] == wandb[1]
    assert all(
        given["project"] == "diffalign" and given["resume"] == "allow" and given["config"] == {"seed": 3}
        for given in opened
    )
    assert (1, {"lr": 0.1}) in logged and (1, {"pictures/drift": 0.5}) in logged
    assert (1, {"samples/0": ((4, 4, 3), "a"), "samples/1": ((4, 4, 3), "b")}) in logged


def test_diversity_is_a_distance_within_groups():
    """Against two loops."""
    rng = np.random.default_rng(0)
    pictures, group = rng.random((7, 12)), np.array([0, 0, 0, 1, 1, 2, 0])
    found = distances.diversity(pictures, group)
    for k in range(7):
        others = [
            np.sqrt(np.mean((pictures[k] - pictures[j]) ** 2)) for j in range(7) if j != k and group[j] == group[k]
        ]
        assert (np.isnan(found[k]) and not others) or found[k] == pytest.approx(np.mean(others))
