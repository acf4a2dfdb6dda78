"""Whole runs on the shipped pipeline, with as little work as possible."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from diffalign import config as configs
from diffalign.cli import app
from diffalign.errors import Fault, UserError
from diffalign.evaluation import fixed as evaluate
from diffalign.evaluation import results
from diffalign.evaluation.results import Summary
from diffalign.models import encoders
from diffalign.planning import cost
from diffalign.report import figures
from diffalign.rewards.base import Wrapped
from diffalign.runs import session
from diffalign.runs.folder import RunFolder, open_run, read_rows
from diffalign.runs.progress import Reporter
from diffalign.runs.session import Interrupted, Session
from diffalign.training.trainer import Trainer
from tests.kit import ROOT
from tests.kit.helpers import SMALL, TINY, checkpoints, saved_state, tiny_config

CONFIGS = ROOT / "configs"


def start(run_dir, *overrides: str, fresh: bool = False) -> Session:
    settings = tiny_config(run_dir, *overrides)
    return Session(settings, open_run(settings, fresh), Reporter(quiet=True))


def finish(made: Session) -> dict[str, torch.Tensor]:
    made.run()
    made.folder.close()
    return load_file(made.folder / "adapter" / "pytorch_lora_weights.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four updates without a stop, in float32 on the CPU."""
    made = start(tmp_path_factory.mktemp("whole") / "run", "updates=4", "evaluation.every=2")
    return made.folder.path, finish(made)


@pytest.mark.parametrize(
    "name", sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*shapes*.yaml"))
)
def test_every_config_that_ships_trains_and_its_adapter_moves(name, tmp_path):
    overrides = ("evaluation.enabled=false", "prompts.group_size=4", "optimizer.micro_batch=4")
    settings = tiny_config(tmp_path / "run", *overrides, name=name)
    summary = session.train(settings, quiet=True)
    assert summary == Summary()
    adapter = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for key, tensor in adapter.items() if "lora_B" in key or "lora.up" in key)
    rows = [row for row in read_rows(tmp_path / "run") if "seconds/total" in row]
    assert len(rows) == 2
    # T32: what `diffalign plan` says, from configs alone, is what the networks were called with
    planned = cost.count(settings)
    assert (planned.rows_forward, planned.rows_backward) == (rows[0]["nfe"], rows[0]["nfe_backward"])
    learnt = "reward/total" if settings.rewards else "distance"
    assert all(np.isfinite(row[learnt]) and row["grad_norm"] > 0 for row in rows if "skipped_flat" not in row)


FORMS = {
    "draft_lv": "{name: truncated_bp, variants: 2}",
    "alignprop": "{name: truncated_bp, depth: [1, 3], noise: true}",
    "refl": "{name: truncated_bp, judged: [1, 2], objective: hinge, target: 5}",
    "drtune": "{name: truncated_bp, depth: all, detached: true, trained: 1, judged: [2, 3]}",
    "vader": "{name: truncated_bp, frames: random}",
    "flow_grpo_fast": "{name: flow_grpo, window_steps: 1, fan: 2, ratio: unweighted}",
    "mixgrpo": "{name: flow_grpo, window_steps: 1, window_move: sliding}",
    "mixgrpo_flash": "{name: flow_grpo, window: [0, 1], flash: 0.5}",
    "riskpo": "{name: flow_grpo, risk: {bundle: 2}}",
    "dancegrpo": "{name: flow_grpo, shared_start: true, keep: 2, kl: 0.01, kl_space: mean}",
    "guard_mean": "{name: grpo_guard, ratio_norm: mean, inner_updates: 2, clip_std: 2}",
    "branch_pruned": "{name: branch_grpo, splits: [0], width: better_child, average: depths, fusion: 1}",
    "awm_huber": "{name: awm, times: 2, weight: huber, kl: 0.1, inner_updates: 2}",
    "nft_prediction": "{name: nft, times: 2, space: prediction}",
    "rlr_parameter_noise": "{name: rlr, cover: zo, start: norms}",
    "rlr_blocks": "{name: rlr, span: 1, cover: is}",
    "rlr_in_memory": "{name: rlr, depth: auto, span: auto, memory_gib: 1}",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", ["shapes-sd3", "shapes-sd"])
def test_every_form_of_the_rules_trains_on_both_pipelines(form, model, tmp_path):
    base = "truncated_bp/shapes-sd" if model == "shapes-sd" else "rlr/shapes-sd3"
    sampler = "sampler.process=ddim" if model == "shapes-sd" else "sampler.process=flow_sde"
    config = configs.load(
        base,
        [
            *SMALL,
            f"rule={FORMS[form]}",
            sampler,
            "sampler.noise_level=0.7",
            "evaluation.enabled=false",
            f"run_dir={tmp_path / 'run'}",
        ],
    )
    session.train(config, quiet=True)
    adapter = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for key, tensor in adapter.items() if "lora_B" in key or "lora.up" in key)
    assert all(np.isfinite(row["grad_norm"]) for row in read_rows(tmp_path / "run") if "seconds/total" in row)


def test_settings_that_the_sampler_cannot_run_are_refused_before_anything_is_written(tmp_path):
    for rule, expected in (
        ("{name: rlr, least_std: 5}", r"rule\.least_std: got 5, allowed is .* or less"),
        (
            "{name: rlr, depth: auto, memory_gib: 0.001}",
            r"rule\.memory_gib: got 0\.001, one step with decoder and reward takes",
        ),
    ):
        config = configs.load("rlr/shapes-sd3", [*SMALL, f"rule={rule}", f"run_dir={tmp_path / 'run'}"])
        with pytest.raises(UserError, match=expected):
            session.train(config, quiet=True)
        assert not (tmp_path / "run").exists()  # not even what holds it


@pytest.mark.parametrize("wrong", ["device=cuda", "speed=graphs", "memory.quantize=nf4"])
def test_a_refused_run_leaves_the_folders_that_were_there_and_no_others(tmp_path, wrong):
    if torch.cuda.is_available():
        pytest.skip("what is refused without a card")
    (tmp_path / "mine").mkdir()
    for place in (tmp_path / "mine", tmp_path / "new" / "a" / "b"):
        done = CliRunner().invoke(app, ["train", "rlr/shapes-sd3", *SMALL, wrong, f"run_dir={place}"])
        assert isinstance(done.exception, UserError)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_run_with_running_norms_resumes_as_if_never_stopped(tmp_path):
    rule = "rule={name: rlr, span: 1, start: norms, depth: auto, memory_gib: 1}"

    def run(folder, updates: int):
        config = configs.load(
            "rlr/shapes-sd3",
            [*SMALL, rule, "sampler.steps=4", "evaluation.enabled=false", f"updates={updates}", f"run_dir={folder}"],
        )
        session.train(config, quiet=True)
        return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    assert same(run(tmp_path / "parts", 4), whole)


def test_a_run_leaves_everything_a_user_needs(whole):
    folder, adapter = whole
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "curves.png",
        "before_after.png",
        "adapter/README.md",
        "adapter/curves.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert {p.name for p in (folder / "samples").glob("*.png")} == {"update_000000.png", "update_000004.png"}
    assert {p.name for p in (folder / "evaluation").iterdir()} == {f"update_{k:06d}.json" for k in (0, 2, 4)}
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name or "lora.up" in name)
    rows = read_rows(folder)
    updates = [row for row in rows if "seconds/total" in row]
    assert [row["update"] for row in updates] == [1, 2, 3, 4]
    keys = {
        "reward/shapes_geneval_partial",
        "ratio",
        "advantage",
        "grad_norm",
        "nfe",
        "seconds/sample",
        "seconds/train",
    }
    learned = [row for row in updates if "ratio" in row]
    assert learned
    assert all(keys <= row.keys() and row["ratio"] == 1.0 for row in learned)
    last = [row for row in rows if "eval/shapes_geneval_gain_lo" in row][-1]
    assert last["eval/n"] == len(tiny_config("x").book.evaluation)
    assert (
        last["eval/shapes_geneval_gain_lo"] <= last["eval/shapes_geneval_gain"] <= last["eval/shapes_geneval_gain_hi"]
    )


def test_resume_equals_never_stopping(whole, tmp_path):
    _, expected = whole
    finish(start(tmp_path / "run", "updates=2", "evaluation.every=2"))
    resumed = finish(start(tmp_path / "run", "updates=4", "evaluation.every=2"))
    assert same(resumed, expected)
    assert [r["update"] for r in read_rows(tmp_path / "run") if "seconds/total" in r] == [1, 2, 3, 4]
    ours, theirs = (
        [r.get("reward/total") for r in read_rows(f) if "seconds/total" in r] for f in (tmp_path / "run", whole[0])
    )
    assert ours == theirs


def test_another_seed_gives_another_adapter(whole, tmp_path):
    assert not same(finish(start(tmp_path / "run", "updates=4", "seed=1", "evaluation.enabled=false")), whole[1])


def test_a_finished_run_can_be_asked_for_again(whole):
    folder, expected = whole
    assert same(finish(start(folder, "updates=4", "evaluation.every=2")), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_update_saves_and_leaves_its_code(tmp_path, monkeypatch, number):
    made = start(tmp_path / "run", "updates=50", "evaluation.enabled=false", "output.checkpoint_every=40")
    update = made.trainer.update
    monkeypatch.setattr(made.trainer, "update", lambda index: (os.kill(os.getpid(), number), update(index))[1])
    with pytest.raises(Interrupted) as caught:
        made.run()
    assert caught.value.code == 128 + number
    assert saved_state(checkpoints(tmp_path / "run")[-1]).update == 1
    assert signal.getsignal(number) is not made


def test_kill_9_loses_at_most_the_updates_since_the_last_checkpoint(whole, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "diffalign", "train", "flow_grpo/shapes-sd3", *TINY, f"run_dir={folder}"]
    command += ["updates=4", "evaluation.every=2", "output.checkpoint_every=1", "evaluation.enabled=true"]
    for updates in (1, 3):  # killed after the first and the third checkpoint, at whatever it is doing then
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len([r for r in read_rows(folder) if "seconds/total" in r]) < updates and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait()
        saved = checkpoints(folder)
        assert int(saved[-1].name[-6:]) >= updates - 1 if saved else updates == 1
    assert same(finish(start(folder, "updates=4", "evaluation.every=2", "output.checkpoint_every=1")), whole[1])


def test_a_planted_change_of_one_stored_latent_stops_the_run_and_says_so(tmp_path, monkeypatch):
    made = start(tmp_path / "run", "evaluation.enabled=false", "rewards={jpeg_compressibility: 1}")
    rollout = made.policy.rollout

    def planted(prompts, plan, each=None):
        found = rollout(prompts, plan, each)
        if any(plan.noise):
            found.x[1][0, 0, 0, 0] += 1e-3
        return found

    monkeypatch.setattr(made.policy, "rollout", planted)
    with pytest.raises(Fault, match="update 1, step 0: the replay differs from the rollout"):
        made.run()


def test_equal_rewards_skip_the_update_and_say_so(tmp_path, monkeypatch):
    made = start(tmp_path / "run", "evaluation.enabled=false")
    said: list[str] = []
    monkeypatch.setattr(made.reporter, "say", said.append)
    made.trainer.scorer.rewards = {"shapes_geneval_partial": Wrapped(lambda media, prompts: [0.25] * len(prompts))}
    before = {name: p.detach().clone() for name, p in made.policy.parameters.items()}
    made.run()
    assert any("every group has equal rewards" in line for line in said)
    assert all(torch.equal(before[name], p) for name, p in made.policy.parameters.items())


def test_samples_without_a_score_are_counted_and_none_at_all_is_a_fault(tmp_path, monkeypatch):
    made = start(tmp_path / "run", "evaluation.enabled=false", "updates=1", "scoring.max_invalid=0.25")
    said: list[str] = []
    monkeypatch.setattr(made.reporter, "say", said.append)
    made.trainer.scorer.rewards = {
        "shapes_geneval_partial": Wrapped(lambda media, prompts: [float("nan"), 0.0, 1.0, 0.5])
    }
    made.run()
    assert "update 1: 1 samples have no score and carry no weight" in said
    made.folder.close()
    made = start(tmp_path / "other", "evaluation.enabled=false")
    made.trainer.scorer.rewards = {"shapes_geneval_partial": Wrapped(lambda media, prompts: [float("nan")] * 4)}
    with pytest.raises(Fault, match="update 1: samples without a score, shapes_geneval_partial: 4 of 4"):
        made.run()


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_in_the_end_a_fault(tmp_path, monkeypatch):
    made = start(tmp_path / "run", "evaluation.enabled=false", "updates=20", "rewards={jpeg_compressibility: 1}")
    before = {name: p.detach().clone() for name, p in made.policy.parameters.items()}
    loss = made.trainer.rule.loss

    def broken(*args):
        found = loss(*args)
        return type(found)(found.value * float("nan"), found.metrics, found.gap)

    monkeypatch.setattr(made.trainer.rule, "loss", broken)
    with pytest.raises(Fault, match=f"{session.NONFINITE_LIMIT} gradients in a row were not finite"):
        made.run()
    assert made.skipped == session.NONFINITE_LIMIT
    assert all(torch.equal(before[name], p) for name, p in made.policy.parameters.items())


def test_a_vanished_folder_is_a_fault(tmp_path, monkeypatch):
    settings = tiny_config(tmp_path / "run", "evaluation.enabled=false", "updates=4")
    update = Trainer.update

    def vanishing(self, index):
        found = update(self, index)
        if index == 1:
            shutil.rmtree(tmp_path / "run")
        return found

    monkeypatch.setattr(Trainer, "update", vanishing)
    with pytest.raises(Fault, match=r"scores\.jsonl: cannot write \(No such file or directory\)"):
        session.train(settings, quiet=True)
    assert not (tmp_path / "run").exists()  # nothing half made in its place


@pytest.mark.wide
def test_a_disk_that_is_really_full_is_exit_code_3_and_the_run_goes_on_later(whole, tmp_path):
    """The kernel refuses files above 100 kB; a checkpoint has 600."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "diffalign", "train", "flow_grpo/shapes-sd3", *TINY, f"run_dir={folder}"]
    command += ["updates=4", "evaluation.every=2", "output.checkpoint_every=1"]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    first = subprocess.run([*command, "updates=1"], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    full = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert full.returncode == 3, full.stderr
    assert "Traceback" not in full.stderr
    assert "checkpoint: cannot write" in full.stderr.splitlines()[-1]
    assert [p.name for p in checkpoints(folder)] == ["update_000001"]
    later = subprocess.run(command, capture_output=True, text=True, check=False)
    assert later.returncode == 0, later.stderr
    assert same(load_file(folder / "adapter" / "pytorch_lora_weights.safetensors"), whole[1])


def test_out_of_memory_halves_the_micro_batch_says_so_and_a_resumed_run_remembers(tmp_path, monkeypatch):
    overrides = ("evaluation.enabled=false", "output.checkpoint_every=1", "rewards={jpeg_compressibility: 1}")
    made = start(tmp_path / "run", *overrides)
    said: list[str] = []
    made.reporter.say = said.append
    made.trainer.notify = said.append
    network = made.parts.pipe.transformer
    forward = network.forward

    def cramped(*args, **kwargs):
        if len(kwargs["hidden_states"]) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    network.forward = cramped
    finish(made)
    assert [line for line in said if "micro" in line] == [
        "out of memory (OutOfMemoryError: CUDA out of memory.): going on with optimizer.micro_batch 2",
        "update 1: old log-probabilities are computed again, for the smaller micro-batch",
    ]
    resumed = start(tmp_path / "run", *overrides)
    resumed.points.resume()
    assert resumed.policy.micro_batch == 2
    resumed.folder.close()


def test_the_best_evaluation_keeps_its_checkpoint_and_its_adapter(tmp_path, monkeypatch):
    values = iter([0.1, 0.3, 0.9, 0.2, 0.4])  # before training, then after each update
    joined = evaluate.joined

    def scored(parts, prompts, update, *more):
        found = joined(parts, prompts, update, *more)
        value = next(values)
        return results.Evaluation(update, {k: np.full_like(v, value) for k, v in found.scores.items()}, found.group)

    monkeypatch.setattr(evaluate, "joined", scored)
    made = start(tmp_path / "run", "updates=4", "evaluation.every=1", "output.keep=1", "output.checkpoint_every=4")
    finish(made)
    kept = checkpoints(tmp_path / "run")
    assert [path.name for path in kept] == ["update_000002", "update_000004"]
    best = load_file(tmp_path / "run" / "best" / "pytorch_lora_weights.safetensors")
    assert not same(best, load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors"))
    ema = {name.replace(".default", "").split(".", 1)[1]: v for name, v in saved_state(kept[0]).shadows["ema"].items()}
    assert {name.split(".", 1)[1] for name in best} == set(ema)
    assert all(torch.equal(v, ema[name.split(".", 1)[1]]) for name, v in best.items())
    assert "best of this run's evaluations" in (tmp_path / "run" / "best" / "README.md").read_text()


def test_rewards_that_are_not_finite_end_a_pathwise_run_with_its_state_intact(tmp_path):
    overrides = ("evaluation.enabled=false", "updates=20", "output.checkpoint_every=1")
    settings = tiny_config(tmp_path / "run", *overrides, name="truncated_bp/shapes-sd")
    made = Session(settings, open_run(settings, False), Reporter(quiet=True))
    reward = made.trainer.scorer.rewards["shapes_pref"]
    calls = iter(range(100))
    made.trainer.scorer.rewards = {
        "shapes_pref": Wrapped(lambda m, p: reward(m, p) * (float("nan") if next(calls) >= 2 else 1.0))
    }
    with pytest.raises(Fault, match="samples without a score, shapes_pref: 4 of 4; saved after update 2; the same"):
        made.run()
    state = saved_state(checkpoints(tmp_path / "run")[-1])
    assert all(value.isfinite().all() for value in state.parameters.values())
    made.folder.close()


def test_a_run_with_other_settings_is_refused_with_the_difference(whole):
    with pytest.raises(UserError) as caught:
        start(whole[0], "updates=4", "evaluation.every=2", "optimizer.lr=0.5")
    assert "  optimizer.lr: 0.001 -> 0.5" in caught.value.problems
    assert "--fresh" in caught.value.problems[0]


def test_fewer_updates_than_done_are_refused(whole):
    with pytest.raises(UserError, match="updates: got 3, .* has done 4; allowed is 4 or more"):
        start(whole[0], "updates=3", "evaluation.every=2")


def test_damaged_checkpoints_are_named_and_the_one_before_is_taken(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    overrides = ("evaluation.every=2", "output.checkpoint_every=1")
    finish(start(folder, "updates=3", *overrides))
    newest = checkpoints(folder)[-1]
    (newest / "optimizer.pt").write_bytes(b"")
    said: list[str] = []
    monkeypatch.setattr(Reporter, "say", lambda reporter, line: said.append(line))
    assert same(finish(start(folder, "updates=4", *overrides)), whole[1])
    assert f"{newest} is damaged and passed over" in said
    assert any(line.startswith("resuming after update 2") for line in said)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_written_over(tmp_path):
    folder = finish_one(tmp_path)
    for path in (folder / "checkpoints").glob("update_*/tensors.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "config.yaml")}
    with pytest.raises(UserError, match="no checkpoint of .* is whole; choose another run_dir, or --fresh"):
        start(folder, "evaluation.enabled=false", "updates=3")
    assert {p: p.read_bytes() for p in before} == before


def finish_one(tmp_path) -> Path:
    finish(start(tmp_path / "run", "evaluation.enabled=false"))
    return tmp_path / "run"


@pytest.mark.slow  # half a minute
def test_equal_adapters_are_equal_files_in_every_process(tmp_path):
    files = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        command = [sys.executable, "-m", "diffalign", "train", "flow_grpo/shapes-sd3", *TINY, f"run_dir={folder}"]
        command += ["evaluation.enabled=false", "updates=1", "rewards={jpeg_compressibility: 1}"]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        files.append((folder / "adapter" / "pytorch_lora_weights.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_reward_whose_gradient_does_not_come_from_the_pixels_is_a_fault(tmp_path):
    overrides = ("evaluation.enabled=false",)
    settings = tiny_config(tmp_path / "run", *overrides, name="truncated_bp/shapes-sd")
    made = Session(settings, open_run(settings, False), Reporter(quiet=True))
    made.trainer.scorer.rewards = {
        "shapes_pref": Wrapped(lambda media, prompts: torch.zeros(len(prompts), requires_grad=True))
    }
    with pytest.raises(Fault, match="reward shapes_pref: has no gradient to the pictures"):
        made.run()
    made.folder.close()


def test_a_judge_that_never_gives_a_score_is_a_fault(tmp_path):
    made = start(tmp_path / "run")
    made.parts.judges.rewards["shapes_geneval"] = Wrapped(lambda media, prompts: [float("nan")] * len(prompts))
    with pytest.raises(
        Fault, match="evaluation after update 0: samples without a score, shapes_geneval: 24 of 24; the same"
    ):
        made.run()
    made.folder.close()


def test_fresh_starts_over_and_leaves_other_files_alone(tmp_path):
    folder = tmp_path / "run"
    finish(start(folder, "evaluation.enabled=false", "updates=1"))
    (folder / "notes.txt").write_text("mine")
    made = start(folder, "evaluation.enabled=false", "updates=1", "optimizer.lr=0.1", fresh=True)
    made.folder.begin(made.config)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not checkpoints(folder)
    made.folder.close()


def test_fresh_deletes_nothing_where_there_is_no_run(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mine.png").write_text("mine")
    folder = open_run(tiny_config(tmp_path), True)
    folder.begin(tiny_config(tmp_path))
    folder.close()
    assert (tmp_path / "samples" / "mine.png").read_text() == "mine"


def test_fresh_deletes_nothing_before_everything_has_loaded(tmp_path):
    folder = tmp_path / "run"
    kept = finish(start(folder, "evaluation.enabled=false"))
    with pytest.raises(UserError, match="cannot fetch"):
        named = ("precision=float32", "sampler.pipeline_args={}")  # so that nothing of it is to be known before
        session.train(tiny_config(folder, "model=owner/name", *named), fresh=True, quiet=True)
    assert same(load_file(folder / "adapter" / "pytorch_lora_weights.safetensors"), kept)
    assert checkpoints(folder)


def test_changed_prompts_are_refused(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a photo of a star\n")
    overrides = (f"prompts.source={path}", "rewards={jpeg_compressibility: 1}", "eval_rewards=[]")
    finish(start(tmp_path / "run", *overrides))
    path.write_text("a photo of a circle\n")
    made = start(tmp_path / "run", "updates=3", *overrides)
    with pytest.raises(
        UserError, match=r"began with other content; restore it, --change .*\n  content of prompts: \w+ -> "
    ):
        made.run()


def test_starting_over_evaluates_again(tmp_path):
    folder = tmp_path / "run"
    finish(start(folder))
    shutil.rmtree(folder / "checkpoints")
    (folder / "evaluation" / "update_000002.json").write_text("{}")
    finish(start(folder))
    assert any(row["update"] == 2 and "eval/n" in row for row in read_rows(folder))


def test_a_folder_in_use_is_refused(tmp_path):
    settings = tiny_config(tmp_path / "run")
    held = open_run(settings, False)
    with pytest.raises(UserError, match="in use by another process"):
        open_run(settings, False)
    held.close()
    open_run(settings, False).close()


@pytest.mark.parametrize("place", ["/proc/nowhere/run", "{file}/run"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir: got .* cannot write there"):
        open_run(tiny_config(place.format(file=tmp_path / "file")), False)


def test_damaged_files_of_a_run_are_named(tmp_path):
    folder = tmp_path / "run"
    finish(start(folder, "updates=1"))
    (folder / "evaluation" / "update_000000.json").write_text("{")
    made = start(folder, "updates=2")
    with pytest.raises(Fault, match=r"update_000000.json: damaged .* delete it"):
        made.run()
    made.folder.close()
    (folder / "evaluation" / "update_000000.json").unlink()
    finish(start(folder, "updates=2"))
    (folder / "config.yaml").write_text("[")
    start(folder, "updates=2").folder.close()  # its checkpoints say what the run is
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match=r"config.yaml is damaged .* --fresh starts over"):
        start(folder, "updates=2")


def test_a_full_disk_outside_checkpoints_is_a_fault_too(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "curves.png")

    monkeypatch.setattr(figures, "curves", full)
    with pytest.raises(Fault, match="curves.png: No space left on device; the last checkpoint is kept"):
        session.train(tiny_config(tmp_path / "run", "evaluation.enabled=false"), quiet=True)
    assert checkpoints(tmp_path / "run")


def test_rows_cut_short_by_a_kill_are_left_out_and_rewound(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\n{"update": 2}\n{"upd')
    folder = RunFolder(tmp_path)
    assert [row["update"] for row in folder.logs.rows()] == [1, 2]
    folder.rewind(1, {})
    folder.logs.append({"update": 2, "x": 1, "y": float("nan")})
    assert folder.logs.rows()[-1] == {"update": 2, "x": 1}
    assert [json.loads(line)["update"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_tensorboard_gets_the_numbers(tmp_path):
    finish(start(tmp_path / "run", "evaluation.enabled=false", "output.trackers=[tensorboard]"))
    assert list((tmp_path / "run" / "trackers").rglob("events*"))


def test_the_evaluation_compares_the_same_images(whole):
    before, after = (json.loads((whole[0] / "evaluation" / f"update_{k:06d}.json").read_text()) for k in (0, 4))
    assert before["prompts"] == after["prompts"]
    assert before["seed"] == after["seed"]
    assert before["group"] == after["group"]
    grids = [np.load(whole[0] / "samples" / f"update_{k:06d}.npz")["images"] for k in (0, 4)]
    assert grids[0].shape == grids[1].shape == (4, 64, 64, 3)
    assert (grids[0] != grids[1]).any()


@pytest.mark.wide
def test_with_a_cache_the_encoders_leave_and_a_resumed_run_is_the_same(tmp_path):
    cached = (f"prompts.cache={tmp_path / 'encoded'}", "evaluation.every=1")
    made = start(tmp_path / "whole", "updates=2", *cached)
    assert encoders.present(made.parts.pipe) == []
    expected = finish(made)
    count = len(list((tmp_path / "encoded").glob("*.safetensors")))
    # every counting caption of training and test, the negative text, and the one that pipelines are tried with
    assert count == 1 + len({*made.fixed.prompts.text, *(entry["prompt"] for entry in made.config.book.training)})
    made = start(tmp_path / "cut", "updates=1", *cached)
    finish(made)
    assert same(finish(start(tmp_path / "cut", "updates=2", *cached)), expected)
    assert len(list((tmp_path / "encoded").glob("*.safetensors"))) == count
    without = finish(start(tmp_path / "without", "updates=2", "evaluation.every=1"))
    for (
        name,
        tensor,
    ) in without.items():  # texts encoded alone round otherwise than in a batch, and two steps of Adam make much of it
        assert (tensor - expected[name]).abs().max() < 0.1 * max(tensor.abs().max(), 1e-3)


def test_a_cache_that_is_too_small_keeps_the_encoders_and_says_so(tmp_path, capsys):
    settings = tiny_config(tmp_path / "run", f"prompts.cache={tmp_path / 'encoded'}", "prompts.cache_gib=0.0001")
    made = Session(settings, open_run(settings, False), Reporter())
    assert len(encoders.present(made.parts.pipe)) == 3
    said = capsys.readouterr()
    assert "text encoders stay: " in said.out + said.err
    assert "encoded prompts take up to" in said.out + said.err
    made.folder.close()


def test_too_many_samples_without_a_score_stop_the_run_before_anything_is_learnt_from_them(tmp_path):
    made = start(tmp_path / "run", "evaluation.enabled=false", "updates=4", "output.checkpoint_every=100")
    whole = iter([True, True, False])

    def reward(media, prompts):
        return [0.1, 0.2, 0.9, 0.3 if next(whole) else float("nan")]

    made.trainer.scorer.rewards = {"shapes_geneval_partial": Wrapped(reward)}
    with pytest.raises(
        Fault, match="update 3: samples without a score, shapes_geneval_partial: 1 of 4; saved after update 2"
    ):
        made.run()
    made.folder.close()
    (kept,) = checkpoints(tmp_path / "run")
    assert saved_state(kept).update == 2
    assert same(saved_state(kept).parameters, dict(made.policy.parameters))


def test_some_samples_without_a_score_in_every_update_stop_the_run_too(tmp_path):
    made = start(
        tmp_path / "run",
        "evaluation.enabled=false",
        "updates=9",
        "scoring.max_invalid=0.5",
        "scoring.invalid_in_a_row=2",
    )
    holes = iter([True, False, True, True, True])
    made.trainer.scorer.rewards = {
        "shapes_geneval_partial": Wrapped(lambda media, prompts: [float("nan") if next(holes) else 0.5, 0.2, 0.9, 0.3])
    }
    with pytest.raises(
        Fault,
        match="update 4: 2 updates in a row had samples without a score: shapes_geneval_partial; saved after update 4",
    ):
        made.run()
    made.folder.close()
    assert checkpoints(tmp_path / "run")[-1].name.endswith("4")


def test_an_evaluation_with_too_many_holes_stops_the_run(tmp_path):
    made = start(tmp_path / "run")
    made.parts.judges.rewards["shapes_geneval"] = Wrapped(
        lambda media, prompts: [float("nan"), *[1.0] * (len(prompts) - 1)]
    )
    with pytest.raises(
        Fault, match=r"evaluation after update 0: samples without a score, shapes_geneval: \d of 24; the same"
    ):
        made.run()
    made.folder.close()


@pytest.mark.parametrize(
    "strip",
    [
        lambda values: values.pop("attention"),
        lambda values: values["scoring"].pop("reduce"),
        lambda values: values.pop("scoring"),
        lambda values: values["prompts"].pop("cache_gib"),
    ],
    ids=["a key", "a key of a section", "a section", "a number"],
)
def test_a_run_from_before_a_key_was_added_goes_on(whole, tmp_path, strip):
    folder = tmp_path / "run"
    finish(start(folder, "updates=2", "evaluation.every=2"))
    values = yaml.safe_load((folder / "config.yaml").read_text())
    strip(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    assert same(finish(start(folder, "updates=4", "evaluation.every=2")), whole[1])


def test_a_setting_of_the_rule_that_is_its_default_is_no_change(whole, tmp_path):
    folder = tmp_path / "run"
    finish(start(folder, "updates=1", "evaluation.enabled=false"))
    rule = configs.load("flow_grpo/shapes-sd3", TINY).make_rule().settings
    assert rule.fan == 1
    start(folder, "updates=1", "evaluation.enabled=false", "rule.fan=1").folder.close()
    with pytest.raises(UserError) as caught:
        start(folder, "updates=1", "evaluation.enabled=false", "rule.clip=0.5")
    assert f"  rule.clip: {rule.clip} -> 0.5" in caught.value.problems


@pytest.mark.parametrize("cached", [True, False])
def test_what_the_pipelines_call_does_not_take_is_refused_by_name(cached, tmp_path):
    cache = [f"prompts.cache={tmp_path / 'encoded'}"] if cached else []
    for argument, told in (
        (
            "{hieght: 32, max_sequence_length: 1}",
            "got hieght, which StableDiffusion3Pipeline's call does not take; did you mean height?",
        ),
        ("{height: 33, max_sequence_length: 1}", "StableDiffusion3Pipeline does not accept "),
    ):
        with pytest.raises(UserError) as refused:
            session.train(tiny_config(tmp_path / "run", f"sampler.pipeline_args={argument}", *cache), quiet=True)
        (line,) = refused.value.problems
        assert line.startswith(f"sampler.pipeline_args: {told}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_config_of_the_users_own_is_no_run(tmp_path):
    """Its name is that of a run's config; without its sections it is none, and what is there is named."""
    (tmp_path / "config.yaml").write_text("model: shapes-sd3\nrule: flow_grpo\n")
    (tmp_path / "curves.png").write_text("mine")
    with pytest.raises(
        UserError,
        match="holds config.yaml, curves.png and no run; choose another run_dir",
    ):
        open_run(tiny_config(tmp_path))
