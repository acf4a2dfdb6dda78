"""Several processes are one: gradients, adapters, runs, and faults. On the CPU, with gloo."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffalign import config as configs
from diffalign.runs import session
from diffalign.runs.folder import read_rows
from diffalign.runtime.distributed import World, checksum
from tests.kit.helpers import TINY
from tests.kit.processes import launch

WORKER = """
import json, os, sys
import numpy as np, torch
torch.set_num_threads(1)
from diffalign.runtime.distributed import World, checksum
from tests.runtime import test_distributed
world = World.join()
getattr(test_distributed, sys.argv[1])(world, sys.argv[2])
world.leave()
sys.stdout.flush()
os._exit(0)  # as the command line does: see `cli._leave`
"""


# -- gradients

SCOUTING, UNEVEN = "awm, scouts", "awm, groups of unequal size"


def every_rules_update(world: World, folder: str) -> None:
    """Two updates of every rule on the Gaussian chain, and of one with scouts and with groups of unequal size; each process writes its
    gradients, parameters, metrics and the seeds that it drew."""
    from diffalign.backends.toy import ToyPolicy
    from diffalign.prompts import book
    from diffalign.rules import AWM
    from diffalign.training.selection import Allocation, Scouts
    from tests.kit.helpers import toy_prompts, toy_teacher
    from tests.rules.test_conformance import FACTORIES

    found = {}
    for name, make in {**FACTORIES, SCOUTING: AWM, UNEVEN: AWM}.items():
        policy = ToyPolicy()
        policy.adapters["better"] = toy_teacher(policy)
        trainer = trainer_of(make(), policy, world)
        trainer.draw = lambda update: toy_prompts(4, 6, update=update)
        if name == SCOUTING:
            trainer.selector = Scouts(12, 2)
        if name == UNEVEN:
            trainer.draw = lambda update: book.draw([{"prompt": "a"}, {"prompt": "b"}], 2, 16, 0, update)
            trainer.selector = Allocation(4, 28, 0.9, 4)
            trainer.selector.passed = {"a": (900.0, 1.0)}
        trainer.update(0)
        update = trainer.update(1)
        row = update.row()
        kept = {k: v for k, v in row.items() if not k.startswith("seconds/")}
        found[name] = {"grad": policy.delta.grad.tolist(), "delta": policy.delta.tolist(), "metrics": kept}
        found[name]["seeds"] = update.judged and update.judged[0].seed.tolist()
    Path(folder, f"{world.size}_{world.rank}.json").write_text(json.dumps(found))


def trainer_of(rule, policy, world: World):
    from diffalign.backends.toy import toy_reward
    from diffalign.rewards.scorer import Scorer
    from diffalign.training.trainer import Trainer

    optimizer = torch.optim.Adam(policy.parameters.values(), lr=0.05)
    policy.micro_batch = 4
    return Trainer(rule, policy, Scorer({"toy": toy_reward}), optimizer, lambda update: None, world=world)


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("updates")
    every_rules_update(World(), str(folder))
    for size in (2, 4):
        for done in launch(size, ["-c", WORKER, "every_rules_update", str(folder)]):
            assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("size", [2, 4])
def test_the_gradient_is_that_of_one_process_for_every_rule(updates, size):
    alone = updates["1_0"]
    assert len(alone) > 15
    for name, expected in alone.items():
        found = updates[f"{size}_0"][name]
        # float64 sums in another order; after one Adam step
        np.testing.assert_allclose(found["grad"], expected["grad"], rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(found["delta"], expected["delta"], rtol=1e-9, atol=1e-11, err_msg=name)
        assert found["metrics"].keys() == expected["metrics"].keys(), name
        assert found["seeds"] == expected["seeds"], name
        for key, value in expected["metrics"].items():
            assert found["metrics"][key] == pytest.approx(value, rel=1e-7, abs=1e-10), (name, key)


def test_15_processes_keep_the_same_seeds_of_scouts(updates):
    kept = [found[SCOUTING]["seeds"] for found in updates.values()]
    assert len(kept) == 7
    assert all(seeds == kept[0] for seeds in kept)
    drawn = updates["1_0"]["awm"]["seeds"]
    assert len(kept[0]) == len(drawn)
    assert kept[0] != drawn


def test_groups_of_unequal_size_were_of_unequal_size(updates):
    metrics = updates["1_0"][UNEVEN]["metrics"]
    assert metrics["allocated/fewest"] < 16 < metrics["allocated/most"]


@pytest.mark.parametrize("size", [2, 4])
def test_T38_every_process_ends_with_the_same_bits(updates, size):
    for rank in range(1, size):
        assert updates[f"{size}_{rank}"] == updates[f"{size}_0"]


def one_has_nothing_to_learn(world: World, folder: str) -> None:
    """Rewards of the first group are equal, and it is all that the first process has."""
    from diffalign.backends.toy import ToyPolicy
    from diffalign.rewards.base import Wrapped
    from diffalign.rules import FlowGRPO
    from tests.kit.helpers import toy_prompts

    policy = ToyPolicy()
    trainer = trainer_of(FlowGRPO(), policy, world)
    trainer.draw = lambda update: toy_prompts(2, 4, update=update)
    own = trainer.scorer.rewards["toy"]
    by_group = lambda media, prompts: own(media, prompts) * torch.as_tensor(prompts.group)  # noqa: E731
    trainer.scorer.rewards["toy"] = Wrapped(by_group)
    assert not trainer.update(0).flat
    Path(folder, f"{world.size}_{world.rank}").write_text(json.dumps(policy.delta.tolist()))


def test_a_process_without_anything_to_learn_takes_part(tmp_path):
    one_has_nothing_to_learn(World(), str(tmp_path))
    assert [d.returncode for d in launch(2, ["-c", WORKER, "one_has_nothing_to_learn", str(tmp_path)], 60)] == [0, 0]
    alone, first, second = (json.loads((tmp_path / name).read_text()) for name in ("1_0", "2_0", "2_1"))
    assert first == second
    np.testing.assert_allclose(first, alone, rtol=1e-9, atol=1e-11)


# -- faults


def one_fails(world: World, folder: str) -> None:
    from diffalign.errors import Fault

    def work() -> int:
        if world.rank == 1:
            raise ValueError("the disk of this one is full")
        return world.rank

    try:
        world.together(work)
    except (Fault, ValueError) as error:
        Path(folder, f"{world.rank}").write_text(f"{type(error).__name__}: {error}")


def test_a_failure_of_one_ends_all(tmp_path):
    assert [done.returncode for done in launch(3, ["-c", WORKER, "one_fails", str(tmp_path)])] == [0, 0, 0]
    told = "Fault: process 1: ValueError: the disk of this one is full"
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 2)] == [told, told]
    assert (tmp_path / "1").read_text() == "ValueError: the disk of this one is full"


def one_drifts(world: World, folder: str) -> None:
    from diffalign.errors import Fault

    parameters = {"a": torch.ones(5)}
    world.check_equal(parameters, "update 3")
    parameters["a"][2] += 1e-7 * world.rank
    try:
        world.check_equal(parameters, "update 4")
    except Fault as error:
        Path(folder, f"{world.rank}").write_text(str(error))


def test_adapters_that_differ_in_a_bit_stop_the_run(tmp_path):
    launch(2, ["-c", WORKER, "one_drifts", str(tmp_path)])
    for rank in (0, 1):
        expected = "update 4: the processes hold 2 different adapters; they must be equal"
        assert (tmp_path / str(rank)).read_text() == expected


def test_rows_are_dealt_by_whole_micro_batches():
    shares = [World(rank, 3).rows(10, 2) for rank in range(3)]
    assert shares == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5]]
    assert World().rows(5, 2) == [0, 1, 2, 3, 4]


# -- whole runs


def command(run_dir, *overrides: str) -> list[str]:
    few = ["prompts.group_size=4", "optimizer.micro_batch=2", "sampler.steps=3", *overrides]
    return ["-m", "diffalign", "train", "flow_grpo/shapes-sd3", *TINY, *few, f"run_dir={run_dir}"]


def adapter(run_dir) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter" / "pytorch_lora_weights.safetensors")


def test_a_run_of_two_processes_is_a_run_and_resumes_with_one(tmp_path):
    both = launch(2, command(tmp_path / "two", "updates=1", "evaluation.every=1"))
    for done in both:
        assert done.returncode == 0, done.stderr
    assert "gain" in both[0].stdout
    assert both[1].stdout == ""  # the first one speaks
    again = launch(1, command(tmp_path / "two", "updates=2", "evaluation.every=1"))[0]
    assert again.returncode == 0, again.stderr
    assert "resuming after update 1" in again.stderr
    settings = configs.load("flow_grpo/shapes-sd3", command(tmp_path / "one", "updates=2", "evaluation.every=1")[4:])
    session.train(settings, quiet=True)
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    # float32 sums in another order, through two steps of Adam
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-5)
    rows = [row for row in read_rows(tmp_path / "two") if "nfe" in row]
    assert [row["nfe"] for row in rows] == [row["nfe"] for row in read_rows(tmp_path / "one") if "nfe" in row]
    counts = [row["eval/n"] for row in read_rows(tmp_path / "two") if "eval/n" in row]
    assert counts
    assert len(set(counts)) == 1


def test_more_processes_than_micro_batches_are_refused(tmp_path):
    for done in launch(2, command(tmp_path / "r", "prompts.groups=1", "optimizer.micro_batch=4")):
        assert done.returncode == 2
        assert (
            "optimizer.micro_batch: got 4, 1 of them an update for 2 processes; allowed is at least one each"
            in done.stderr
        )


def test_a_fault_in_one_process_ends_the_run_of_all(tmp_path):
    reward = tmp_path / "bad.py"
    reward.write_text(
        "import os\ndef f(media, prompts):\n"
        "    if os.environ['RANK'] == '1':\n        raise ConnectionError('reward server is down')\n"
        "    return [0.1 * k for k in range(len(prompts))]\n"
    )
    first, second = launch(
        2, command(tmp_path / "r", f"rewards={{{reward}:f: 1}}", "eval_rewards=[]", "evaluation.enabled=false")
    )
    assert (first.returncode, second.returncode) == (3, 3)
    assert "process 1: RewardFailed: reward" in first.stderr
    assert "ConnectionError: reward server is down" in second.stderr
    assert "Traceback" not in first.stderr + second.stderr


@example([0.0, -0.0], 0, torch.float64)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=40),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_checksum_sees_a_bit_and_an_order(values, place, dtype):
    tensor = torch.tensor(values, dtype=dtype)
    assert checksum([tensor, tensor[:1]]) == checksum([tensor.clone(), tensor[:1]])
    flipped = tensor.clone()
    octets = flipped.view(torch.uint8)
    octets[place % len(octets)] ^= 1 << place % 8
    assert checksum([flipped]) != checksum([tensor])
    turned = tensor.flip(0)
    same = torch.equal(turned.view(torch.uint8), tensor.view(torch.uint8))
    assert (checksum([turned]) == checksum([tensor])) == same
