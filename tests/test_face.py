"""What a stranger meets first: issue forms, the container's recipe, a shell's completion, the list for releases."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.shell_completion import ShellComplete

from diffalign.cli import app
from tests.kit import ROOT

FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def offered(*words: str) -> list[str]:
    *before, begun = words
    found = ShellComplete(app, {}, "diffalign", "_DIFFALIGN_COMPLETE").get_completions(list(before), begun)
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in found]


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["tr"], ["train"]),
        (["train", "truncated_bp/shapes-s"], ["truncated_bp/shapes-sd", "truncated_bp/shapes-sd3"]),
        (["train", "./mi"], ["<file>"]),
        (["plan", "flow_grpo/shapes-sd3", "optimizer.l"], ["optimizer.lr="]),
        (["train", "rlr/shapes-sd3", "updates=2", "rule.sp"], ["rule.span="]),  # of its own rule
        (["train", "flow_grpo/shapes-sd3", "rule.sp"], []),
        (["train", "no/such", "lora.r"], ["lora.rank="]),
        (["schema", "--o"], ["--out"]),
    ],
)
def test_a_shell_is_offered(words, first):
    assert offered(*words) == first


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_forms(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= form.keys()
    inputs = [part for part in form["body"] if part["type"] != "markdown"]
    assert all(
        part["type"] in ("textarea", "input", "dropdown", "checkboxes") and part["attributes"]["label"]
        for part in inputs
    )
    assert len({part["id"] for part in inputs}) == len(inputs)
    assert any(part.get("validations", {}).get("required") for part in inputs)


def test_a_bug_comes_with_what_doctor_prints():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    (doctor,) = [part for part in form["body"] if part.get("id") == "doctor"]
    assert doctor["validations"]["required"]


def test_the_container_takes_what_the_package_needs():
    text = (ROOT / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]}
    packaged = (ROOT / "pyproject.toml").read_text()
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "diffalign", "reward_models", "configs"}
    assert all((ROOT / name).exists() for name in copied)
    extras = re.search(r"^ARG EXTRAS=(\S+)$", text, re.M)[1].split(",")
    assert all(f"\n{extra} = [" in packaged for extra in extras)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == copied


@pytest.mark.skipif(sys.platform != "linux", reason="hadolint is installed on Linux alone")
def test_the_container_s_recipe_is_linted():
    tool = shutil.which("hadolint", path=f"{Path(sys.executable).parent}") or shutil.which("hadolint")
    assert tool, "pip install -e '.[dev]'"
    done = subprocess.run([tool, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_list_for_releases_names_is_there():
    text = (ROOT / "docs/release.md").read_text()
    for module in re.findall(r"python -m (tools\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists() or (
            ROOT / module.replace(".", "/")
        ).is_dir(), module
    for name in ("CITATION.cff", "tests/runs/old_runs", ".ci/run", "Dockerfile"):
        assert (ROOT / name).exists()
        assert Path(name).name in text or "docker build" in text
