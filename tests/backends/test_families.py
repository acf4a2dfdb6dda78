"""Real pipeline classes with tiny random weights, through the one backend: every cell of the README's table."""

import pytest

from tests.families import FAMILIES
from tests.families.__main__ import PAGE, README, bases, committed, markdown
from tests.families.probe import probe

NEEDED = (
    "pictures",
    "replay fp32",
    "bf16",
    "guided",
    "gradient",
    "decode gradient",
    "any t",
    "checkpointing",
    "LoRA file",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_does_what_the_table_says(name):
    found = probe(name)
    assert found == committed()[name]
    assert [key for key in NEEDED if found[key] != "yes"] == []


def test_the_page_of_bases_says_what_the_configs_say():
    assert bases() == PAGE.read_text(encoding="utf-8")
    assert bases().count("\n| ") == len(FAMILIES) + 1


def test_the_readme_shows_the_table():
    assert list(committed()) == list(FAMILIES)
    assert markdown(committed()) in README.read_text(encoding="utf-8")
