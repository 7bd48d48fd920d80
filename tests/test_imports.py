"""Imports go one way, and the package itself needs torch and numpy only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import geffect_fast

ROOT = Path(geffect_fast.__file__).parent

LAYERS = {
    "visible": set(),
    "errors": {"visible"},
    "trying": set(),
    "threads": set(),
    "transfer": set(),
    "terminal": {"visible"},
    "ops": {"errors"},
    "capture": {"errors", "trying", "transfer", "ops"},
    "data": {"errors", "trying", "transfer"},
    "objectives": {"errors", "transfer", "data"},
    "engines": {"errors", "trying", "transfer", "ops", "capture", "data", "objectives"},
    "functional": {"errors", "ops", "capture"},
    "runs": {
        *{"errors", "trying", "transfer", "ops", "capture", "data", "objectives", "engines"},
        *{"functional", "terminal", "visible"},
    },
    "integrations": {"errors", "objectives", "runs"},
    "unlearning": {"errors", "data", "objectives", "engines", "runs", "integrations"},
    "weights": {"errors", "data", "runs"},
    "report": {"errors", "terminal", "visible", "runs"},
    "demo": {"errors", "data", "objectives", "runs", "unlearning", "report"},
    "cli": {
        "errors",
        "terminal",
        "visible",
        "ops",
        "runs",
        "unlearning",
        "weights",
        "report",
        "demo",
    },
}
"""What each part may import; `batch`, the type all engines share, lies in data."""

HEAVY = ("transformers", "datasets", "matplotlib", "xarray", "pandas", "typer", "rich", "pydantic")


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


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_package_imports_neither_transformers_nor_other_heavy_things():
    code = "import sys, geffect_fast; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in python(code)}
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


def test_importing_takes_less_than_three_seconds_of_processor_time():
    code = "import geffect_fast, time; print(time.process_time())"
    assert min(float(python(code)[0]) for _ in range(2)) < 3.0


def test_every_public_name_is_there():
    for name in geffect_fast.__all__:
        assert getattr(geffect_fast, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = geffect_fast.no_such_name
