import json
import os

import pytest
import torch

from diffalign.errors import Fault, UserError
from diffalign.runs import state as states
from diffalign.runs import store as stores
from diffalign.runs.budget import Spent
from diffalign.runs.store import Store
from diffalign.runtime import files, signed


def state(update: int, value: float = 1.0) -> states.RunState:
    parameter = torch.full((2, 3), value, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    return states.RunState(
        update,
        {"a.b": parameter},
        {"old": {"a.b": torch.zeros(2, 3)}},
        optimizer.state_dict(),
        rule={"n": 3},
        micro_batch=4,
        digests={"prompts": "p"},
        spent=Spent(update, 12.0, 7, 0.5),
    )


def save(folder, saved, keep, best=None):
    return states.save(Store(folder), saved, keep, best)


def test_round_trip(tmp_path):
    saved = state(5)
    loaded = states.load(Store(tmp_path), save(tmp_path, saved, keep=2))
    assert loaded.update == 5
    assert loaded.facts() == saved.facts()
    assert torch.equal(loaded.parameters["a.b"], saved.parameters["a.b"])
    assert torch.equal(loaded.shadows["old"]["a.b"], torch.zeros(2, 3))
    assert torch.equal(loaded.optimizer["state"][0]["exp_avg"], saved.optimizer["state"][0]["exp_avg"])


def test_only_the_newest_are_kept(tmp_path):
    for update in (1, 2, 3):
        save(tmp_path, state(update), keep=2)
    assert [path.name for path in Store(tmp_path).complete()] == ["update_000002", "update_000003"]


@pytest.mark.parametrize("damage", ["cut", "missing", "no_state", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    save(tmp_path, state(1), keep=5)
    last = save(tmp_path, state(2), keep=5)
    tensors = last / "tensors.safetensors"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-3])
    elif damage == "missing":
        (last / "optimizer.pt").unlink()
    elif damage == "no_state":
        (last / stores.STATE).write_text("{")
    else:
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(bytes(data))
    assert [path.name for path in Store(tmp_path).complete()] == ["update_000001"]


@pytest.mark.parametrize(
    ("where", "moment"), [(states, "save_file"), (states, "write_text"), (signed, "write_text"), (files, "sync")]
)
def test_a_stop_in_the_middle_leaves_the_last_one(tmp_path, monkeypatch, where, moment):
    save(tmp_path, state(1), keep=1)

    class Killed(BaseException):
        pass

    def stop(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(where, moment, stop)
    with pytest.raises(Killed):
        save(tmp_path, state(2), keep=1)
    monkeypatch.undo()
    assert [path.name for path in Store(tmp_path).complete()] == ["update_000001"]
    save(tmp_path, state(2), keep=1)
    assert [path.name for path in Store(tmp_path).complete()] == ["update_000002"]


@pytest.mark.parametrize("kind", [OSError, RuntimeError, states.SafetensorError])
def test_a_full_disk_is_a_fault_and_the_last_one_stays(tmp_path, monkeypatch, kind):
    save(tmp_path, state(1), keep=1)

    def full(*args, **kwargs):
        raise kind("No space left on device")

    monkeypatch.setattr(states, "save_file", full)
    with pytest.raises(Fault, match="No space left"):
        save(tmp_path, state(2), keep=1)
    assert [path.name for path in Store(tmp_path).complete()] == ["update_000001"]


def test_what_reads_back_differently_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "load_file", lambda path: {"parameters/a.b": torch.zeros(2, 3)})
    with pytest.raises(Fault, match="reads back differently"):
        save(tmp_path, state(1), keep=1)
    assert not Store(tmp_path).complete()


def test_the_optimiser_file_holds_no_code(tmp_path):
    path = save(tmp_path, state(1), keep=1)
    torch.load(path / "optimizer.pt", weights_only=True)
    assert json.loads((path / stores.STATE).read_text())["state"]["update"] == 1
    assert os.listdir(tmp_path) == ["update_000001"]


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path):
    import json

    path = save(tmp_path, state(1), 2)
    header = json.loads((path / stores.STATE).read_text())
    (path / stores.STATE).write_text(json.dumps({**header, "format": 1}))
    with pytest.raises(UserError, match="written by another version"):
        states.load(Store(tmp_path), path)


def test_the_best_is_kept_besides_the_newest(tmp_path):
    for update in range(1, 6):
        save(tmp_path, state(update), 2, best=2 if update > 1 else None)
    assert [p.name for p in Store(tmp_path).complete()] == ["update_000002", "update_000004", "update_000005"]
