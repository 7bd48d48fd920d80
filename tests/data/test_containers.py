"""Every container gives the same rows, whatever it is called, and says what it is."""

from __future__ import annotations

import pytest

from geffect_fast.data import read_rows, write_jsonl


def test_written_rows_are_read_back(tmp_path):
    rows = [
        {"question": "Who?", "answer": f"She {i}.", "perturbed_answer": ["He."]} for i in range(3)
    ]
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(rows, path)
    assert read_rows(path, name="forget") == rows
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    write_jsonl([{"question": "Où?", "answer": "Là."}], path)
    assert path.read_bytes() == '{"question": "Où?", "answer": "Là."}\n'.encode()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl([{"a": 1}], path)
    with pytest.raises(TypeError):
        write_jsonl([{"a": 2}, {"a": object()}], path)
    assert path.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [path]
