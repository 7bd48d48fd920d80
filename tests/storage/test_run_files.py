"""A run knows its files: others stay, damage is named, and kills lose nothing."""

from __future__ import annotations

import random

import pytest
import xarray as xr
from killed import killed
from synthetic import make_dataset

from geffect_fast.arguments import make_config
from geffect_fast.errors import InputError, UnfinishedError
from geffect_fast.storage.disk import REPLACED, UNFINISHED
from geffect_fast.storage.lock import LOCK
from geffect_fast.storage.manifest import MANIFEST, Manifest, check_sums, files_below
from geffect_fast.storage.run_folder import check_free, open_run
from geffect_fast.storage.save_run import save_run
from geffect_fast.storage.seal import write_sealed

CONFIG = make_config({"model": "a/b", "forget": "c/d", "retain": "e/f", "objectives": "ga"})
OLD, NEW = (make_dataset(resolve=(), seed=seed) for seed in (1, 2))


def note(dataset, folder):
    (folder / "summary.csv").write_text(f"summary {float(dataset.g_effect.sum())}")
    (folder / "plots").mkdir()
    (folder / "plots/layers.png").write_text(f"plot {float(dataset.g_effect.sum())}")


def more(dataset, folder):
    note(dataset, folder)
    (folder / "plots/instances.png").write_text("another plot")


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run", OLD, CONFIG, report=note)


def whole(folder):
    """The result of a run, all of whose files are as they were written."""
    manifest = Manifest.read(folder)
    check_sums(folder, manifest.files, "")
    assert {*files_below(folder)} == {*manifest.files, MANIFEST}
    return open_run(folder)


# ---- files of others ----


def test_overwriting_touches_the_files_of_the_run_alone(run):
    mine = {"plots/my-figure.pdf": "figure", "notes.txt": "notes", "deep/er/x.csv": "1,2"}
    for name, text in mine.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    save_run(run, NEW, CONFIG, overwrite=True)  # this run has no plots
    xr.testing.assert_identical(open_run(run), NEW)
    assert {*files_below(run)} == {*mine, "results.nc", "run.yaml", MANIFEST}
    assert all((run / name).read_text() == text for name, text in mine.items())


@pytest.mark.parametrize(
    "name", ["summary.csv", "report.html", "tokens.html", "run.yaml", "plots/layers.png"]
)
def test_what_no_run_made_is_refused_by_name(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=f"holds {name}, which no run made; choose another"):
            check_free(tmp_path, overwrite)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_that_came_while_the_run_was_made_is_refused_by_name(run):
    def late(dataset, folder):
        more(dataset, folder)
        (run / "plots").mkdir(exist_ok=True)
        (run / "plots/instances.png").write_text("mine")

    with pytest.raises(UnfinishedError, match=r"holds plots/instances\.png, which no run made"):
        save_run(run, NEW, CONFIG, overwrite=True, report=late)
    assert (run / "plots/instances.png").read_text() == "mine"
    xr.testing.assert_identical(open_run(run), NEW)


def test_of_a_run_without_a_manifest_only_what_runs_alone_write_goes(run):
    """Runs of earlier versions have no manifest."""
    (run / MANIFEST).unlink()
    (run / "plots/my-figure.pdf").write_text("mine")
    (run / "plots/layers.svg").write_text("of a run")
    save_run(run, NEW, CONFIG, overwrite=True)
    assert {*files_below(run)} == {"plots/my-figure.pdf", "results.nc", "run.yaml", MANIFEST}


@pytest.mark.parametrize("name", ["../mine.txt", "/tmp/mine.txt", "..", "link/mine.txt", ""])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(run, name):
    mine = run.parent / "mine.txt"
    mine.write_text("mine")
    (run / "link").symlink_to(run.parent)
    sums = {name: {"bytes": 4, "sha256": "0"}}
    write_sealed(run / MANIFEST, {"files": sums, "inputs": {}})
    with pytest.raises(InputError, match="is no file in it; it is left alone"):
        save_run(run, NEW, CONFIG, overwrite=True)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["../mine.txt", "link/mine.txt"])
def test_what_was_set_aside_leads_nowhere_else(run, name):
    mine = run.parent / "mine.txt"
    mine.write_text("mine")
    (run / "link").symlink_to(run.parent)
    hidden = run / f"{REPLACED}1"
    hidden.mkdir()
    (hidden / "note.json").write_text(
        f'{{"names": ["{name}"], "present": [], "folders": [], "source": null}}'
    )
    with pytest.raises(InputError, match="is no file in it; it is left alone"):
        open_run(run)
    assert mine.read_text() == "mine"


# ---- kills ----


def overwrite(folder):
    """Replace a run by another."""
    save_run(folder, NEW, CONFIG, overwrite=True, report=more)


BEFORE = {  # the files of the result change places, then those of its report
    "the result is written": ("open", UNFINISHED, 2),
    "the note": ("os.rename", REPLACED),
    "the old result is set aside": ("os.rename", "results.nc"),
    "the new files come": ("os.rename", "manifest.json", 2),
    "the new result comes": ("os.rename", "results.nc", 2),
    "the note goes": ("os.rename", REPLACED, 7),
}
BEHIND = {
    "set aside files are removed": ("shutil.rmtree", UNFINISHED),
    "their folder is removed": ("os.rmdir", UNFINISHED),
    "a plot comes": ("os.rename", "plots/layers.png", 2),
    "the note of the report goes": ("os.rename", REPLACED, 10),
    "the end": ("os.remove", LOCK),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", BEFORE | BEHIND)
def test_killed_at_any_moment_the_old_run_or_the_new_one_is_there(run, moment):
    assert killed(overwrite, run, *(BEFORE | BEHIND)[moment])
    # the next command restores files that were set aside
    xr.testing.assert_identical(open_run(run), OLD if moment in BEFORE else NEW)
    save_run(run, NEW, CONFIG, overwrite=True, report=more)  # removes the rest as well
    xr.testing.assert_identical(whole(run), NEW)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_a_new_run_behind_a_killed_one_restores_it_first(run):
    """Without --overwrite too: the files that were set aside are the existing run."""
    for moment in (BEFORE["the new result comes"], BEHIND["a plot comes"]):
        assert killed(overwrite, run, *moment)
        with pytest.raises(InputError, match=r"already holds results\.nc"):
            save_run(run, NEW, CONFIG)
        assert not [path for path in run.iterdir() if path.name.startswith((REPLACED, ".lock"))]


def test_files_set_aside_without_a_note_are_left_alone(run):
    aside = run / f"{REPLACED}abc/aside"
    aside.mkdir(parents=True)
    (run / "summary.csv").rename(aside / "summary.csv")
    with pytest.raises(InputError, match=r"note\.json in it is missing or damaged; move"):
        open_run(run)
    assert (aside / "summary.csv").is_file()


def test_what_killed_processes_left_goes_with_the_next_run(run):
    (run / f"{UNFINISHED}abc/plots").mkdir(parents=True)
    save_run(run, NEW, CONFIG, overwrite=True)
    whole(run)


# ---- damage ----


def flipped(file, dice):
    """Flip one bit of a file, and return the earlier bytes."""
    data = file.read_bytes()
    bit = dice.randrange(8 * len(data))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    file.write_bytes(changed)
    return data


def test_every_bit_flip_in_a_result_is_named(run):
    dice, file = random.Random(11), run / "results.nc"
    for _ in range(150):
        data = flipped(file, dice)
        with pytest.raises(InputError, match=r"results\.nc is damaged or was replaced"):
            open_run(run)
        file.write_bytes(data)
    whole(run)


@pytest.mark.parametrize("resolve", [("parameter", "sample"), ("sample", "token")])
def test_every_bit_flip_in_a_result_alone_is_named_or_changes_nothing(tmp_path, resolve):
    """Flips in the checksum's own frame leave a result without a checksum."""
    dice, dataset = random.Random(12), make_dataset(n_blocks=1, n_forget=3, resolve=resolve)
    file = save_run(tmp_path / "run", dataset, CONFIG) / "results.nc"
    alone = tmp_path / "alone.nc"
    alone.write_bytes(file.read_bytes())
    silent = 0
    for _ in range(150):
        data = flipped(alone, dice)
        try:
            xr.testing.assert_identical(open_run(alone), dataset)
            silent += 1
        except InputError as error:
            assert "alone.nc is damaged" in str(error) or "is torn" in str(error)
        alone.write_bytes(data)
    assert silent <= 3


def test_every_bit_flip_in_a_manifest_is_named(run):
    dice, file = random.Random(13), run / MANIFEST
    for _ in range(100):
        data = flipped(file, dice)
        try:
            changed = Manifest.read(run)
        except InputError as error:
            assert f"{MANIFEST} is not as a run wrote it" in str(error)
        else:  # white space means nothing
            file.write_bytes(data)
            assert changed == Manifest.read(run)
        file.write_bytes(data)


def test_another_result_in_the_place_of_a_runs_own_is_named(run, tmp_path):
    other = save_run(tmp_path / "other", NEW, CONFIG)
    (other / "results.nc").replace(run / "results.nc")
    with pytest.raises(InputError, match=r"results\.nc is (torn|damaged) or was replaced"):
        open_run(run)


def test_a_run_that_was_damaged_can_be_replaced(run):
    flipped(run / "results.nc", random.Random(3))
    save_run(run, NEW, CONFIG, overwrite=True)
    xr.testing.assert_identical(whole(run), NEW)


def test_a_result_of_an_earlier_version_has_no_checksum_and_is_read(tmp_path):
    folder = save_run(tmp_path / "run", OLD, CONFIG)
    (folder / MANIFEST).unlink()
    data = (folder / "results.nc").read_bytes()
    (folder / "results.nc").write_bytes(data[: data.rindex(b"\ngeffect_fast sha256")])
    xr.testing.assert_identical(open_run(folder), OLD)
    xr.testing.assert_identical(open_run(folder / "results.nc"), OLD)
