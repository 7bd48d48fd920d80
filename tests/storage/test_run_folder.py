"""Run folders: results come back bit by bit, and a failed write leaves the earlier run."""

import sys
from pathlib import Path

import h5netcdf
import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from synthetic import make_dataset

from geffect_fast.arguments import make_config
from geffect_fast.errors import GEffectError, InputError
from geffect_fast.storage.disk import UNFINISHED
from geffect_fast.storage.export import export
from geffect_fast.storage.manifest import Manifest, check_sums, files_below
from geffect_fast.storage.netcdf import read_dataset
from geffect_fast.storage.results_file import store_in, write_dataset
from geffect_fast.storage.run_folder import check_free, open_run
from geffect_fast.storage.run_yaml import load_config
from geffect_fast.storage.save_run import save_run

CONFIG = make_config({"model": "a/b", "forget": "c/d", "retain": "e/f", "objectives": "ga"})


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def note(dataset, folder):
    (folder / "summary.csv").write_text("summary")
    (folder / "plots").mkdir()
    (folder / "plots" / "layers.png").write_text("plot")


def test_a_file_is_what_h5netcdf_writes_and_reads(tmp_path):
    dataset = make_dataset(resolve=("parameter", "sample"))
    ours, theirs = tmp_path / "ours.nc", tmp_path / "theirs.nc"
    write_dataset(dataset, ours)
    with h5netcdf.File(theirs, "w") as h5:
        store_in(h5, dataset)
    with h5py.File(ours) as a, h5py.File(theirs) as b:
        assert list(a) == list(b) and list(a.attrs) == list(b.attrs)
        for name, one in a.items():
            other = b[name]
            assert list(one.attrs) == list(other.attrs)
            assert (one.dtype, one.shape, one.chunks) == (other.dtype, other.shape, other.chunks)
            assert (one.compression, one.shuffle) == (other.compression, other.shuffle)
            if "DIMENSION_LIST" in one.attrs:
                axes = [
                    [h5[at[0]].name for at in of.attrs["DIMENSION_LIST"]]
                    for h5, of in ((a, one), (b, other))
                ]
                assert axes[0] == axes[1]
    with xr.open_dataset(ours, engine="h5netcdf") as plain, read_dataset(ours) as found:
        xr.testing.assert_identical(found, plain)
        assert found["g_effect"].encoding["source"] == str(ours)


@pytest.mark.parametrize("resolve", [("parameter", "sample"), ("parameter",), ("sample",), ()])
def test_round_trip_is_bitwise(tmp_path, resolve):
    dataset = make_dataset(resolve=resolve)
    dataset.attrs |= {"flag": True, "nothing": None, "list": [1, "two"], "number": 0.1}
    folder = save_run(tmp_path / "deep" / "run", dataset, CONFIG)
    back = open_run(folder)
    xr.testing.assert_identical(back, dataset)
    assert back.g_effect.values.tobytes() == dataset.g_effect.values.tobytes()
    assert back.attrs == dataset.attrs
    assert {k: type(v) for k, v in back.attrs.items()} == {
        k: type(v) for k, v in dataset.attrs.items()
    }
    assert load_config(folder / "run.yaml") == CONFIG


def test_not_a_number_and_zero_survive(tmp_path, dataset):
    dataset["g_effect"][0, 0, 0, :3] = [np.nan, -0.0, np.inf]
    back = open_run(save_run(tmp_path / "run", dataset, CONFIG))
    assert back.g_effect.values.tobytes() == dataset.g_effect.values.tobytes()


def test_the_file_is_closed_after_reading(tmp_path, dataset):
    folder = save_run(tmp_path / "run", dataset, CONFIG)
    open_run(folder)
    open_files = [p.resolve() for p in Path("/proc/self/fd").iterdir()]
    assert folder / "results.nc" not in open_files


def test_a_result_file_opens_by_itself_and_is_smaller_than_its_numbers(tmp_path):
    dataset = make_dataset(n_forget=400)
    dataset["g_effect"][:, :, :, 50:] = 0
    folder = save_run(tmp_path / "run", dataset, CONFIG)
    assert (folder / "results.nc").stat().st_size < dataset.g_effect.nbytes / 2
    xr.testing.assert_identical(open_run(folder / "results.nc"), dataset)


def test_a_folder_with_a_run_is_refused_unless_overwritten(tmp_path, dataset):
    folder = save_run(tmp_path / "run", dataset, CONFIG, report=note)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"already holds results\.nc.*--overwrite"):
        check_free(folder)
    with pytest.raises(InputError, match="already holds"):
        save_run(folder, dataset, CONFIG)
    save_run(folder, dataset * 2, CONFIG, overwrite=True)
    np.testing.assert_array_equal(open_run(folder).g_effect, 2 * dataset.g_effect)
    assert (folder / "mine.txt").read_text() == "mine"


def test_a_foreign_run_yaml_is_never_overwritten_unasked(tmp_path, dataset):
    (tmp_path / "run.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"holds run\.yaml, which no run made"):
        save_run(tmp_path, dataset, CONFIG)
    assert files(tmp_path) == ["run.yaml"]


def test_pictures_of_others_in_plots_are_in_nobody_s_way(tmp_path, dataset):
    """Foreign pictures stay, after a first run and after one that replaces it."""
    folder, picture = tmp_path / "run", tmp_path / "run/plots/mine.pdf"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"mine")
    save_run(folder, dataset, CONFIG)
    with pytest.raises(InputError, match="already holds"):
        save_run(folder, dataset, CONFIG)
    save_run(folder, dataset * 2, CONFIG, overwrite=True)
    assert picture.read_bytes() == b"mine"


def test_checking_writes_nothing(tmp_path):
    assert check_free(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert files(tmp_path) == []


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file"):
        check_free(tmp_path / "file")
    with pytest.raises(InputError, match="file is a file"):
        check_free(tmp_path / "file" / "run")


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, Stop, KeyboardInterrupt, OSError(28, "full")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_while_writing_numbers_leaves_what_was_there(
    tmp_path, dataset, error, overwrite, monkeypatch
):
    if overwrite:
        save_run(tmp_path / "deep" / "run", dataset, CONFIG, report=note)
    before = files(tmp_path)

    def fail(config):
        raise error

    monkeypatch.setattr("geffect_fast.storage.run_folder.dump_config", fail)
    refused = InputError if isinstance(error, OSError) else error
    with pytest.raises(refused):
        save_run(tmp_path / "deep" / "run", dataset * 2, CONFIG, overwrite=True)
    assert files(tmp_path) == before
    if overwrite:
        xr.testing.assert_identical(open_run(tmp_path / "deep" / "run"), dataset)


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (RuntimeError("no ink"), "are whole, but RuntimeError: no ink; geffect-fast report", 3),
        (OSError(28, "No space left"), "are whole, but No space left; geffect-fast report", 3),
        (MemoryError(), "are whole, but MemoryError; geffect-fast report", 3),
        (KeyboardInterrupt(), "interrupted; the numbers of run folder .*run are whole", 130),
    ],
)
def test_a_failure_of_the_report_costs_no_number(tmp_path, dataset, error, said, code):
    save_run(tmp_path / "run", dataset, CONFIG, report=note)

    def fail(dataset, folder):
        note(dataset, folder)
        raise error

    with pytest.raises(GEffectError, match=said) as caught:
        save_run(tmp_path / "run", dataset * 2, CONFIG, overwrite=True, report=fail)
    assert caught.value.exit_code == code
    xr.testing.assert_identical(open_run(tmp_path / "run"), dataset * 2)
    held = Manifest.read(tmp_path / "run").files
    check_sums(tmp_path / "run", held, "")
    # The files written before the failure are there too.
    assert {*files_below(tmp_path / "run")} == {*held, "manifest.json"}
    assert ("summary.csv" in held) == (code == 3)


def test_what_is_no_run_is_named(tmp_path, dataset):
    with pytest.raises(InputError, match="does not exist"):
        open_run(tmp_path / "none")
    with pytest.raises(InputError, match="not a run folder"):
        open_run(tmp_path)
    (tmp_path / f"{UNFINISHED}x").mkdir()
    with pytest.raises(InputError, match="did not finish"):
        open_run(tmp_path)
    dataset.rename(g_effect="other").to_netcdf(tmp_path / "results.nc", engine="h5netcdf")
    with pytest.raises(InputError, match="holds no G-effect"):
        open_run(tmp_path)


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_torn_result_is_named(tmp_path, dataset, kept):
    file = save_run(tmp_path / "run", dataset, CONFIG) / "results.nc"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"results\.nc is torn or was replaced: it has") as caught:
        open_run(tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resolve", [("parameter", "sample"), ("sample",), ()])
def test_csv_and_parquet_hold_every_effect_once(tmp_path, resolve):
    dataset = make_dataset(resolve=resolve)
    csv = pd.read_csv(export(dataset, tmp_path / "all.csv"))
    parquet = pd.read_parquet(export(dataset, tmp_path / "all.parquet"))
    for table in (csv, parquet):
        assert len(table) == dataset.g_effect.size
        assert list(table.columns)[:2] == ["objective", "risk"]
        assert table.columns[-1] == "g_effect"
        np.testing.assert_array_equal(table["g_effect"], dataset.g_effect.values.ravel())
    if "parameter" in resolve:
        row = parquet[(parquet.objective == "ga") & (parquet.risk == "retain")].iloc[17]
        assert (row.parameter, row["sample"], row.block) == (
            "model.layers.0.input_layernorm.weight",
            2,
            0,
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.csv", "all.parquet"]


def test_an_export_by_position_leaves_padding_out(tmp_path):
    dataset = make_dataset(resolve=("group", "sample", "position"))
    for name in ("all.csv", "all.parquet"):
        file = export(dataset, tmp_path / name)
        table = pd.read_csv(file) if name == "all.csv" else pd.read_parquet(file)
        assert len(table) == dataset.g_effect.size * 2 // 3
        assert set(table.position) == {0, 1} and set(table.token_id) == {7, 9}
        found = table.groupby(["objective", "risk"]).g_effect.sum().to_xarray()
        expected = dataset.g_effect.sum(["group", "sample", "position"])
        xr.testing.assert_allclose(found.reindex_like(expected), expected, rtol=1e-12)


def test_export_says_what_is_wrong(tmp_path, dataset, monkeypatch):
    with pytest.raises(InputError, match=r"must end in \.parquet or \.csv"):
        export(dataset, tmp_path / "all.xlsx")
    with pytest.raises(InputError, match="does not exist"):
        export(dataset, tmp_path / "none" / "all.csv")

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        export(dataset, tmp_path / "all.parquet")
    assert files(tmp_path) == []
