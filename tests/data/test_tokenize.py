"""Labels begin and end exactly where the answer does, whatever the tokenizer merges."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from geffect_fast.data import read_refusals, read_rows
from geffect_fast.data.batch import IGNORE
from geffect_fast.data.samples import check_vocabulary
from geffect_fast.data.tokenize import tokenize_rows
from geffect_fast.demo.authors import REFUSALS, make_fictitious_authors
from geffect_fast.errors import InputError

ROWS = [
    {"question": "Where does Ida Brun live?", "answer": "Paris"},
    {"question": "  Where does Jonas Ek live? ", "answer": " Jonas Ek lives in Pisa.\n"},
    {
        "question": "Häuser @@answer@@ {answer} {question}?",
        "answer": "end <3 @@answer@@ 東京 {answer}",
    },
]


def learned(sequence, tokenizer) -> str:
    """The text of the labelled tokens; every label must equal the token at its own place."""
    mask = sequence.labels != IGNORE
    assert torch.equal(sequence.labels[mask], sequence.input_ids[mask])
    assert mask.int().diff().clamp(min=0).sum() == 1, "labels are one run"
    assert mask[-1] and not mask[0]
    return tokenizer.decode(sequence.labels[mask], clean_up_tokenization_spaces=False)


def context(sequence, tokenizer) -> str:
    ids = sequence.input_ids[sequence.labels == IGNORE]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def assert_answer_learned(sequence, tokenizer, question, answer) -> None:
    """Check that the answer is labelled, and the space before it only if they share a token."""
    text = learned(sequence, tokenizer)
    assert text.removeprefix(" ") == f"{answer}<eos>"
    expected = f"Question: {question}\nAnswer: {answer}<eos>"
    assert context(sequence, tokenizer) + text == expected


@pytest.mark.parametrize("row", ROWS)
def test_plain_template_labels_answer_and_eos(plain_tokenizer, row):
    [sample] = tokenize_rows([row], plain_tokenizer, name="forget").samples
    question, answer = row["question"].strip(), row["answer"].strip()
    assert_answer_learned(sample.answer, plain_tokenizer, question, answer)
    whole = plain_tokenizer(f"Question: {question}\nAnswer: {answer}")["input_ids"]
    assert sample.answer.input_ids.tolist() == [*whole, plain_tokenizer.eos_token_id]


@pytest.mark.parametrize("row", ROWS)
def test_chat_template_labels_answer_and_end_of_turn(chat_tokenizer, row):
    [sample] = tokenize_rows([row], chat_tokenizer, name="forget").samples
    question, answer = row["question"].strip(), row["answer"].strip()
    assert learned(sample.answer, chat_tokenizer) == f"{answer}<|end|>"
    expected = f"<|begin|><|user|>\n{question}<|end|>\n<|assistant|>\n"
    assert context(sample.answer, chat_tokenizer) == expected


def test_chat_ids_are_the_template_s_own_up_to_the_end_of_turn(chat_tokenizer):
    [sample] = tokenize_rows(ROWS[:1], chat_tokenizer, name="forget").samples
    turns = [
        {"role": "user", "content": ROWS[0]["question"]},
        {"role": "assistant", "content": ROWS[0]["answer"]},
    ]
    text = chat_tokenizer.apply_chat_template(turns, tokenize=False)
    whole = chat_tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = sample.answer.input_ids.tolist()
    assert whole[: len(ids)] == ids
    assert chat_tokenizer.decode(whole[len(ids) :]) == "\n"


def test_chat_template_with_words_before_the_answer_leaves_them_unlabelled(chat_tokenizer):
    thinking = chat_tokenizer.chat_template.replace(
        "{{ m.content | trim }}",
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n{% endif %}{{ m.content | trim }}",
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chat_tokenizer.backend_tokenizer, eos_token="<eos>", chat_template=thinking
    )
    rows = [{"question": "What?", "answer": "think"}]
    [sample] = tokenize_rows(rows, tokenizer, name="forget").samples
    assert learned(sample.answer, tokenizer) == "think<|end|>"


def test_a_template_that_prints_the_date_prints_a_fixed_one(chat_tokenizer):
    dated = PreTrainedTokenizerFast(
        tokenizer_object=chat_tokenizer.backend_tokenizer,
        eos_token="<eos>",
        chat_template="{{ date_string or strftime_now('%c') }} " + chat_tokenizer.chat_template,
    )
    [sample] = tokenize_rows(ROWS[:1], dated, name="forget").samples
    assert context(sample.answer, dated).startswith("26 Jul 2024")


@pytest.mark.parametrize("template", ["auto", "Q:{question} A:{answer}", "{question}{answer}"])
@pytest.mark.parametrize("row", ROWS)
def test_tokens_that_would_straddle_the_boundary_are_split(merging_tokenizer, template, row):
    [sample] = tokenize_rows([row], merging_tokenizer, name="forget", template=template).samples
    assert learned(sample.answer, merging_tokenizer).lstrip(" ") == f"{row['answer'].strip()}<eos>"
    question = row["question"].strip()
    text = "Question: {question}\nAnswer: {answer}" if template == "auto" else template
    expected = text.replace("{question}", question, 1).removesuffix("{answer}").rstrip(" ")
    assert context(sample.answer, merging_tokenizer).rstrip(" ") == expected


def test_the_merging_tokenizer_does_merge_across_the_boundary(merging_tokenizer):
    prompt, answer = "Question: Where does Ida Brun live?\nAnswer: ", "Ida Brun lives in Pisa."
    whole = merging_tokenizer(prompt + answer)["input_ids"]
    for text in (prompt, prompt.rstrip()):
        head = merging_tokenizer(text)["input_ids"]
        assert whole[: len(head)] != head


def test_text_after_the_answer_is_learned_up_to_its_first_special_token(plain_tokenizer):
    template = "{question}<|assistant|>{answer} .<|end|><|user|>"
    [sample] = tokenize_rows(ROWS[:1], plain_tokenizer, name="forget", template=template).samples
    assert learned(sample.answer, plain_tokenizer) == "Paris .<|end|>"


def test_a_tail_that_would_merge_with_the_answer_leaves_the_boundary_alone(merging_tokenizer):
    template = "{question}<|user|>{answer}ris."
    rows = [{"question": "Where?", "answer": "in Pa"}]
    [sample] = tokenize_rows(rows, merging_tokenizer, name="forget", template=template).samples
    alone = merging_tokenizer("in Pa")["input_ids"]
    labels = sample.answer.labels[sample.answer.labels != IGNORE].tolist()
    assert labels[: len(alone)] == alone
    assert learned(sample.answer, merging_tokenizer) == "in Paris.<eos>"


def test_bos_comes_from_the_tokenizer_and_eos_comes_once(metaspace_tokenizer):
    [sample] = tokenize_rows(ROWS[:1], metaspace_tokenizer, name="forget").samples
    text = "Question: Where does Ida Brun live?\nAnswer: Paris"
    assert sample.answer.input_ids.tolist() == metaspace_tokenizer(text)["input_ids"]
    assert learned(sample.answer, metaspace_tokenizer) == "Paris</s>"
    assert context(sample.answer, metaspace_tokenizer).endswith("Answer:")


def test_an_unknown_token_cannot_hide_the_boundary():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "is": 1, "Paris": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    rows = [{"question": "is", "answer": "Paris is"}]
    [sample] = tokenize_rows(rows, wrapped, name="f", template="{question} A:{answer}").samples
    assert sample.answer.input_ids.tolist() == [1, 0, 2, 1]
    assert sample.answer.labels.tolist() == [IGNORE, IGNORE, 2, 1]


def test_a_tokenizer_without_eos_ends_with_the_answer():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    rows = [{"question": "a", "answer": "b"}]
    [sample] = tokenize_rows(rows, wrapped, name="f", template="{question} {answer}").samples
    assert sample.answer.labels.tolist() == [IGNORE, 1]


# ---- alternatives, sets, checks ----


def test_alternatives_are_the_row_s_own_else_refusals_in_turn(plain_tokenizer):
    rows = [
        {
            "question": f"Where is {i}?",
            "answer": f"in {i}",
            **({"alternative": "away"} if i == 1 else {}),
        }
        for i in range(5)
    ]
    tokenized = tokenize_rows(rows, plain_tokenizer, name="forget", refusals=["No.", "Pass."])
    expected = ["No.", "away", "No.", "Pass.", "No."]
    for row, sample, text in zip(rows, tokenized.samples, expected, strict=True):
        [alternative] = sample.alternatives
        assert_answer_learned(alternative, plain_tokenizer, row["question"], text)
    assert tokenized.has_alternatives

    own_only = tokenize_rows(rows, plain_tokenizer, name="forget")
    assert [len(s.alternatives) for s in own_only.samples] == [0, 1, 0, 0, 0]
    assert not own_only.has_alternatives


def test_a_row_may_have_several_alternatives(plain_tokenizer):
    texts = ["in Oslo", "at home", "on a boat"]
    rows = [
        {"question": "Where is Ida?", "answer": "in Pisa", "alternative": texts},
        {"question": "Where is Mara?", "answer": "in Perth", "alternative": texts[:1]},
    ]
    tokenized = tokenize_rows(read_rows(rows, name="forget"), plain_tokenizer, name="forget")
    for row, sample in zip(rows, tokenized.samples, strict=True):
        for alternative, text in zip(sample.alternatives, row["alternative"], strict=True):
            assert_answer_learned(alternative, plain_tokenizer, row["question"], text)
    assert tokenized.has_alternatives
    counts = [q.n_targets for s in tokenized.samples for q in s.alternatives]
    totals = tokenized.totals()
    assert totals.sequence_targets["alternative"] == tuple(counts)
    assert totals.n_targets["alternative"] == sum(counts)
    [both] = tokenize_rows(
        [TOKENS | {"alternative": [TOKENS, {"input_ids": [1, 3], "labels": [-100, 3]}]}],
        None,
        name="forget",
    ).samples
    assert [q.input_ids.tolist() for q in both.alternatives] == [[1, 2], [1, 3]]


def test_tokenised_rows_are_used_as_they_are_with_or_without_a_tokenizer(plain_tokenizer):
    rows = read_rows(
        [{"input_ids": [7, 8, 9], "labels": [7, IGNORE, 11], "question": "Q?"},
         {"input_ids": torch.tensor([4, 5]), "labels": torch.tensor([IGNORE, 5])}],
        name="forget",
    )  # fmt: skip
    refusals = [{"input_ids": [7, 1, 2], "labels": [IGNORE, 1, 2]},
                {"input_ids": [4, 1], "labels": [IGNORE, 1]}]  # fmt: skip
    for tokenizer in (None, plain_tokenizer):
        tokenized = tokenize_rows(rows, tokenizer, name="forget", refusals=refusals)
        assert [s.answer.input_ids.tolist() for s in tokenized.samples] == [[7, 8, 9], [4, 5]]
        assert [s.answer.labels.tolist() for s in tokenized.samples] == [[7, -100, 11], [-100, 5]]
        assert [[q.labels.tolist() for q in s.alternatives] for s in tokenized.samples] == [
            [[-100, 1, 2]],
            [[-100, 1]],
        ]
        assert tokenized.questions == ("Q?", "")
        assert tokenized.n_tokens == 3 + 2 + 3 + 2
        totals = tokenized.totals()
        assert totals.n_samples == 2
        # The first row labels its first token, which nothing predicts.
        assert totals.n_targets == {"answer": 2, "alternative": 3}
        assert totals.n_labelled == {"answer": 3, "alternative": 3}


def test_weights_stand_at_the_labels(plain_tokenizer):
    hole = {"input_ids": [7, 8, 9, 3], "labels": [7, 8, IGNORE, 3], "weights": [1, 0.5, 2]}
    [sample] = tokenize_rows(read_rows([hole], name="forget"), None, name="forget").samples
    assert sample.answer.weights.dtype == torch.float64
    assert sample.answer.weights.tolist() == [1, 0.5, 0, 2]
    plain = tokenize_rows([TEXT], plain_tokenizer, name="forget")
    [bare] = plain.samples
    weights = [1 + i / 8 for i in range(bare.answer.n_targets)]
    weighted = tokenize_rows([TEXT | {"weights": weights}], plain_tokenizer, name="forget")
    [sample] = weighted.samples
    assert sample.answer.weights[bare.answer.labels != IGNORE].tolist() == weights
    assert not sample.answer.weights[bare.answer.labels == IGNORE].any()
    assert (plain.has_weights, weighted.has_weights) == (False, True)


def test_check_vocabulary_names_row_and_id():
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2], "labels": [-100, 9]}]
    tokenized = tokenize_rows(rows, None, name="retain")
    check_vocabulary(tokenized, 10)
    with pytest.raises(InputError, match=r"retain: row 1 .* token id 9, .* 9 tokens"):
        check_vocabulary(tokenized, 9)


TOKENS = {"input_ids": [1, 2], "labels": [-100, 2]}
TEXT = {"question": "Where?", "answer": "Here."}


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([TEXT], {"tokenizer": None}, r"forget: row 0 .* is text; give a tokenizer"),
        ([TOKENS], {"refusals": ["No."]}, r"row 0 .* is tokenised, its alternative is text; give"),
        ([TOKENS], {"refusals": [TOKENS, TOKENS]}, r"refusals: 2 tokenised refusals for 1 rows"),
        ([TEXT], {"refusals": []}, r"refusals: the list is empty"),
        ([TEXT], {"template": "{question}"}, r"template: '\{question\}' must be 'auto' or hold"),
        ([TEXT], {"template": "{question}{answer}{answer}"}, r"template: .* once"),
        ([TEXT], {"template": "{answer}{question}"}, r"template: .* \{question\} before \{answ"),
        ([TEXT, TOKENS | {"input_ids": [1] * 9, "labels": [1] * 9}], {"max_length": 8},
         r"forget: row 0 .* answer sequence has \d+ tokens, more than max_length=8; shorten"),
        ([TOKENS, {"input_ids": [1] * 9, "labels": [1] * 9}], {"max_length": 8},
         r"forget: row 1 .* answer sequence has 9 tokens, more than max_length=8"),
        ([TEXT], {"refusals": ["long " * 40], "max_length": 40}, r"row 0 .* its alternative"),
        ([TOKENS, TOKENS | {"weights": [1.0, 0.5]}], {},
         r"forget: row 1 .*: 2 'weights' for the 1 label tokens of its answer; .* write them anew"),
        ([TEXT | {"weights": [1.0]}], {}, r"row 0 .*: 1 'weights' for the \d+ label tokens of its"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_name_the_culprit(plain_tokenizer, rows, arguments, message):
    arguments = {"tokenizer": plain_tokenizer, "name": "forget"} | arguments
    with pytest.raises(InputError, match=message) as caught:
        tokenize_rows(rows, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("{{ raise_exception('only\nsystem') }}", r"row 0 .* chat template \(only system\); give"),
        (
            "{{ messages[0].content }}",
            r"row 0 .* chat template \(it shows no assistant turn\); give",
        ),
    ],
)
def test_a_chat_template_that_cannot_show_the_answer_is_refused(
    chat_tokenizer, chat_template, message
):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chat_tokenizer.backend_tokenizer, chat_template=chat_template
    )
    with pytest.raises(InputError, match=message) as caught:
        tokenize_rows([TEXT], tokenizer, name="forget")
    assert "\n" not in str(caught.value)


def test_an_answer_the_tokenizer_drops_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("b", "removed")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    rows = [{"question": "a", "answer": "b"}]
    with pytest.raises(InputError, match=r"row 0 .*answer, has no token to learn"):
        tokenize_rows(rows, wrapped, name="forget", template="{question}{answer}")


def test_fictitious_authors_and_tofu_agree_with_the_labels(plain_tokenizer, tofu):
    rows = make_fictitious_authors(4) + read_rows(tofu / "forget01.json", name="forget")
    refusals = REFUSALS + tuple(read_refusals(tofu / "idontknow.jsonl"))
    tokenized = tokenize_rows(rows, plain_tokenizer, name="forget", refusals=refusals)
    for i, (row, sample) in enumerate(zip(rows, tokenized.samples, strict=True)):
        assert sample.row == i and sample.question == row["question"]
        question, refusal = row["question"].strip(), refusals[i % len(refusals)]
        assert_answer_learned(sample.answer, plain_tokenizer, question, row["answer"].strip())
        [alternative] = sample.alternatives
        assert_answer_learned(alternative, plain_tokenizer, question, refusal)
