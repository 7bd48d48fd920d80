"""Conversations as OpenAI (`messages`) and ShareGPT (`conversations`) write them, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from geffect_fast.data.row_checks import check_text, missing
from geffect_fast.errors import InputError, in_one_line

_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response"), "tool"),
}
"""Roles of chat templates, by the names that data gives to speakers."""


def is_turns(raw: Any) -> bool:
    """Whether a bare row is a list of turns."""
    return (
        isinstance(raw, list | tuple)
        and bool(raw)
        and isinstance(raw[0], Mapping)
        and ({"role", "content"} <= raw[0].keys() or {"from", "value"} <= raw[0].keys())
    )


def is_learned(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is learned: a turn of the assistant's is, unless OpenAI's `weight` is 0."""
    return turn["role"] == "assistant" and turn.get("weight") != 0


def checked_conversation(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row's `messages` and, if it has some, `tools`, in the form that chat templates take.

    Args:
        row: a row with `messages` or `conversations`; beside `conversations` the field `system` may
            hold the system's turn. `tools` may be a list or JSON of a list.
        where: the row's place, for messages.

    Raises:
        InputError: a turn has the wrong form, no turn of the assistant's is learned, or `tools` is
            no list.
    """
    found: dict[str, Any] = {"messages": _turns(row, where)}
    tools = row.get("tools")
    if not missing(tools) and tools != "":
        found["tools"] = _parsed(tools) if isinstance(tools, str) else tools
        if not isinstance(found["tools"], list):
            raise InputError(f"{where}: 'tools' is no list of tools; give one, or leave it out")
    return found


def _turns(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    field = "messages" if "messages" in row else "conversations"
    raw = row[field]
    raw = raw.tolist() if hasattr(raw, "tolist") else raw
    if not isinstance(raw, list | tuple):
        raise InputError(
            f"{where}: '{field}' is of type {type(raw).__name__}; make it a list of turns"
        )
    turns = [_turn(turn, f"{where}, turn {i} of '{field}'") for i, turn in enumerate(raw)]
    system = row.get("system")
    said = field == "conversations" and isinstance(system, str) and system.strip()
    if said and turns and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    if not any(map(is_learned, turns)):
        raise InputError(
            f"{where}: '{field}' has no turn of the assistant's to learn; add one or leave the "
            "row out"
        )
    return turns


def _turn(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise InputError(
            f"{where} is of type {type(raw).__name__}; give an object with 'role' and 'content'"
        )
    who, says = ("from", "value") if "from" in raw and "role" not in raw else ("role", "content")
    # In a table, a turn has every field that any turn has, with missing values.
    turn = {key: value for key, value in raw.items() if not missing(value)}
    role = _ROLES.get(turn[who]) if isinstance(turn.get(who), str) else None
    if role is None:
        given = in_one_line(repr(raw.get(who)), 40)
        raise InputError(
            f"{where} has {who!r} {given}; use system, user, assistant or tool, or ShareGPT's "
            "human and gpt"
        )
    turn.pop(who)
    calls = turn.get("tool_calls")
    if calls and role == "assistant":
        turn["tool_calls"] = [_call(call, where) for call in calls]
    content = turn.pop(says, "" if calls else None)
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    elif isinstance(content, list):
        raise InputError(f"{where} holds parts other than text; keep the text alone")
    if not (content == "" and (calls or role == "tool")):
        content = check_text({says: content}, says, where)
    return {**turn, "role": role, "content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call of a tool with its arguments as an object, which OpenAI writes as a JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: a call in 'tool_calls' has no 'name' of a function; add it")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
        if arguments is None:
            raise InputError(f"{where}: 'arguments' of {function['name']!r} is no JSON; mend it")
    made = {**function, "arguments": arguments or {}}
    return {**call, "function": made} if "function" in call else made


def _parsed(text: str) -> Any:
    """The value of a JSON text; None where the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
