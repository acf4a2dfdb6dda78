"""A base in 8 or 4 bits: samples, replays, is the reference, and comes back the same."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from diffalign import config as configs
from diffalign.errors import UserError
from diffalign.models import loading, lora, lora_files, notes, quantizing
from diffalign.runs import parts, session
from diffalign.sampling import sources
from tests.backends.test_both_pipelines import given, noisy

pytest.importorskip("torchao")
CALL = {
    "shapes-sd3": {"max_sequence_length": 1},
    "shapes-flux": {"height": 64, "width": 64, "max_sequence_length": 16},
    "shapes-wan": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
}
EMBEDDED = ("shapes-sd3", "shapes-sd", "shapes-flux", "shapes-wan")


@pytest.fixture
def four_bits(monkeypatch):
    """diffusers' 4-bit quantiser without its question for a GPU: the kernels run on the CPU too."""
    pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as Quantizer

    monkeypatch.setattr(Quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(Quantizer, "update_device_map", lambda self, device_map: device_map)
    monkeypatch.setattr(quantizing, "check", lambda *args: None)
    # On some CPUs a weight is packed anew for products without a graph, and loses digits: a card has no such thing.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def config(folder, quantize="int8", *more, model="shapes-sd3"):
    process = {"shapes-sd": ["sampler.process=ddim", "sampler.noise_level=1"]}.get(model, [])
    call = f"sampler.pipeline_args={CALL.get(model, {})}"
    given = [
        *(f"model={model}", "precision=bfloat16", f"memory.quantize={quantize}", "memory.checkpoint=blocks"),
        *(
            "sampler.sigmas=pipeline",
            "sampler.steps=3",
            "rule={name: flow_grpo, kl: 0.1}",
            "rewards={jpeg_compressibility: 1}",
        ),
        *("eval_rewards=[]", "prompts.groups=2", "prompts.group_size=4", "optimizer.micro_batch=4", "updates=2"),
        *("evaluation.enabled=false", "output.checkpoint_every=1", f"run_dir={folder}", call, *process, *more),
    ]
    return configs.load("flow_grpo/shapes-sd3", given)


def built(settings):
    made = parts.build(settings, lambda line: None)
    with torch.no_grad():
        for index, (name, p) in enumerate(made.policy.parameters.items()):
            if "lora_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(index))
    return made


def held(tmp_path, quantize, model):
    """Prediction of the base alone, of the reference, and of the adapter sampled and replayed."""
    settings = config(tmp_path / model, quantize, model=model)
    alone = parts.policy(settings, loading.load(model, torch.bfloat16, quantize=quantize)[0])
    part = alone.rollout(given(), noisy(3))
    base = alone.transition(part, 0).prediction
    policy = built(settings).policy
    with policy.reference():
        assert torch.equal(policy.transition(part, 0).prediction, base)
    mine = policy.rollout(given(), noisy(3))
    replay = policy.replay(mine, 0, 3)
    assert torch.equal(replay.x, mine.x[3])
    gradients = torch.autograd.grad(replay.x.square().sum(), list(policy.parameters.values()), allow_unused=True)
    assert all(g is None or (g.isfinite().all() and g.dtype == torch.float32) for g in gradients)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)
    return policy


@pytest.mark.parametrize("model", EMBEDDED)
def test_m8_the_reference_is_the_quantised_base(model, tmp_path):
    policy = held(tmp_path, "int8", model)
    (module,) = lora.denoisers(policy.pipe).values()
    kinds = {type(layer.base_layer.weight).__name__ for layer in lora.layers(policy.pipe)}
    assert kinds == {"Int8Tensor"}
    assert any(type(p) is torch.nn.Parameter for p in module.parameters())  # norms keep their precision


@pytest.mark.parametrize("model", ["shapes-sd3", "shapes-flux"])
def test_m7_four_bits_do_the_same(model, tmp_path, four_bits):
    policy = held(tmp_path, "nf4", model)
    assert {type(layer.base_layer.weight).__name__ for layer in lora.layers(policy.pipe)} == {"Params4bit"}


def test_m6_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    """Every start quantises the same file anew."""
    session.train(config(tmp_path / "whole"), quiet=True)
    session.train(config(tmp_path / "stopped", "int8", "updates=1"), quiet=True)
    session.train(config(tmp_path / "stopped"), quiet=True)
    adapters = [(tmp_path / run / "adapter" / notes.LORA).read_bytes() for run in ("whole", "stopped")]
    assert adapters[0] == adapters[1]
    read = notes.Notes.read(tmp_path / "whole" / "adapter")
    assert (read.quantize, read.precision) == ("int8", "bfloat16")
    # Reloaded by plain diffusers on the same base, it predicts what it did in training.
    source = sources.resolve(str(tmp_path / "whole"))
    assert (source.quantize, source.remark) == ("int8", "")
    assert "not quantised" in sources.with_options(source, [], quantize="none").remark
    pipe = sources.pipeline(source)
    assert type(lora.layers(pipe)[0].base_layer.weight).__name__ == "Int8Tensor"
    with pytest.raises(UserError, match=r"memory\.quantize: 'int8' -> 'none'"):
        session.train(config(tmp_path / "whole", "none"), quiet=True)


def test_the_int8_base_is_near_the_full_one(tmp_path):
    """Half a step of 127 a weight: the prediction moves by less than a hundredth."""
    pipes = [loading.load("shapes-sd3", torch.bfloat16, quantize=kind)[0] for kind in ("none", "int8")]
    policies = [parts.policy(config(tmp_path), pipe) for pipe in pipes]
    part = policies[0].rollout(given(), noisy(3))
    full, int8 = (policy.transition(part, 0).prediction for policy in policies)
    apart = float((full - int8).norm() / full.norm())
    assert 0 < apart < 0.02


def test_a_second_adapter_and_a_start_say_on_what_they_were_trained(tmp_path, capsys):
    session.train(config(tmp_path / "packed"), quiet=True)
    one, two = tmp_path / "packed" / "adapter", sources.resolve("shapes-sd3", more=[str(tmp_path / "packed")])
    assert "an adapter was trained on an int8 base, here it is on a base that is not quantised" in two.remark
    session.train(config(tmp_path / "next", "none", f"lora.start={one}"))
    said = capsys.readouterr()
    assert "lora.start was trained with memory.quantize int8, this base has none" in said.out + said.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["memory.encode_on=cpu"], "memory.encode_on: got cpu without prompts.cache"),
        (["memory.vram=12"], "memory.vram: it is written by --vram"),
        (["prompts.cache={file}"], "prompts.cache: got .*which is a file; allowed is a folder"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(more, said, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=said):
        config(tmp_path / "run", "none", *(each.format(file=tmp_path / "file") for each in more))


def test_a_reward_without_a_network_says_that_it_stays(tmp_path, capsys):
    session.train(config(tmp_path, "none", "memory.judge_precision=bfloat16", "updates=1"))
    said = capsys.readouterr()
    assert "memory.judge_precision: jpeg_compressibility has no network" in said.out + said.err


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"memory\.quantize: got nf4, which needs a CUDA device, this is cpu"):
        quantizing.check("nf4", "cpu")
    monkeypatch.setattr(quantizing, "missing", lambda module: f"pip install {module}")
    with pytest.raises(UserError, match="got int8, which needs torchao; pip install torchao"):
        quantizing.check("int8", "cuda")
    quantizing.check("none", "cpu")
    with pytest.raises(UserError, match=r"memory\.quantize: got 'int4'"):
        config(tmp_path, "int4")


def test_a_saved_adapter_is_verified_on_its_quantised_base(tmp_path):
    made = built(config(tmp_path / "run"))
    lora_files.save(made.pipe, tmp_path / "saved", {})
    lora_files.verify(made.pipe, tmp_path / "saved")


def flux(folder, *more):
    """As somebody with a small card trains FLUX: 8 bits, blocks again for the gradient, no text encoders."""
    few = (f"prompts.cache={folder.parent / 'encoded'}", f"sampler.pipeline_args={CALL['shapes-flux']}", *more)
    return config(folder, "int8", *few, model="shapes-flux")


@pytest.mark.slow
def test_a_quantised_run_without_encoders_is_killed_resumed_sampled_exported_and_loaded_elsewhere(tmp_path):
    run = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(configs.dump(flux(run, "updates=300")))
    cli = [sys.executable, "-m", "diffalign"]
    killed = subprocess.Popen([*cli, "train", str(tmp_path / "config.yaml")])
    began = time.monotonic()
    while not (run / "checkpoints" / "update_000001").is_dir() and time.monotonic() - began < 120:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    done = max(int(path.name.split("_")[1]) for path in (run / "checkpoints").glob("update_*"))
    session.train(flux(run, f"updates={done + 1}"), quiet=True)
    session.train(flux(tmp_path / "whole", f"updates={done + 1}"), quiet=True)
    files = [tmp_path / name / "adapter" / notes.LORA for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()

    cli = [sys.executable, "-m", "diffalign"]
    subprocess.run(
        [*cli, "sample", str(run), "--prompt", "two stars", "-n", "1", "--out", str(tmp_path / "out")], check=True
    )
    subprocess.run([*cli, "export", str(run), "--out", str(tmp_path / "comfy.safetensors")], check=True)
    assert (tmp_path / "comfy.safetensors").stat().st_size > 1000
    # Plain diffusers, as the card says.
    import diffusers
    from PIL import Image
    from torchao.quantization import Int8WeightOnlyConfig

    from diffalign.shapes import models

    bits = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        models.path("shapes-flux"),
        dtype=torch.bfloat16,
        quantization_config=diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": bits}),
    )
    pipe.load_lora_weights(run / "adapter")
    call = notes.Notes.read(run / "adapter").call
    shot = pipe(["two stars"], generator=[torch.Generator().manual_seed(0)], output_type="np", **call).images[0]
    drawn = np.asarray(Image.open(tmp_path / "out" / "000_seed0.png"))
    assert np.abs(np.round(shot * 255) - drawn).max() <= 1
