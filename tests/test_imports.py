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


def reading_order():
    """File names in the list of the package's docstring."""
    return re.findall(r"\w+", diffaugkit.__doc__.split(":", 1)[1])


def imports(path):
    """Yield (line, module of the package) of each import in a file, those in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            if node.module == "diffaugkit":
                for alias in node.names:
                    yield node.lineno, alias.name
            elif node.module.startswith("diffaugkit."):
                yield node.lineno, node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "diffaugkit":
                    yield node.lineno, [*alias.name.split("."), "__init__"][1]


def loaded_after(statement, names):
    """Names of those modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*[m for m in {names!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()


def seconds(module):
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


def test_every_file_is_in_the_list_once():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert sorted(reading_order()) == sorted(files)


@pytest.mark.parametrize("name", reading_order())
def test_a_file_imports_only_from_files_before_it(name):
    order = reading_order()
    above = order[: order.index(name)]
    wrong = [f"{name}.py:{line} imports {m}" for line, m in imports(PACKAGE / f"{name}.py")
             if m not in above]  # fmt: skip
    assert not wrong


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
