"""The README and the pages of docs/ say what is true: their Python blocks run as printed."""

import re
from pathlib import Path

import anndata
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    """Code of each Python block, on the lines that it has in the page."""
    text = page.read_text()
    return ["\n" * text.count("\n", 0, m.start(1)) + m[1] for m in PYTHON.finditer(text)]


@pytest.fixture
def reader(tmp_path, monkeypatch, counts):
    """A folder with the cells that the pages speak of, and fits of two epochs for the default."""
    matrix, labels = counts
    adata = anndata.AnnData(matrix.copy())
    adata.obs["cell_type"] = np.array(["B", "NK", "T"])[labels]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def epochs(max_epochs, *args, **kwargs):
        return 2 if max_epochs == "auto" else max_epochs

    # The pages show defaults, whose hundreds of epochs are the one thing that is not run here.
    for module in ("encoder", "embedding_diffusion", "diffaug_em"):
        monkeypatch.setattr(f"diffaugkit.{module}.auto_epochs", epochs)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_python_blocks_run(page, reader):
    namespace = {"__name__": page.stem}
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), namespace)


def test_readme_example_is_ten_lines():
    (code,) = blocks(ROOT / "README.md")
    assert len([line for line in code.splitlines() if line.strip()]) == 10


def test_readme_has_the_two_commands_that_set_everything_up():
    commands = re.findall(r"^```bash\n(.*?)^```$", PAGES[0].read_text(), re.DOTALL | re.MULTILINE)
    assert [command.count("\n") for command in commands] == [1, 1]
    assert commands[0].endswith("examples/quickstart.py\n")
    assert commands[1].endswith("-m pytest -n auto\n")  # .ci/run finds the line by this


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_benchmark_scripts_that_the_page_names_exist():
    text = (ROOT / "docs/benchmarks.md").read_text()
    for script in re.findall(r"python (examples/\S+\.py)", text):
        assert (ROOT / script).exists(), script
