"""The notebooks run from top to bottom, and what is committed is what they print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def outputs(notebook):
    """All outputs, after a check that every cell of code was run, in order, without an error."""
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    found = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in found}
    assert "stderr" not in {output.get("name") for output in found}
    return found


def texts(notebook):
    """The printed texts, and the values of cells: all that is the same whenever it runs on the same kind of machine."""
    return ["".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs(notebook)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_executed_and_small(notebook):
    pictures = [output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert pictures
    assert max(len(picture) for picture in pictures) * 3 / 4 < 80_000
    assert "/tmp" not in "".join(texts(notebook))


@pytest.mark.third_party
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    pytest.importorskip("nbconvert")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", tmp_path, notebook]
    subprocess.run(command, check=True, timeout=400, cwd=tmp_path)
    printed = "\n".join(texts(tmp_path / notebook.name))
    if notebook.stem == "first_steps":
        assert "step 53: the power is gone" in printed
        assert "resumed at step 50" in printed
        assert printed.endswith("True")  # the same bits as never interrupted
    else:
        assert "(300, 8)" in printed
        assert "on 8 devices" in printed
        assert printed.count("epoch 10, step 80") == printed.count("epoch 40, step 320") == 1
