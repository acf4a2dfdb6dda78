"""Prompts are encoded once, kept on disk under a budget, and the encoders are not needed any more."""

import gc
import hashlib
import os
import weakref
from dataclasses import replace

import pytest
import torch

from diffalign.backends.diffusers import DiffusersPolicy
from diffalign.errors import Fault, UserError
from diffalign.models import encoders, loading
from diffalign.models.encoding_store import Store
from diffalign.models.encodings import joined
from diffalign.processes import PROCESSES
from diffalign.prompts import book
from diffalign.runtime.memory import Live
from diffalign.types import Plan
from tests.families import FAMILIES, build, folder

TEXTS = ["a cat", "two dogs under a table, seen from the side", "a cat and a dog"]
ALONE = [name for name in FAMILIES if name != "CogView4"]  # which pads a batch on the left and attends to that


def policy(name, pipe=None, kept=None, **more):
    family = FAMILIES[name]
    call = {**family.call, **({} if family.guide == "guidance_scale" else {family.guide: 3.0})} | more
    scale = 3.0 if family.guide == "guidance_scale" else None
    process = PROCESSES[family.process]
    return DiffusersPolicy(
        pipe or build(name), process, steps=2, call=call, micro_batch=3, guidance_scale=scale, kept=kept
    )


def encoded(made, folder, budget=1e9):
    """What a policy's pipeline keeps of TEXTS in a folder, and why not."""
    return encoders.encode_all(made.pipe, made.arguments, "cpu", folder, budget, TEXTS, TEXTS)


def bare(name):
    """A family's pipeline without its text encoders."""
    return loading.load(folder(name), part="rest")[0]


def drawn(made, texts=TEXTS):
    wanted = book.fixed([{"prompt": text} for text in texts], 1, seed=0)
    return made.rollout(wanted, Plan.deterministic(2)).x[-1]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ALONE)
def test_m14_every_family_samples_the_same_without_its_encoders(name, tmp_path):
    """Encoders alone, then the rest without them, as a run loads them."""
    made = policy(name, loading.load(folder(name))[0])
    expected = drawn(made)
    first = loading.load(folder(name), part="encoders")[0]
    networks = {key: part for key, part in first.components.items() if isinstance(part, torch.nn.Module)}
    assert encoders.present(first)
    for key, part in networks.items():
        assert all(p.is_meta for p in part.parameters()) != key.startswith("text_encoder")
    kept, why_not = encoders.encode_all(first, made.arguments, "cpu", tmp_path, 1e9, TEXTS, TEXTS)
    assert why_not == "" and kept.complete
    assert len(files(tmp_path)) >= len(TEXTS)
    without = policy(name, bare(name), kept)
    assert encoders.present(without.pipe) == []
    # rows encoded alone differ from rows of a batch by rounding, two guided steps make more of it
    before = drawn(without)
    torch.testing.assert_close(before, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    without.seam.encodings._memory.clear()  # from the files
    assert torch.equal(drawn(without), before)


def test_m13_encoders_are_gone_before_the_denoiser_is_read(tmp_path):
    """Weak references to them die, and what is allocated at once while both are loaded is no more than the larger of the two takes."""
    name = "FLUX.1-dev"
    arguments = policy(name, loading.load(folder(name))[0]).arguments

    def first():
        pipe = loading.load(folder(name), part="encoders")[0]
        alive.extend(weakref.ref(getattr(pipe, key)) for key in encoders.present(pipe))
        return encoders.encode_all(pipe, arguments, "cpu", tmp_path, 1e9, TEXTS, TEXTS)[0]

    alive = []
    with Live() as live:
        first()
        gc.collect()
        assert alive and all(reference() is None for reference in alive)
        held = live.now
        alone, live.peak = live.peak, live.now
        pipe = loading.load(folder(name), part="rest")[0]
        rest = live.peak
    assert held < 0.1 * alone
    weights = sum(p.nbytes for part in (pipe.transformer, pipe.vae) for p in part.parameters())
    assert rest <= held + 2.1 * weights  # read, and in its precision


def test_an_encoder_that_looks_at_the_whole_batch_stays(tmp_path):
    made = policy("CogView4")
    kept, why_not = encoded(made, tmp_path)
    assert kept is None and "encodes a batch otherwise" in why_not
    assert files(tmp_path) == []


def test_files_are_found_again_and_depend_on_weights_length_and_negative_text(tmp_path):
    name = "SD 3.5 Medium"
    kept, why_not = encoded(policy(name), tmp_path)
    assert why_not == ""
    count, expected = len(files(tmp_path)), drawn(policy(name, bare(name), kept))

    again = policy("SD 3.5 Medium")
    encode = again.pipe._get_clip_prompt_embeds
    calls = []
    again.pipe._get_clip_prompt_embeds = lambda *args, **kwargs: calls.append(args) or encode(*args, **kwargs)
    kept = encoded(again, tmp_path)[0]
    probing = len(calls)
    assert torch.equal(drawn(policy(name, bare(name), kept)), expected)
    assert len(calls) == probing
    assert len(files(tmp_path)) == count

    for change in ({"max_sequence_length": 9}, {"negative_prompt": "blurred"}):
        assert encoded(policy(name, **change), tmp_path)[1] == ""
        assert len(files(tmp_path)) > count
        count = len(files(tmp_path))
    pipe = build("SD 3.5 Medium")
    with torch.no_grad():
        next(pipe.text_encoder_2.parameters()).view(-1)[7] += 1e-3
    assert encoded(policy(name, pipe), tmp_path)[1] == ""
    assert len(files(tmp_path)) > count


def test_what_does_not_fit_the_budget_keeps_its_encoders_and_the_folder_small(tmp_path):
    made = policy("SD 1.5")
    expected = drawn(made)
    mine = tmp_path / "pytorch_lora_weights.safetensors"
    mine.write_bytes(bytes(10**6))
    budget = 60_000  # three encodings of 77 x 32 numbers, with and without the prompt, take 20 kB each
    kept, why_not = encoded(made, tmp_path, budget)
    assert "prompts.cache_gib allows" in why_not and not kept.complete
    found = drawn(policy("SD 1.5", kept=kept))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert files(tmp_path)  # it is used all the same
    own = [path for path in tmp_path.iterdir() if path != mine]
    assert sum(path.stat().st_size for path in own) <= budget
    assert mine.stat().st_size == 10**6  # what is not the cache's is neither counted nor touched


def test_the_least_recently_used_goes_first(tmp_path):
    store = Store(tmp_path, 5_000)
    names = [hashlib.sha256(bytes([k])).hexdigest() for k in range(5)]
    for k in range(4):
        store.write(names[k], (torch.full((250,), float(k)), None))
        os.utime(tmp_path / f"{names[k]}.safetensors", ns=(k, k))
    assert torch.equal(store.read(names[0])[0], torch.zeros(250))  # used now, so 1 is the oldest
    store.write(names[4], (torch.ones(250), None))
    assert store.read(names[1]) is None
    assert store.read(names[0]) is not None
    assert store.read(names[4]) is not None
    assert store.used == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_nested_encodings_come_back_as_they_were(tmp_path):
    shared = torch.arange(6.0)
    value = ([torch.ones(1, 2, dtype=torch.bfloat16)], None, (shared, shared[:3]), True, torch.zeros(1, 2) > 1)
    store = Store(tmp_path, 1e6)
    store.write("x", value)
    found = store.read("x")
    assert found[1] is None
    assert found[3] is True
    assert isinstance(found[0], list)
    assert isinstance(found[2], tuple)
    for a, b in ((found[0][0], value[0][0]), (found[2][0], shared), (found[2][1], shared[:3]), (found[4], value[4])):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all", None])
def test_a_damaged_or_missing_file_is_encoded_again(tmp_path, damage):
    kept = encoded(policy("SD 1.5"), tmp_path)[0]
    made = policy("SD 1.5", kept=replace(kept, complete=False))
    without = policy("SD 1.5", bare("SD 1.5"), kept)
    expected = drawn(made)
    for path in tmp_path.iterdir():
        path.write_bytes(damage) if damage is not None else path.unlink()
    made.seam.encodings._memory.clear()
    assert torch.equal(drawn(made), expected)
    assert torch.equal(drawn(without), expected)
    for path in tmp_path.iterdir():
        path.unlink()
    without.seam.encodings._memory.clear()
    with pytest.raises(Fault, match="gone from the cache"):
        drawn(without)


def test_rows_of_several_lengths_are_padded_at_the_end_and_lists_are_joined():
    a = (torch.ones(1, 2, 3), torch.ones(1, 4), [torch.ones(2)], torch.arange(3), None)
    b = (torch.ones(1, 3, 3), torch.ones(1, 4), [torch.ones(5)], torch.arange(3), None)
    found = joined([a, b], [True, True, True, False, False])
    assert found[0].shape == (2, 3, 3)
    assert found[0][0, 2].eq(0).all()
    assert found[1].shape == (2, 4)
    assert [len(item) for item in found[2]] == [2, 5]
    assert torch.equal(found[3], torch.arange(3))
    assert found[4] is None


def test_a_full_disk_is_a_fault_that_leaves_nothing_half_written(tmp_path, monkeypatch):
    from diffalign.models import encoding_store

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoding_store, "save_file", full)
    with pytest.raises(Fault, match="prompts.cache: cannot write .*No space left"):
        encoded(policy("SD 1.5"), tmp_path)
    assert files(tmp_path) == []


def test_a_cache_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="prompts.cache: got .*file.*cannot write there"):
        encoded(policy("SD 1.5"), tmp_path / "file")
