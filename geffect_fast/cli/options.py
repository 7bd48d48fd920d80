"""Options that several commands share, and those that stand for the fields of a run's config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from geffect_fast.errors import InputError
from geffect_fast.settings import ProfileConfig, Training, UnlearnConfig
from geffect_fast.storage.run_yaml import read_values


def option(*names: str, field: str | None = None, **more: Any) -> Any:
    """An option; one that sets a config field is described by the field's own docstring."""
    if field is not None:
        fields = ProfileConfig.model_fields | UnlearnConfig.model_fields
        described = fields[field].description or ""
        more["help"] = " ".join(described.replace("`", "").split())
    return typer.Option(*names, show_default=False, **more)


def given_path(text: str | Path) -> Path:
    """A path; an empty one would mean the working folder, which nobody asks for in that way."""
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

_FIELDS: dict[str, Any] = {
    "model": Annotated[str | None, option("--model", "-m", field="model")],
    "forget": Annotated[str | None, option("--forget", "-f", field="forget")],
    "retain": Annotated[str | None, option("--retain", "-r", field="retain")],
    "objectives": Annotated[
        list[str] | None,
        option(
            "--objectives",
            help="Objectives with commas between: 'ga,wga(alpha=1),npo(beta=0.1)+kl'; repeatable.",
        ),
    ],
    "probes": Annotated[
        list[str] | None,
        option(
            "--probe", metavar="NAME=DATA", help="A further risk on data of its own; repeatable."
        ),
    ],
    "checkpoints": Annotated[
        list[str] | None,
        option("--checkpoints", metavar="PATTERN", field="checkpoints"),
    ],
    "refusals": Annotated[str | None, option("--refusals", field="refusals")],
    "reference": Annotated[str | None, option("--reference", field="reference")],
    "tokenizer": Annotated[str | None, option("--tokenizer", field="tokenizer")],
    "reduction": Annotated[str | None, option("--reduction", field="reduction")],
    "risk": Annotated[str | None, option("--risk", field="risk")],
    "resolve": Annotated[str | None, option("--resolve", field="resolve")],
    "groups": Annotated[
        list[str] | None,
        option(
            "--group",
            metavar="NAME=BLOCKS",
            help="A group of blocks in place of thirds, such as first=0-3; repeatable.",
        ),
    ],
    "engine": Annotated[str | None, option("--engine", field="engine")],
    "norms": Annotated[bool | None, option("--norms/--no-norms", field="norms")],
    "template": Annotated[str | None, option("--template", field="template")],
    "max_length": Annotated[int | None, option("--max-length", field="max_length")],
    "date": Annotated[str | None, option("--date", metavar="YYYY-MM-DD", field="date")],
    "token_budget": Annotated[int | None, option("--token-budget", field="token_budget")],
    "trust_remote_code": Annotated[
        bool | None, option("--trust-remote-code", field="trust_remote_code")
    ],
    "dtype": Annotated[str | None, option("--dtype", field="dtype")],
    "device": Annotated[str | None, option("--device", field="device")],
    "threads": Annotated[int | None, option("--threads", field="threads")],
}
"""The option of every config field, in the order in which help shows them."""

PROFILE_FIELDS = tuple(_FIELDS)

_FIELDS |= {
    "objective": Annotated[str | None, option("--objective", field="objective")],
    "steps": Annotated[int | None, option("--steps", field="steps")],
    "probe_every": Annotated[int | None, option("--probe-every", field="probe_every")],
    "probe_rows": Annotated[
        str | None, option("--probe-rows", metavar="N|all", field="probe_rows")
    ],
    "batch_size": Annotated[int | None, option("--batch-size", field="batch_size")],
    "retain_batch_size": Annotated[
        int | None, option("--retain-batch-size", field="retain_batch_size")
    ],
    "accumulation": Annotated[int | None, option("--accumulation", field="accumulation")],
    "learning_rate": Annotated[
        float | None, option("--learning-rate", "--lr", field="learning_rate")
    ],
    "scheduler": Annotated[str | None, option("--scheduler", field="scheduler")],
    "warmup_steps": Annotated[int | None, option("--warmup-steps", field="warmup_steps")],
    "optimizer": Annotated[str | None, option("--optimizer", field="optimizer")],
    "precision": Annotated[str | None, option("--precision", field="precision")],
    "checkpointing": Annotated[
        bool | None, option("--checkpointing/--no-checkpointing", field="checkpointing")
    ],
    "lora_rank": Annotated[int | None, option("--lora-rank", field="lora_rank")],
    "lora_alpha": Annotated[int | None, option("--lora-alpha", field="lora_alpha")],
    "lora_dropout": Annotated[float | None, option("--lora-dropout", field="lora_dropout")],
    "lora_targets": Annotated[str | None, option("--lora-targets", field="lora_targets")],
    "seed": Annotated[int | None, option("--seed", field="seed")],
    "trainer": Annotated[
        list[str] | None,
        option(
            "--trainer",
            metavar="FIELD=VALUE",
            help="A field of transformers' TrainingArguments, such as weight_decay=0.01, or "
            "max_grad_norm=1, without which gradients are not clipped; repeatable.",
        ),
    ],
    "save_every": Annotated[int | None, option("--save-every", field="save_every")],
    "keep_checkpoints": Annotated[
        bool | None,
        option("--keep-checkpoints/--no-keep-checkpoints", field="keep_checkpoints"),
    ],
}
UNLEARN_FIELDS = (
    *("model", "forget", "retain", "objective", "objectives"),
    *Training.model_fields,
    *(
        field
        for field in PROFILE_FIELDS
        if field not in ("model", "forget", "retain", "objectives", "checkpoints")
    ),
)
SWEEP_FIELDS = tuple(f for f in PROFILE_FIELDS if f not in ("objectives", "checkpoints"))
CHECK_FIELDS = (
    "refusals",
    "reference",
    "tokenizer",
    "template",
    "max_length",
    "date",
    "token_budget",
    "trust_remote_code",
    "dtype",
    "device",
    "threads",
)


def config_options(
    fields: tuple[str, ...],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these config fields, where its parameter `given` stands.

    The command is called with `given`: the fields whose option was used, and their values.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_given(**values: Any) -> None:
            options = {field: values.pop(field) for field in fields}
            used = {field: value for field, value in options.items() if value is not None}
            command(given={f: _READ[f](v) if f in _READ else v for f, v in used.items()}, **values)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name != "given":
                parameters.append(parameter)
                continue
            for field in fields:
                parameters.append(
                    inspect.Parameter(
                        field, parameter.kind, default=None, annotation=_FIELDS[field]
                    )
                )
        with_given.__dict__["__signature__"] = inspect.Signature(parameters)
        with_given.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_given

    return decorate


def begun_config(config: Path | None, out: Path, resume: bool) -> Path | None:
    """The config file that is meant: a run that is gone on with has one in its folder."""
    from geffect_fast.paths import is_there, user_path
    from geffect_fast.storage.run_folder import CONFIG, NEXT

    if config is None and resume:
        for begun in (user_path(out) / NEXT / CONFIG, user_path(out) / CONFIG):
            if is_there(begun):
                return begun
    return config


def config_input(config: Path | None, resume: bool) -> dict[str, Path]:
    """The config file as an input of a run, by its option."""
    return {} if config is None or resume else {"--config": config}


def values_of(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config file and of options, which override it.

    What the file recorded of rows is left out where an option chooses others.
    """
    values = {} if config is None else read_values(config)
    if given.keys() & _DECIDE_ROWS:
        values.pop("rows", None)
    return values | given


_DECIDE_ROWS = {"model", "tokenizer", "forget", "retain", "probes", "template", "date"}


def option_names(given: dict[str, Any], **names: str) -> dict[str, str]:
    """What the options behind config fields are called, those aside that `names` holds."""
    names = {"probes": "--probe", "groups": "--group"} | names
    return {field: names.get(field, f"--{field.replace('_', '-')}") for field in given}


def _pairs(what: str, form: str, texts: list[str]) -> dict[str, str]:
    """`NAME=VALUE` of a repeatable option `--what`, by name."""
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


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _trainer_value(text: str) -> Any:
    """What an option's text stands for: a number, true, false, null, a list, or the text itself."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _trainer(texts: list[str]) -> dict[str, Any]:
    pairs = _pairs("trainer", "FIELD=VALUE, such as weight_decay=0.01", texts)
    return {name: _trainer_value(text) for name, text in pairs.items()}


_READ: dict[str, Callable[[Any], Any]] = {
    "probes": functools.partial(_pairs, "probe", "NAME=DATA, such as general=wiki.jsonl"),
    "groups": functools.partial(_pairs, "group", "NAME=BLOCKS, such as first=0-3"),
    "resolve": _listed,
    "lora_targets": _listed,
    "trainer": _trainer,
}
"""How an option's value becomes its field's, where these differ."""
