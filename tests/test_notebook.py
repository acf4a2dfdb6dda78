"""examples/first_run.ipynb: it runs as it stands, and is kept without what it printed."""

import json

import nbclient
import nbformat
import pytest

from tests.kit import ROOT

PLACE = ROOT / "examples" / "first_run.ipynb"


def test_it_is_kept_without_outputs_and_its_cells_are_python():
    book = nbformat.read(PLACE, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    for cell in code:
        compile(cell.source, str(PLACE), "exec")
    assert json.loads(PLACE.read_text())["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.slow
def test_it_runs_and_the_reward_goes_up(tmp_path, monkeypatch):
    """About two minutes; pictures stand under their cells, and what was trained on gains."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(PLACE, as_version=4)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    printed = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    gains = [line for line in printed.splitlines() if "gain" in line]
    assert len(gains) >= 4
    assert "gain +" in next(line for line in gains if line.startswith("shapes_pref"))
    assert (tmp_path / "first" / "blue" / "adapter").is_dir()
