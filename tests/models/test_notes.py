"""An adapter's notes: a record with a format, read back as written, and refused in one line where they are something else."""

from dataclasses import asdict, fields

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffalign.models.notes import FORMAT, LORA, Notes
from tests.kit import ROOT

# Changing these needs a new FORMAT: a later version must know what it reads.
WRITTEN = {
    7: "base_model base_revision base_weights base_weights_digest denoisers rule rewards seed updates precision quantize diffalign_version "
    "call scheduler frozen start guidance_steps fps",
    6: "base_model base_revision base_weights base_weights_digest denoisers rule rewards seed updates precision quantize diffalign_version "
    "call scheduler frozen start guidance_steps",
    5: "base_model base_revision base_weights base_weights_digest denoisers rule rewards seed updates precision quantize diffalign_version "
    "call scheduler frozen start",
    4: "base_model base_revision base_weights base_weights_digest denoisers rule rewards seed updates precision quantize diffalign_version "
    "call scheduler frozen",
    3: "base_model base_revision base_weights base_weights_digest denoisers rule rewards seed updates precision quantize diffalign_version "
    "call scheduler",
}


def adapter(folder, **notes):
    save_file({"x.lora_A.weight": np.zeros((1, 2), np.float32)}, folder / LORA, metadata=notes)
    return folder


def test_what_is_written_belongs_to_the_format():
    assert [f.name for f in fields(Notes)] == WRITTEN[FORMAT].split()


def test_round_trip(tmp_path):
    notes = Notes("a/b", "c", denoisers=["X"], rule={"name": "ddpo"}, rewards={"r": 1.5}, seed=3, call={"height": 64})
    assert Notes.read(adapter(tmp_path, **notes.written())) == notes


@pytest.mark.parametrize("folder", sorted((ROOT / "tests/runs/old_runs/format_2").glob("*/adapter")), ids=str)
def test_notes_without_a_format_are_the_first(folder):
    notes = Notes.read(folder)
    assert notes.base_model.startswith("shapes-")
    assert notes.rule["name"] == folder.parent.name
    assert notes.call["num_inference_steps"] == 3


def test_a_file_of_another_tool_says_nothing(tmp_path):
    assert asdict(Notes.read(adapter(tmp_path, format="pt", ss_network_dim="4"))) == asdict(Notes())


@pytest.mark.parametrize(
    ("notes", "problem"),
    [
        ({"quantize": "int3"}, "its note quantize is 'int3', allowed are none, int8, nf4"),
        ({"precision": "float8"}, "its note precision is 'float8', allowed are float32, bfloat16"),
        ({"notes_format": "8"}, "its notes have format 8, this version reads up to 7"),
        ({"notes_format": "7", "fps": "-1.0"}, "its note fps is -1.0, expected frames per second"),
        ({"notes_format": "7", "fps": '"16"'}, "its note fps is .* expected a float"),
        ({"notes_format": "6", "guidance_steps": "[3]"}, "its note guidance_steps is \\[3\\], expected the first step"),
        ({"notes_format": "two"}, "its notes have format two"),
        ({"call": "{"}, "its note call is not JSON"),
        ({"call": "[]"}, "its note call is '\\[\\]', expected a dict"),
        ({"seed": '"x"'}, "its note seed is .* expected a int"),
        ({"denoisers": "{}"}, "its note denoisers is '{}', expected a list"),
    ],
)
def test_notes_that_are_something_else_are_refused(tmp_path, notes, problem):
    with pytest.raises(ValueError, match=f"holds a damaged adapter: {problem}"):
        Notes.read(adapter(tmp_path, **notes))
