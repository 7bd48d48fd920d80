"""Options that several commands share, and options made from the fields of a run's config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import typer
import yaml
from pydantic.fields import FieldInfo

from geffect_fast.control_settings import ControlConfig
from geffect_fast.errors import InputError
from geffect_fast.evaluation_settings import EvaluateConfig
from geffect_fast.relearn_settings import RelearnConfig
from geffect_fast.setting_types import Option
from geffect_fast.settings import Machine, ProfileConfig, Reading, Settings, Sharding
from geffect_fast.storage.run_yaml import KINDS, read_values
from geffect_fast.unlearn_settings import UnlearnConfig


def option(*names: str, **more: Any) -> Any:
    """An option whose help shows no default, since its default means that it is not given."""
    return typer.Option(*names, show_default=False, **more)


def given_path(text: str | Path) -> Path:
    """A path from an option; an empty text, which would mean the working folder, is refused."""
    if text == "":
        raise typer.BadParameter("must not be empty; give a path, or . for the working folder")
    return Path(text)


Out = Annotated[
    Path, option("--out", "-o", help="Folder for the results; made if missing.", parser=given_path)
]
Overwrite = Annotated[bool, option("--overwrite", help="Replace the run that --out holds.")]
Resume = Annotated[
    bool, option("--resume", help="Go on with the run in --out; no other option is needed.")
]
Quiet = Annotated[bool, option("--quiet", "-q", help="No progress bars, tables or findings.")]
Run = Annotated[
    Path,
    typer.Argument(help="A run folder, or a results.nc.", show_default=False, parser=given_path),
]
ConfigFile = Annotated[
    Path | None,
    option(
        "--config", "-c", help="YAML file of fields; options given override it.", parser=given_path
    ),
]

_RECORDED = ("command", "rows")
"""Fields that no option sets."""


class Declared(NamedTuple):
    """A config field that an option sets, with the heading under which help shows the option."""

    field: FieldInfo
    panel: str


def _fields(kind: type[Settings], *without: str) -> dict[str, Declared]:
    """The fields of a config that options set, by name, but those in `without`."""
    return {
        name: Declared(field, kind.panel_of(name))
        for name, field in kind.model_fields.items()
        if name not in (*_RECORDED, *without)
    }


PROFILE_FIELDS = _fields(ProfileConfig)
SWEEP_FIELDS = _fields(
    ProfileConfig,
    *("checkpoints", "metric", "optimizer_state", "step_of", "second_order", "conflicts"),
)
UNLEARN_FIELDS = _fields(UnlearnConfig)
EVALUATE_FIELDS = _fields(EvaluateConfig)
CONTROL_FIELDS = _fields(ControlConfig)
RELEARN_FIELDS = _fields(RelearnConfig)
CHECK_FIELDS = {
    name: declared
    for name, declared in PROFILE_FIELDS.items()
    if name
    in {
        *Reading.model_fields,
        *Machine.model_fields,
        *Sharding.model_fields,
        *("objectives", "refusals", "reference", "tokenizer"),
    }
}


def option_of(name: str, declared: Declared) -> Any:
    """The annotation of the option that sets a field: its type, names and help."""
    field = declared.field
    how = next((each for each in field.metadata if isinstance(each, Option)), Option())
    dashed = f"--{name.replace('_', '-')}"
    kind = _type_of(field)
    if kind is bool and name != "trust_remote_code":
        dashed = f"{dashed}/--no-{dashed[2:]}"
    if how.repeatable or kind is dict:
        shown: Any = list[str]
    else:
        shown = kind if kind in (int, float, bool) else str
    choices = _choices(field)
    named = typer.Option(
        *(how.names or (dashed,)),
        metavar=how.metavar,
        help=(how.help or described(declared)) + _default_told(field),
        show_default=False,
        rich_help_panel=declared.panel,
        autocompletion=(lambda: choices) if choices else None,
    )
    return Annotated[shown | None, named]


def described(declared: Declared) -> str:
    """A field's docstring in the form that help shows."""
    return " ".join((declared.field.description or "").replace("`", "").split())


def _default_told(field: FieldInfo) -> str:
    """The sentence on a field's default in help; empty without one and for switches."""
    value = None if field.is_required() else field.get_default(call_default_factory=True)
    text = ",".join(value) if isinstance(value, tuple) else str(value or "")
    return f" Default: {text}." if text and value is not True else ""


def _choices(field: FieldInfo) -> list[str]:
    """The words that a field's type lists as its values; empty where the type lists none."""
    kinds = (field.annotation, *get_args(field.annotation))
    return [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def _type_of(field: FieldInfo) -> type:
    """The type of a field's option: `int`, `float`, `bool`, `tuple`, `dict`, or `str` otherwise."""
    kinds = [
        get_origin(each) or each
        for each in (get_args(field.annotation) or (field.annotation,))
        if each is not type(None)
    ]
    origin = get_origin(field.annotation)
    if origin in (tuple, dict):
        return origin
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) else str


def config_options(
    fields: Mapping[str, Declared],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options for config fields in the place of its parameter `given`.

    The command is called with `given`, the values of those fields whose option was used, by field.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_given(**values: Any) -> None:
            options = {field: values.pop(field) for field in fields}
            used = {field: value for field, value in options.items() if value is not None}
            command(given={f: _read(f, fields[f].field, v) for f, v in used.items()}, **values)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name != "given":
                parameters.append(parameter)
                continue
            parameters.extend(
                inspect.Parameter(
                    name, parameter.kind, default=None, annotation=option_of(name, declared)
                )
                for name, declared in fields.items()
            )
        with_given.__dict__["__signature__"] = inspect.Signature(parameters)
        with_given.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_given

    return decorate


def spread(words: Sequence[str], commands: Any) -> list[str]:
    """Repeat an option before each of its values: `--o a b` becomes `--o a --o b`.

    The parser takes one value for an option, so `--objectives ga wga` becomes `--objectives ga
    --objectives wga`. Only options that may be repeated are changed.

    Args:
        words: words of the command line, from the command's name on.
        commands: the parser's group of commands.
    """
    command = commands.commands.get(words[0]) if words else None
    if command is None:
        return list(words)
    repeatable = {name for p in command.params if getattr(p, "multiple", False) for name in p.opts}
    found: list[str] = []
    option, value = "", ""
    for i, word in enumerate(words):
        if word == "--":
            return [*found, *words[i:]]
        if word.startswith("-"):
            option, _, value = word.partition("=")
        elif value and option in repeatable:
            found.append(option)
        else:
            value = word
        found.append(word)
    return found


def begun_config(config: Path | None, out: Path, resume: bool) -> Path | None:
    """The config file to use: the one given, or, for a run to resume, the one in its folder."""
    from geffect_fast.paths import is_there, user_path
    from geffect_fast.storage.run_folder import CONFIG, NEXT

    if config is None and resume:
        for begun in (user_path(out) / NEXT / CONFIG, user_path(out) / CONFIG):
            if is_there(begun):
                return begun
    return config


def config_input(config: Path | None, resume: bool) -> dict[str, Path]:
    """The config file as an input of a run, by its option; empty where a run is resumed."""
    return {} if config is None or resume else {"--config": config}


def values_of(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config file, overridden by those of options.

    The file's record of its rows is left out where an option may choose other rows.
    """
    values = {} if config is None else read_values(config)
    if given.keys() & _DECIDE_ROWS:
        values.pop("rows", None)
    return values | given


_DECIDE_ROWS = {
    *(
        "model",
        "models",
        "run",
        "against_effects",
        "tokenizer",
        "forget",
        "retain",
        "holdout",
        "probes",
        "template",
    ),
    *("data_format", "max_length", "date", "original", "n_rows", "seed", "preset"),
}


def check_command(config: Path | None, held: Any, *commands: str) -> None:
    """Raise `InputError` where a config file belongs to a command that is not in `commands`."""
    if str(held) in KINDS and held not in commands:
        raise InputError(
            f"config {config} is of a run of {held}; use geffect-fast {held} --config {config}"
        )


def check_given(values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise `InputError` naming the first of some fields that has no value."""
    for name in names:
        if values.get(name) is None:
            raise InputError(f"--{name} is missing; give it, or a --config that holds it")


def option_names(given: Iterable[str], **names: str) -> dict[str, str]:
    """The option's name for each field, which is the field's own unless `names` has another."""
    names = {"probes": "--probe", "groups": "--group"} | names
    return {field: names.get(field, f"--{field.replace('_', '-')}") for field in given}


def _read(name: str, field: FieldInfo, value: Any) -> Any:
    """An option's value in the form that its field takes."""
    if name in _FIELD_EXAMPLES:
        pairs = _pairs(name, f"FIELD=VALUE, such as {_FIELD_EXAMPLES[name]}", value)
        return {key: _plain_value(text) for key, text in pairs.items()}
    if name in _PAIR_FORMS:
        return _pairs(*_PAIR_FORMS[name], value)
    if _type_of(field) is tuple and isinstance(value, str):
        return [item.strip() for item in value.split(",")]
    return value


_FIELD_EXAMPLES = {"trainer": "weight_decay=0.01", "relearn": "steps=20"}
"""An example of a value of each option that holds `FIELD=VALUE`."""

_PAIR_FORMS = {
    "probes": ("probe", "NAME=DATA, such as general=wiki.jsonl"),
    "groups": ("group", "NAME=BLOCKS, such as first=0-3"),
}
"""The option's name and the form of its values, for each field that is set by `NAME=VALUE`."""


def _pairs(what: str, form: str, texts: list[str]) -> dict[str, str]:
    """The values of a repeatable option `--what NAME=VALUE`, by name."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise InputError(f"--{what} {text!r} must be {form}")
        if name in pairs:
            raise InputError(
                f"--{what} {text!r}: there is a {what} {name!r} already; choose another"
            )
        pairs[name] = value
    return pairs


def _plain_value(text: str) -> Any:
    """The value of an option's text: a number, true, false, null, a list, or the text itself."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
