"""Steps from a config to a run folder that `evaluate`, `control` and `relearn` have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import device, nn

from geffect_fast.control_settings import ControlConfig
from geffect_fast.evaluation_settings import EvaluateConfig
from geffect_fast.measure.by_config import on_threads, recorded_machine, tokenizer_of
from geffect_fast.measure.sources import read_sets
from geffect_fast.ranks import here
from geffect_fast.relearn_settings import RelearnConfig
from geffect_fast.storage.inputs import Inputs, check_replayed, inputs_of, summed_beside
from geffect_fast.storage.lock import locked
from geffect_fast.storage.manifest import Sums
from geffect_fast.storage.model_folder import check_model_source
from geffect_fast.storage.run_folder import EVALUATION, check_free
from geffect_fast.storage.save_run import save_run
from geffect_fast.terminal import print_notice

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.storage.run_folder import Reporter

Config = EvaluateConfig | ControlConfig | RelearnConfig


def check_compared(config: EvaluateConfig | ControlConfig) -> None:
    """Raise `InputError` where the reference or retain model is missing, as far as can be known."""
    named = {"reference": config.reference}
    if not config.is_log():
        named["retain_model"] = config.retain_model
    for what, source in named.items():
        if source is not None:
            check_model_source(source, what, config.trust_remote_code)


def compared_bytes(config: EvaluateConfig | ControlConfig, model: nn.Module) -> int:
    """Bytes that a model to compare with takes beside `model`; 0 where none is given."""
    compared = config.reference is not None or not (config.retain_model is None or config.is_log())
    return compared * sum(p.nbytes for p in model.parameters())


def read_sets_of(
    config: Config, sources: Mapping[str, str | None], own: str, what: str, progress: bool
) -> tuple[dict[str, Any], Any]:
    """Read data sets and load the tokenizer for them.

    Args:
        config: the run.
        sources: paths or hub ids by name; None for a set that is not given.
        own: the model whose tokenizer is taken for text where the config names none.
        what: the name of that model in messages.
        progress: whether to print in a line what the data sets were found to be.

    Returns:
        Rows by name, None for a set that is not given; the tokenizer, or None where rows need none.
    """
    found: list[str] = []
    sets = read_sets(sources, config.data_format, found.append)
    if progress:
        print_notice(*found)
    has_text = any(rows is not None and "input_ids" not in rows[0] for rows in sets.values())
    return sets, tokenizer_of(config, has_text, own, what)


@dataclass(frozen=True)
class EvaluationFolder:
    """A run folder that is locked for the time of a run; the first of several ranks writes it.

    Attributes:
        threads: CPU threads that torch has.
        config: the run.
        out: the folder.
        overwrite: whether a run in the folder may be replaced.
        inputs: files that are read beside those that the config names.
        report: writes tables, plots and a page into the folder.
        sums: waits for the checksums of the files that are read, and returns them.
    """

    threads: int
    config: Config
    out: str | Path
    overwrite: bool
    inputs: Inputs
    report: Reporter | None
    sums: Callable[[], Mapping[str, Sums]]

    def save(
        self, dataset: xr.Dataset, where: Mapping[str, Any], token_budget: int, rows: dict[str, str]
    ) -> None:
        """Write the results, and the config that replays them.

        Args:
            dataset: the results.
            where: the fields of `recorded_machine`: threads, device and precision of the run.
            token_budget: tokens of a batch that fitted into memory.
            rows: digests of the tokenised rows, by set.
        """
        if not here().first:
            return
        config, sums = self.config, self.sums()
        check_replayed(self.inputs.get("--config"), config, sums)
        chosen = {"metrics": tuple(map(str, config.metrics)), "token_budget": token_budget}
        replay = config.model_copy(update={**chosen, "rows": rows, **where})
        read = inputs_of(config) | dict(self.inputs)
        save_run(
            self.out,
            dataset,
            replay,
            self.overwrite,
            self.report,
            read,
            sums,
            file=EVALUATION,
        )

    def machine(self, on: device, model: nn.Module) -> dict[str, Any]:
        """Threads, device and precision of the run, as its config records them."""
        return recorded_machine(self.threads, on, model)


def check_out(config: Config, out: str | Path, overwrite: bool, inputs: Inputs) -> None:
    """Raise `InputError` where a run folder is in use, or holds files that the run reads."""
    if here().first:
        check_free(out, overwrite, inputs_of(config) | dict(inputs))


@contextmanager
def evaluation_folder(
    config: Config,
    out: str | Path,
    overwrite: bool,
    inputs: Inputs,
    report: Reporter | None = None,
) -> Iterator[EvaluationFolder]:
    """Lock a run folder for the time of a run, and take checksums of the files that are read."""
    first = here().first
    with (
        locked(out) if first else nullcontext(),
        on_threads(config.threads) as threads,
        summed_beside(inputs_of(config) if first else {}) as sums,
    ):
        yield EvaluationFolder(threads, config, out, overwrite, inputs, report, sums)
