"""The notebooks run from top to bottom as they are shipped, with small sizes in their cell of parameters."""

from pathlib import Path

import jupytext
import nbclient
import pytest

COLAB = Path(__file__).parents[1] / "colab"
SMALL = {
    "1_feature_death": "gamma = 20.0\nsteps = 100\nn_tokens = 4000",
    "2_your_model": 'model_id = ""\nlayer = 2\nn_tokens = 2000\nn_features, k = 512, 8',
    "3_sweep_on_tpu": "gammas = (1, 20)\nseeds = (0,)\nsteps = 20\nn_tokens = 2000",
}
LONG = {name: pytest.mark.long for name in SMALL if name != "2_your_model"}


@pytest.mark.parametrize("name", list(SMALL))
def test_a_notebook_and_its_text_are_the_same(name):
    notebook, text = (jupytext.read(COLAB / f"{name}.{ending}") for ending in ("ipynb", "py"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in text.cells]
    assert "colab-badge.svg" in notebook.cells[0].source
    assert f"colab/{name}.ipynb" in notebook.cells[0].source
    first_code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first_code.metadata.tags == ["install"]
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.filterwarnings("ignore")  # Jupyter's own
@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG.get(name, ())) for name in SMALL])
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(COLAB.parent))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    notebook = jupytext.read(COLAB / f"{name}.py")
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = SMALL[name]
    done = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [o for c in done.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 1
