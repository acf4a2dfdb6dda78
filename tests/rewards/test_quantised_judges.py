"""Judges in 8 and 4 bits: their weights against rounding by hand, their scores near those of the whole ones, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from diffalign import config as configs
from diffalign.errors import UserError
from diffalign.planning.demand import GIB, judges
from diffalign.rewards import catalog, families
from diffalign.rewards.load import load
from diffalign.types import Media, Prompts
from reward_models._bits import quantised
from tests.rewards import qwen, tiny_vlm

WAYS = ("int8", "nf4")


@pytest.fixture(autouse=True)
def plain_products(monkeypatch):
    for module in ("torchao", "bitsandbytes"):
        pytest.importorskip(module)
    # On some CPUs a weight is packed anew for products without a graph, and loses digits: a card has no such thing.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


# The 16 values of a 4-bit normal float, from QLoRA (arXiv 2305.14314), appendix E
NF4 = np.array([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip


def by_hand(weight, how):
    """A matrix as it is held: int8 by rows, nf4 by blocks of 64 of its numbers one after another, to the nearest value."""
    w = weight.double().numpy()
    if how == "int8":
        scale = np.abs(w).max(1, keepdims=True) / 127.5
        sure = np.abs(w / scale) < 127.4  # a row's largest is a tie, which 32-bit numbers break either way
        return np.where(sure, np.round(w / scale) * scale, np.nan), 1e-6  # of numbers up to 0.13, in 32 bits
    blocks = w.reshape(-1, 64)
    scale = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / scale[..., None] - NF4).argmin(-1)
    return (NF4[nearest] * scale).reshape(w.shape), 0.02 * scale.max()  # the scales are 8-bit numbers themselves


@pytest.mark.parametrize("how", WAYS)
def test_weights_are_rounded_as_by_hand_and_what_is_to_stay_stays(how):
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(64, 24), "whole": nn.Linear(64, 8, bias=False), "words": nn.Embedding(5, 64)})
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert quantised(net, how, ("whole",)) is net
    for name in ("whole.weight", "words.weight", "a.bias"):
        assert torch.equal(net.state_dict()[name], before[name]), name
    seen = (net["a"](torch.eye(64)) - net["a"].bias).T.numpy()  # each column of the weights
    expected, allowed = by_hand(before["a.weight"], how)
    assert np.isfinite(expected).mean() > 0.9
    assert np.nanmax(np.abs(seen - expected)) <= allowed
    assert np.abs(seen - before["a.weight"].numpy()).max() > 1e-4
    assert not any(parameter.requires_grad for parameter in net.parameters())


def given(count=4):
    keys = np.arange(count)
    pixels = torch.rand(count, 1, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    return Media(pixels), Prompts([f"a red circle {k}" for k in keys], keys, keys, keys, [{}] * count)


@pytest.mark.parametrize("how", WAYS)
def test_a_preference_judge_in_few_bits_is_near_the_whole_one(how, tmp_path, monkeypatch):
    qwen.asked(monkeypatch, "hpsv3")
    place = qwen.hpsv3_folder(tmp_path / "hpsv3")
    whole, few = load(f"hpsv3@{place}"), load(f"hpsv3+{how}@{place}")
    theirs, mine = whole(*given()), few(*given())
    assert mine.dtype == torch.float32 and not mine.requires_grad
    apart = float((mine - theirs).abs().max())
    # Weights are off by 1 in 250 and 1 in 12 of the largest, some three layers one after another add up; scores spread over several.
    assert 0 < apart < {"int8": 0.1, "nf4": 1.5}[how] * float(theirs.abs().max())
    assert torch.equal(mine, few(*given()))


@pytest.mark.parametrize("how", WAYS)
def test_a_model_that_is_asked_is_not_the_whole_ones(how, tmp_path):
    """Both at one place, in half precision, of which one serves all that ask: these are two."""
    place = tiny_vlm.save("qwen3_vl", tmp_path, torch.bfloat16)
    whole, few, again = (load(f"{name}@{place}") for name in ("vlm_ask", f"vlm_ask+{how}", f"soft_tifa+{how}"))
    assert few.model is again.reward.model and few.model is not whole.model
    assert type(whole.model.net.lm_head) is nn.Linear and type(few.model.net.lm_head) is nn.Linear
    layer = "model.language_model.layers.0.self_attn.q_proj"
    kinds = [type(one.model.net.get_submodule(layer).weight).__name__ for one in (whole, few)]
    assert kinds == ["Parameter", {"int8": "Int8Tensor", "nf4": "Params4bit"}[how]]
    theirs, mine = whole(*given()), few(*given())
    assert 0 <= float((mine - theirs).abs().max()) < 0.1 and mine.isfinite().all()


def test_plan_counts_them_and_a_rule_that_wants_a_gradient_refuses_them():
    found = configs.load("flow_grpo/hpsv3-sd35-medium", ["rewards={hpsv3+nf4: 1.0}", "eval_rewards=[]"], ready=False)
    (size,) = judges(found)[0].values()
    # 7.07 B weights of linear layers in 4.127 bits each, and 152 k words of 3,584 in bfloat16
    assert size / GIB == pytest.approx((7.2e9 * 4.127 / 8 + 152064 * 3584 * 2) / 2**30, abs=0.1)
    with pytest.raises(UserError, match=r"rewards: .*hpsv3\+nf4"):
        configs.load("truncated_bp/shapes-sd3", ["rewards={hpsv3+nf4: 1.0}"])
    assert families.mark("hpsv3", ["hpsv3+nf4"]) == "trained on"
    assert families.mark("hpsv2.1", ["hpsv3+nf4@x"]) == "in domain"


@pytest.mark.parametrize("name", ["clipscore+nf4", "hpsv3+int3", "hpsv3+", "hpsv3+nf4+int8"])
def test_what_has_no_such_form_is_refused_by_name(name):
    with pytest.raises(
        LookupError, match="allowed are .int8 and .nf4, of dsg, hpsv3, soft_tifa, soft_tifa_am, videoreward"
    ):
        catalog.find(name)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(catalog, "missing", lambda module: f"pip install {module}" if module == "bitsandbytes" else "")
    with pytest.raises(UserError, match=r"rewards: hpsv3\+nf4@x needs bitsandbytes; pip install bitsandbytes"):
        load("hpsv3+nf4@x")
    assert catalog.find("hpsv3+int8").missing == ""
