"""LoCon, LoHa, LoKr, DoRA, whole differences and text encoders, merged: weights as formulas in numpy, and peft itself, have them."""

import re

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file

from diffalign.errors import UserError
from diffalign.models import loading, lora_files, lora_pairs, merging
from diffalign.models.places import Adapter
from diffalign.runs import parts, session
from diffalign.sampling import merged, sources
from tests.kit.helpers import tiny_config

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"


def drawn(seed=0, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def array(tensors, name):
    return tensors[name].double().numpy()


def locon(shape):
    out, inside, *kernel = shape
    made = drawn(down=(3, inside, *kernel), up=(out, 3, *[1] * len(kernel)))
    up, down = array(made, "up").reshape(out, 3), array(made, "down")
    wanted = sum(np.multiply.outer(up[:, r], down[r]) for r in range(3))
    return {"lora_down.weight": made["down"], "lora_up.weight": made["up"]}, wanted, 3


def locon_cp(shape):
    out, inside, *kernel = shape
    made = drawn(down=(3, inside, 1, 1), up=(out, 3, 1, 1), mid=(3, 3, *kernel))
    up, down, mid = array(made, "up")[..., 0, 0], array(made, "down")[..., 0, 0], array(made, "mid")
    wanted = np.zeros(shape)
    for n in range(3):
        for m in range(3):
            wanted += up[:, n, None, None, None] * down[m][None, :, None, None] * mid[n, m]
    return {f"lora_{name}.weight": made[name] for name in ("down", "up", "mid")}, wanted, 3


def loha(shape):
    out, inside = shape[0], int(np.prod(shape[1:]))
    made = drawn(w1_a=(out, 2), w1_b=(2, inside), w2_a=(out, 2), w2_b=(2, inside))
    one, two = (array(made, f"w{k}_a") @ array(made, f"w{k}_b") for k in (1, 2))
    return {f"hada_{name}": tensor for name, tensor in made.items()}, (one * two).reshape(shape), 2


def loha_cp(shape):
    out, inside, *kernel = shape
    made = drawn(
        w1_a=(2, out), w1_b=(2, inside), w2_a=(2, out), w2_b=(2, inside), t1=(2, 2, *kernel), t2=(2, 2, *kernel)
    )
    whole = []
    for k in (1, 2):
        a, b, core = (array(made, name) for name in (f"w{k}_a", f"w{k}_b", f"t{k}"))
        whole.append(
            sum(a[n][:, None, None, None] * b[m][None, :, None, None] * core[n, m] for n in range(2) for m in range(2))
        )
    return {f"hada_{name}": tensor for name, tensor in made.items()}, whole[0] * whole[1], 2


def lokr(shape):
    """Both factors whole: alpha says nothing."""
    out, inside, *kernel = shape
    made = drawn(w1=(4, 2), w2=(out // 4, inside // 2, *kernel))
    one = array(made, "w1").reshape(4, 2, *[1] * len(kernel))
    return {f"lokr_{name}": tensor for name, tensor in made.items()}, np.kron(one, array(made, "w2")), None


def lokr_factors(shape):
    out, inside = shape[0], int(np.prod(shape[1:]))
    made = drawn(w1_a=(4, 3), w1_b=(3, 2), w2_a=(out // 4, 5), w2_b=(5, inside // 2))
    one, two = (array(made, f"w{k}_a") @ array(made, f"w{k}_b") for k in (1, 2))
    return {f"lokr_{name}": tensor for name, tensor in made.items()}, np.kron(one, two).reshape(shape), 5


def lokr_core(shape):
    out, inside, *kernel = shape
    made = drawn(w1=(4, 2), w2_a=(3, out // 4), w2_b=(3, inside // 2), t2=(3, 3, *kernel))
    two = np.einsum("nmkl,ni,mj->ijkl", array(made, "t2"), array(made, "w2_a"), array(made, "w2_b"))
    wanted = np.kron(array(made, "w1")[..., None, None], two)
    return {f"lokr_{name}": tensor for name, tensor in made.items()}, wanted, 3


def whole(shape):
    made = drawn(diff=shape)
    return made, array(made, "diff"), None


KINDS = {
    "LoCon": (locon, (LINEAR, CONV)),
    "LoCon in CP form": (locon_cp, (CONV,)),
    "LoHa": (loha, (LINEAR, CONV)),
    "LoHa in CP form": (loha_cp, (CONV,)),
    "LoKr": (lokr, (LINEAR, CONV)),
    "LoKr of factors": (lokr_factors, (LINEAR, CONV)),
    "LoKr with a core": (lokr_core, (CONV,)),
    "whole": (whole, (LINEAR, CONV)),
}
CASES = [(kind, layer) for kind, (_, layers) in KINDS.items() for layer in layers]


@pytest.fixture(scope="module")
def loaded():
    pipe, _ = loading.load("shapes-sd")
    return pipe, [{k: v.clone() for k, v in m.state_dict().items()} for m in (pipe.unet, pipe.text_encoder)]


@pytest.fixture
def pipe(loaded):
    """A pipeline as it was loaded."""
    made, (unet, encoder) = loaded
    made.unet.load_state_dict(unet)
    made.text_encoder.load_state_dict(encoder)
    return made


@pytest.fixture
def base(loaded):
    return loaded[1][0]


def magnitudes(weight, changed, axis):
    """A DoRA's: m V / |V|."""
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    m = np.random.default_rng(3).uniform(0.5, 2, shape)
    norm = np.sqrt((changed**2).sum(tuple(k for k in range(weight.ndim) if k != axis), keepdims=True))
    return torch.tensor(m).float(), changed * m / norm


@pytest.mark.parametrize("dora", ["", "rows", "columns"])
@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_l7_l16_l18_what_is_merged_is_what_the_formulas_say(kind, layer, dora, pipe, base, tmp_path):
    weight = base[f"{layer}.weight"].double().numpy()
    tensors, difference, rank = KINDS[kind][0](weight.shape)
    stem = "lora_unet_" + layer.replace(".", "_")
    tensors = {f"{stem}.{name}": tensor for name, tensor in tensors.items()} | {f"{stem}.alpha": torch.tensor(1.5)}
    changed = weight + difference * (1.0 if rank is None else 1.5 / rank)
    if dora:
        tensors[f"{stem}.dora_scale"], changed = magnitudes(weight, changed, 0 if dora == "rows" else 1)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "x.safetensors")
    assert merging.merge(pipe, [Adapter(tmp_path / "x.safetensors", 0.7)]) == {"unet": 1}
    for name, own in pipe.unet.state_dict().items():
        if name == f"{layer}.weight":
            wanted = weight + 0.7 * (changed - weight)
            # In float32, sums of up to 15 products
            assert np.abs(own.double().numpy() - wanted).max() < 2e-6 * max(1, np.abs(wanted).max()), name
        else:
            assert torch.equal(own, base[name]), name


def test_two_adapters_change_the_base_each_not_one_another(pipe, base, tmp_path):
    weight = base[f"{LINEAR}.weight"].double().numpy()
    total, adapters = weight.copy(), []
    for number, (kind, strength) in enumerate([("LoHa", 0.5), ("LoCon", -1.0)]):
        tensors, difference, rank = KINDS[kind][0](weight.shape)
        stem = f"unet.{LINEAR}"
        file = {f"{stem}.{name}": tensor for name, tensor in tensors.items()}
        file[f"{stem}.dora_scale"], changed = magnitudes(weight, weight + difference, 0)
        save_file(file, tmp_path / f"{number}.safetensors")
        adapters.append(Adapter(tmp_path / f"{number}.safetensors", strength))
        total += strength * (changed - weight)
    merging.merge(pipe, adapters)
    assert (
        np.abs(pipe.unet.state_dict()[f"{LINEAR}.weight"].double().numpy() - total).max() < 2e-6 * np.abs(total).max()
    )


PEFT = {
    "DoRA": peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, init_lora_weights=False),
    "LoHa": peft.LoHaConfig(r=3, alpha=6, init_weights=False),
    "LoHa, convolutions by their effect": peft.LoHaConfig(r=3, alpha=6, init_weights=False, use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=3, alpha=6, init_weights=False, decompose_both=True),
    "LoKr, whole": peft.LoKrConfig(r=64, alpha=32, init_weights=False),
}


@pytest.mark.parametrize("name", PEFT)
def test_l16_l18_pefts_folders_are_merged_as_peft_merges_them(name, pipe, tmp_path):
    torch.manual_seed(0)
    theirs, _ = loading.load("shapes-sd")
    config = PEFT[name]
    config.target_modules = ["to_q", "to_out.0", "conv1"]
    model = peft.get_peft_model(theirs.unet, config)
    if name == "DoRA":
        for key, value in model.named_parameters():
            if "magnitude" in key:
                value.data *= torch.rand_like(value) + 0.5
    model.save_pretrained(tmp_path)
    wanted = model.merge_and_unload().state_dict()
    merging.merge(pipe, [Adapter(tmp_path / "adapter_model.safetensors")])
    for key, value in pipe.unet.state_dict().items():
        # peft adds in another order.
        assert (value - wanted[key]).abs().max() <= 1e-5 * wanted[key].abs().max(), key


def encoder_file(path, pipe, spelled, ends, alpha=None):
    """Halves for some of a text encoder's layers, and what they add."""
    tensors, wanted = {}, {}
    for k, layer in enumerate([n for n, m in pipe.text_encoder.named_modules() if re.search(r"(q|out)_proj$|fc1$", n)]):
        weight = pipe.text_encoder.get_submodule(layer).weight
        made = drawn(k, down=(2, weight.shape[1]), up=(len(weight), 2))
        stem = spelled(layer)
        tensors |= {stem + end: half for end, half in zip(ends, made.values(), strict=True)}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        wanted[f"{layer}.weight"] = array(made, "up") @ array(made, "down") * (1 if alpha is None else alpha / 2)
    save_file(tensors, path)
    return tensors, wanted


def kohya_encoder(layer):
    return "lora_te_text_model_" + layer.removeprefix("text_model.").replace(".", "_")


def older(layer):
    for new, old in (("q_proj", "to_q"), ("out_proj", "to_out")):
        layer = layer.replace(new, old)
    return "text_encoder.text_model." + layer.removeprefix("text_model.")


SPELLED = {
    "kohya": (kohya_encoder, (".lora_down.weight", ".lora_up.weight"), 1.0),
    "kohya SDXL": (
        lambda n: kohya_encoder(n).replace("lora_te_", "lora_te1_"),
        (".lora_down.weight", ".lora_up.weight"),
        1.0,
    ),
    "diffusers": (lambda n: f"text_encoder.{n}", (".lora_A.weight", ".lora_B.weight"), None),
    "old diffusers": (older, ("_lora.down.weight", "_lora.up.weight"), None),
    "with text_model": (
        lambda n: "text_encoder.text_model." + n.removeprefix("text_model."),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        None,
    ),
}


@pytest.mark.parametrize("name", SPELLED)
def test_l5_a_text_encoders_part_is_merged_into_it(name, pipe, tmp_path):
    before = {key: value.clone() for key, value in pipe.text_encoder.state_dict().items()}
    tensors, wanted = encoder_file(tmp_path / "x.safetensors", pipe, *SPELLED[name])
    assert merging.merge(pipe, [Adapter(tmp_path / "x.safetensors", 0.5)]) == {"text_encoder": len(wanted)}
    for key, value in pipe.text_encoder.state_dict().items():
        expected = before[key].double().numpy() + 0.5 * wanted.get(key, 0.0)
        assert np.abs(value.double().numpy() - expected).max() < 1e-6, key


def test_encoders_are_told_apart_by_number(tmp_path):
    """T5 is lora_te3_ in kohya's files, the third of Stable Diffusion 3 and the second of FLUX."""
    for model, theirs in (("shapes-sd3", "text_encoder_3"), ("shapes-flux", "text_encoder_2")):
        made, _ = loading.load(model)
        layer = "encoder.block.0.layer.0.SelfAttention.q"
        weight = getattr(made, theirs).get_submodule(layer).weight
        stem = "lora_te3_" + layer.replace(".", "_")
        halves = drawn(down=(2, weight.shape[1]), up=(len(weight), 2))
        save_file(
            {f"{stem}.lora_down.weight": halves["down"], f"{stem}.lora_up.weight": halves["up"]},
            tmp_path / "x.safetensors",
        )
        before = weight.clone()
        assert merging.merge(made, [Adapter(tmp_path / "x.safetensors")]) == {theirs: 1}
        assert (weight - before - halves["up"] @ halves["down"]).abs().max() < 1e-6


def test_a_dora_over_layers_that_are_one_in_the_file(tmp_path):
    """q, k and v have rows of the magnitudes; over columns they cannot be told apart."""
    pipe, _ = loading.load("shapes-sd3")
    attention = pipe.transformer.transformer_blocks[0].attn
    weights = [getattr(attention, name).weight.clone() for name in ("to_q", "to_k", "to_v")]
    whole = torch.cat(weights).double().numpy()
    tensors, difference, _ = loha(whole.shape)
    stem = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    file = {f"{stem}.{name}": tensor for name, tensor in tensors.items()}
    file[f"{stem}.dora_scale"], changed = magnitudes(whole, whole + difference, 0)
    save_file(file, tmp_path / "x.safetensors")
    merging.merge(pipe, [Adapter(tmp_path / "x.safetensors")])
    found = torch.cat([getattr(attention, name).weight for name in ("to_q", "to_k", "to_v")]).double().numpy()
    assert np.abs(found - changed).max() < 2e-6 * np.abs(changed).max()
    file[f"{stem}.dora_scale"] = magnitudes(whole, whole + difference, 1)[0]
    save_file(file, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"its magnitudes are \(1, 96\), which is neither one a row nor one a column"):
        merging.merge(pipe, [Adapter(tmp_path / "x.safetensors")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, s: {**t, f"{s}.hada_w2_b": t[f"{s}.hada_w2_b"][:, :-1].contiguous()}, "which do not fit"),
        (lambda t, s: {k: v for k, v in t.items() if "w2_b" not in k}, "its parts are hada_w1_a, hada_w1_b, hada_w2_a"),
        (lambda t, s: {**t, f"{s}.hada_w3": torch.ones(2, 2)}, "hada_w3' is no part of a LoRA"),
        (lambda t, s: {**t, f"{s}.diff_b": torch.ones(2)}, "it has biases besides its LoRA .*diff_b"),
        (lambda t, s: {**t, f"{s}.dora_scale": torch.ones(3, 1)}, r"its magnitudes are \(3, 1\)"),
        (lambda t, s: {**t, "lora_te_nowhere.hada_w1_a": torch.ones(3, 1)}, "is of no layer of this model"),
        (
            lambda t, s: {k: v[:, :-1].contiguous() if k.endswith("b") else v for k, v in t.items()},
            "it changes a weight of",
        ),
        (lambda t, s: {**t, f"{s}.hada_w1_a": t[f"{s}.hada_w1_a"] * float("nan")}, "not finite"),
    ],
    ids=["sizes", "a part less", "a part more", "bias", "magnitudes", "unknown", "another model", "nan"],
)
def test_l19_what_is_not_whole_is_named_and_nothing_is_changed(change, said, pipe, base, tmp_path):
    stem = f"unet.{LINEAR}"
    tensors, _, _ = loha(base[f"{LINEAR}.weight"].shape)
    tensors = change({f"{stem}.{name}": tensor for name, tensor in tensors.items()}, stem)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=said):
        merging.merge(pipe, [Adapter(tmp_path / "x.safetensors")])
    assert all(torch.equal(value, base[key]) for key, value in pipe.unet.state_dict().items())


@pytest.fixture(scope="module")
def hers(tmp_path_factory):
    """A LoKr on a Stable Diffusion 3 with a part for its first text encoder."""
    path = tmp_path_factory.mktemp("hers") / "hers.safetensors"
    pipe, _ = loading.load("shapes-sd3")
    layer = "transformer_blocks.0.attn.to_q"
    tensors, _, _ = lokr(pipe.transformer.get_submodule(layer).weight.shape)
    file = {f"lycoris_{layer.replace('.', '_')}.{name}": tensor for name, tensor in tensors.items()}
    encoder, _ = encoder_file(path, pipe, *SPELLED["kohya SDXL"])
    save_file(file | encoder, path)
    return path


def test_it_is_no_start_and_not_sampled_but_frozen_and_merged(hers, tmp_path):
    pipe, _ = loading.load("shapes-sd3")
    with pytest.raises(ValueError, match="it has layers of a text encoder .*; lora.frozen and `merge` take it"):
        lora_files.go_on_from_file(pipe, hers)
    own = lora_pairs.changes(pipe, hers)
    assert {name: len(layers) for name, layers in own.items()} == {
        "transformer": 1,
        "text_encoder": len(own["text_encoder"]),
    }
    with pytest.raises(UserError, match="sample: .* cannot be used on shapes-sd3: .*lora.frozen and `merge` take it"):
        sources.pipeline(sources.resolve("shapes-sd3", more=[str(hers)]))
    said = merged.write("shapes-sd3", [f"{hers}:0.5"], tmp_path / "merged")
    assert said[0].startswith(f"{tmp_path / 'merged'}: shapes-sd3 with 1 adapter in ")
    by_hand, _ = loading.load("shapes-sd3")
    merging.merge(by_hand, [Adapter(hers, 0.5)])
    back, _ = loading.load(str(tmp_path / "merged"))
    frozen = parts.build(tiny_config(tmp_path / "run", f"lora.frozen=[{hers}:0.5]"), lambda line: None).pipe
    for name in ("transformer", "text_encoder"):
        wanted = getattr(by_hand, name).state_dict()
        plain = {
            k.replace(".base_layer", ""): v for k, v in getattr(frozen, name).state_dict().items() if ".lora_" not in k
        }
        for found in (getattr(back, name).state_dict(), plain):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_texts_that_were_encoded_before_are_not_these(hers, tmp_path):
    cached = tiny_config(tmp_path / "run", f"lora.frozen=[{hers}]", f"prompts.cache={tmp_path / 'cache'}")
    with pytest.raises(UserError, match="lora.frozen: .*text encoder.*allowed is null"):
        session.train(cached, quiet=True)
