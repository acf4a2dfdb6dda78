"""Pages whose parts are made from the code."""

import ast
import re

from diffalign.errors import EXIT_CODES
from diffalign.rewards import catalog
from diffalign.rules import RULES
from tests.kit import ROOT
from tools import docs
from tools.docs import messages, tables
from tools.docs.markdown import table


def test_what_is_made_is_as_the_code_makes_it():
    """`python -m tools.docs --write` makes it."""
    made = docs.made()
    assert [path for path, text in made.items() if (ROOT / path).read_text(encoding="utf-8") != text] == []
    assert len(made) > 5


def test_every_part_stands_in_a_page():
    assert set(docs.used()) == set(docs.PARTS)
    marked = sum(page.read_text(encoding="utf-8").count("<!-- made:") for page in docs.pages())
    assert marked == len(docs.used()), "a mark that is not closed, or misspelt"


def test_tables_have_a_row_for_everything():
    assert len(tables.rules()) == len(RULES) + 2
    assert len(tables.rewards()) == len(catalog.builtin()) + 2
    assert len(tables.presets()) == len(list((ROOT / "configs").rglob("*.yaml"))) + 2


def test_a_cell_keeps_its_text_in_one_column():
    assert table(("a", "b"), [("x | y", "two\nlines")]) == ["| a | b |", "|---|---|", "| x \\| y | two lines |"]


def test_every_code_that_a_command_ends_with_has_a_meaning():
    tree = ast.parse((ROOT / "diffalign/cli/commands.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    given = [
        call.args[0].value
        for call in calls
        if call.func.id in ("fail", "_leave") and isinstance(call.args[0], ast.Constant)
    ]
    assert given
    assert set(given) <= set(EXIT_CODES)


def test_messages_are_found_with_what_differs_left_out():
    tree = ast.parse('raise Fault(f"{place}: damaged ({why:g}); " + ("delete it" if a else f"keep {it} as it is"))')
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert list(messages._said(call)) == [
        (True, "…: damaged (…); delete it"),
        (True, "…: damaged (…); keep … as it is"),
    ]


def test_evidence_is_what_the_header_says():
    assert tables.evidence("# Run on 2026-11-27 on two CPU cores") == "to its end, 2026-11-27"
    assert tables.evidence("# Not run: it needs a GPU and the weights of x") == "tiny weights, two updates"
    assert tables.evidence("# Not run to its end. GPU: not run.") == "not to its end"
    assert next(line for line in tables.presets() if "ddpo/shapes-sd3" in line).endswith("not to its end |")
    assert re.search(r"flow_grpo/shapes-sd3` .* to its end, 2026-11-27 \|", "\n".join(tables.presets()))


def test_what_troubleshooting_quotes_is_said_by_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```text\n(.*?)```", page, re.S) for line in block.splitlines()]
    assert len(lines) > 15
    assert [line for line in lines if not messages.is_said(line)] == []
    assert not messages.is_said("the ratio was … and nobody says so")


def test_every_page_is_in_the_index_of_the_site():
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = {
        line.strip() for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.S) for line in block.splitlines()
    }
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in docs.pages()} - {"index"}
    assert pages <= listed
