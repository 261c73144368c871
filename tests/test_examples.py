"""The scripts of examples/ say what they need, and what is wrong, before any work."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from diffaugkit import datasets

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
# Of an import that the package alone does not bring.
EXTRA = {"matplotlib": "plots", "skimage": "images", "scanpy": "cells"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    script, tmp_path, monkeypatch, capsys
):
    def work(*args, **kwargs):
        raise AssertionError("data were loaded first")

    for loader in ("load_pbmc", "load_digits", "load_tissue_tiles"):
        monkeypatch.setattr(datasets, loader, work)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root
    monkeypatch.setattr(sys, "argv", [script.name, "--folder", str(tmp_path / "figures")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    assert "figures cannot be written to; name another --folder" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_docstring_names_the_extras_of_the_imports(script):
    code = script.read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    docstring = ast.get_docstring(ast.parse(code))
    assert len(imported & set(EXTRA)) > 0
    for module in imported & set(EXTRA):
        assert f"`{EXTRA[module]}`" in docstring, module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "written"),
    [
        ("detection", "--pretrain-epochs 1 --epochs 2", {"detection.png"}),
        ("slides", "--slides 4 --epochs 1 --mil-epochs 2", {"slides.png", "slide.geojson"}),
    ],
)
def test_quick_runs_write_what_the_docstring_says(
    name, options, written, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("skimage")
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    script = ROOT / f"examples/{name}.py"
    assert re.search(
        rf"python examples/{name}.py +# writes {' and '.join(sorted(written, reverse=True))}\n",
        ast.get_docstring(ast.parse(script.read_text())) + "\n",
    )
    monkeypatch.setattr(sys, "argv", [script.name, "--folder", str(tmp_path), *options.split()])
    runpy.run_path(str(script), run_name="__main__")
    plt.close("all")
    assert {path.name for path in tmp_path.iterdir()} == written
    assert plt.imread(tmp_path / f"{name}.png")[..., :3].std() > 0.05
    for path in tmp_path.glob("*.geojson"):
        assert len(json.loads(path.read_text())["features"]) > 10
    assert "all of it in" in capsys.readouterr().out
