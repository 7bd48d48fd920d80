"""Run folders that cannot be written or read, exports that fail, full disks, and Ctrl-C."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from pathlib import Path

from bad_input.case import Case, both, check, cut, holds, patched, profile
from synthetic import make_dataset

from geffect_fast.arguments import make_config
from geffect_fast.storage.disk import UNFINISHED
from geffect_fast.storage.manifest import Manifest, checksums, files_below
from geffect_fast.storage.save_run import save_run

FULL = OSError(errno.ENOSPC, "No space left on device")
CONFIG = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "objectives": "ga"}


def a_run(here, _patch):
    """A finished run in the folder `run`."""
    save_run(here / "run", make_dataset(n_blocks=2), make_config(CONFIG))


def made_by_a_run(here, _patch):
    """Record in a manifest that a run made every file here."""
    Manifest(checksums(here, files_below(here))).write(here)


def listed(here, _patch):
    """The run in the folder `run`, with a manifest of every file in it."""
    Manifest(checksums(here / "run", files_below(here / "run"))).write(here / "run")


def changed(change):
    """A result that was changed before it was written."""

    def apply(here, _patch):
        (here / "run").mkdir()
        change(make_dataset(n_blocks=2)).to_netcdf(here / "run/results.nc", engine="h5netcdf")

    return apply


def middle_lost(here, _patch):
    """Overwrite the numbers of a result, but not its header."""
    file = here / "run/results.nc"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 - 2000 : len(data) // 2 + 2000] = bytes(4000)
    file.write_bytes(data)


def not_writable(here, patch):
    """A folder without permission to write, also where the user is root."""

    def access(path, mode):
        return mode & os.W_OK == 0 or bool(Path(path).stat().st_mode & stat.S_IWUSR)

    (here / "shut").mkdir(mode=0o555)
    patch.setattr("os.access", access)


def last_rename(_here, patch):
    """Fail for lack of space when the last file of a run takes its place."""
    rename = Path.rename

    def fail(path, target):
        if path.name == "results.nc" and path.parent.name.startswith(UNFINISHED):
            raise FULL
        return rename(path, target)

    patch.setattr(Path, "rename", fail)


def interrupted(target):
    """Press Ctrl-C in the middle of a function."""
    return patched(target, KeyboardInterrupt())


def profiled_again():
    """A `profile` command line for a run that replaces another."""
    return [*profile(), "--overwrite"]


CASES = [
    # ---- folders that runs are written to ----
    Case(
        "a file in the way",
        profile(out="forget.jsonl"),
        "forget.jsonl is a file",
        "choose another --out",
    ),
    Case(
        "a file above",
        profile(out="forget.jsonl/run"),
        "forget.jsonl is a file",
        "choose another --out",
    ),
    Case(
        "a link to nowhere in the way",
        profile(),
        "run",
        "choose another --out",
        lambda here, _: (here / "run").symlink_to(here / "nowhere"),
    ),
    Case(
        "a name longer than folders have",
        profile(out="x" * 5000),
        "File name too long",
        "choose another --out",
    ),
    Case(
        "a folder that must not be written",
        profile(out="shut/run"),
        "shut is not writable",
        "choose another --out",
        not_writable,
    ),
    Case("a folder that cannot be made", profile(out="/proc/run"), "/proc", "choose another --out"),
    Case(
        "a run in the folder",
        profile(),
        "run folder run already holds results.nc",
        "use --overwrite",
        a_run,
    ),
    Case(
        "a demo in the folder of a run",
        ["demo", "-q", "--out", "run"],
        "run already holds results.nc",
        "use --overwrite",
        a_run,
    ),
    Case(
        "a demo over other data",
        ["demo", "-q", "--out", ".", "--overwrite"],
        ". holds forget.jsonl, which no demo made",
        "choose another --out",
    ),
    Case(
        "a run.yaml of somebody in the folder",
        profile(out="."),
        ". holds run.yaml, which no run made",
        "choose another --out",
        holds("run.yaml", "mine"),
    ),
    Case(
        "a summary of somebody in the folder",
        [*profile(out="."), "--overwrite"],
        ". holds summary.csv, which no run made",
        "choose another --out",
        holds("summary.csv", "mine"),
    ),
    Case(
        "a report of somebody in the folder of a run",
        ["report", "run"],
        "report.html: no run made that",
        "name another page, --out",
        both(a_run, holds("run/report.html", "mine")),
    ),
    Case(
        "data that an earlier run made, and that would be replaced",
        [*profile(forget="run/forget.jsonl"), "--overwrite"],
        "--forget",
        "which --overwrite would replace; choose another --out",
        both(a_run, lambda here, _: shutil.copy(here / "forget.jsonl", here / "run"), listed),
    ),
    Case(
        "a model that an earlier run made, and that would be replaced",
        [*profile(model="run/model"), "--overwrite"],
        "--model",
        "which --overwrite would replace; choose another --out",
        both(a_run, lambda here, _: shutil.copytree(here / "model", here / "run/model"), listed),
    ),
    Case(
        "a link to a model that would be replaced",
        [*profile(reference="linked"), "--overwrite"],
        "--reference",
        "which --overwrite would replace; choose another --out",
        both(
            a_run,
            lambda here, _: shutil.copytree(here / "model", here / "run/model"),
            listed,
            lambda here, _: (here / "linked").symlink_to("run/model"),
        ),
    ),
    Case(
        "a config that would be replaced",
        ["profile", "-q", "--config", "run/run.yaml", "--out", "run", "--overwrite"],
        "--config run/run.yaml",
        "which --overwrite would replace; choose another --out",
        a_run,
    ),
    Case(
        "a manifest of another program",
        [*profile(out="."), "--overwrite"],
        "manifest.json is not as a run wrote it",
        "move it away",
        holds("manifest.json", '{"name": "app"}'),
    ),
    # ---- runs that cannot be read ----
    Case(
        "no run to show",
        ["show", "gone"],
        "run folder gone does not exist",
        "give a run folder",
    ),
    Case(
        "a folder that is no run",
        ["show", "model"],
        "run folder model holds no results.nc: it is not a run folder",
        "give a run folder",
    ),
    Case(
        "a run that did not finish",
        ["show", "run"],
        "its run did not finish",
        "repeat the run",
        holds("run/run.yaml", ""),
    ),
    Case(
        "a torn result",
        ["show", "run"],
        "run/results.nc is torn",
        "repeat the run",
        both(a_run, cut("run/results.nc", 5_000)),
    ),
    Case(
        "an empty result",
        ["show", "run"],
        "run/results.nc is torn",
        "repeat the run",
        both(a_run, cut("run/results.nc", 0)),
    ),
    Case(
        "a result torn in the middle",
        ["show", "run"],
        "run/results.nc is damaged or was replaced: its checksum",
        "repeat the run",
        both(a_run, middle_lost),
    ),
    Case(
        "a result torn in the middle, exported",
        ["export", "run", "--to", "x.csv"],
        "run/results.nc is damaged or was replaced: its checksum",
        "repeat the run",
        both(a_run, middle_lost),
    ),
    Case(
        "text as a result",
        ["show", "forget.jsonl"],
        "forget.jsonl is torn or not NetCDF",
        "repeat the run",
    ),
    Case(
        "a result of another program",
        ["show", "run"],
        "run/results.nc holds no G-effect",
        "written by geffect_fast",
        changed(lambda d: d.rename(g_effect="t")),
    ),
    Case(
        "a result without risks",
        ["show", "run"],
        "run/results.nc",
        "written by geffect_fast",
        changed(lambda d: d.drop_vars("risk_value")),
    ),
    Case(
        "a result with other axes",
        ["show", "run"],
        "run/results.nc",
        "written by geffect_fast",
        changed(lambda d: d.rename(risk="data")),
    ),
    Case(
        "attributes that were edited",
        ["show", "run"],
        "run/results.nc",
        "written by geffect_fast",
        changed(lambda d: d.assign_attrs(json_attrs="{")),
    ),
    Case(
        "nobody's run",
        ["show", "~nobody-here/run"],
        "~nobody-here/run does not",
        "give a run folder",
    ),
    Case("a name that no run has", ["show", "x" * 5000], "run folder xxx", "give a run folder"),
    # ---- exports ----
    Case(
        "a name that no file has",
        ["export", "run", "--to", f"{'x' * 5000}.csv"],
        "File name too",
        "another --to",
        a_run,
    ),
    Case(
        "no run to export from",
        ["export", "gone", "--to", "x.csv"],
        "run folder gone does not exist",
        "give a run folder",
    ),
    Case(
        "a strange ending",
        ["export", "run", "--to", "x.xlsx"],
        "export x.xlsx",
        ".parquet or .csv",
        a_run,
    ),
    Case(
        "a folder that is not there",
        ["export", "run", "--to", "no/x.csv"],
        "folder no does not exist",
        "make it first",
        a_run,
    ),
    Case(
        "a folder in the way",
        ["export", "run", "--to", "x.csv"],
        "export x.csv",
        "choose another --to",
        both(a_run, lambda here, _: (here / "x.csv").mkdir()),
    ),
    Case(
        "an export over a file",
        ["export", "run", "--to", "retain.jsonl.csv"],
        "export retain.jsonl.csv is there already",
        "choose another --to or use --overwrite",
        both(a_run, holds("retain.jsonl.csv", "mine")),
    ),
    Case(
        "no pyarrow",
        ["export", "run", "--to", "x.parquet"],
        "Parquet needs pyarrow",
        "export to .csv",
        both(a_run, lambda _, patch: patch.setitem(sys.modules, "pyarrow", None)),
    ),
    # ---- a full disk ----
    Case(
        "a disk full at results.nc",
        profile(),
        "run folder run cannot be written",
        "free some space",
        largest_file=3_000,
    ),
    Case(
        "a disk full by position",
        profile(resolve="sample,position"),
        "cannot be written",
        "free some space",
        largest_file=5_000,
    ),
    Case(
        "a disk full at run.yaml",
        profile(),
        "No space left on device",
        "free some space",
        patched("pathlib.Path.write_text", FULL),
    ),
    Case(
        "a disk full at the last rename",
        profiled_again(),
        "No space left on device",
        "free some space",
        both(a_run, last_rename),
    ),
    Case(
        "a disk full while overwriting",
        profiled_again(),
        "cannot be written",
        "free some space",
        a_run,
        largest_file=3_000,
    ),
    Case(
        "a disk full at a CSV",
        ["export", "run", "--to", "x.csv"],
        "export x.csv cannot be written",
        "free some space",
        a_run,
        largest_file=3_000,
    ),
    Case(
        "a disk full at a Parquet",
        ["export", "run", "--to", "x.parquet"],
        "export x.parquet cannot be written",
        "free some space",
        a_run,
        largest_file=3_000,
    ),
    Case(
        "a disk full at a demo",
        ["demo", "-q", "--out", "new"],
        "new",
        "free some space",
        largest_file=3_000,
    ),
    # ---- Ctrl-C ----
    Case(
        "Ctrl-C at work",
        profile(),
        "interrupted",
        "nothing half-written",
        interrupted("torch.autograd.grad"),
        130,
    ),
    Case(
        "Ctrl-C while overwriting",
        profiled_again(),
        "interrupted",
        "nothing",
        both(a_run, interrupted("geffect_fast.storage.run_folder.dump_config")),
        130,
    ),
    Case(
        "Ctrl-C at a check",
        check(),
        "interrupted",
        "nothing",
        interrupted("torch.autograd.grad"),
        130,
    ),
    Case(
        "Ctrl-C at an export",
        ["export", "run", "--to", "x.csv"],
        "interrupted",
        "nothing",
        both(a_run, interrupted("geffect_fast.storage.export.write_csv")),
        130,
    ),
    Case(
        "Ctrl-C at a demo",
        ["demo", "-q", "--out", "new"],
        "interrupted",
        "nothing",
        interrupted("torch.optim.AdamW.step"),
        130,
    ),
    Case(
        "Ctrl-C at a demo over another",
        ["demo", "-q", "--out", ".", "--overwrite"],
        "interrupted",
        "nothing",
        both(made_by_a_run, interrupted("torch.optim.AdamW.step")),
        130,
    ),
]
