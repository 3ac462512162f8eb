"""The notebooks run from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not NOTEBOOKS.exists(), reason="the notebooks are not here")]


@pytest.mark.parametrize(("name", "said"), [("quickstart", "CGH: 9"), ("own_backbone", "by 10 neighbours")])
def test_from_top_to_bottom(name: str, said: str, tmp_path: Path) -> None:
    for package in ("ipykernel", "kornia", "matplotlib", "sklearn"):
        pytest.importorskip(package)
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert said in "".join(output.get("text", "") for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert pictures, "a picture is shown without being asked for"
