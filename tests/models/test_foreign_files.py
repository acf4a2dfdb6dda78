"""Files from elsewhere: an adapter is taken whole, or refused in one line."""

import json
import os
import shutil
import stat

import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign import config
from diffalign.errors import UserError
from diffalign.evaluation import suite
from diffalign.models import loading, lora, lora_files, merging
from diffalign.models.notes import LORA, Notes, lora_folder
from diffalign.models.places import Adapter
from diffalign.runs import session
from diffalign.sampling import sources
from tests.kit.generators import COUNTS, PLAIN, broken, promised, tried
from tests.kit.helpers import comfyui, tiny_config

CALL = {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    session.train(tiny_config(folder, "updates=3", "output.checkpoint_every=1", "evaluation.enabled=false"), quiet=True)
    return folder


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def rewritten(folder, change):
    """An adapter's file with other metadata."""
    path = folder / LORA
    with safe_open(path, "pt") as file:
        notes = dict(file.metadata())
    save_file(load_file(path), path, metadata=change(notes))


NAMES = [
    "call",
    "base_model",
    "denoisers",
    "rule",
    "rewards",
    "updates",
    "notes_format",
    "lora_adapter_metadata",
    "scheduler",
    "seed",
]


@COUNTS
def test_any_notes_are_read_or_refused(count, copied):
    pipe, _ = loading.load("shapes-sd3")
    with safe_open(copied / "adapter" / LORA, "pt") as file:
        whole = dict(file.metadata())
    content = load_file(copied / "adapter" / LORA)
    printable = st.text(st.characters(exclude_categories=("Cs",)))
    values = st.sampled_from(NAMES).flatmap(
        lambda name: st.tuples(
            st.just(name),
            broken(whole.get(name, "")).map(lambda t: t.encode("utf-8", "replace").decode())
            | PLAIN.map(json.dumps)
            | printable,
        )
    )
    at = {"k": 0}

    def check(drawn):
        name, value = drawn
        save_file(content, copied / "adapter" / LORA, metadata={**whole, name: value})
        source = promised(lambda: sources.resolve(str(copied / "adapter")))
        promised(lambda: config.load("flow_grpo/shapes-sd3", [f"lora.start={copied / 'adapter'}"]))
        promised(lambda: comfyui(copied / "adapter", copied / "out.safetensors"))
        at["k"] += 1
        if source is not None and name == "lora_adapter_metadata":
            with promising():
                lora_files.load(pipe, copied / "adapter", f"a{at['k']}")
            with lora.quiet():
                pipe.delete_adapters(list(pipe.get_list_adapters().get("transformer", [])))

    tried(values, count, check)


class promising:
    """A ValueError is a refusal."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind is None or issubclass(kind, ValueError), error
        return kind is not None


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        ({"call": '{"prompt": "x"}'}, "its note call has 'prompt', which is not free"),
        ({"call": '{"callback_on_step_end": 1}'}, "'callback_on_step_end', which is not free"),
        ({"call": "[1]"}, "its note call is '[1]', expected a dict"),
        ({"call": "{"}, "its note call is not JSON"),
        ({"notes_format": "99"}, "its notes have format 99"),
        ({"base_model": "a\0b"}, "have a NUL"),
    ],
)
def test_notes_that_are_not_ours_are_refused(copied, notes, said):
    rewritten(copied / "adapter", lambda whole: {**whole, **notes})
    with pytest.raises(UserError) as caught:
        sources.resolve(str(copied / "adapter"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"transformer.lora_alpha": "8"}, "lora_alpha '8', expected a number above 0"),
        ({"transformer.megatron_config": {"a": 1}, "transformer.megatron_core": "os"}, "which is not for here"),
        ({"transformer.auto_mapping": {"parent_library": "os"}}, "'transformer.auto_mapping' {'parent_library': 'os'}"),
        ({"transformer.a_key_of_next_year": 3}, "'transformer.a_key_of_next_year' 3, which is not for here"),
        ({"transformer.rank_pattern": {"x": "y"}}, "rank_pattern {'x': 'y'}, expected numbers by layer"),
    ],
)
def test_what_a_file_wants_peft_to_do_is_looked_at(copied, settings, said):
    def change(notes):
        return {
            **notes,
            "lora_adapter_metadata": json.dumps({**json.loads(notes["lora_adapter_metadata"]), **settings}),
        }

    rewritten(copied / "adapter", change)
    pipe, _ = loading.load("shapes-sd3")
    with pytest.raises(ValueError) as caught:
        lora_files.load(pipe, copied / "adapter", "a")
    assert said in str(caught.value)


@pytest.mark.parametrize(("kind", "said"), [("use_dora", "it is a DoRA"), ("lora_bias", "it has biases")])
def test_what_a_lora_has_no_place_for_is_no_start(kind, said, tmp_path):
    torch.manual_seed(1)
    pipe, _ = loading.load("shapes-sd3")
    targets = ["to_q", "to_v"]
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **{kind: True})
    )
    settings = pipe.transformer.peft_config["default"].to_dict()
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=settings,
    )
    other, _ = loading.load("shapes-sd3")
    lora.attach(other, 8, 16.0, targets, 0)
    with pytest.raises(ValueError, match=said):
        lora_files.go_on_from(other, tmp_path)
    plain, _ = loading.load("shapes-sd3")
    lora_files.load(plain, tmp_path, "a")  # to sample with, it is whole
    seeds = {"generator": None, "output_type": "np", **CALL}
    want, got = (p(["a"], **{**seeds, "generator": torch.Generator().manual_seed(0)})[0] for p in (pipe, plain))
    assert abs(want - got).max() < 1e-3
    bare, _ = loading.load("shapes-sd3")
    if kind == "lora_bias":
        with pytest.raises(ValueError, match="a LoRA with biases: its settings say lora_bias"):
            merging.merge(bare, [Adapter(tmp_path)])
        return
    merging.merge(bare, [Adapter(tmp_path)])
    assert abs(want - bare(["a"], **{**seeds, "generator": torch.Generator().manual_seed(0)})[0]).max() < 1e-3


@pytest.mark.parametrize("extra", ["", "_extra"])
def test_a_kohya_file_of_half_another_model_is_refused(extra, tmp_path):
    pipe, _ = loading.load("shapes-sd")
    names = [n for n, m in pipe.unet.named_modules() if n.endswith(("to_q", "to_v")) and isinstance(m, torch.nn.Linear)]
    tensors = {}
    for k, name in enumerate(names):
        module, key = pipe.unet.get_submodule(name), "lora_unet_" + name.replace(".", "_") + (extra if k % 2 else "")
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, module.in_features)
        tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 4)
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / LORA)
    if extra:
        with pytest.raises(ValueError, match=rf"'lora_unet_\w+{extra}\.\w+.*' is of no layer of this denoiser"):
            lora_files.load(pipe, tmp_path, "a")
    else:
        lora_files.load(pipe, tmp_path, "a")
        assert len(list(lora_files.layers(pipe.unet, "a"))) == len(names)


def test_every_place_of_a_run_stands_for_an_adapter(copied):
    assert lora_folder(copied) == copied / "adapter"
    assert lora_folder(copied / "adapter" / LORA) == copied / "adapter"  # what `train` prints last
    assert lora_folder(f"{copied}@2") == copied / "checkpoints/update_000002"
    assert Notes.read(lora_folder(f"{copied}@2")).updates == 2
    assert lora_folder(f"{copied}@7") is None
    with pytest.raises(UserError, match=f"allowed are {copied}@2, {copied}@3"):
        sources.resolve(f"{copied}@7")
    assert lora_folder(f"{copied}@best") is None
    shutil.copytree(copied / "adapter", copied / "best")
    assert lora_folder(f"{copied}@best") == copied / "best"
    assert sources.resolve(f"{copied}@best").adapters[0].folder == copied / "best"
    rewritten(copied / "adapter", lambda notes: {**notes, "updates": "1"})  # of an earlier end
    assert lora_folder(copied) == copied / "checkpoints/update_000003"
    shutil.rmtree(copied / "adapter")
    assert lora_folder(copied) == copied / "checkpoints/update_000003"
    assert sources.resolve(str(copied)).adapters[0].folder == copied / "checkpoints/update_000003"
    assert list(suite.labels([sources.resolve(f"{copied}@2")])) == ["0-run-2"]
    assert comfyui(copied, copied.parent / "out.safetensors")
    made = config.load("flow_grpo/shapes-sd3", [f"lora.start={copied}@2"])
    assert made.lora.start == f"{copied}@2"
    content = bytearray((copied / "checkpoints/update_000003" / LORA).read_bytes())
    content[-1] ^= 1
    (copied / "checkpoints/update_000003" / LORA).write_bytes(content)
    with pytest.raises(UserError, match="is a damaged checkpoint"):
        sources.resolve(str(copied))


def test_files_have_the_mode_that_any_file_gets(copied):
    plain = copied / "plain"
    plain.write_text("x")
    comfyui(copied, copied / "out.safetensors")
    for path in (p for p in copied.rglob("*") if p.is_file() and p.name != ".lock"):
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode), path


def test_a_model_is_sampled_in_the_precision_it_was_trained_in(copied):
    rewritten(copied / "adapter", lambda notes: {**notes, "precision": "bfloat16"})
    source = sources.resolve(str(copied))
    assert source.precision == "bfloat16"
    assert sources.pipeline(source).transformer.dtype == torch.bfloat16
    assert sources.with_options(source, (), "float32").precision == "float32"


def test_a_negative_prompt_that_has_no_effect_is_refused():
    pipe, _ = loading.load("shapes-flux")
    with pytest.raises(UserError, match="no effect, FluxPipeline's guidance is the network's own"):
        sources.check_negative(pipe, {"negative_prompt": "x", "guidance_scale": 3.5})
    sources.check_negative(pipe, {"negative_prompt": "x", "true_cfg_scale": 2})
    sources.check_negative(loading.load("shapes-sd")[0], {"negative_prompt": "x"})


def test_a_folder_of_half_precision_files_alone_is_loaded(tmp_path):
    pipe, _ = loading.load("shapes-sd3")
    pipe.to(torch.float16).save_pretrained(tmp_path / "m", variant="fp16")
    assert loading.variant(tmp_path / "m") == "fp16"
    again, _ = loading.load(str(tmp_path / "m"))
    assert again.transformer.dtype == torch.float32
    plain, _ = loading.load("shapes-sd3")
    plain.save_pretrained(tmp_path / "m")  # both kinds: the plain ones are whole
    assert loading.variant(tmp_path / "m") is None


def test_fresh_deletes_nothing_that_a_manifest_only_names(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    victims = [tmp_path / "000000.png", out / "0-mine" / "holiday.png", tmp_path / "0-x" / "000000.png"]
    for victim in victims:
        victim.parent.mkdir(exist_ok=True)
        victim.write_bytes(b"mine")
    os.symlink(tmp_path / "0-x", out / "0-link")
    (out / suite.MANIFEST).write_text(
        json.dumps({"models": {"..": {}, "0-mine": {}, "0-link": {}, "/": {}, "../0-x": {}}})
    )
    (out / "0-mine" / "000000.png").write_bytes(b"ours")
    suite._clear(out, out / suite.MANIFEST, [])
    assert all(victim.exists() for victim in victims)
    assert not (out / "0-mine" / "000000.png").exists()


def changed(folder, change):
    path = folder / LORA
    with safe_open(path, "pt") as file:
        notes = dict(file.metadata())
    save_file(change(load_file(path)), path, metadata=notes)


FIRST = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if k != FIRST}, "has one half of a LoRA only"),
        (lambda t: {**t, FIRST: t[FIRST] * float("nan")}, "holds numbers that are not finite"),
        (lambda t: {**t, FIRST: t[FIRST][:1].clone()}, "which do not fit"),
        (lambda t: {**t, FIRST: torch.tensor(1.0)}, "which do not fit"),
        (lambda t: {**t, FIRST: t[FIRST].to(torch.int8)}, "holds int8"),
        (lambda t: {**t, FIRST: t[FIRST].to(torch.float8_e4m3fn)}, "holds float8_e4m3fn|damaged"),
        (lambda t: {"x": torch.ones(1)}, "it holds no layer of a LoRA"),
    ],
    ids=["a half missing", "nan", "rank", "number", "int8", "float8", "nothing"],
)
def test_half_an_adapter_is_no_adapter_wherever_it_is_read(change, said, copied):
    """Not sampled with a matrix that diffusers makes up, not exported, no start."""
    changed(copied / "adapter", change)
    source = sources.resolve(str(copied / "adapter"))
    with pytest.raises(UserError, match=said):
        sources.pipeline(source)
    with pytest.raises(UserError, match=said):
        comfyui(copied / "adapter", copied / "out.safetensors")
    with pytest.raises(UserError, match=said):
        session.train(tiny_config(copied.parent / "next", f"lora.start={copied / 'adapter'}"), quiet=True)
