"""Questions of judges: taken from their authors' files without running them, word for word or not at all."""

import zipfile

import pytest
from click.testing import CliRunner

from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.rewards import catalog, templates
from tests.rewards import qwen

FILE = "hpsv3/dataset/data_collator_qwen.py"


@pytest.fixture
def authors(tmp_path, monkeypatch):
    """A checkout with the text in two constants, which would fail if it were run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = qwen.asked(monkeypatch, "hpsv3")
    first, second = whole[:30], whole[30:]
    source = tmp_path / "checkout" / FILE
    source.parent.mkdir(parents=True)
    source.write_text(f"import nothing_of_that_name\nINSTRUCTION = {first!r}\nprompt_with_special_token = {second!r}\n")
    return tmp_path


def fetch(name: str, source) -> str:
    return CliRunner().invoke(app, ["rewards", "fetch", name, "--from", str(source)], catch_exceptions=False).output


def places(authors):
    with zipfile.ZipFile(authors / "one.whl", "w") as wheel:
        wheel.write(authors / "checkout" / FILE, FILE)
    (authors / "mine.txt").write_text(qwen.QUESTIONS["hpsv3"])
    return ["checkout", f"checkout/{FILE}", "one.whl", "mine.txt"]


def test_a_text_is_found_in_a_checkout_a_wheel_and_a_file_and_used_from_the_cache(authors):
    kept = templates.kept("hpsv3", None)
    for place in places(authors):
        assert fetch("hpsv3", authors / place).strip() == str(kept)
        assert templates.of("hpsv3") == qwen.QUESTIONS["hpsv3"]
        kept.unlink()
    with pytest.raises(FileNotFoundError, match="diffalign rewards fetch hpsv3 --from WHEEL_OR_CHECKOUT"):
        templates.of("hpsv3")


def test_it_is_written_beside_weights_that_are_named(authors):
    (authors / "weights").mkdir()
    written = fetch(f"hpsv3@{authors / 'weights'}", authors / "checkout")
    assert written.strip() == str(authors / "weights" / "template.txt")
    assert templates.of("hpsv3", str(authors / "weights")) == qwen.QUESTIONS["hpsv3"]


def test_an_installed_package_of_its_authors_is_read(authors, monkeypatch):
    (authors / "checkout" / "hpsv3" / "__init__.py").write_text("raise RuntimeError('run')")
    monkeypatch.syspath_prepend(str(authors / "checkout"))
    assert templates.of("hpsv3") == qwen.QUESTIONS["hpsv3"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda p: p.write_text(p.read_text().replace("good", "bad")), "question has checksum"),
        (lambda p: p.write_text("INSTRUCTION = 'a'\n"), "has no text prompt_with_special_token"),
        (lambda p: p.unlink(), "has no hpsv3/dataset/data_collator_qwen.py that can be read"),
        (lambda p: p.write_text("def"), "that can be read"),
    ],
)
def test_another_text_is_refused_and_nothing_is_written(authors, change, expected):
    change(authors / "checkout" / FILE)
    with pytest.raises(UserError, match=f"--from: hpsv3: .*{expected}"):
        templates.fetch(catalog.find("hpsv3"), authors / "checkout")
    assert not templates.kept("hpsv3", None).exists()


def test_rewards_that_ask_nothing_are_refused(authors):
    with pytest.raises(UserError, match="pickscore has no question .* allowed are hpsv3, videoreward$"):
        templates.fetch(catalog.find("pickscore"), authors)


def test_a_place_that_is_no_folder_is_refused(authors):
    with pytest.raises(UserError, match="rewards: someone/HPSv3 is no folder; without a place the text is kept in "):
        templates.fetch(catalog.find("hpsv3@someone/HPSv3"), authors / "checkout")
