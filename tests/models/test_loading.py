"""Where models come from: folders, and the hub's cache laid out as the hub does."""

import importlib.util
import shutil
from types import SimpleNamespace
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from diffalign import config
from diffalign.errors import UserError
from diffalign.models import loading
from diffalign.models.notes import Notes
from diffalign.runs import session
from diffalign.sampling.sources import resolve
from tests.backends.test_hub_configs import tiny
from tests.families import folder, single_file
from tests.kit.helpers import SMALL, THREE_STEPS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with two commits of one repository, and no network."""
    repository = tmp_path / "models--someone--tiny-sd"
    for commit in (COMMIT, OLDER):
        shutil.copytree(folder("SD 1.5"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "v1").write_text(OLDER)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path), raising=False)
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_id_is_found_in_the_cache_with_its_commit(hub):
    place = loading.locate("someone/tiny-sd")
    assert place.commit == COMMIT
    assert loading.locate("someone/tiny-sd", "v1").commit == OLDER
    pipe, where = loading.load("someone/tiny-sd")
    assert where == place
    assert type(pipe) is d.StableDiffusionPipeline


def test_a_run_records_the_commit_and_sampling_goes_back_to_it(hub, tmp_path):
    settings = config.load(
        "ddpo/sd15",
        [
            *SMALL,
            *THREE_STEPS["ddpo"],
            "model=someone/tiny-sd",
            "revision=v1",
            "sampler.pipeline_args={}",
            "rewards={jpeg_compressibility: 1.0}",
            "eval_rewards=[]",
            "lora.rank=4",
            "precision=float32",
            "evaluation.enabled=false",
            f"run_dir={tmp_path / 'run'}",
        ],
    )
    session.train(settings, quiet=True)
    assert Notes.read(tmp_path / "run" / "adapter").base_revision == OLDER
    assert resolve(str(tmp_path / "run")).revision == OLDER


def test_what_is_not_there_is_named_with_the_way_out(hub):
    with pytest.raises(UserError) as caught:
        loading.load("someone/else")
    (line,) = caught.value.problems
    assert line.startswith("model: cannot fetch 'someone/else' from the hub")
    assert line.endswith(f"and it is not in the hub's cache ({hub}) either: connect, or give the folder of a copy")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            errors.GatedRepoError,
            "is gated: accept its terms at https://huggingface.co/a/b and log in with `hf auth login`",
        ),
        (errors.RepositoryNotFoundError, "is not on the hub, or private: check https://huggingface.co/a/b"),
        (errors.RevisionNotFoundError, "has no revision 'v9'; its branches, tags and commits are at"),
    ],
)
def test_the_hubs_refusals_say_what_to_do(error, expected, monkeypatch):
    response = SimpleNamespace(headers={}, request=None, status_code=403)

    def refuse(*args, **kwargs):
        raise error("no", response=response)

    monkeypatch.setattr(d.DiffusionPipeline, "download", refuse)
    with pytest.raises(UserError, match="model: 'a/b'") as caught:
        loading.load("a/b", revision="v9")
    assert expected in caught.value.problems[0]


def test_folders_have_no_revision():
    with pytest.raises(
        UserError, match="revision: got 'main', only models on the hub have one; shapes-sd3 is a folder"
    ):
        config.load("flow_grpo/shapes-sd3", ["revision=main"])


def test_pipelines_that_start_from_a_picture_are_refused(tmp_path):
    pipe = d.StableDiffusionPipeline.from_pretrained(folder("SD 1.5"))
    other = d.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="is a StableDiffusionImg2ImgPipeline; image-to-image, editing .* not there yet"
    ):
        loading.load(str(tmp_path))


def original(place) -> dict[str, torch.Tensor]:
    """LTX's denoiser with other weights in a single file, under the names its authors use; returns the weights."""
    pipe = d.LTXPipeline.from_pretrained(folder("LTX-Video"))
    generator = torch.Generator().manual_seed(5)
    weights = {
        key: torch.randn(value.shape, generator=generator) for key, value in pipe.transformer.state_dict().items()
    }
    names = {"proj_in.": "patchify_proj.", "time_embed.": "adaln_single.", "norm_q": "q_norm", "norm_k": "k_norm"}
    written = {}
    for key, value in weights.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        written["model.diffusion_model." + key] = value
    save_file(written, place)
    return weights


def test_a_single_files_denoiser_takes_the_place_of_the_models(tmp_path):
    weights = original(tmp_path / "tuned.safetensors")
    pipe, _ = loading.load(str(folder("LTX-Video")), weights=str(tmp_path / "tuned.safetensors"))
    assert all(torch.equal(value, weights[key]) for key, value in pipe.transformer.state_dict().items())
    plain, _ = loading.load(str(folder("LTX-Video")))
    assert not torch.equal(plain.transformer.proj_in.weight, pipe.transformer.proj_in.weight)
    assert torch.equal(plain.vae.decoder.conv_in.conv.weight, pipe.vae.decoder.conv_in.conv.weight)


def tuned() -> Any:
    """A tiny Stable Diffusion with other weights than its folder's."""
    pipe = d.StableDiffusionPipeline.from_pretrained(folder("SD 1.5"))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            for parameter in part.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return pipe


def drawn(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("two stars", num_inference_steps=2, generator=generator, output_type="pt").images


def test_everything_an_all_in_one_file_holds_is_read(tmp_path):
    """The picture is that of the pipeline whose weights were written under the authors' names."""
    pipe = tuned()
    path = tmp_path / "all.safetensors"
    parts = single_file.unet(pipe.unet), single_file.vae(pipe.vae), single_file.clip(pipe.text_encoder)
    save_file({name: value.contiguous() for part in parts for name, value in part.items()}, path)
    found, place = loading.load(str(folder("SD 1.5")), weights=str(path))
    assert place.file == "unet, vae, text_encoder"
    torch.testing.assert_close(drawn(found), drawn(pipe), rtol=0, atol=0)
    plain, place = loading.load(str(folder("SD 1.5")))
    assert place.file == ""
    assert (drawn(plain) - drawn(pipe)).abs().max() > 0.05


def test_what_a_file_lacks_is_the_models_own_and_what_is_not_read_is_told(tmp_path):
    pipe = tuned()
    path = tmp_path / "some.safetensors"
    odd = {"text_encoders.other.layer.weight": torch.zeros(2)}
    save_file(
        {k: v.contiguous() for k, v in (single_file.unet(pipe.unet) | single_file.vae(pipe.vae) | odd).items()}, path
    )
    found, place = loading.load(str(folder("SD 1.5")), weights=str(path))
    assert place.file == "unet, vae; not read: text_encoders.other"
    plain, _ = loading.load(str(folder("SD 1.5")))
    pipe.text_encoder = plain.text_encoder
    torch.testing.assert_close(drawn(found), drawn(pipe), rtol=0, atol=0)


@pytest.mark.parametrize(
    "missing",
    [
        "first_stage_model.decoder.conv_out.bias",
        "model.diffusion_model.out.2.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_a_file_with_a_weight_too_few_is_refused(missing, tmp_path):
    pipe = tuned()
    path = tmp_path / "less.safetensors"
    weights = single_file.unet(pipe.unet) | single_file.vae(pipe.vae) | single_file.clip(pipe.text_encoder)
    del weights[missing]
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    with pytest.raises(
        UserError, match=r"weights: (cannot read '.*less.safetensors' as a|'.*less.safetensors' lacks 1)"
    ):
        loading.load(str(folder("SD 1.5")), weights=str(path))


def test_a_single_file_alone_is_told_how_to_be_used(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"a single file; allowed is the hub id or folder of the model .* and weights: "
    ):
        config.load("flow_grpo/shapes-sd3", [f"model={path}"])


def test_a_run_on_a_single_file_is_sampled_with_it(tmp_path):
    original(tmp_path / "tuned.safetensors")
    settings = tiny("flow_grpo/ltx-video", tmp_path / "run").model_copy(
        update={"weights": str(tmp_path / "tuned.safetensors")}
    )
    session.train(settings, quiet=True)
    source = resolve(str(tmp_path / "run"))
    assert source.weights == str(tmp_path / "tuned.safetensors")
    longer = settings.model_copy(update={"updates": 3})
    whole = (tmp_path / "tuned.safetensors").read_bytes()
    (tmp_path / "tuned.safetensors").write_bytes(whole[:-4] + b"abcd")  # other weights under its name
    with pytest.raises(UserError, match=r"began with other content; restore it.*\n  content of weights: "):
        session.train(longer, quiet=True)
    with pytest.raises(UserError, match="was trained on .*tuned.safetensors, which is another file now"):
        resolve(str(tmp_path / "run"))
    (tmp_path / "tuned.safetensors").unlink()
    with pytest.raises(UserError, match="was trained on .*tuned.safetensors, which is not there; restore the file"):
        resolve(str(tmp_path / "run"))


def test_a_file_that_is_no_checkpoint_of_this_model_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"weights: cannot read '.*other.safetensors' as a UNet2DConditionModel"):
        loading.load(str(folder("SD 1.5")), weights=str(path))
    path.write_text("no tensors")
    with pytest.raises(UserError, match=r"weights: cannot read '.*other.safetensors' as a LTXVideoTransformer3DModel"):
        loading.load(str(folder("LTX-Video")), weights=str(path))
    with pytest.raises(UserError, match=r"has 2 denoisers \(transformer, transformer_2\), a single file fills one"):
        loading.load(str(folder("Wan 2.2")), weights=str(path))
    with pytest.raises(UserError, match=r"weights: got 'nowhere', no file there"):
        config.load("flow_grpo/shapes-sd3", ["weights=nowhere"])


without_xformers = pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")


@without_xformers
def test_xformers_is_refused_where_it_does_not_run(monkeypatch):
    pipe, _ = loading.load("shapes-sd3")
    with pytest.raises(UserError, match="attention: got 'xformers', which needs a CUDA device; allowed here is native"):
        loading.attend(pipe, "xformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("shapes-sd3", "shapes-sd", "shapes-flux"):
        pipe, _ = loading.load(name)
        with pytest.raises(
            UserError, match=r"attention: the \w+ cannot attend by xformers \(.*xformers.*allowed is native"
        ):
            loading.attend(pipe, "xformers")  # it is not installed


def test_xformers_is_asked_for_as_each_denoiser_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    for name in ("shapes-sd3", "shapes-sd", "shapes-flux", "shapes-wan"):
        pipe, _ = loading.load(name)
        (denoiser,) = loading.adapters.denoisers(pipe).values()
        kind = type(denoiser)
        monkeypatch.setattr(
            kind, "set_attention_backend", lambda self, backend: asked.append((type(self).__name__, backend))
        )
        monkeypatch.setattr(
            kind,
            "enable_xformers_memory_efficient_attention",
            lambda self: asked.append((type(self).__name__, "processors")),
        )
        loading.attend(pipe, "xformers")
    assert asked == [
        ("SD3Transformer2DModel", "processors"),
        ("UNet2DConditionModel", "processors"),
        ("FluxTransformer2DModel", "xformers"),
        ("WanTransformer3DModel", "xformers"),
    ]


@without_xformers
def test_a_missing_xformers_is_told_with_its_command():
    with pytest.raises(UserError, match=r"attention: xformers is not installed; pip install 'diffalign\[xformers\]'"):
        config.load("flow_grpo/shapes-sd3", ["attention=xformers"])


def test_another_backend_gives_nearly_the_same_picture_and_is_refused_where_there_is_no_choice():
    """Torch's plain sums against its own choice: the same attention in another order."""
    call = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64, "max_sequence_length": 16}
    drawn = []
    for backend in ("_native_math", "native"):  # the last is the process's from now on
        pipe, _ = loading.load("shapes-flux")
        loading.attend(pipe, backend)
        drawn.append(pipe("two stars", generator=torch.Generator().manual_seed(0), **call).images)
    assert np.abs(drawn[0] - drawn[1]).max() < 1e-4
    with pytest.raises(UserError, match="the unet cannot attend by _native_math .*has no choice of backends"):
        loading.attend(loading.load("shapes-sd")[0], "_native_math")
