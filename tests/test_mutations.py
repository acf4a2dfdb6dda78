"""The tests of ops, processes, rules and the trainer must notice each planted mistake."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.kit import ROOT
from tests.mutations import MUTATIONS


def test_there_are_twenty_and_each_names_one_place():
    assert len(MUTATIONS) >= 20
    for mutation in MUTATIONS:
        assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, mutation.name


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_every_mutation_is_killed(mutation, tmp_path):
    for name in ("diffalign", "reward_models", "tests", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / mutation.file
    target.write_text(target.read_text().replace(mutation.old, mutation.new))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-n",
            "0",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/ops",
            "tests/processes",
            "tests/rules",
            "tests/training/test_trainer.py",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, f"{mutation.name} survived\n{done.stdout[-2000:]}"
    assert "FAILED" in done.stdout
