"""Conversations written by a tokenizer's chat template, with the places of the answers.

Every answer is replaced by a mark, and the template's text is cut at the marks, so that the
beginning and the end of an answer are known to the character. A template writes calls of tools in a
form of its own, so the beginning of a call is found by the text before it: the conversation up to
the call, with the header of an answer. The result is compared with the template's text of the
conversation itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Rows
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from geffect_fast.data.chat_render import Rendered, render
from geffect_fast.data.conversations import is_learned
from geffect_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Rows[Mapping[str, Any]]
"""Turns of `conversations.checked_conversation`; the content None is filled in later."""

CHAT_DATE = "2024-07-26"
"""The day that chat templates are told unless another is given. It is fixed, so that a run can be
replayed on any day, and is the day in Llama's own template."""

CHARACTERS = 1_000_000
"""Most characters that a template may add to those of a conversation."""
_MARK = "@@answer@@"


@dataclass(frozen=True)
class Spoken:
    """One answer of a conversation, with the text before it and the text that ends it.

    `before` is the text since the previous answer. `answer` is None where the answer is to be
    filled in. `end` is the text that the template writes behind the answer where the conversation
    ends there.
    """

    before: str
    answer: str | None
    end: str


class ChatTemplate:
    """The chat template of a tokenizer, on a given day."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str) -> None:
        self._tokenizer, self._day = tokenizer, checked_date(date)
        self._rendered: dict[str, Rendered] = {}

    def render(self, conversations: Iterable[tuple[Turns, Any]]) -> None:
        """Let the template write the texts of turns and tools, all in one child process."""
        keys = list(dict.fromkeys(_key(turns, tools) for turns, tools in conversations))
        self._rendered |= zip(keys, render(self._spoken, keys), strict=False)

    def spoken(self, turns: Turns, tools: Any) -> list[Spoken]:
        """The answers of a conversation.

        Raises:
            ValueError: the template cannot write them; the message says why.
        """
        key = _key(turns, tools)
        if key not in self._rendered:
            self.render([(turns, tools)])
        found = self._rendered[key]
        if found.reason:
            raise ValueError(found.reason)
        return [Spoken(*each) for each in json.loads(found.text)]

    def _spoken(self, key: str) -> str:
        """The answers of a conversation as JSON, which the child process sends back."""
        turns, tools = json.loads(key)
        mark = _MARK
        while mark in key:
            mark += "@"
        marked = [
            {**turn, "content": mark} if is_learned(turn) and not turn.get("tool_calls") else turn
            for turn in turns
        ]
        whole = self._apply(marked, tools)
        found, at = [], 0
        for i, turn in enumerate(marked):
            if not is_learned(turn):
                continue
            upto = whole if i == len(turns) - 1 else self._apply(marked[: i + 1], tools)
            if turn.get("tool_calls"):
                begin, answer = self._call(marked, i, tools, upto)
                if whole[begin : begin + len(answer)] != answer or begin < at:
                    raise ValueError("it shows calls of tools by what follows them")
                found.append((whole[at:begin], answer, ""))  # the call includes its end
                at = begin + len(answer)
            else:
                begin = whole.find(mark, at)
                if begin < 0:
                    raise ValueError("it shows no assistant turn" + (f" {i}" if i > 1 else ""))
                found.append((whole[at:begin], turns[i]["content"], upto.rpartition(mark)[2]))
                at = begin + len(mark)
        if mark in whole[at:]:
            raise ValueError("it shows an answer twice")
        if all(turn["content"] is not None for turn in turns):
            shown = "".join(before + answer for before, answer, _ in found) + whole[at:]
            if self._apply(turns, tools) != shown:
                raise ValueError("it rewrites what the assistant says, such as its reasoning")
        return json.dumps(found)

    def _call(self, turns: Turns, i: int, tools: Any, upto: str) -> tuple[int, str]:
        """The place where turn `i`, a call of tools, begins in `upto`, and the text of the turn."""
        before = self._apply(turns[:i], tools, add_generation_prompt=True)
        if before == self._apply(turns[:i], tools) or not upto.startswith(before):
            raise ValueError("where a call of a tool begins in it cannot be told")
        return len(before), upto[len(before) :].rstrip()

    def _apply(self, turns: Turns, tools: Any, **how: bool) -> str:
        with _clock_at(self._day):
            text = self._tokenizer.apply_chat_template(
                turns,
                tools=tools,
                tokenize=False,
                date_string=self._day.strftime("%d %b %Y"),
                **how,
            )
        if len(text) > sum(len(str(turn)) for turn in turns) + CHARACTERS:
            raise ValueError(f"it writes {len(text)} characters")
        return str(text)


def checked_date(date: str) -> datetime:
    """Midnight of a day; raises `InputError` where `date` is not a day."""
    try:
        return datetime.strptime(date, "%Y-%m-%d")
    except (TypeError, ValueError):
        raise InputError(f"date: {date!r} must be a day such as '{CHAT_DATE}'") from None


def _key(turns: Turns, tools: Any) -> str:
    return json.dumps([turns, tools], default=str)


@contextmanager
def _clock_at(day: datetime) -> Iterator[None]:
    """Make the function `strftime_now` of chat templates tell a given day, inside the context.

    transformers has no argument for the day.
    """
    from transformers.utils import chat_template_utils

    clock = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda: day)
    try:
        yield
    finally:
        chat_template_utils.datetime = clock
