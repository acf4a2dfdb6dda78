"""What the README shows is run, shortened; and what users install is built, installed aside and used."""

import os
import re
import shlex
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.kit import ROOT
from tests.kit.commands import diffalign
from tests.kit.helpers import TINY, tiny

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST, MOST = 100, 160  # characters of a line of the README, and its lines


def blocks(language: str) -> list[str]:
    """Code of all pages; what cannot run here, for want of weights or a card, is marked `sh`."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"```{language}\n(.*?)```", pages, re.S)


def links(page: Path) -> list[str]:
    """Files that a page links to, without the place in them."""
    found = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    return [target for target in found if not target.startswith(("http", "mailto"))]


def commands() -> list[str]:
    """Lines of the pages that call the tool, without comments and continued lines joined."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    found = [line.split(" #")[0].strip() for line in text.splitlines()]
    return [line for line in found if line.startswith(("diffalign ", "python train.py", "python sample.py"))]


def as_typed(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The README's line, without a shell's process and its imports where the line needs none."""
    words = shlex.split(command)
    return diffalign(*words[1:], cwd=cwd) if words[0] == "diffalign" else shell(command, cwd)


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, capture_output=True, text=True, check=False, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder that looks like a checkout and holds a short finished run where the README expects one."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "train.py", "sample.py", "examples"):
        (folder / name).symlink_to(ROOT / name)
    done = shell(f"diffalign train configs/flow_grpo/shapes-sd3.yaml {shortened()}", folder)
    assert done.returncode == 0, done.stderr
    # A later command goes on from this one's adapter; in which process each runs is not known.
    done = as_typed(f"diffalign train flow_grpo/shapes-sd3 seed=1 run_dir=runs/seed1 {shortened()}", folder)
    assert done.returncode == 0, done.stderr
    return folder


def shortened(command: str = "flow_grpo") -> str:
    return " ".join(f"'{override}'" for override in tiny(command))


def test_the_readme_begins_with_the_two_commands():
    assert blocks("bash")[0].splitlines() == [
        "pip install -e . && diffalign train configs/flow_grpo/shapes-sd3.yaml",
        "pip install -e '.[rewards,dev]' && pytest",
    ]


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_every_command_of_the_readme_runs(command, place):
    if " init " in command:
        (place / "first.yaml").unlink(missing_ok=True)  # made by the test of the command after it, in another order
    elif "first.yaml" in command and not (place / "first.yaml").exists():
        assert as_typed("diffalign init first.yaml --rule ddpo", place).returncode == 0
    elif " train" in command or " plan " in command or "train.py" in command:
        command += f" {shortened(command)} run_dir=runs/other" if "mine.py" in command else f" {shortened(command)}"
    if " evaluate " in command:
        (place / "few.txt").write_text("a photo of two stars\n")
        command += " --prompts few.txt --reward jpeg_compressibility"
    done = as_typed(command, place)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_python_example_of_the_readme_runs(number, place, monkeypatch):
    code = blocks("python")[number].replace('["seed=0"]', repr(TINY))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_pages_exist(page):
    for target in links(page):
        assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_leads_to_every_page():
    lines = README.splitlines()
    assert len(lines) <= MOST
    assert not [line for line in lines if len(line) > LONGEST and not line.startswith(("|", "diffalign "))]
    seen, found = set(), {ROOT / "README.md"}
    while found - seen:
        seen |= found
        found |= {
            (page.parent / target).resolve() for page in found for target in links(page) if target.endswith(".md")
        }
    assert set(PAGES) - seen == {ROOT / "docs" / "index.md"}  # the site's front page, which leads here


def test_a_built_wheel_installed_elsewhere_trains(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for part in (
        "reward_models/shapes_geneval.py",
        "diffalign/_configs/flow_grpo/shapes-sd3.yaml",
        "diffalign/shapes/weights/shapes-sd3/transformer/diffusion_pytorch_model.safetensors",
        "diffalign/shapes/weights/shapes-sd/unet/diffusion_pytorch_model.safetensors",
        "diffalign/shapes/weights/preference/shapes_judge.safetensors",
        "diffalign/sampling/page.html",
    ):
        assert part in names
    assert not [name for name in names if name.startswith("tests/")]
    assert wheel.stat().st_size < 18e6  # five pipelines of 2.4 to 4 MB
    # A bare environment with the wheel alone; its dependencies are borrowed through the path.
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    (site,) = (environment / "lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    code = f"import sys; sys.path += {borrowed!r}; from diffalign.cli import main; main(sys.argv[1:])"
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [str(python), "-c", code, "train", "flow_grpo/shapes-sd3", *TINY, f"run_dir={run_dir}", "updates=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert (run_dir / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    where = subprocess.run(
        [str(python), "-c", f"import sys; sys.path += {borrowed!r}; import diffalign; print(diffalign.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert where.stdout.startswith(str(environment))
