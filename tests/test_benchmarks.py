"""The scripts of examples/benchmarks/: their commands, and that no row stands where it must not."""

import argparse
import importlib
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples/benchmarks"
PAGE = (ROOT / "docs/benchmarks.md").read_text().replace("\\\n", " ")
COMMANDS = sorted(set(re.findall(r"python examples/benchmarks/(\w+\.py[^`\n]*)", PAGE)))
QUICK = [p.stem for p in sorted(FOLDER.glob("[a-z]*.py")) if '"--quick"' in p.read_text()]


@pytest.fixture
def script(monkeypatch):
    """Import one of the scripts by its name, and forget it afterwards."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    before = {name: sys.modules.pop(name, None) for name in names}
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_are_accepted(command, script, monkeypatch):
    name, *given = shlex.split(command)
    main = script(name.removesuffix(".py")).main

    class Accepted(Exception):
        pass

    def parse(self, args=None, namespace=None, parse=argparse.ArgumentParser.parse_args):
        raise Accepted(parse(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [name, *given])
    with pytest.raises(Accepted):
        main()


@pytest.mark.parametrize("name", QUICK)
def test_smoke_tests_write_to_a_file_of_their_own(name, script, monkeypatch, tmp_path):
    module, seen = script(name), []
    monkeypatch.setattr(module, "run", lambda args, *more: seen.append(args.out))
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--out", str(tmp_path / "out.json")])
    module.main()
    assert seen
    assert Path(seen[0]).parent == tmp_path
    assert Path(seen[0]).name != "out.json"


def test_a_result_file_of_other_settings_is_refused(script, tmp_path):
    results = script("_common").Results(tmp_path / "out.json")
    results.settle("lung", epochs=40, widths=[8, 8])
    results.add("lung|0", {"knn": 1.0})
    results.settle("lung", epochs=40, widths=[8, 8])
    results.settle("cifar", epochs=15, widths=None)
    with pytest.raises(SystemExit, match=r"lung with epochs=40 and not 25: name another --out"):
        results.settle("lung", epochs=25, widths=[8, 8])
    assert results.read() == {"lung|0": {"knn": 1.0}}


def test_what_has_no_chance_in_it_is_embedded_once_and_judged_with_every_seed(
    script, monkeypatch, tmp_path
):
    cells, made = script("cells"), []

    def embed(matrix, seed, args):
        made.append(seed)
        return matrix

    for name, stochastic in (("PCA-20", False), ("UMAP-10", True)):
        peer = ("high-D", "sklearn", "matrix", stochastic, embed)
        monkeypatch.setitem(cells.PEERS, name, peer)
    monkeypatch.setattr(cells, "standard_matrix", lambda cells, kind: np.zeros((3, 2)))
    monkeypatch.setattr(cells, "load_cells", lambda name, quick: None)
    args = Namespace(
        methods=["PCA-20", "UMAP-10"],
        seeds=[0, 1],
        sets=["paul15"],
        cache=tmp_path,
        quick=False,
        scvi_epochs=None,
    )
    results = script("_common").Results(tmp_path / "out.json")
    found = []
    for key, inputs, method, kind, seed in cells.runs(args, results):
        inputs.peer(method, kind, seed)
        found.append(key)
    keys = {f"paul15|{m}|{k}|{s}" for m in args.methods for k in cells.MATRICES for s in (0, 1)}
    assert set(found) == keys
    # Both matrices of the one without chance once, of the other twice.
    assert sorted(made) == [0, 0, 0, 0, 1, 1]


def test_the_cache_keeps_embeddings_of_other_epochs_apart(script, monkeypatch, tmp_path):
    cells = script("cells")
    peer = ("high-D", "sklearn", "counts", True, lambda counts, seed, args: [args.scvi_epochs])
    monkeypatch.setitem(cells.PEERS, "scVI-10", peer)
    monkeypatch.setattr(cells, "load_cells", lambda name, quick: Namespace(counts=None))
    for epochs in (200, 400):
        args = Namespace(cache=tmp_path, quick=False, scvi_epochs=epochs)
        array, _ = cells.Inputs("paul15", args).peer("scVI-10", "counts", 0)
        assert array.tolist() == [epochs]


def test_leiden_of_fewer_seeds_than_others_says_so(script, capsys):
    clusters = script("clusters")
    scores = dict.fromkeys(clusters.MEASURES, 50.0)
    keys = ("PCA-20|log|0", "DiffAugEM|ours|0", "DiffAugEM|ours|1")
    clusters.tables({f"paul15|{key}": scores for key in keys}, ["paul15"])
    lines = capsys.readouterr().out.splitlines()
    assert "| PCA-20 | 50.0 ± 0.0 (1 of 2 seeds) | 50.0 |" in lines
    assert "| DiffAugEM | 50.0 ± 0.0 | 50.0 |" in lines


def test_a_segmentation_without_contours_does_not_count_as_a_distance(script, tmp_path, capsys):
    module = script("segmentation")

    class Nothing:
        def predict(self, images):
            return [np.zeros(image.shape[:2], np.uint8) for image in images]

    mask = np.zeros((32, 32), bool)
    mask[4:12, 4:12] = True
    record = module.scores(Nothing(), [np.zeros((32, 32, 3), np.uint8)], [mask])
    results = script("_common").Results(tmp_path / "out.json")
    results.add("small, 1/4|5|0|from scratch", record)
    results.add("small, 1/4|5|1|from scratch", record | {"hd95": 14.0})
    module.tables(results)
    assert "14.0 ± 0.0" in capsys.readouterr().out


def test_the_diffusion_of_the_nuclei_sees_no_tile_of_the_test(script):
    module = script("zero_shot_segmentation")
    (X, _), (X_test, _) = module.load_set("nuclei", None)
    seen = {tile.tobytes() for tile in module.unlabelled("nuclei", X)}
    assert {tile.tobytes() for tile in X} <= seen
    assert not {tile.tobytes() for tile in X_test} & seen


def test_few_labels_names_the_folds_that_it_lacks(script):
    base = dict.fromkeys("01234", 90.0)
    text = script("few_labels").against(base, {"0": {"trees": 92.0}}, "trees")
    assert text == "92.0 (+2.0, 1 of 5 folds)"


def test_gains_of_one_strategy_stand_in_its_column(script, tmp_path, capsys):
    module, results = script("rare_cells"), script("_common").Results(tmp_path / "out.json")
    scores = [f"{c}_{s}" for c in module.CLASSIFIERS for s in module.SCORES]
    for fold, gain in enumerate((1.0, 3.0)):
        key = f"paul15|aim 1.0|seed 0|fold {fold}"
        results.add(f"{key}|SMOTE", dict.fromkeys(scores, 80.0))
        results.add(f"{key}|interpolation", dict.fromkeys(scores, 80.0 + gain))
    module.tables(results)
    row = "| **against SMOTE, all folds** |  | 2 |  |  |  | - | +2.00 ± 1.00 |"
    assert row in capsys.readouterr().out.splitlines()


def test_all_labels_are_judged_by_a_run_that_stopped_before_them(script, monkeypatch, tmp_path):
    module = script("histodiffusion")

    class Judge:
        def __init__(self, *args):
            pass

        def fit(self, X, y):
            return self

        def transform(self, X):
            return X.reshape(len(X), -1)[:, :20]

        def predict(self, X):
            return np.zeros(len(X), int)

    rng = np.random.default_rng(0)
    X, y = rng.integers(256, size=(80, 4, 4, 3)).astype(np.uint8), np.arange(80) % 2
    monkeypatch.setattr(module, "Judge", Judge)
    monkeypatch.setattr(module, "load_tissue", lambda name, size: (X, y, np.arange(80) // 40))
    results = script("_common").Results(tmp_path / "out.json")
    results.add("lung->breast|0|real", {"accuracy": 0.5})
    numbers = ("size", "n_labels", "guidance_scale", "n_candidates", "sampling_steps", "steps")
    args = Namespace(
        targets=["breast"],
        seeds=[0],
        variants=[],
        pretraining_seed=None,
        quick=False,
        **dict.fromkeys((*numbers, "judges", "epochs"), 4),
    )
    module.run(args, results)
    assert results.read()["lung->breast|0|all labels"]["accuracy"] == 0.5
