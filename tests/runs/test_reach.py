"""An adapter that changes nothing is found out, whatever detached it."""

import contextlib

import pytest

from diffalign.errors import Fault
from diffalign.runs import session
from diffalign.runs.reach import Reach, acts
from diffalign.types import Update
from tests.kit.helpers import tiny_config
from tests.runs.test_session import finish, start

REWARDS = {"shapes-flux": "shapes_pref"}
FEW = ("evaluation.enabled=false", "output.checkpoint_every=100")


@pytest.mark.parametrize("model", ["shapes-sd3", "shapes-sd", "shapes-flux", "shapes-wan"])
def test_the_first_update_reaches_the_predictions_and_no_update_does_not(model, tmp_path):
    name = {"shapes-sd": "ddpo/shapes-sd", "shapes-flux": "truncated_bp/shapes-flux"}.get(model, f"flow_grpo/{model}")
    reward = REWARDS.get(model, "jpeg_compressibility")
    made = session.Session(
        settings := tiny_config(
            tmp_path / "run",
            *FEW,
            "updates=1",
            f"rewards={{{reward}: 1}}",
            name=name,
        ),
        session.open_run(settings),
        session.Reporter(quiet=True),
    )
    counted = made.policy.rows_forward
    assert not acts(made.trainer)  # B is 0
    finish(made)
    assert acts(made.trainer)
    assert made.reach.reached
    assert made.policy.rows_forward > counted


@pytest.mark.parametrize("how", ["the same without", "frozen"])
def test_an_adapter_that_is_off_ends_the_run(how, tmp_path, monkeypatch):
    made = start(tmp_path / "run", *FEW, "updates=12", "rewards={jpeg_compressibility: 1}")
    if how == "the same without":  # what samples has the adapter merged away, or none
        monkeypatch.setattr(made.policy, "reference", contextlib.nullcontext)
    else:
        monkeypatch.setattr(made.trainer.optimizer, "step", lambda: None)
    with pytest.raises(Fault, match="trained for 10 updates and changes no prediction in a single bit"):
        made.run()
    made.folder.close()


def test_an_update_without_a_step_is_no_try():
    reach = Reach(trainer=None)
    reach.check(Update(steps=2, nonfinite=2))
    assert reach.tries == 0


def test_nft_says_when_its_old_policy_is_the_trained_one(tmp_path, capfd):
    made = tiny_config(tmp_path / "run", *FEW, "updates=6", "rule.old_decay=0", name="nft/shapes-sd3")
    session.train(made)
    said = capfd.readouterr().err
    assert said.count("the old policy has equalled the trained one for 5 updates; rule.old_decay: 0 is too low") == 1
    session.train(tiny_config(tmp_path / "other", *FEW, "updates=6", name="nft/shapes-sd3"))
    assert "equalled" not in capfd.readouterr().err
