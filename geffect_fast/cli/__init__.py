"""The command line: `geffect-fast COMMAND`, with every command in a module of its name."""

from __future__ import annotations

import errno
import functools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

from geffect_fast.cli import (
    check,
    compare,
    control,
    demo,
    env,
    evaluate,
    export,
    objectives,
    profile,
    relearn,
    report,
    show,
    sweep,
    tokens,
    unlearn,
    weights,
)
from geffect_fast.cli.launched import is_first, let_first_speak, on_launched_ranks
from geffect_fast.cli.options import option, spread
from geffect_fast.cli.signals import ended_by_signals
from geffect_fast.cli.streams import OutputLost, watched_streams
from geffect_fast.errors import GEffectError, GEffectWarning
from geffect_fast.terminal import clean_output

EXIT_CODES = (
    "Exit codes: 0 all went well; 2 bad input, a full disk or too little memory, one line "
    "'error: ...' on stderr and nothing written; 3 check found a deviation, or a run of several "
    "steps stopped and kept those it had written, or a plot or page could not be made; 1 "
    "unexpected failure; 130 interrupted, 143 by "
    "SIGTERM, 129 by SIGHUP; 141 the output's reader has gone."
)
COMMANDS = (
    profile.profile,
    sweep.sweep,
    unlearn.unlearn,
    check.check,
    compare.compare,
    evaluate.evaluate,
    control.control,
    relearn.relearn,
    show.show,
    report.report,
    tokens.tokens,
    weights.weights,
    export.export,
    objectives.objectives,
    demo.demo,
    env.env,
)
_INTERRUPTED = "interrupted; nothing half-written is left"

app = typer.Typer(
    name="geffect-fast",
    help="The G-effect of unlearning objectives on a language model, per layer and per instance.",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in COMMANDS:
    app.command(epilog=EXIT_CODES)(_command)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from geffect_fast import __version__

        print(f"geffect-fast {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@ended_by_signals
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; None for those of the process.
    """
    try:
        # Rich writes to the stream that a clean one wraps, which must therefore be a watched one.
        with watched_streams(), clean_output():
            return _run(argv)
    except OutputLost as lost:
        if lost.error.errno == errno.EPIPE:
            return 141  # the code of a program that SIGPIPE ends, also without a message
        with suppress(OSError):  # where stderr is lost too
            _fail(f"what is printed cannot be written: {lost.error.strerror}; free some space", 2)
        return 2


@functools.cache
def _parser() -> Any:
    """The parser's group of commands, cached since reading all their options takes 20 ms."""
    return typer.main.get_command(app)


def _run(argv: list[str] | None) -> int:
    try:
        with _told_in_a_line():
            commands = _parser()
            words = spread(sys.argv[1:] if argv is None else argv, commands)
            with on_launched_ranks(words):
                status = commands(args=words, prog_name="geffect-fast", standalone_mode=False)
        # The parser turns Ctrl-C into an exit code itself.
        return _fail(_INTERRUPTED, 130) if status == 130 else int(status or 0)
    except GEffectError as error:
        if error.told and not is_first():
            let_first_speak()
            return error.exit_code
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_INTERRUPTED, 130) if is_first() else 130
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the parser
            if not is_first():
                let_first_speak()
                return 2
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "geffect-fast"
            return _fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)
        import traceback

        traceback.print_exc()
        return _fail(f"unexpected {type(error).__name__}: {error}", 1)


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """Show this package's warnings as `warning: ...` on stderr; leave other warnings unchanged."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(message: Warning | str, category: type[Warning], *more: Any) -> None:
            if issubclass(category, GEffectWarning):
                print(f"warning: {message}", file=sys.stderr)
            else:
                show(message, category, *more)

        warnings.showwarning = shown  # type: ignore[assignment]
        yield


def _fail(message: str, code: int) -> int:
    words = (word if len(word) <= 300 else f"{word[:297]}..." for word in message.split())
    print(f"error: {' '.join(words)}", file=sys.stderr)
    return code
