"""Publicly reported errors of other tools with data files, outputs and environments, one each."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import transformers
from synthetic import make_dataset

import geffect_fast as gf
from geffect_fast.arguments import make_config
from geffect_fast.cli import main
from geffect_fast.errors import InputError
from geffect_fast.storage.run_folder import open_run
from geffect_fast.storage.save_run import save_run

pytestmark = pytest.mark.usefixtures("undrawn")


FILES = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl"}


def words(**changes):
    options = FILES | {"objectives": "ga", "out": "run"} | changes
    return ["profile", *(w for key, value in options.items() for w in (f"--{key}", value))]


def read(content):
    """The rows of a data file of these bytes."""
    with open("odd.jsonl", "wb") as file:  # noqa: PTH123
        file.write(content)
    return gf.data.read_rows("odd.jsonl", name="forget")


def a_packed_file(here):
    """janosh/matbench-discovery#20: 'utf-8' codec can't decode byte 0x8b."""
    packed = gzip.compress(b'{"question": "a", "answer": "b"}')
    assert read(packed) == [{"question": "a", "answer": "b"}]
    with pytest.raises(InputError, match=r"odd\.jsonl"):
        read(packed[:-12])


def rows_of_sharegpt(here):
    """Tencent/AngelSlim#7: KeyError 'role' where the field is called `from`."""
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (found,) = read(json.dumps(row).encode())
    assert found["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def ids_of_numpy(here):
    """huggingface/transformers#2024: an id of numpy.int64 is no int to a tokenizer."""
    row = {"input_ids": list(np.arange(3)), "labels": list(np.arange(3))}
    (read,) = gf.data.read_rows([row], name="forget")
    assert read["input_ids"] == [0, 1, 2]


def a_nul_in_a_text(here):
    """encode/typesystem#60: U+0000 passes all checks of a text and fails where it is stored."""
    rows = [{"question": "Who\0 is it?", "answer": "She\0 is."}] * 2
    (here / "forget.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert main([*words(), "--resolve", "sample,token"]) == 0
    with open_run("run") as result:
        assert result["question"].values[0] == "Who\N{SYMBOL FOR NULL} is it?"
        assert any("\N{SYMBOL FOR NULL}" in text for text in result["token_text"].values[0])
    assert main(["show", "run"]) == main(["tokens", "run"]) == 0
    weights = ["weights", "run", "--out", "weighted.jsonl", "--retain-budget", "0"]
    assert main(weights) == 0
    again = gf.data.read_rows("weighted.jsonl", name="forget")
    assert [row["question"] for row in again] == [row["question"] for row in rows]


def a_closed_pipe(here):
    """Backblaze/B2_Command_Line_Tool#1071: BrokenPipeError where output goes through head."""
    there, end = os.pipe()
    os.close(there)
    with pytest.MonkeyPatch.context() as patch:
        stream = io.TextIOWrapper(os.fdopen(end, "wb"), line_buffering=True)
        patch.setattr(sys, "stdout", stream)
        assert main(["--version"]) == 141
        stream.close()


def tekken(path):
    """A tokenizer file in Mistral's own format, with bytes and a few words."""
    texts = [bytes([i]) for i in range(256)] + [b" author", b" book", b"She", b"Wh"]
    words = [
        {"rank": i, "token_bytes": base64.b64encode(text).decode(), "token_str": None}
        for i, text in enumerate(texts)
    ]
    special = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    special += "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] "
    special += "[SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
    config = {
        "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+",
        "num_vocab_tokens": len(words),
        "default_vocab_size": len(words) + 20,
        "default_num_special_tokens": 20,
        "version": "v7",
    }
    tokens = [
        {"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(special.split())
    ]
    content = {"config": config, "vocab": words, "special_tokens": tokens}
    path.write_text(json.dumps(content), encoding="utf-8")


def tokens_of_mistral(here):
    """huggingface/transformers#47507: a model whose tokenizer is a tekken.json alone."""
    pytest.importorskip("mistral_common")
    shutil.rmtree("model")
    config = transformers.MistralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained("model")
    tekken(here / "model/tekken.json")
    assert main([*words(), "--quiet", "--resolve", "sample,token"]) == 0
    with open_run("run") as result:
        assert "</s>" in result["token_text"].values[0]
        tokenizer = transformers.AutoTokenizer.from_pretrained("model")
        model = transformers.AutoModelForCausalLM.from_pretrained("model").eval()
        data = {"forget": "forget.jsonl", "retain": "retain.jsonl"}
        by_api = gf.profile(
            model, tokenizer, **data, objectives=["ga"], resolve=["sample", "token"]
        )
        np.testing.assert_array_equal(by_api["token_id"], result["token_id"])
        np.testing.assert_allclose(by_api["g_effect"], result["g_effect"], rtol=1e-5)


def a_tokenizer_without_a_list_of_added_tokens(here):
    """huggingface/transformers#46622: mistral-common's class has methods where others have data."""

    class WithMethod:
        def __init__(self, tokenizer):
            self.inside = tokenizer

        def __getattr__(self, name):
            return getattr(self.inside, name)

        def __call__(self, *args, **kwargs):
            return self.inside(*args, **kwargs)

        def added_tokens_decoder(self):
            raise NotImplementedError

    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    rows = gf.data.read_rows("forget.jsonl", name="forget")
    found, expected = (
        gf.data.tokenize_rows(rows, t, name="forget") for t in (WithMethod(tokenizer), tokenizer)
    )
    assert found.n_tokens == expected.n_tokens


def a_backend_of_notebooks(here):
    """bmaltais/kohya_ss#2521: matplotlib is not imported where MPLBACKEND is a notebook's."""
    backend = {"MPLBACKEND": "module://no_such_module.backend_inline"}
    save_run("run", make_dataset(["ga"], n_blocks=1), make_config(FILES | {"objectives": "ga"}))
    command = [sys.executable, "-m", "geffect_fast.cli", "report", "run"]
    done = subprocess.run(
        command, env=os.environ | backend, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    assert (here / "run/plots/layers.png").exists()


REPORTED = [
    tokens_of_mistral,
    a_tokenizer_without_a_list_of_added_tokens,
    a_backend_of_notebooks,
    a_packed_file,
    rows_of_sharegpt,
    ids_of_numpy,
    a_nul_in_a_text,
    a_closed_pipe,
]


@pytest.mark.parametrize("case", REPORTED, ids=lambda case: case.__doc__.split(":")[0])
def test_reported(case, here):
    case(here)
