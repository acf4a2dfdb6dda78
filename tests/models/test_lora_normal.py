"""LoRA files of other tools: every layer's product as an independent reading of the raw tensors has it, or one line that says what is not
taken."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from diffalign import config as configs
from diffalign.errors import UserError
from diffalign.models import loading, lora, lora_files
from diffalign.models.layer_names import WAN, fused
from diffalign.runs import parts, session
from diffalign.sampling import sources
from tests.kit.helpers import tiny_config

MODELS = {"shapes-sd": "unet", "shapes-sd3": "transformer", "shapes-flux": "transformer", "shapes-wan": "transformer"}


def targets(pipe, more):
    """The usual ones that a pipeline has, and more."""
    names = [name for module in lora.denoisers(pipe).values() for name, _ in module.named_modules()]
    return [t for t in (*lora.TARGETS, *more) if any(name == t or name.endswith("." + t) for name in names)]


def prepared(model, *more):
    """A pipeline with a trained LoRA of rank 8, and its layers."""
    pipe, _ = loading.load(model)
    lora.attach(pipe, 8, 4.0, targets(pipe, more) if more else None, 0)
    return pipe, dict(lora_files.layers(getattr(pipe, MODELS[model])))


def halves(layers, ranks=lambda k: 4, every=3, dtype=torch.float32):
    """Random halves for some of the layers."""
    made, generator = {}, torch.Generator().manual_seed(0)
    for k, (name, layer) in enumerate(layers.items()):
        if k % every == 0:
            rank = ranks(k)
            down = torch.randn(rank, layer.in_features, generator=generator).to(dtype)
            made[name] = down, torch.randn(layer.out_features, rank, generator=generator).to(dtype)
    return made


def flat(prefix):
    return lambda layer: prefix + layer.replace(".", "_")


def authors(prefix, dots=True):
    def name(layer):
        for ours, theirs in WAN:
            layer = layer.replace(ours, theirs)
        return prefix + (layer if dots else layer.replace(".", "_"))

    return name


PEFT, KOHYA = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
# name -> how a layer is called, its halves, and the models it is tried on
FORMATS = {
    "diffusers": (lambda layer: "COMPONENT." + layer, PEFT, MODELS),
    "bare": (lambda layer: layer, PEFT, MODELS),
    "bare default": (lambda layer: layer, (".lora_A.default.weight", ".lora_B.default.weight"), MODELS),
    "diffusion_model": (lambda layer: "diffusion_model." + layer, PEFT, MODELS),
    "base_model": (lambda layer: "base_model.model." + layer, PEFT, MODELS),
    "kohya": (flat("lora_unet_"), KOHYA, MODELS),
    "kohya, dotted": (lambda layer: "COMPONENT." + layer, KOHYA, MODELS),
    "OneTrainer": (flat("lora_transformer_"), KOHYA, MODELS),
    "LyCORIS names": (flat("lycoris_"), KOHYA, MODELS),
    "old diffusers": (lambda layer: "COMPONENT." + layer, (".lora.down.weight", ".lora.up.weight"), MODELS),
    "Wan's authors": (authors("diffusion_model."), PEFT, ("shapes-wan",)),
    "musubi": (authors("lora_unet_", dots=False), KOHYA, ("shapes-wan",)),
}
CASES = [(name, model) for name, (_, _, models) in FORMATS.items() for model in models]


def written(path, made, name, ends, component, alphas=None, metadata=None):
    tensors = {}
    for layer, pair in made.items():
        stem = name(layer).replace("COMPONENT", component)
        tensors |= {stem + end: half.contiguous() for end, half in zip(ends, pair, strict=True)}
        if alphas is not None:
            tensors[stem + ".alpha"] = torch.tensor(alphas[layer])
    save_file(tensors, path, metadata=metadata)
    return tensors


def held(layers, made, scales):
    """Every trained product against scale B A in float64; layers that the file does not have do nothing."""
    for name, layer in layers.items():
        a, b = (half["default"].weight.double() for half in (layer.lora_A, layer.lora_B))
        found = layer.scaling["default"] * b @ a
        expected = torch.zeros_like(found)
        if name in made:
            down, up = (half.double() for half in made[name])
            expected = scales[name] * up @ down
        assert float((found - expected).norm()) <= 1e-6 * max(float(expected.norm()), 1e-9), name


@pytest.mark.parametrize(("name", "model"), CASES)
@pytest.mark.parametrize("alphas", ["none", "by layer"])
def test_l1_to_l4_l9_l10_l15_every_layer_acts_as_the_file_says(name, model, alphas, tmp_path):
    """Ranks and alphas that differ by layer too, which diffusers' own readers give one value for all."""
    pipe, layers = prepared(model)
    made = halves(layers, ranks=lambda k: 2 + k % 5)
    spelled, ends, _ = FORMATS[name]
    given = {"none": None, "by layer": {n: 1.0 + k for k, n in enumerate(made)}}[alphas]
    written(tmp_path / "x.safetensors", made, spelled, ends, MODELS[model], given)
    lora_files.go_on_from_file(pipe, tmp_path / "x.safetensors")
    held(layers, made, {n: 1.0 if given is None else given[n] / len(pair[0]) for n, pair in made.items()})


def together(made, layers):
    """What tools that fuse layers write: one A, the B's one after another; and the pairs that this is for each layer."""
    whole, apart = {}, {}
    for theirs, ours in fused(layers).items():
        if theirs.rpartition(".")[2] not in ("lin",) and all(name in made for name in ours):
            down = made[ours[0]][0]
            apart |= {name: (down, made[name][1]) for name in ours}
            whole[theirs] = down, torch.cat([made[name][1] for name in ours])
    return whole, apart


@pytest.mark.parametrize("model", ["shapes-sd3", "shapes-flux"])
@pytest.mark.parametrize("name", ["diffusion_model", "bare", "kohya"])
def test_l11_l12_l25_layers_that_are_one_in_a_file_are_told_apart(model, name, tmp_path):
    """q, k and v, and FLUX's mlp beside them, image and text alike; each has its rows of B."""
    pipe, layers = prepared(model, *(("proj_mlp", "proj_out") if model == "shapes-flux" else ()))
    whole, apart = together(halves(layers, every=1), layers)
    assert any(len(ours) > 1 for ours in fused(layers).values())
    assert len(apart) > 0.9 * len([n for n in layers if "blocks" in n])
    spelled, ends, _ = FORMATS[name]
    written(tmp_path / "x.safetensors", whole, spelled, ends, MODELS[model], dict.fromkeys(whole, 2.0))
    lora_files.go_on_from_file(pipe, tmp_path / "x.safetensors")
    held(layers, apart, dict.fromkeys(apart, 0.5))
    other, _ = loading.load(model)
    lora_files.load_file(other, tmp_path / "x.safetensors", "hers")
    assert {name for name, _ in lora_files.layers(other.transformer, "hers")} == apart.keys()


def test_l13_z_image_has_its_attention_too():
    own = [f"layers.0.attention.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")]
    found = fused([*own, "layers.0.feed_forward.w1"])
    assert found == {
        "layers.0.attention.qkv": tuple(own[:3]),
        "layers.0.attention.out": (own[3],),
        "layers.0.feed_forward.w1": ("layers.0.feed_forward.w1",),
    }


def test_a_fused_layer_of_another_size_is_refused(tmp_path):
    pipe, layers = prepared("shapes-sd3")
    whole, _ = together(halves(layers, every=1), layers)
    first = next(name for name in whole if name.endswith("qkv"))
    whole[first] = whole[first][0], whole[first][1][:-1]
    written(tmp_path / "x.safetensors", whole, lambda n: n, PEFT, "transformer")
    with pytest.raises(ValueError, match=r"puts out 287 numbers, this model's 96 \+ 96 \+ 96"):
        lora_files.go_on_from_file(pipe, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 2, "r": 4}, lambda layer: 0.5),
        ({"lora_alpha": 2, "r": 4, "use_rslora": True}, lambda layer: 1.0),
        (
            {"lora_alpha": 2, "r": 4, "alpha_pattern": {"to_q": 8}},
            lambda layer: 2.0 if layer.endswith(".to_q") else 0.5,
        ),
    ],
)
def test_l8_a_folder_of_peft_has_its_strengths_beside_it(settings, scale, tmp_path):
    pipe, layers = prepared("shapes-sd3")
    made = halves(layers)
    written(tmp_path / "adapter_model.safetensors", made, lambda n: "base_model.model." + n, PEFT, "transformer")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    lora_files.go_on_from_file(pipe, tmp_path / "adapter_model.safetensors")
    held(layers, made, {n: scale(n) for n in made})


def test_old_attention_processors(tmp_path):
    pipe, layers = prepared("shapes-sd")
    made = {n: p for n, p in halves(layers, every=1).items() if re.search(r"attn\d\.to_(q|k|v|out\.0)$", n)}

    def name(layer):
        layer = layer.removesuffix(".0") if layer.endswith("to_out.0") else layer
        before, _, last = layer.rpartition(".")
        return f"unet.{before}.processor.{last}"

    written(tmp_path / "x.safetensors", made, name, ("_lora.down.weight", "_lora.up.weight"), "unet")
    lora_files.go_on_from_file(pipe, tmp_path / "x.safetensors")
    held(layers, made, dict.fromkeys(made, 1.0))


REFUSED = {
    "dora_scale": "it is a DoRA",
    "lora_magnitude_vector.weight": "it is a DoRA",
    "hada_w1_a": "its parts are down, hada_w1_a, up, which is no kind that is known here",
    "lokr_w1": "its parts are down, lokr_w1, up, which is no kind",
    "lora_mid.weight": "it is a LoCon in CP form",
    "lora_B.bias": "it has biases besides its LoRA",
    "something": "is no part of a LoRA",
}


@pytest.mark.parametrize("ending", REFUSED)
def test_l16_to_l19_what_is_no_lora_is_named(ending, tmp_path):
    pipe, layers = prepared("shapes-sd3")
    made = halves(layers)
    tensors = written(tmp_path / "x.safetensors", made, flat("lora_unet_"), KOHYA, "transformer")
    key = f"{flat('lora_unet_')(next(iter(made)))}.{ending}"
    save_file({**tensors, key: torch.ones(4, 4)}, tmp_path / "x.safetensors")
    before = [p.clone() for p in layers[next(iter(layers))].parameters()]
    with pytest.raises(ValueError, match=re.escape(REFUSED[ending])) as refused:
        lora_files.go_on_from_file(pipe, tmp_path / "x.safetensors")
    assert ending.split(".")[0] in str(refused.value)
    assert all(torch.equal(a, b) for a, b in zip(before, layers[next(iter(layers))].parameters(), strict=True))


def broken(tensors, layers, which):
    key = next(iter(tensors))
    stem = key.removesuffix(".lora_down.weight")
    if which == "half":
        return {k: v for k, v in tensors.items() if k != key}
    if which == "nan":
        return {**tensors, key: tensors[key] * float("nan")}
    if which == "ints":
        return {**tensors, key: torch.ones(4, 96, dtype=torch.int32)}
    if which == "sizes":
        return {**tensors, key: torch.ones(5, 96)}
    if which == "alpha":
        return {**tensors, f"{stem}.alpha": torch.ones(2)}
    if which == "zero":
        return {**tensors, f"{stem}.alpha": torch.zeros(())}
    if which == "twice":
        layer = next(name for name in layers if flat("lora_unet_")(name) == stem)
        return {**tensors, f"{layer}.lora_down.weight": tensors[key].clone()}
    if which == "encoder":
        return {**tensors, "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(4, 8)}
    return {**tensors, "lora_unet_nowhere_to_q.lora_down.weight": torch.ones(4, 8)}


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("half", "has one half of a LoRA only"),
        ("nan", "holds numbers that are not finite"),
        ("ints", "holds torch.int32, allowed are float16, bfloat16, float32, float64"),
        ("sizes", "which do not fit"),
        ("alpha", r"has an alpha of \(2,\), expected one number"),
        ("zero", "has a strength of 0"),
        ("twice", "is in it twice"),
        ("encoder", "it has layers of a text encoder .*lora_te_text_model.*not trained here"),
        ("unknown", "'lora_unet_nowhere_to_q.lora_down.weight' is of no layer of this denoiser"),
    ],
)
def test_l5_l19_damage_is_named_and_nothing_is_taken(which, said, tmp_path):
    pipe, layers = prepared("shapes-sd3")
    tensors = written(tmp_path / "x.safetensors", halves(layers), flat("lora_unet_"), KOHYA, "transformer")
    save_file(broken(tensors, layers, which), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=said):
        lora_files.go_on_from_file(pipe, tmp_path / "x.safetensors")
    held(layers, {}, {})


def test_l20_another_familys_file_is_refused(tmp_path):
    other, theirs = prepared("shapes-flux")
    written(tmp_path / "x.safetensors", halves(theirs, every=1), lambda n: "transformer." + n, PEFT, "transformer")
    pipe, layers = prepared("shapes-sd3")
    with pytest.raises(ValueError, match="is of no layer of this denoiser"):
        lora_files.go_on_from_file(pipe, tmp_path / "x.safetensors")
    held(layers, {}, {})


def test_a_rank_above_the_trained_one_and_a_layer_beside_the_targets_are_refused(tmp_path):
    pipe, layers = prepared("shapes-sd3")
    written(
        tmp_path / "x.safetensors",
        halves(layers, ranks=lambda k: 9 if k else 8),
        flat("lora_unet_"),
        KOHYA,
        "transformer",
    )
    with pytest.raises(ValueError, match=r"its rank is 9, lora.rank is 8; allowed is lora.rank=9 or more.*--rank 8"):
        lora_files.go_on_from_file(pipe, tmp_path / "x.safetensors")
    held(layers, {}, {})  # the first layer's rank is 8
    few, _ = loading.load("shapes-sd3")
    lora.attach(few, 9, 4.0, ["to_q"], 0)
    with pytest.raises(ValueError, match=r"it has layer .*, which is not among lora\.targets"):
        lora_files.go_on_from_file(few, tmp_path / "x.safetensors")


def test_a_run_starts_from_a_kohya_file(tmp_path, capsys):
    """And its first evaluation is that of the file's effect, drawn by plain diffusers from the same numbers."""
    pipe, layers = prepared("shapes-sd3")
    made = {n: (a * 0.05, b * 0.05) for n, (a, b) in halves(layers).items()}
    written(tmp_path / "hers.safetensors", made, flat("lora_unet_"), KOHYA, "transformer", dict.fromkeys(made, 2.0))
    start = f"lora.start={tmp_path / 'hers.safetensors'}"
    session.train(
        tiny_config(tmp_path / "run", start, "lora.rank=8", "updates=1", "evaluation.enabled=false"), quiet=True
    )
    policy = parts.build(tiny_config(tmp_path / "again", start, "lora.rank=8"), lambda line: None).policy
    held(dict(lora_files.layers(policy.pipe.transformer)), made, dict.fromkeys(made, 0.5))
    with pytest.raises(UserError, match=r"lora\.start: got .*nothing.safetensors.*allowed is"):
        tiny_config(tmp_path / "none", f"lora.start={tmp_path / 'nothing.safetensors'}")
    (tmp_path / "text.safetensors").write_text("not a tensor")
    with pytest.raises(UserError, match=r"lora\.start: .*text.safetensors does not fit: text.safetensors is damaged"):
        session.train(tiny_config(tmp_path / "bad", f"lora.start={tmp_path / 'text.safetensors'}"), quiet=True)
    assert configs.load("flow_grpo/shapes-sd3", [start]).lora.start == str(tmp_path / "hers.safetensors")


@pytest.mark.parametrize("model", MODELS)
def test_a_file_is_sampled_with_as_it_says(model, tmp_path):
    """Every layer's product under diffusers' own adapter, ranks and alphas differing by layer; fused names too."""
    pipe, _ = loading.load(model)
    module = getattr(pipe, MODELS[model])
    trained, layers = prepared(model)
    made = halves(layers, ranks=lambda k: 2 + k % 5)
    alphas = {n: 1.0 + k for k, n in enumerate(made)}
    written(tmp_path / "x.safetensors", made, flat("lora_unet_"), KOHYA, MODELS[model], alphas)
    lora_files.load_file(pipe, tmp_path / "x.safetensors", "hers")
    found = dict(lora_files.layers(module, "hers"))
    assert found.keys() == made.keys()
    for name, layer in found.items():
        a, b = (half["hers"].weight.double() for half in (layer.lora_A, layer.lora_B))
        down, up = (half.double() for half in made[name])
        expected = alphas[name] / len(down) * up @ down
        assert float((layer.scaling["hers"] * b @ a - expected).norm()) <= 1e-6 * float(expected.norm())


def test_sample_takes_a_file_and_says_what_it_cannot_take(tmp_path):
    _, layers = prepared("shapes-sd3")
    made = halves(layers)
    hers = tmp_path / "hers.safetensors"
    tensors = written(hers, made, flat("lora_unet_"), KOHYA, "transformer", dict.fromkeys(made, 2.0))
    source = sources.resolve("shapes-sd3", more=[f"{hers}:0.5"])
    assert [(a.folder, a.strength) for a in source.adapters] == [(hers, 0.5)]
    pipe = sources.pipeline(source)
    layer = dict(lora_files.layers(pipe.transformer, "adapter_0"))[next(iter(made))]
    assert layer.scaling["adapter_0"] == pytest.approx(0.5)  # alpha / r is in B
    save_file({**tensors, "lora_te_x.lora_down.weight": torch.ones(4, 4)}, hers)
    with pytest.raises(UserError, match="cannot be used on shapes-sd3: it has layers of a text encoder"):
        sources.pipeline(source)
    with pytest.raises(UserError, match="--adapter: got .*allowed is a run.s or adapter.s folder, a .safetensors file"):
        sources.resolve("shapes-sd3", more=[str(tmp_path / "nothing.safetensors")])
