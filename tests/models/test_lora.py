import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffalign.errors import Fault, UserError
from diffalign.models import loading, lora_files
from diffalign.models import lora as adapters
from diffalign.models.notes import Notes, metadata
from diffalign.shapes import models

CALL = {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "pt"}


def trained(rank=4, alpha=20.0, dtype=torch.float32):
    pipe = loading.load("shapes-sd3", dtype)[0]
    for p in adapters.attach(pipe, rank, alpha, None, 0).values():
        with torch.no_grad():
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return pipe


def picture(pipe):
    return pipe("a photo of two stars", generator=torch.Generator().manual_seed(1), **CALL).images


def test_plain_diffusers_loads_the_file_and_draws_the_training_pipelines_picture(tmp_path):
    pipe = trained()  # alpha differs from rank: a lost alpha would show
    lora_files.save(pipe, tmp_path, Notes(base_model="shapes-sd3", seed=3).written())
    lora_files.verify(pipe, tmp_path)
    plain = DiffusionPipeline.from_pretrained(models.path("shapes-sd3"))
    base = picture(plain)
    plain.load_lora_weights(tmp_path)
    assert plain.get_list_adapters()
    assert (picture(plain) - picture(pipe)).abs().max() < 1e-5
    assert (picture(plain) - base).abs().max() > 0.01
    assert Notes.read(tmp_path).seed == 3


def test_verify_leaves_the_trained_adapter_active_and_trainable(tmp_path):
    pipe = trained()
    before = picture(pipe)
    lora_files.save(pipe, tmp_path, {})
    lora_files.verify(pipe, tmp_path)
    assert pipe.get_list_adapters() == {"transformer": ["default"]}
    assert all(p.requires_grad for n, p in pipe.transformer.named_parameters() if "lora_" in n)
    assert torch.equal(picture(pipe), before)


def test_a_half_precision_pipeline_verifies_its_file_too(tmp_path):
    pipe = trained(dtype=torch.bfloat16)
    path = lora_files.save(pipe, tmp_path, {})
    lora_files.verify(pipe, tmp_path)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def test_a_damaged_file_is_caught(tmp_path):
    pipe = trained()
    path = lora_files.save(pipe, tmp_path, {})
    tensors, kept = load_file(path), metadata(path)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, path, metadata=kept)
    with pytest.raises(Fault, match="differs from what was trained"):
        lora_files.verify(pipe, tmp_path)


def test_a_file_without_its_alpha_is_caught(tmp_path):
    pipe = trained()
    path = lora_files.save(pipe, tmp_path, {})
    save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.raises(Fault, match="differs from what was trained"):
        lora_files.verify(pipe, tmp_path)


def test_targets_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="lora.targets: no layer of transformer is named to_nowhere"):
        adapters.attach(loading.load("shapes-sd3")[0], 4, 4, ("to_q", "to_nowhere"), 0)


def test_initial_weights_follow_the_seed():
    one, again, other = (adapters.attach(loading.load("shapes-sd3")[0], 4, 4, ("to_q",), seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)
    assert {p.dtype for p in one.values()} == {torch.float32}
    assert sum(p.numel() for p in one.values()) == 4 * 4 * (96 + 96)


def test_only_the_adapter_is_trainable():
    pipe = loading.load("shapes-sd3")[0]
    names = set(adapters.attach(pipe, 4, 4, None, 0))
    found = {f"transformer.{n}" for n, p in pipe.transformer.named_parameters() if p.requires_grad}
    assert names == found
    assert not any(p.requires_grad for p in (*pipe.vae.parameters(), *pipe.text_encoder.parameters()))
    assert np.prod([len(names)]) > 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drift_is_the_distance_of_predictions_along_the_sampling(guidance):
    """Against the same calls made by hand, one picture after another; without adapters it is 0."""
    pipe = DiffusionPipeline.from_pretrained(models.path("shapes-sd3"))
    pipe.set_progress_bar_config(disable=True)
    parameters = adapters.attach(pipe, 2, 4.0, None, 0)
    call = {"num_inference_steps": 2, "guidance_scale": guidance, "max_sequence_length": 1, "output_type": "latent"}
    prompts = ["two stars", "a red circle"]

    def seeds():
        return [torch.Generator().manual_seed(k) for k in (5, 6)]

    with adapters.compared(pipe, 2) as apart:
        untouched = pipe(prompts, generator=seeds(), **call).images
    assert apart() == [0.0, 0.0]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    expected = []
    for prompt, generator in zip(prompts, seeds(), strict=True):
        sums = np.zeros(2)

        def note(module, args, kwargs, output, sums=sums):
            with adapters.disabled(adapters.layers(pipe)):
                base = module.forward(*args, **kwargs)[0]
            sums += [float(((output[0] - base) ** 2).sum()), float((base**2).sum())]

        hook = pipe.transformer.register_forward_hook(note, with_kwargs=True)
        pipe(prompt, generator=generator, **call)
        hook.remove()
        expected.append(np.sqrt(sums[0] / sums[1]))
    with adapters.compared(pipe, 2) as apart:
        moved = pipe(prompts, generator=seeds(), **call).images
    assert apart() == pytest.approx(expected, rel=1e-4)  # batches of two round otherwise
    assert min(expected) > 0.01
    plain = pipe(prompts, generator=seeds(), **call).images
    assert torch.equal(moved, plain)  # looking changes nothing
    assert not torch.equal(moved, untouched)
