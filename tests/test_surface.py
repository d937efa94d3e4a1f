"""The outside of the package: what imports what, how light the import is, and that the README is true."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trainer
from trainer.fit.live import Live
from trainer.fit.setup import Setup

ROOT = Path(__file__).parent.parent

PURE = {"types", "errors", "batches", "core", "state", "steps"}

# What each file of the top folder, and each package, may import of the others.
LOOP = PURE | {"compile", "data", "metrics", "run", "sharding"}
EVERYONE = LOOP | {"callbacks", "checkpoints", "config", "distributed", "loggers", "loop", "paths"}
ARROWS = {
    "types": set(),
    "errors": set(),
    "paths": set(),
    "batches": {"core", "errors", "types"},
    "core": {"batches", "errors", "state", "types"},  # the objective is called with a state
    "state": {"core", "errors", "types"},
    "steps": PURE,
    "features": PURE | {"compile", "metrics"},
    "config": {"core", "errors", "paths"},
    "metrics": PURE | {"paths"},
    "data": PURE,
    "distributed": PURE,
    "sharding": PURE | {"data"},
    "run": PURE | {"data", "metrics"},
    "compile": PURE | {"run", "sharding"},
    "checkpoints": PURE | {"data", "distributed", "metrics", "paths", "run", "sharding"},
    "loggers": PURE | {"metrics", "paths"},
    "callbacks": PURE | {"checkpoints", "distributed", "loggers", "paths"},
    "extensions": PURE | {"callbacks", "config"},
    "loop": LOOP,
    "fit": EVERYONE | {"features", "api"},  # the latter for the type of the trainer only
    "api": EVERYONE | {"fit"},
    "commands": EVERYONE | {"api", "fit", "__init__"},
    "__main__": {"commands"},
}


def imports_of(path):
    """Names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def files_of(name):
    """The files of a package, or the one of a module in the top folder."""
    package = ROOT / "trainer" / name
    return sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]


@pytest.mark.parametrize("name", sorted(ARROWS))
def test_packages_import_downwards_only(name):
    imported = {module for path in files_of(name) for module in imports_of(path)}
    own = {module.split(".")[1] for module in imported if module.startswith("trainer.")}
    assert own - {name} <= ARROWS[name]


def test_every_package_has_its_arrows():
    entries = {path.stem for path in (ROOT / "trainer").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert entries - {"__pycache__"} == set(ARROWS) | {"__init__"}


def test_tests_mirror_the_packages():
    packages = {path.parent.name for path in (ROOT / "trainer").glob("*/__init__.py")}
    tested = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert tested == packages | {"third_party"}


@pytest.mark.parametrize("name", sorted(PURE))
def test_the_core_touches_no_files_clocks_or_loggers(name):
    allowed = {"__future__", "jax", "flax", "optax", "chex", "numpy", "trainer"}
    allowed |= {"collections", "copy", "dataclasses", "difflib", "functools", "hashlib", "inspect", "operator"}
    allowed |= {"contextlib", "math", "re", "reprlib", "types", "typing", "weakref", "zlib"}
    # Of code and values in `core/fingerprint.py`.
    allowed |= {"argparse", "dis", "enum", "sys"} if name == "core" else set()
    # For types and numbers only; and to warn at the caller's line.
    allowed |= {"pathlib", "signal", "warnings"} if name == "errors" else set()
    allowed |= {"atexit", "concurrent", "threading"} if name == "core" else set()  # core/private_api.py wraps them
    assert {module.split(".")[0] for path in files_of(name) for module in imports_of(path)} <= allowed


def assigned_attributes(function):
    """Names of the attributes of ``self`` that a function assigns, in whatever spelling; of ``self.a.b`` it is a."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            root, name = node.value, node.attr
            while isinstance(root, ast.Attribute):
                root, name = root.value, root.attr
            if isinstance(root, ast.Name) and root.id == "self":
                yield name
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("setattr", "__setattr__", "delattr", "__delattr__"):
                yield called
        elif isinstance(node, ast.Attribute) and node.attr == "__dict__":
            yield "__dict__"


def class_tree(cls):
    """The syntax tree of a class, whose lines count from its first."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    return tree


def test_a_trainer_assigns_one_attribute_at_one_place():
    trees = {cls: class_tree(cls) for cls in trainer.Trainer.__mro__ if cls is not object}
    assert [cls.__name__ for cls in trees] == ["Trainer", "Inspection", "ReadOnly"]
    methods = [
        (cls.__name__, node)
        for cls, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (cls.__name__, node.name) != ("Trainer", "__init__")
    ]
    assigned = [(cls, method.name, name) for cls, method in methods for name in assigned_attributes(method)]
    assert assigned == [("Trainer", "hold", "run")]
    assert trees[trainer.Trainer].end_lineno <= 350


@pytest.mark.parametrize(
    "statement",
    [
        "self.x = 1",
        "self.x, y = 1, 2",
        "[y, *self.x] = 1, 2",
        "self.x += 1",
        "self.x: int = 1",
        "self.x.y = 1",
        "self.x.y.z += 1",
        "for self.x in (1, 2): pass",
        "with open('f') as self.x: pass",
        "del self.x",
        "setattr(self, 'x', 1)",
        "object.__setattr__(self, 'x', 1)",
        "self.__dict__['x'] = 1",
    ],
)
def test_every_spelling_of_an_assignment_counts(statement):
    assert list(assigned_attributes(ast.parse(f"def method(self):\n    {statement}")))


def assigned_through(tree, roots=("trainer", "setup", "live")):
    """Dotted names that a file assigns, deletes or sets by `setattr` and that begin at a trainer or its parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            name = ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            *("setattr", "__setattr__", "delattr", "__delattr__"),
        ):
            name = f"{ast.unparse(node.args[0])}.{getattr(node.args[1], 'value', '?')}" if len(node.args) > 1 else "?"
        else:
            continue
        if name.split(".")[0] in roots or name.startswith("self.setup."):
            yield name


def test_of_a_trainers_parts_only_the_fields_of_live_are_assigned():
    found = {
        (path.relative_to(ROOT / "trainer").as_posix(), name)
        for path in (ROOT / "trainer").rglob("*.py")
        for name in assigned_through(ast.parse(path.read_text(encoding="utf-8")))
    }
    others = {(path, name) for path, name in found if "live" not in name.split(".")}
    # The property that makes a new run of another state.
    assert others == {("callbacks/early_stopping.py", "trainer.state"), ("callbacks/plateau.py", "trainer.state")}
    fields = {field.name for field in dataclasses.fields(Live)}
    assert {name.rpartition(".")[::2] for _, name in found - others} <= {
        (owner, field) for owner in ("live", "setup.live", "trainer.setup.live") for field in fields
    }
    assert {path.split("/")[0] for path, _ in found - others} == {"fit"}


def test_of_the_classes_in_fit_those_that_setup_names_change_themselves():
    changing = {
        node.name
        for path in files_of("fit")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name != "__init__" and list(assigned_attributes(method))
    }
    named = {type_of for name, type_of in Setup.__annotations__.items() if f"``{name}``" in Setup.__doc__}
    assert changing == {one.__name__ for one in named if one.__module__.startswith("trainer.fit.")} - {"Live"}


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("trainer.setup.step = 1", "trainer.setup.step"),
        ("setup.live.planned, y = 1, 2", "setup.live.planned"),
        ("del setup.step", "setup.step"),
        ("self.setup.step += 1", "self.setup.step"),
        ("object.__setattr__(setup, 'step', 1)", "setup.step"),
        ("setattr(trainer.setup, name, 1)", "trainer.setup.?"),
    ],
)
def test_every_spelling_of_an_assignment_to_the_parts_of_a_trainer_counts(statement, name):
    assert list(assigned_through(ast.parse(statement))) == [name]


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "trainer").rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > 450} == {}


def test_the_ledger_is_in_reading_order():
    lines = (ROOT / "trainer" / "__init__.py").read_text(encoding="utf-8").splitlines()
    first = [line.split() for line in lines if line.startswith("from trainer")][1:]
    when_used = [line.split() for line in lines if line.startswith("    from trainer")]
    assert [key.split(".")[1] for key, _ in itertools.groupby(line[1] for line in first)][:5] == [
        *("state", "steps", "run", "loop", "api"),
    ]
    for imports in (first, when_used):
        packages = [key for key, _ in itertools.groupby(line[1].split(".")[1] for line in imports)]
        assert len(packages) == len(set(packages))  # what belongs together stands together
    assert all(getattr(trainer, line[-1]).__module__ == line[1] for line in first + when_used)


@pytest.mark.parametrize("package", ["trainer", "trainer.callbacks", "trainer.loggers"])
def test_names_imported_when_used_are_those_that_type_checkers_see(package):
    source = Path(importlib.import_module(package).__file__).read_text(encoding="utf-8")
    seen = re.findall(r"^    from (\S+) import (\S+) as \2$", source, re.MULTILINE)
    (table,) = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict)]
    assert [(home, name) for home, names in ast.literal_eval(table).items() for name in names] == seen
    names = {name for _, name in seen}
    code = f"import {package} as p; print({names} & {{*vars(p)}}, {names} <= {{*dir(p)}}); "
    code += f"from {package} import *; print({names} <= {{*globals()}}, {{*p.__all__}} <= {{*globals()}})"
    assert fresh_python(code).split("\n") == ["set() True", "True True"]


def test_a_name_that_is_not_there_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'Trianer'"):
        _ = trainer.Trianer
    with pytest.raises(ImportError, match="Trianer"):
        exec("from trainer import Trianer")


def fresh_python(code):
    """Runs code in another interpreter, which keeps the bytecode of modules as installed packages do."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    return done.stdout.strip()


BASE = "import jax, flax.nnx, optax"
HEAVY = {
    "PIL",
    "datarax",
    "grain",
    "matplotlib",
    "mlflow",
    "orbax",
    "pandas",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "wandb",
}


def loaded_beyond_base(statement):
    code = f"{BASE}; import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    return {module.split(".")[0] for module in fresh_python(code).split()}


def import_seconds(statement):
    return float(
        fresh_python(f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)")
    )


def import_ratio(statement, repeats=5):
    """The processor time of a statement over that of the imports that it builds on, each at its least."""
    fresh_python(statement)  # compiles what is not compiled yet
    alone, beside = [], []
    for _ in range(repeats):
        alone.append(import_seconds(statement))
        beside.append(import_seconds(BASE))
    return min(alone) / min(beside)


class TestLightImport:
    def test_nothing_heavy_is_loaded(self):
        assert not loaded_beyond_base("import trainer") & HEAVY

    @pytest.mark.slow
    def test_the_check_would_notice(self):
        assert "grain" in loaded_beyond_base("import trainer, datarax.sources") & HEAVY

    @pytest.mark.slow
    def test_it_takes_little_longer_than_what_it_builds_on(self):
        assert import_ratio("import trainer") <= 1.2

    @pytest.mark.slow
    def test_that_check_would_notice_too(self):
        assert import_ratio("import trainer, matplotlib.pyplot, sklearn.linear_model", repeats=3) > 1.2

    def test_in_memory_data_needs_no_tensorflow(self):
        code = "import trainer, numpy, sys; trainer.InMemoryData({'x': numpy.ones(3)}, 2).source; print(*sys.modules)"
        loaded = {module.split(".")[0] for module in fresh_python(code).split()}
        assert "datarax" in loaded
        assert not loaded & {"tensorflow", "tensorflow_datasets"}


@pytest.mark.slow
def test_the_snippets_of_the_readme_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 15
    names = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README snippet {number}", "exec"), names)
    assert names["metrics"]["loss"].shape == ()
    assert names["classes"].shape == (1000,)
    assert (tmp_path / "runs" / "job" / "curves.png").is_file()
    job = next(snippet for snippet in snippets if "CSVLogger" in snippet)
    assert len([line for line in job.splitlines() if line and "import" not in line]) <= 12
    assert names["result"]["accuracy"] > 0.9
    assert "did you mean 'learning_rate'?" in capsys.readouterr().out


@pytest.mark.slow
def test_the_digits_example_reaches_its_accuracy(tmp_path, capsys):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import digits

        result = digits.main(["--workdir", str(tmp_path)])
    finally:
        sys.path.remove(str(ROOT / "examples"))
    assert result["accuracy"] > 0.97
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "curves.png") in capsys.readouterr().out


def test_pins_are_names_and_versions_only():
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9.-]+==[\w.!+]+( ; .+)?", line) for line in lines)
    names = {line.split("==")[0] for line in lines}
    assert "datarax" in names
    assert not names & {"tensorflow", "tensorflow-datasets"}


# Packages whose name is not that of the module that they bring.
BRINGS = {"orbax-checkpoint": "orbax", "pillow": "PIL", "PyYAML": "yaml", "scikit-learn": "sklearn"}


def declared():
    """The modules that the dependencies bring, and those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    for lines in (project["dependencies"], [line for extra in extras for line in extra]):
        names = [re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in lines]
        yield {BRINGS.get(name, name) for name in names}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    modules = {module.split(".")[0] for path in (ROOT / "trainer").rglob("*.py") for module in imports_of(path)}
    imported = modules - set(sys.stdlib_module_names) - {"trainer"}
    runtime, extras = declared()
    assert imported - runtime - extras == set()
    assert runtime - imported == set()
    optional = {"PIL", "datarax", "flatbuffers", "matplotlib", "mlflow", "pandas", "safetensors", "sklearn"}
    optional |= {"tensorboardX", "wandb"}
    assert imported & (extras - runtime) == optional


def test_what_extras_bring_is_tested_in_a_version_that_they_allow():
    """By the pins of development and of the Makefile; of MLflow that is the part which logs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    words = [*map(str.strip, lines), *(ROOT / "Makefile").read_text(encoding="utf-8").split()]
    pins = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", "\n".join(words), re.MULTILINE):
        pins.setdefault(canonicalize_name(name.replace("mlflow-skinny", "mlflow")), []).append(version)
    extras = project["optional-dependencies"]
    assert {"grain", "torch", "datasets", "tensorboard", "wandb", "mlflow", "pandas", "plot"} <= set(extras)
    missing = [
        (extra, line)
        for extra, wanted in extras.items()
        if extra != "datarax"  # which asks for one release of jax, see README
        for line in wanted
        if not any(
            Requirement(line).specifier.contains(pin) for pin in pins.get(canonicalize_name(Requirement(line).name), [])
        )
    ]
    assert missing == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## Installation")[1]
    assert [extra for extra in extras if f"`{extra}`" not in readme and f"[{extra}]" not in readme] == []


def test_extras_load_when_they_are_used():
    """What only an extra brings is imported within a function."""
    runtime, _ = declared()
    for path in (ROOT / "trainer").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                modules = {name.split(".")[0] for name in names}
                assert modules <= runtime | set(sys.stdlib_module_names) | {"trainer"}, path


def private_names(tree):
    """Dotted names of other libraries that begin with an underscore somewhere, whether imported or looked up."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            modules |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {alias.asname or alias.name for alias in node.names} if "trainer" not in node.module else set()
        else:
            continue
        yield from (name for name in names if re.search(r"(^|\.)_(?!_)", name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.split(".")[0] in modules and re.fullmatch(r"[\w.]+", name) and re.search(r"\._(?!_)", name):
                yield name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1:
            owner, name = ast.unparse(node.args[0]), getattr(node.args[1], "value", "")
            if owner.split(".")[0] in modules and str(name).startswith("_"):
                yield f"{owner}.{name}"


def test_private_names_of_other_libraries_are_in_one_module():
    found = {
        (path.relative_to(ROOT / "trainer").as_posix(), name)
        for path in (ROOT / "trainer").rglob("*.py")
        for name in private_names(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == {
        ("core/private_api.py", "jax._src.distributed"),
        ("core/private_api.py", "threading._register_atexit"),
        ("distributed/start.py", "os._exit"),  # public, whatever its name
    }


@pytest.mark.parametrize(
    "statement",
    [
        "from jax._src import distributed",
        "import jax._src.core as core",
        "import jax\njax._src.core",
        "import threading\nthreading._register_atexit(f)",
        "import threading\ngetattr(threading, '_register_atexit', None)",
        "from orbax import checkpoint as ocp\nocp.handlers._private(1)",
        "from flax.nnx import _graph",
    ],
)
def test_every_spelling_of_a_private_name_counts(statement):
    assert list(private_names(ast.parse(statement)))
