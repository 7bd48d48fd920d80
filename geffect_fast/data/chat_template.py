"""What a tokenizer's chat template makes of a conversation, and where in it the assistant speaks.

Every answer is replaced by a mark, and what the template writes is cut at the marks, so that where
an answer begins and ends is known to the character. Calls of tools, which templates write in forms
of their own, are told by what stands before: the conversation up to there with the header of an
answer. Both are compared with what the template makes of the conversation itself.
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
"""As `conversations.checked_turns` returns them; an answer of None is filled in later."""

CHAT_DATE = "2024-07-26"
"""The day that chat templates are told, unless another is given; a fixed one lets a run be replayed
on any day. It is the one in Llama's own template."""

CHARACTERS = 1_000_000
"""Characters that a template may write around a conversation's own."""
_MARK = "@@answer@@"


@dataclass(frozen=True)
class Spoken:
    """One answer of a conversation: the text before it, since the last one, and what ends it.

    `answer` is None where it is to be filled in. `end` is what the template writes behind the
    answer where the conversation ends there.
    """

    before: str
    answer: str | None
    end: str


class ChatTemplate:
    """The chat template of a tokenizer on a day."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str) -> None:
        self._tokenizer, self._day = tokenizer, checked_date(date)
        self._rendered: dict[str, Rendered] = {}

    def render(self, conversations: Iterable[tuple[Turns, Any]]) -> None:
        """Have the template make its texts of turns and tools, all in one process."""
        keys = list(dict.fromkeys(_key(turns, tools) for turns, tools in conversations))
        self._rendered |= zip(keys, render(self._spoken, keys), strict=False)

    def spoken(self, turns: Turns, tools: Any) -> list[Spoken]:
        """The answers of a conversation.

        Raises:
            ValueError: the template cannot show them; the message says why.
        """
        key = _key(turns, tools)
        if key not in self._rendered:
            self.render([(turns, tools)])
        found = self._rendered[key]
        if found.reason:
            raise ValueError(found.reason)
        return [Spoken(*each) for each in json.loads(found.text)]

    def _spoken(self, key: str) -> str:
        """`spoken`, as text: what the process of the template sends back."""
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
                found.append((whole[at:begin], answer, ""))  # the call has its end in it
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
        """Where turn `i`, a call of tools, begins in a text that ends with it, and its text."""
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
    """Midnight of a day; raise `InputError` where `date` is none."""
    try:
        return datetime.strptime(date, "%Y-%m-%d")
    except (TypeError, ValueError):
        raise InputError(f"date: {date!r} must be a day such as '{CHAT_DATE}'") from None


def _key(turns: Turns, tools: Any) -> str:
    return json.dumps([turns, tools], default=str)


@contextmanager
def _clock_at(day: datetime) -> Iterator[None]:
    """The function `strftime_now` of chat templates tells this day; transformers takes no other."""
    from transformers.utils import chat_template_utils

    clock = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda: day)
    try:
        yield
    finally:
        chat_template_utils.datetime = clock
