"""Conversations and preferences, from the layouts in which people keep them.

    {"messages": [{"role", "content"}…], "tools": […]}          OpenAI's
    {"conversations": [{"from", "value"}…], "tools": "…"}       ShareGPT's
    {"instruction", "input", "output"}                          Alpaca's
    {"prompt", "answer"}                                        ours

A preference has `chosen` and `rejected` in place of the last answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]


class Function(msgspec.Struct, frozen=True):
    name: str
    arguments: dict[str, Any] | str = {}


class ToolCall(msgspec.Struct, frozen=True):
    function: Function


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class Conversation(msgspec.Struct, frozen=True):
    """The assistant's turns are what is learnt."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


class Preference(msgspec.Struct, frozen=True):
    """Two answers to the same conversation, the first the better one."""

    prompt: Conversation
    chosen: str
    rejected: str


class Unreadable(ValueError):
    """The record is in none of the layouts, or lacks something. The message says what."""


def conversation(record: Mapping[str, Any], *, fill: Mapping[str, str] | None = None) -> Conversation:
    """One record, with each `{{name}}` in it replaced by `fill["name"]`. Raises Unreadable."""
    found = Conversation(_messages(record, fill or {}), _tools(record))
    if not any(it.role == "assistant" for it in found.messages):
        raise Unreadable("the assistant says nothing in it, so there is nothing to learn")
    return found


def preference(record: Mapping[str, Any], *, fill: Mapping[str, str] | None = None) -> Preference:
    """One record with two answers. Raises Unreadable."""
    fill = fill or {}
    prompt = Conversation(_messages(record, fill), _tools(record))
    if not prompt.messages or prompt.messages[-1].role == "assistant":
        raise Unreadable("its conversation must end before the answers that are to be compared")
    chosen, rejected = (_answer(record, name, fill) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise Unreadable("the chosen answer is the rejected one")
    return Preference(prompt, chosen, rejected)


def _messages(record: Mapping[str, Any], fill: Mapping[str, str]) -> tuple[Message, ...]:
    if "messages" in record:
        turns = record["messages"]
    elif "conversations" in record:
        turns = [_turn(it) for it in _list(record, "conversations")]
    elif "instruction" in record:
        asked = "\n".join(text for text in (_text(record, "instruction"), record.get("input") or "") if text)
        turns = _exchange(asked, record, "output")
    elif "prompt" in record:
        turns = _exchange(_text(record, "prompt"), record, "answer")
    else:
        raise Unreadable(
            f"it has {', '.join(sorted(record)) or 'no field'}; a conversation has `messages`, `conversations`, "
            "`instruction` and `output`, or `prompt` and `answer`"
        )
    try:
        messages = msgspec.convert(turns, tuple[Message, ...])
    except msgspec.ValidationError as error:
        raise Unreadable(str(error)) from error
    return tuple(msgspec.structs.replace(it, content=_filled(it.content, fill)) for it in messages)


def _exchange(asked: str, record: Mapping[str, Any], answer: str) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": asked}]
    if "chosen" not in record:
        turns.append({"role": "assistant", "content": _text(record, answer)})
    return turns


_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system", "function_call": "assistant"}


def _turn(said: Any) -> dict[str, Any]:
    if not isinstance(said, Mapping) or said.get("from") not in _ROLES or not isinstance(said.get("value"), str):
        raise Unreadable(f"a turn of `conversations` has `from`, one of {', '.join(_ROLES)}, and `value`, a text")
    role = _ROLES[said["from"]]
    if said["from"] != "function_call":
        return {"role": role, "content": said["value"]}
    try:
        return {"role": role, "tool_calls": [{"function": msgspec.json.decode(said["value"])}]}
    except msgspec.DecodeError as error:
        raise Unreadable(f"a turn from `function_call` is not JSON: {error}") from error


def _answer(record: Mapping[str, Any], name: str, fill: Mapping[str, str]) -> str:
    said = record.get(name)
    if isinstance(said, list) and len(said) == 1:
        [said] = said
    if isinstance(said, Mapping):
        said = said.get("value", said.get("content"))
    if not isinstance(said, str) or not said:
        raise Unreadable(f"`{name}` is not an answer: give a text, or one message")
    return _filled(said, fill)


def _tools(record: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = record.get("tools") or []
    try:
        if isinstance(tools, str):
            tools = msgspec.json.decode(tools)
        return msgspec.convert(tools, tuple[dict[str, Any], ...])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Unreadable(f"`tools` is not a list of tools: {error}") from error


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(record[name], list):
        raise Unreadable(f"`{name}` is not a list")
    return list(record[name])


def _text(record: Mapping[str, Any], name: str) -> str:
    if not isinstance(record.get(name), str) or not record[name]:
        raise Unreadable(f"`{name}` is empty or no text")
    return str(record[name])


def _filled(text: str, fill: Mapping[str, str]) -> str:
    for name, value in fill.items():
        text = text.replace("{{" + name + "}}", value)
    return text
