"""Encoding of text as token ids and labels, with one tokenizer and template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Any

from geffect_fast.data.batch import IGNORE
from geffect_fast.data.chat_template import ChatTemplate, Spoken, Turns
from geffect_fast.data.conversations import is_learned
from geffect_fast.data.fewest_tokens import FewestTokens
from geffect_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = "Question: {question}\nAnswer: {answer}"
"""The template that `auto` stands for with a tokenizer without a chat template."""

Labelled = tuple[list[int], list[int]]
"""Token ids, and unshifted labels with `IGNORE` where nothing is learned."""


class Encoder:
    """An encoder of conversations, texts and continuations as ids and labels.

    Args:
        tokenizer: a tokenizer of transformers.
        template: `auto`, or a text with `{question}` and then `{answer}`.
        date: the day that a chat template is told.
        most: the most tokens that a sequence may have; None where no limit is known.

    Raises:
        InputError: a bad tokenizer, template or date.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, date: str, most: int | None
    ) -> None:
        if not callable(tokenizer):
            raise InputError(
                f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}; "
                "load it with AutoTokenizer.from_pretrained"
            )
        if not isinstance(template, str):
            raise InputError(f"template: got {type(template).__name__}; give 'auto' or a text")
        self.tokenizer = tokenizer
        self._most, self._fewest = most, FewestTokens(tokenizer)
        written = ChatTemplate(tokenizer, date)
        chats = template == "auto" and bool(getattr(tokenizer, "chat_template", None))
        self._chat = written if chats else None
        if template == "auto":
            template = PLAIN_TEMPLATE
        if template.count("{question}") != 1 or template.count("{answer}") != 1:
            raise InputError(
                f"template: {template!r} must be 'auto' or hold {{question}} and {{answer}} once"
            )
        self._before, _, rest = template.partition("{question}")
        self._between, answer, self._after = rest.partition("{answer}")
        if not answer:
            raise InputError(f"template: {template!r} must put {{question}} before {{answer}}")
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._begin = [tokenizer.bos_token_id] if begins else []
        added = getattr(tokenizer, "added_tokens_decoder", None)
        of_added = added.items() if isinstance(added, Mapping) else ()  # mistral-common has none
        self._special = set(tokenizer.all_special_ids) | {i for i, t in of_added if t.special}

    def render(self, conversations: Iterable[tuple[Turns, Any]]) -> None:
        """Let the chat template, if there is one, write all these conversations at once."""
        if self._chat is not None:
            self._chat.render(conversations)

    def conversation(
        self, turns: Turns, tools: Any, place: str, answer: str | None = None, ends: bool = True
    ) -> Labelled:
        """Encode a conversation up to its last turn that is learned.

        Every learned turn is labelled, and so is the token that ends the turn: the first special
        token that the template writes behind the turn, or without a chat template the tokenizer's
        end of sequence.

        Args:
            turns: turns of `conversations.checked_conversation`, without white space around them.
            tools: the tools that a chat template is told.
            place: the row's place, for messages.
            answer: a text in place of the last learned turn; only this text is then labelled.
            ends: whether the last answer gets the token that ends it.

        Raises:
            InputError: the template cannot write the conversation, the text is too long, or it has
                no token to learn.
        """
        ids: list[int] = []
        labels: list[int] = []
        if answer is not None and turns[-1].get("tool_calls"):
            raise InputError(
                f"{place} takes the place of a call of a tool; leave the row out, or its call"
            )
        if self._chat is None:  # a chat template writes the beginning of sequence itself
            ids, labels = list(self._begin), [IGNORE] * len(self._begin)
        blocks = list(self._blocks(turns, tools, place))
        for number, (spoken, learned) in enumerate(blocks):
            last = number == len(blocks) - 1
            if answer is not None and last:
                spoken = [*spoken[:-1], Spoken(spoken[-1].before, answer, spoken[-1].end)]
            # With another answer in its place, the last turn alone is learned.
            first_learned = 0 if answer is None else len(spoken) - 1
            more, own = self._block(spoken, first_learned, ends or not last, place)
            ids += more
            labels += own if learned and (answer is None or last) else [IGNORE] * len(own)
        if all(label == IGNORE for label in labels[1:]):
            raise InputError(f"{place} has no token to learn after a first one; check the template")
        return ids, labels

    def continuation(self, prompt: str, text: str, place: str) -> Labelled:
        """Encode a text after a prompt that is not learned.

        A space is put between the two where neither has white space at that place.
        """
        parted = prompt[-1:].isspace() or text[:1].isspace()
        ids, first = self._pair([], "", prompt + ("" if parted else " "), text)
        self._check_length(prompt + text, place)
        return self._begin + ids, [IGNORE] * (len(self._begin) + first) + ids[first:]

    def windows(self, text: str, length: int, place: str) -> Iterator[Labelled]:
        """Encode a text in windows of at most `length` tokens; each of its tokens is a label once.

        The text is tokenised as a whole. Where the tokenizer begins texts with a token of its own,
        so does every window. Otherwise every window but the first begins with the last token of the
        previous window, without a label. All tokens are therefore predicted, except the first token
        of a text where the tokenizer adds none.
        """
        ids = self._ids(text)
        if len(self._begin) + len(ids) < 2:
            raise InputError(f"{place} has no token to learn after a first one; leave it out")
        for at in range(0, len(ids) - (not self._begin), length - 1):
            if self._begin:
                own = ids[at : at + length - 1]
                yield self._begin + own, [IGNORE, *own]
            else:
                own = ids[at : at + length]
                yield own, [IGNORE if at else own[0], *own[1:]]

    # ---- conversations ----

    def _blocks(self, turns: Turns, tools: Any, place: str) -> Iterator[tuple[list[Spoken], bool]]:
        """Parts of a conversation that are tokenised apart, and whether each part is learned."""
        if self._chat is not None:
            try:
                yield self._chat.spoken(turns, tools), True
            except ValueError as error:
                raise InputError(
                    f"{place} does not fit the tokenizer's chat template ({str(error)[:200]}); "
                    "give template='...{question}...{answer}'"
                ) from None
            return
        begun = "" if turns[0]["role"] == "user" else f"{turns[0]['content']}\n"
        rest = turns[1:] if begun else turns
        roles = [turn["role"] for turn in rest]
        alternate = len(rest) % 2 == 0 and roles == ["user", "assistant"] * (len(rest) // 2)
        if (
            not alternate
            or turns[0]["role"] not in ("user", "system", "developer")
            or any(turn.get("tool_calls") for turn in rest)
        ):
            raise InputError(
                f"{place} has turns other than an optional system turn and alternating user and "
                "assistant turns, which need a chat template; give a tokenizer that has one "
                "(--tokenizer)"
            )
        for question, answer in zip(rest[::2], rest[1::2], strict=True):
            before = begun + self._before + question["content"] + self._between
            begun = "\n"
            yield [Spoken(before, answer["content"], self._after)], is_learned(answer)

    def _block(self, spoken: Rows[Spoken], first_learned: int, ends: bool, place: str) -> Labelled:
        """Ids and labels of answers and of the texts between them, to the last answer's end."""
        pairs = [(each.before, str(each.answer)) for each in spoken]
        text = "".join(before + answer for before, answer in pairs)
        self._check_length(text, place)
        ids, spans = self._pairs(pairs, text)
        n_body = len(ids)
        if ends and spoken[-1].end:
            ids = self._continue(ids, text, spoken[-1].end)
        end = self._first_special(ids, n_body)
        if end is not None:
            ids = ids[: end + 1]
        elif ends and self._chat is None and self.tokenizer.eos_token_id is not None:
            ids = [*ids, self.tokenizer.eos_token_id]
        labels = [IGNORE] * len(ids)
        for number, (first, stop) in enumerate(spans):
            if first == stop and number >= first_learned:
                raise InputError(
                    f"{place} has no token to learn after a first one; check the template"
                )
            if number == len(spans) - 1:
                stop = len(ids)
            else:
                own = self._ids(spoken[number].end)
                ended, written = self._first_special(ids, stop), self._first_special(own, 0)
                if ended is not None and written is not None and ids[ended] == own[written]:
                    stop = ended + 1
            if number >= first_learned:
                labels[first:stop] = ids[first:stop]
        return ids, labels

    def _first_special(self, ids: list[int], start: int) -> int | None:
        return next((i for i in range(start, len(ids)) if ids[i] in self._special), None)

    def _check_length(self, text: str, place: str) -> None:
        fewest = 0 if self._most is None else self._fewest(text)
        if self._most is not None and fewest > self._most:
            raise InputError(
                f"{place} has {len(text)} characters, at least {fewest} tokens, more than "
                f"{self._most} (the model's positions, or max_length); shorten or drop the row"
            )

    # ---- tokens that do not straddle a boundary ----

    def _pairs(
        self, pairs: list[tuple[str, str]], text: str
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of pairs (text before an answer, answer), and the span of each answer in the ids.

        `text` is all pairs joined. Where the parts tokenised apart give the ids of the whole, as
        between a chat template's special tokens, no token straddles a boundary and the ids are
        final. Otherwise every boundary is tried, in time that grows with the square of the turns.
        """
        parts = [self._ids(part) for pair in pairs for part in pair] if len(pairs) > 1 else []
        ids = [token for part in parts for token in part]
        spans, at = [], 0
        if parts and self.tokenizer.unk_token_id not in ids and ids == self._ids(text):
            for head, own in zip(parts[::2], parts[1::2], strict=True):
                spans.append((at + len(head), at + len(head) + len(own)))
                at = spans[-1][1]
            return ids, spans
        ids, text = [], ""
        for before, answer in pairs:
            ids, first = self._pair(ids, text, before, answer)
            text += before + answer
            spans.append((first, len(ids)))
        return ids, spans

    def _pair(self, ids: list[int], text: str, before: str, answer: str) -> tuple[list[int], int]:
        """Ids of `text`, `before` and `answer`, beginning with `ids`, and the answer's first place.

        A tokenizer that ties a space to the following word takes the last space before an answer
        into the answer. If no prefix of the ids is the text before the answer, a token straddles
        the boundary, and the two are tokenised apart.
        """
        whole = self._ids(text + before + answer)
        head: list[int] = []
        if self._begins(whole, ids):
            for head_text in (text + before, (text + before).rstrip(" ")):
                head = self._ids(head_text)
                if self._begins(whole, head) and len(head) >= len(ids):
                    return whole, len(head)
        if ids:
            more, first = self._pair([], "", before, answer)
            return ids + more, len(ids) + first
        return head + self._ids((before + answer)[len(head_text) :]), len(head)

    def _continue(self, ids: list[int], text: str, more: str) -> list[int]:
        """Ids of `text + more` that begin with the ids of `text`."""
        whole = self._ids(text + more)
        return whole if self._begins(whole, ids) else ids + self._ids(more)

    def _begins(self, whole: list[int], head: list[int]) -> bool:
        # An unknown token stands for any length of text, so it is no evidence as a prefix.
        known = not head or head[-1] != self.tokenizer.unk_token_id
        return known and whole[: len(head)] == head

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
