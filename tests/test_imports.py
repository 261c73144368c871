"""The order of the files, and what importing them costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffaugkit

PACKAGE = Path(diffaugkit.__file__).parent
HEAVY = "accelerate anndata diffusers matplotlib pandas pynndescent scanpy timm torch".split()
OPTIONAL = [name for name in HEAVY if name not in ("pandas", "torch")]


FOLDERS = [PACKAGE, *(path.parent for path in PACKAGE.glob("*/__init__.py"))]


def reading_order(folder=PACKAGE):
    """File names in the list of the docstring of a package."""
    document = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    return re.findall(r"\w+", document.rsplit(":", 1)[1])


def imports(path):
    """Yield (line, names below diffaugkit) of each import in a file, those in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            if node.module == "diffaugkit":
                yield from ((node.lineno, [alias.name]) for alias in node.names)
            elif node.module.startswith("diffaugkit."):
                yield node.lineno, node.module.split(".")[1:]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "diffaugkit":
                    yield node.lineno, alias.name.split(".")[1:] or ["__init__"]


def loaded_after(statement, names):
    """Names of those modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*[m for m in {names!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()


def seconds(module):
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_file_is_in_the_list_once(folder):
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    files |= {path.parent.name for path in folder.glob("*/__init__.py")}
    assert sorted(reading_order(folder)) == sorted(files)


@pytest.mark.parametrize(
    ("folder", "name"), [(f, name) for f in FOLDERS for name in reading_order(f)], ids=str
)
def test_a_file_imports_only_from_files_before_it(folder, name):
    order, top = reading_order(folder), reading_order()
    above = order[: order.index(name)]
    files = [folder / f"{name}.py"]
    if folder == PACKAGE and not files[0].exists():
        files = sorted((folder / name).glob("*.py"))
    for path in files:
        for line, names in imports(path):
            home, *rest = names
            if folder == PACKAGE:
                allowed = home in above or home == path.parent.name == name
            elif home == folder.name:
                allowed = not rest or rest[0] in above
            else:
                allowed = home in top[: top.index(folder.name)]
            assert allowed, f"{path.name}:{line} imports {'.'.join(names)}"


def test_the_package_imports_nothing_heavy():
    assert loaded_after("import diffaugkit", HEAVY) == []


@pytest.mark.parametrize("name", ["metrics", "plotting", "preprocessing", "data"])
def test_files_without_networks_do_without_torch(name):
    # pandas is not asked for here: scikit-learn's own imports may bring it along.
    assert loaded_after(f"import diffaugkit.{name}", [*OPTIONAL, "torch"]) == []


@pytest.mark.parametrize("name", ["encoder", "embedding_diffusion", "diffaug_em"])
def test_estimators_wait_for_what_only_fit_needs(name):
    assert loaded_after(f"import diffaugkit.{name}", OPTIONAL) == []


def test_importing_costs_at_most_a_third_more_than_scikit_learn():
    # The best of several: whatever else the machine does only makes a run slower.
    pairs = [(seconds("diffaugkit"), seconds("sklearn")) for _ in range(5)]
    ours, theirs = (min(times) for times in zip(*pairs, strict=True))
    assert ours <= theirs * 4 / 3


@pytest.mark.parametrize("name", diffaugkit.__all__)
def test_public_names_are_there(name):
    assert getattr(diffaugkit, name) is not None
    assert name in dir(diffaugkit)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'DiffAugEN'"):
        _ = diffaugkit.DiffAugEN


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
