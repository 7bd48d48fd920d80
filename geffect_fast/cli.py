"""The command line: `geffect-fast profile | check | show | export | demo | env`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geffect_fast.errors import GEffectError, InputError
from geffect_fast.runs.config import ProfileConfig, make_config, read_values

if TYPE_CHECKING:
    import xarray as xr

EXIT_CODES = (
    "Exit codes: 0 all went well; 2 bad input, a full disk or too little memory, one line "
    "'error: ...' on stderr and nothing written; 3 check found a deviation; 1 unexpected failure; "
    "130 interrupted."
)
DEVIATION = 3
_INTERRUPTED = "interrupted; nothing half-written is left"

app = typer.Typer(
    name="geffect-fast",
    help="The G-effect of unlearning objectives on a language model, per layer and per instance.",
    epilog=EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; None: those of the process.
    """
    try:
        status = typer.main.get_command(app)(
            args=argv, prog_name="geffect-fast", standalone_mode=False
        )
        # the parser makes an exit code of Ctrl-C itself
        return _fail(_INTERRUPTED, 130) if status == 130 else int(status or 0)
    except GEffectError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_INTERRUPTED, 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the parser
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "geffect-fast"
            return _fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)
        import traceback

        traceback.print_exc()
        return _fail(f"unexpected {type(error).__name__}: {error}", 1)


def _fail(message: str, code: int) -> int:
    words = (word if len(word) <= 300 else f"{word[:297]}..." for word in message.split())
    print(f"error: {' '.join(words)}", file=sys.stderr)
    return code


def _option(*names: str, field: str | None = None, **more: Any) -> Any:
    """An option; one that sets a config field is described by the field's own docstring."""
    if field is not None:
        described = ProfileConfig.model_fields[field].description or ""
        more["help"] = " ".join(described.replace("`", "").split())
    return typer.Option(*names, show_default=False, **more)


_Out = Annotated[Path, _option("--out", "-o", help="Folder for the results; made if missing.")]
_Overwrite = Annotated[bool, _option("--overwrite", help="Replace the run that --out holds.")]
_Quiet = Annotated[bool, _option("--quiet", "-q", help="No progress bars, tables or findings.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, _option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from geffect_fast import __version__

        print(f"geffect-fast {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command(epilog=EXIT_CODES)
def profile(
    out: _Out,
    config: Annotated[
        Path | None,
        _option("--config", "-c", help="YAML file of fields; options given override it."),
    ] = None,
    model: Annotated[str | None, _option("--model", "-m", field="model")] = None,
    forget: Annotated[str | None, _option("--forget", "-f", field="forget")] = None,
    retain: Annotated[str | None, _option("--retain", "-r", field="retain")] = None,
    objectives: Annotated[
        str | None,
        _option(
            "--objectives",
            help="Objectives with commas between: 'ga,wga(alpha=1),npo(beta=0.1)+kl'.",
        ),
    ] = None,
    probe: Annotated[
        list[str] | None,
        _option(
            "--probe", metavar="NAME=DATA", help="A further risk on data of its own; repeatable."
        ),
    ] = None,
    refusals: Annotated[str | None, _option("--refusals", field="refusals")] = None,
    reference: Annotated[str | None, _option("--reference", field="reference")] = None,
    tokenizer: Annotated[str | None, _option("--tokenizer", field="tokenizer")] = None,
    reduction: Annotated[str | None, _option("--reduction", field="reduction")] = None,
    risk: Annotated[str | None, _option("--risk", field="risk")] = None,
    resolve: Annotated[str | None, _option("--resolve", field="resolve")] = None,
    engine: Annotated[str | None, _option("--engine", field="engine")] = None,
    norms: Annotated[bool | None, _option("--norms/--no-norms", field="norms")] = None,
    template: Annotated[str | None, _option("--template", field="template")] = None,
    max_length: Annotated[int | None, _option("--max-length", field="max_length")] = None,
    token_budget: Annotated[int | None, _option("--token-budget", field="token_budget")] = None,
    dtype: Annotated[
        str | None,
        _option("--dtype", field="dtype"),
    ] = None,
    device: Annotated[str | None, _option("--device", field="device")] = None,
    threads: Annotated[int | None, _option("--threads", field="threads")] = None,
    overwrite: _Overwrite = False,
    quiet: _Quiet = False,
) -> None:
    """Profile objectives on a model and data, and write a run folder.

    The folder holds results.nc (NetCDF; geffect_fast.open_run reads it), summary.csv, plots/ and
    run.yaml, which replays the run: geffect-fast profile --config run/run.yaml --out NEW.
    """
    options = {
        "model": model,
        "forget": forget,
        "retain": retain,
        "objectives": objectives,
        "probes": _probes(probe) if probe else None,
        "refusals": refusals,
        "reference": reference,
        "tokenizer": tokenizer,
        "reduction": reduction,
        "risk": risk,
        "resolve": None if resolve is None else [r.strip() for r in resolve.split(",")],
        "engine": engine,
        "norms": norms,
        "template": template,
        "max_length": max_length,
        "token_budget": token_budget,
        "dtype": dtype,
        "device": device,
        "threads": threads,
    }
    given = {name: value for name, value in options.items() if value is not None}
    values = given if config is None else read_values(config) | given
    for name in ("model", "forget", "retain", "objectives"):
        if values.get(name) is None:
            raise InputError(f"--{name} is missing; give it, or a --config that holds it")
    checked = make_config(values, str(config or ""), _named(given, probes="--probe"))

    from geffect_fast.report import write_report
    from geffect_fast.runs.execute import execute

    dataset = execute(checked, out, overwrite=overwrite, progress=not quiet, report=write_report)
    if not quiet:
        _print_result(dataset, out)


@app.command(epilog=EXIT_CODES)
def check(
    model: Annotated[str, _option("--model", "-m", field="model")],
    data: Annotated[str, _option("--data", "-d", field="forget")],
    samples: Annotated[int, typer.Option(help="Rows of the data, the first ones.", min=1)] = 4,
    objectives: Annotated[
        str, typer.Option("--objectives", "--objective", help="Objectives with commas between.")
    ] = "ga",
    refusals: Annotated[str | None, _option("--refusals", field="refusals")] = None,
    reference: Annotated[str | None, _option("--reference", field="reference")] = None,
    tokenizer: Annotated[str | None, _option("--tokenizer", field="tokenizer")] = None,
    template: Annotated[str | None, _option("--template", field="template")] = None,
    max_length: Annotated[int | None, _option("--max-length", field="max_length")] = None,
    token_budget: Annotated[int | None, _option("--token-budget", field="token_budget")] = None,
    dtype: Annotated[str | None, _option("--dtype", field="dtype")] = None,
    device: Annotated[str | None, _option("--device", field="device")] = None,
    threads: Annotated[int | None, _option("--threads", field="threads")] = None,
    quiet: Annotated[bool, _option("--quiet", "-q", help="The verdict alone.")] = False,
) -> None:
    """Compare every parameter's effects, norms and inner products with plain autograd.

    On a few samples of your own data, one at a time: 18 backward passes for 4 of them and one
    objective. Prints the largest error by kind of layer, what is covered, and a verdict.
    """
    options = {
        "model": model,
        "forget": data,
        "retain": data,
        "objectives": objectives,
        "refusals": refusals,
        "reference": reference,
        "tokenizer": tokenizer,
        "template": template,
        "max_length": max_length,
        "token_budget": token_budget,
        "dtype": dtype,
        "device": device,
        "threads": threads,
    }
    given = {name: value for name, value in options.items() if value is not None}
    config = make_config(given, options=_named(given, forget="--data"))

    from geffect_fast.report.check_table import render_check, verdict
    from geffect_fast.runs.execute import execute_check

    found = execute_check(config, samples, progress=not quiet)
    if quiet:
        print(verdict(found))
    else:
        _console().print(render_check(found))
    if not found.exact:
        raise typer.Exit(DEVIATION)


@app.command(epilog=EXIT_CODES)
def show(
    run: Annotated[Path, typer.Argument(help="A run folder, or a results.nc.", show_default=False)],
) -> None:
    """Print the tables and findings of a run again."""
    from geffect_fast.runs.store import open_run, reading

    with open_run(run, lazy=True) as dataset, reading(run):
        _print_result(dataset, run)


@app.command(epilog=EXIT_CODES)
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or a results.nc.", show_default=False)],
    to: Annotated[Path, _option("--to", help="File to write; ends in .csv or .parquet.")],
) -> None:
    """Write a run as one long table, a row a G-effect: objective, risk, parameter, sample."""
    from geffect_fast.runs.store import export as write_table
    from geffect_fast.runs.store import open_run

    with open_run(run, lazy=True) as dataset:
        print(write_table(dataset, to))


@app.command(epilog=EXIT_CODES)
def demo(
    out: _Out = Path("demo-run"),
    seed: Annotated[int, typer.Option(help="Decides data, model and order.", min=0)] = 0,
    overwrite: _Overwrite = False,
    quiet: _Quiet = False,
) -> None:
    """Train a small Llama on invented authors until it knows them by heart, then profile it.

    Needs no network and a few minutes on two cores; --out (demo-run) gets data, models and the run.
    """
    from geffect_fast.demo import run_demo

    dataset = run_demo(out, seed=seed, overwrite=overwrite, progress=not quiet)
    if not quiet:
        _print_result(dataset, out)


@app.command(epilog=EXIT_CODES)
def env() -> None:
    """Print versions, devices, threads, and which provider serves each op and why."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from geffect_fast import __version__
    from geffect_fast.ops.backend import build_info, providers

    print(f"geffect-fast  {__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "transformers", "numpy", "xarray", "h5netcdf", "pyarrow", "datasets"):
        try:
            print(f"{name:<13} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<13} not installed")
    print(f"cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch")
    for i in range(torch.cuda.device_count()):
        print(f"cuda:{i}        {torch.cuda.get_device_name(i)}")
    if not torch.cuda.is_available():
        print("cuda          none")
    info = build_info()
    for key, value in info.items():
        print(f"build         {key}: {value}")
    if not info:
        print("build         no native build")
    print()
    rows = [("op", "device", "provider", "why"), *map(tuple, providers())]
    width = max(len(op) for op, *_ in rows)
    for op, device, provider, why in rows:
        print(f"{op:<{width}} {device:<7} {provider:<10} {why}")


def _named(given: dict[str, Any], **names: str) -> dict[str, str]:
    """What the options behind config fields are called."""
    return {field: names.get(field, f"--{field.replace('_', '-')}") for field in given}


def _probes(texts: list[str]) -> dict[str, str]:
    probes: dict[str, str] = {}
    for text in texts:
        name, equals, source = (part.strip() for part in text.partition("="))
        if not (name and equals and source):
            raise InputError(f"--probe {text!r} must be NAME=DATA, such as general=wiki.jsonl")
        if name in probes:
            raise InputError(f"--probe {text!r}: there is a probe {name!r} already; choose another")
        probes[name] = source
    return probes


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _print_result(dataset: xr.Dataset, folder: Path) -> None:
    """Tables, where the files are, and three sentences."""
    from geffect_fast.report.findings import findings
    from geffect_fast.report.table import render
    from geffect_fast.runs.dataset import sum_positions
    from geffect_fast.runs.store import PLOTS

    dataset = sum_positions(dataset)
    console = _console()
    console.print(render(dataset))
    plots = sorted((folder / PLOTS).glob("*.png")) if folder.is_dir() else []
    for path in [folder, *plots]:
        print(path)
    print()
    for sentence in findings(dataset):
        console.print(sentence, markup=False)


if __name__ == "__main__":
    sys.exit(main())
