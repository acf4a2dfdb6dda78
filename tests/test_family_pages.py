"""docs/families/: short, one a family; what they count is counted again, and their first command is run on tiny weights."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from tests.families import FAMILIES, folder
from tests.kit import ROOT
from tests.kit.commands import diffalign
from tools import hub_configs
from tools.docs import families

LONGEST = 60  # lines


@pytest.mark.parametrize("page", families.PAGES)
def test_a_page_is_short_and_goes_through_one_preset(page):
    text = (ROOT / f"docs/families/{page}.md").read_text(encoding="utf-8")
    made = [families.facts(page), families.cards(page), families.tried(page)]
    assert len(text.splitlines()) - sum(map(len, made)) <= LONGEST
    assert f"diffalign train {families.PAGES[page]} --vram" in text
    for part in ("facts", "cards", "tried"):
        assert f"<!-- made: {part} of {page} -->" in text


def test_every_page_of_the_folder_has_made_parts():
    assert {path.stem for path in (ROOT / "docs/families").glob("*.md")} == set(families.PAGES)


def first_command(page: str) -> list[str]:
    """The page's `diffalign sample` on tiny weights of its family."""
    text = (ROOT / f"docs/families/{page}.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^diffalign (sample \S+/\S+ --prompt .*)$", text, re.M)[:1]
    family = hub_configs.families()[families.PAGES[page].partition("/")[2]]
    words = shlex.split(line)
    assert words[1] == family["model"]
    asked = yaml.safe_load(family["call"])
    given = dict(words[k + 1].split("=") for k, word in enumerate(words) if word == "--set")
    assert {key: str(asked[key]) for key in given} == given  # the preset's size
    tiny = FAMILIES[family["tried_on"]].call
    words[1] = str(folder(family["tried_on"]))
    words[words.index("--steps") + 1] = "3"
    own = {**given, **{key: value for key, value in tiny.items() if key != "negative_prompt"}}
    kept = [word for k, word in enumerate(words) if word != "--set" and (k == 0 or words[k - 1] != "--set")]
    return [*kept, *(word for key, value in own.items() for word in ("--set", f"{key}={value}"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", families.PAGES)
def test_the_first_command_of_a_page_draws(page, tmp_path):
    done = diffalign(*first_command(page), "--out", "pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures" / "grid.png").is_file()


@pytest.mark.slow
def test_what_a_page_counts_is_counted_so():
    """One of them, the smallest; `python benchmarks/families.py` counts all."""
    code = "import json, sys; sys.path.insert(0, 'benchmarks'); import families; print(json.dumps(families.preset('ddpo/sd15')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(families.RESULTS.read_text())["ddpo/sd15"]
