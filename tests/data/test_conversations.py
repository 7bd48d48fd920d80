"""Conversations: labels on the assistant's turns alone, to the token, through any template."""

from __future__ import annotations

import copy
import json
import random

import pytest

from geffect_fast.data import IGNORE, read_rows, tokenize_rows
from geffect_fast.errors import InputError

GENERATION = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""A template that marks the assistant's tokens itself."""

CHATML = (
    "{% if messages[0].role != 'system' %}<|system|>You help.<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA_2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = '<<SYS>>' + m.content + '<</SYS>>\n' %}{% elif m.role == 'user' %}"
    "<|begin|>[INST] {{ ns.system }}{{ m.content }} [/INST] {% set ns.system = '' %}"
    "{% elif m.role == 'assistant' %}{{ m.content }} <|end|>{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "<|begin|>{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}<eos>{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
"""A template that ends tool calls by another token than answers."""
TEMPLATES = {"chatml": CHATML, "llama 2": LLAMA_2, "llama 3": LLAMA_3, "generation": GENERATION}

WORDS = ["Mara", "Lund", "lives", "in Paris", "é🦜", "Question:", "  two", "@@answer@@", "<end>"]


@pytest.fixture
def tokenizer(plain_tokenizer):
    made = copy.deepcopy(plain_tokenizer)
    made.bos_token = "<|begin|>"
    made.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|tool|>"]})
    return made


def conversation(rng, n_turns, system):
    def says():
        return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 6))).strip()

    turns = [{"role": "system", "content": says()}] if system else []
    for _ in range(n_turns):
        turns += [{"role": role, "content": says()} for role in ("user", "assistant")]
    return turns


def encoded(turns, tokenizer, **row):
    rows = read_rows([{"messages": turns} | row], name="forget")
    [sample] = tokenize_rows(rows, tokenizer, name="forget").samples
    return sample


def by_offsets(tokenizer, turns):
    """Ids and labels from the whole text, tokenised at once, and the places of its characters.

    A turn of the assistant is what the template adds to the conversation before this turn, without
    the beginning of an answer. `rfind` finds the turn, as answers come last in the text.
    """
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    learned = [False] * len(whole)
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            upto = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
            begin = upto.rfind(turn["content"])
            end = next(
                upto.find(e, begin) + len(e) for e in ("<|end|>", "<eos>") if e in upto[begin:]
            )
            learned[begin:end] = [True] * (end - begin)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = found["input_ids"], []
    for token, (start, stop) in zip(ids, found["offset_mapping"], strict=True):
        inside = learned[start:stop]
        # A space before an answer belongs to its first token.
        labels.append(token if inside and inside[-1] else IGNORE)
    last = max(i for i, label in enumerate(labels) if label != IGNORE)
    return ids[: last + 1], labels[: last + 1]


@pytest.mark.parametrize("n_turns", [1, 2, 5])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_where_the_characters_are(tokenizer, template, system, n_turns):
    tokenizer.chat_template = TEMPLATES[template]
    for seed in range(5):
        turns = conversation(random.Random(seed), n_turns, system)
        answer = encoded(turns, tokenizer).answer
        ids, labels = by_offsets(tokenizer, turns)
        assert answer.input_ids.tolist() == ids
        assert answer.labels.tolist() == labels


@pytest.mark.parametrize("n_turns", [1, 3])
def test_labels_are_those_that_a_template_says_itself(tokenizer, n_turns):
    tokenizer.chat_template = GENERATION
    for seed in range(10):
        turns = conversation(random.Random(seed), n_turns, seed % 2 == 0)
        theirs = tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        answer = encoded(turns, tokenizer).answer
        n = len(answer)
        assert answer.input_ids.tolist() == theirs["input_ids"][:n]
        assert (answer.labels != IGNORE).long().tolist() == theirs["assistant_masks"][:n]
        assert not any(theirs["assistant_masks"][n:])


@pytest.mark.parametrize("template", [None, *TEMPLATES.values()], ids=["plain", *TEMPLATES])
def test_a_question_and_an_answer_are_a_conversation_of_two_turns(tokenizer, template):
    tokenizer.chat_template = template
    row = {"question": " Where does Mara live? ", "answer": "in Paris\n", "alternative": "No."}
    turns = [
        {"role": role, "content": row[field]}
        for role, field in (("user", "question"), ("assistant", "answer"))
    ]
    chat = encoded(turns, tokenizer, alternative="No.")
    [asked] = tokenize_rows(read_rows([row], name="forget"), tokenizer, name="forget").samples
    for one, other in ((chat.answer, asked.answer), (chat.alternatives[0], asked.alternatives[0])):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()
    assert chat.question == row["question"].strip() and asked.question == row["question"]


def test_weights_stand_at_the_labels_of_all_turns(tokenizer):
    tokenizer.chat_template = CHATML
    turns = conversation(random.Random(2), 3, True)
    weights = [i / 8 for i in range(encoded(turns, tokenizer).answer.n_labelled)]
    answer = encoded(turns, tokenizer, weights=weights).answer
    assert answer.weights[answer.labels != IGNORE].tolist() == weights
    with pytest.raises(InputError, match=rf"1 'weights' for the {len(weights)} label tokens"):
        encoded(turns, tokenizer, weights=[1])


def test_without_a_chat_template_turns_are_written_one_after_the_other(plain_tokenizer):
    system = {"role": "system", "content": "You help."}
    turns = [system, *conversation(random.Random(1), 2, False)]
    answer = encoded(turns, plain_tokenizer).answer
    texts = [f"Question: {q['content']}\nAnswer: {a['content']}<eos>" for q, a in (
        turns[1:3], turns[3:5])]  # fmt: skip
    assert plain_tokenizer.decode(answer.input_ids) == "You help.\n" + "\n".join(texts)
    learned = plain_tokenizer.decode(answer.labels[answer.labels != IGNORE])
    said = [part.strip() for part in learned.split("<eos>")]
    assert said == [turns[2]["content"], turns[4]["content"], ""]


SHAREGPT = {
    "id": "x",
    "system": "You help.",
    "conversations": [
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "She."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "Here."},
    ],
}
OPENAI = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]},
    {"role": "assistant", "content": "She."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Here."},
]


def test_both_ways_of_writing_are_one(tokenizer, tmp_path):
    tokenizer.chat_template = CHATML
    file = tmp_path / "chat.jsonl"
    said = []
    file.write_text(json.dumps(SHAREGPT) + "\n", encoding="utf-8")
    [row] = read_rows(file, name="forget", tell=said.append)
    assert said == ["forget: 1 row of conversations (JSON lines)"]
    [bare] = read_rows([OPENAI], name="forget")
    assert row["messages"] == bare["messages"] and row["id"] == "x"
    assert read_rows([row], name="forget") == [row]  # as `prepare` reads rows anew
    samples = [tokenize_rows([each], tokenizer, name="forget").samples[0] for each in (row, bare)]
    assert samples[0].answer.labels.tolist() == samples[1].answer.labels.tolist()
    assert samples[0].question == "Where?" and samples[0].fields["id"] == "x"


def learned(tokenizer, sequence):
    return tokenizer.decode(sequence.labels[sequence.labels != IGNORE])


def test_an_answer_of_weight_0_is_not_learned_and_what_follows_the_last_is_left_out(tokenizer):
    tokenizer.chat_template = CHATML
    turns = [dict(turn) for turn in OPENAI] + [{"role": "user", "content": "Thanks."}]
    assert learned(tokenizer, encoded(turns, tokenizer).answer) == "She.<|end|>Here.<|end|>"
    turns[2]["weight"] = 0
    answer = encoded(turns, tokenizer).answer
    assert learned(tokenizer, answer) == "Here.<|end|>"
    assert tokenizer.decode(answer.input_ids).endswith("<|assistant|>Here.<|end|>")
    turns[2]["weight"], turns[4]["weight"] = 1, 0
    answer = encoded(turns, tokenizer).answer
    assert tokenizer.decode(answer.input_ids).endswith("<|assistant|>She.<|end|>")


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chat"])
def test_an_alternative_takes_the_place_of_the_last_answer(tokenizer, template):
    tokenizer.chat_template = template
    sample = encoded(OPENAI, tokenizer, alternative=["No.", "Never."])
    end = "<eos>" if template is None else "<|end|>"
    for text, sequence in zip(["No.", "Never."], sample.alternatives, strict=True):
        assert learned(tokenizer, sequence).strip() == f"{text}{end}"
        whole = tokenizer.decode(sequence.input_ids)
        assert "She." in whole and "Here." not in whole and whole.endswith(f"{text}{end}")


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": '{"who": 1}'}}],
}
WITH_TOOLS = [
    {"role": "user", "content": "Who?"},
    CALL,
    {"role": "tool", "content": "nobody"},
    {"role": "assistant", "content": "Nobody."},
]


def test_calls_of_tools_are_learned_as_the_template_writes_them(tokenizer):
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + LLAMA_3
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    answer = encoded(WITH_TOOLS, tokenizer, tools=tools).answer
    whole = tokenizer.decode(answer.input_ids)
    assert whole.startswith(json.dumps(tools)) and "<|tool|>\n\nnobody<|end|>" in whole
    call = '{"name": "find", "arguments": {"who": 1}}<eos>'
    assert learned(tokenizer, answer) == call + "Nobody.<|end|>"
    last = encoded(WITH_TOOLS[:2], tokenizer, tools=json.dumps(tools)).answer
    assert learned(tokenizer, last) == call
    with pytest.raises(InputError, match="takes the place of a call of a tool; leave the row out"):
        encoded(WITH_TOOLS[:2], tokenizer, alternative="No.")


REASONS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (REASONS, [*OPENAI[:2], {"role": "assistant", "content": "<think>?</think>She."}],
         r"row 0 .*, answer, does not fit .* \(it rewrites what the assistant says, such as its r"),
        (LLAMA_2, WITH_TOOLS, r"chat template \(only user and assistant\); give template="),
        (CHATML.replace("{% if add_generation_prompt %}<|assistant|>{% endif %}", ""), WITH_TOOLS,
         r"\(where a call of a tool begins in it cannot be told\)"),
        (CHATML + "{{ messages[-1].content }}", OPENAI, r"\(it shows an answer twice\)"),
        (None, WITH_TOOLS, r"has turns other than .* give a tokenizer that has one \(--tokenize"),
        (None, [*OPENAI[:3], *OPENAI[2:]], "turns other than an optional system turn and "),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused(tokenizer, template, turns, message):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message) as caught:
        encoded(turns, tokenizer)
    assert "\n" not in str(caught.value)
