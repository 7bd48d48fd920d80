"""Imports go one way, and the package itself needs torch and numpy only."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import geffect_fast

ROOT = Path(geffect_fast.__file__).parent

BASE = {"errors", "precision", "ranks", "registry", "trying", "transfer", "visible"}
"""The parts that every part may import."""
MODEL = {"ops", "capture", "data", "objectives", "engines"}
RUN = {"paths", "results", "settings", "evaluation_settings", "arguments", "storage"}
RUN |= {"unlearn_settings", "control_settings", "relearn_settings"}

LAYERS = {
    "visible": set(),
    "errors": {"visible"},
    "precision": set(),
    "ranks": {"errors"},
    "registry": {"errors"},
    "trying": {"errors"},
    "transfer": set(),
    "threads": set(),
    "terminal": BASE,
    "ops": BASE,
    "capture": BASE | {"ops"},
    "data": BASE,
    "objectives": BASE | {"data"},
    "engines": BASE | MODEL - {"engines"},
    "functional": BASE | {"ops", "capture"},
    "paths": BASE,
    "optimizers": BASE | {"ops", "paths", "capture"},
    "updates": BASE | {"ops", "capture", "data", "objectives", "optimizers"},
    "results": BASE | MODEL,
    "setting_types": BASE | {"data", "objectives", "paths", "results", "updates"},
    "settings": BASE | {"data", "objectives", "paths", "results", "setting_types", "updates"},
    "unlearn_settings": BASE | {"objectives", "settings", "setting_types"},
    "evaluation_settings": BASE | {"paths", "settings", "setting_types"},
    "control_settings": BASE | {"paths", "settings", "setting_types", "evaluation_settings"},
    "relearn_settings": BASE | {"settings", "setting_types", "evaluation_settings"},
    "arguments": BASE | {"settings"},
    "storage": BASE | {"data"} | RUN - {"storage"},
    "metrics": BASE | MODEL | RUN | {"functional"},
    "measure": BASE | MODEL | RUN | {"terminal", "functional", "metrics", "optimizers"},
    "steps": BASE | MODEL | RUN | {"terminal", "measure", "optimizers"},
    "training": BASE | MODEL | RUN | {"terminal", "measure", "metrics", "steps", "updates"},
    "report": BASE | RUN - {"settings", "arguments"} | {"terminal", "measure", "steps"},
    "integrations": BASE | {"capture", "data", "steps", "updates", "report"},
    "demo": BASE | RUN | {"data", "objectives", "terminal", "measure", "training", "report"},
    "cli": BASE
    | {"setting_types"}
    | RUN
    | {"objectives", "ops", "terminal", "measure", "steps"}
    | {"training", "metrics", "report", "demo"},
    "__main__": {"cli"},
}
"""The parts that each part may import. `batch`, the type that all engines share, lies in data."""

HEAVY = (
    *("transformers", "datasets", "matplotlib", "xarray", "pandas", "typer", "rich", "pydantic"),
    *("rouge_score", "sklearn"),
)


def imported(file):
    """Parts of the package that a file imports, at any depth."""
    parts = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [node.module]
            if node.module == "geffect_fast":
                names = [f"geffect_fast.{alias.name}" for alias in node.names]
        parts |= {n.split(".")[1] for n in names if n.startswith("geffect_fast.")}
    return parts


def files():
    return [f for f in sorted(ROOT.rglob("*.py")) if f != ROOT / "__init__.py"]


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_one_way(file):
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert part in LAYERS, f"{part} has no place in the order of parts"
    wrong = imported(file) - LAYERS[part] - {part, "__version__", "_C"}
    assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_the_order_has_no_circle():
    seen = set()
    for part, below in LAYERS.items():
        assert below <= seen
        seen.add(part)


def modules():
    """Files by the names of their modules."""
    dotted = (f.relative_to(ROOT.parent).with_suffix("").parts for f in files())
    return dict(zip((".".join(d).removesuffix(".__init__") for d in dotted), files(), strict=True))


def imports_of(file, known):
    """The modules of the package that a file imports anywhere, except for types alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        id(within)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for each in node.body
        for within in ast.walk(each)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in known else node.module


def test_no_module_imports_itself_by_a_detour():
    """Imports within functions count: a late import that breaks a circle is a circle."""
    known = modules()
    left = {
        name: {*imports_of(file, known)} & known.keys() - {name} for name, file in known.items()
    }
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    while unused := left.keys() - {need for needs in left.values() for need in needs}:
        for name in unused:
            del left[name]
    assert sorted(left) == []


def test_a_class_has_a_name_of_its_own():
    places = defaultdict(list)
    for file in files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(file.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


SMALL = {
    "cli/check.py": "a command",
    "cli/demo.py": "a command",
    "cli/env.py": "a command",
    "cli/objectives.py": "a command",
    "cli/relearn.py": "a command",
    "cli/export.py": "a command",
    "cli/show.py": "a command",
    "cli/sweep.py": "a command",
    "cli/signals.py": "of the process, before a command is known",
    "data/fewest_tokens.py": "a bound of its own",
}
"""Modules under 60 lines that one other module imports, and why they stand alone. `__init__` files
do not count."""


def test_a_small_module_is_used_by_several():
    importers = defaultdict(set)
    for file in files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importers[alias.name].add(file)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("geffect_fast"):
                for name in [node.module, *(f"{node.module}.{a.name}" for a in node.names)]:
                    importers[name].add(file)
    alone = set()
    for file in files():
        where = file.relative_to(ROOT)
        name = "geffect_fast." + ".".join(where.with_suffix("").parts).removesuffix(".__init__")
        lines = file.read_text(encoding="utf-8").count("\n")
        if file.stem != "__init__" and lines < 60 and len(importers[name] - {file}) == 1:
            alone.add(str(where))
    assert alone == SMALL.keys()


def test_an_option_is_declared_once():
    """The one place is a field of the settings, with the default."""
    from geffect_fast.settings import LiveMetrics, Measuring
    from geffect_fast.unlearn_settings import Training

    own = {*Measuring.model_fields, *Training.model_fields, *LiveMetrics.model_fields}
    found = {}
    for file in files():
        if file.relative_to(ROOT).parts[0] not in ("measure", "steps", "training"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                last = node.args.args[len(node.args.args) - len(node.args.defaults) :]
                pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                given = {a.arg for a in last} | {a.arg for a, d in pairs if d is not None}
                found |= (
                    {f"{file.relative_to(ROOT)}: {node.name}": given & own} if given & own else {}
                )
    assert found == {
        "measure/models.py: load_model": {"trust_remote_code"},  # off for all callers
        "measure/models.py: load_tokenizer": {"trust_remote_code"},
        # A live optimizer instead of its name; off for all callers.
        "measure/profile.py: profile": {"optimizer", "second_order"},
        "measure/profiler.py: measure": {"second_order"},
        "steps/probe.py: __init__": {"second_order"},
        "steps/probe.py: measure_at": {"optimizer"},
    }


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def package():
    """The processor time of importing the package in seconds, and the modules loaded then."""
    code = "import sys, geffect_fast, time; print(time.process_time(), *sys.modules)"
    seconds, *modules = python(code)
    return float(seconds), modules


@pytest.fixture(scope="module")
def loaded_package():
    return package()


def test_the_package_imports_neither_transformers_nor_other_heavy_things(loaded_package):
    loaded = {name.split(".")[0] for name in loaded_package[1]}
    assert "geffect_fast" in loaded and not loaded & set(HEAVY)


def test_asking_for_help_imports_no_model_code():
    code = (
        "import sys; from geffect_fast.cli import main; main(['profile', '--help'])\n"
        "print('MODULES', *sys.modules)"
    )
    printed = python(code)
    loaded = {name.split(".")[0] for name in printed[printed.index("MODULES") :]}
    assert "typer" in loaded
    assert not loaded & {"transformers", "xarray", "pandas", "matplotlib", "datasets"}


def test_importing_takes_less_than_three_seconds_of_processor_time(loaded_package):
    assert loaded_package[0] < 3.0 or package()[0] < 3.0


def test_every_public_name_is_there():
    for name in geffect_fast.__all__:
        assert getattr(geffect_fast, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = geffect_fast.no_such_name
