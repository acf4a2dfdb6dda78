"""What `doctor --card` finds: a kernel that is wrong, and one that ends its process."""

import os
import signal

import pytest
import torch
from click.testing import CliRunner

from diffalign import doctor
from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.runtime import trials
from diffalign.runtime.trials import Trial

HERE = __name__


def nan_with_a_mask(q, k, v, mask):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out * float("nan") if mask is not None and q.shape[2] == 704 else out


def dies(q, k, v, mask):
    if q.shape[-1] == 128 and mask is not None:
        os.kill(os.getpid(), signal.SIGSEGV)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.wide
def test_c9_a_wrong_kernel_and_one_that_ends_its_process_are_told(monkeypatch):
    monkeypatch.setattr(trials, "CASES", trials.CASES)
    wrong = trials.tried(f"{HERE}:nan_with_a_mask", "cpu")
    assert [trial.found for trial in wrong] == ["right", "wrong", "right", "right"] * 2
    assert str(doctor.kernel("x", wrong)).startswith(
        "x                    wrong in 2 of 8 cases: heads of 64, 704 tokens, a mask: forward nan, backward nan"
    )
    dead = trials.tried(f"{HERE}:dies", "cpu")
    assert [trial.found for trial in dead] == ["right"] * 5 + ["fault", "right", "fault"]
    assert dead[5].detail == "its process ended with code -11"


def test_what_torch_has_on_a_cpu_is_right():
    found = trials.all_tried(("_native_math", trials.NORM), "cpu")
    assert {trial.found for each in found.values() for trial in each} == {"right"}
    assert trials.fastest(found) == "_native_math"


def some(form, ms, found="right", masked="right"):
    return [Trial(form, 64, 704, mask, masked if mask else found, "", ms) for mask in (False, True)]


def test_the_fastest_is_never_wrong():
    given = {
        "_native_cudnn": some("_native_cudnn", 1.0, masked="wrong"),
        "_native_flash": some("_native_flash", 2.0, masked="refused"),
        "_native_efficient": some("_native_efficient", 3.0),
        "_native_math": some("_native_math", 4.0),
    }
    assert trials.fastest(given) == "_native_flash"
    assert trials.fastest({"_native_cudnn": given["_native_cudnn"]}) is None
    assert "takes no mask" in str(doctor.kernel("flash", given["_native_flash"]))
    assert not doctor.kernel("_native_cudnn", given["_native_cudnn"]).broken  # nobody asks for it unless by name
    assert doctor.kernel("_native_efficient", some("_native_efficient", 1.0, "fault")).broken


def test_without_a_card_it_is_refused():
    result = CliRunner().invoke(app, ["doctor", "--card"])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == "--card: torch sees no CUDA device here"
