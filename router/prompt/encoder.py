"""Messages in, prompt string out, character for character as DeepSeek-V4's own encoder writes it. Pure.

Called by `router.prompt`. A prompt is BOS, an effort prefix if asked for, and the messages one after another
with nothing in between. Texts that belong to a checkpoint come from `router.prompt.texts`.

Behaviour kept from the original although one would not guess it:

- A call without arguments leaves an empty line inside its invoke block.
- Arguments that are not the text of a JSON object become one string parameter named "arguments".
- A user message that a latest_reminder follows gets the assistant's tokens too, before the reminder.
- A user message merged into the one before it loses its task.
- A reply to a task has no reasoning part, and an action's think token is `<think>` wherever it stands.
- Once any message carries tools, no reasoning is dropped, and no developer message either.
- Control tokens that a client writes into its own text are not escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from rorqual.errors import InvalidRequest
from router.prompt import texts as revision
from router.prompt.messages import (
    Assistant,
    Developer,
    JsonObject,
    Message,
    Reminder,
    System,
    ToolCall,
    ToolResult,
    User,
)
from router.prompt.texts import RevisionTexts

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
CONTROL_TOKENS = (BOS, EOS, USER, ASSISTANT, REMINDER, THINK_START, THINK_END)
"""What the encoder writes between texts: the tokenizer may cut a prompt there."""

TOOL_CALLS_BLOCK = "tool_calls"

Turn = System | User | Developer | Assistant | Reminder
"""What is left of the messages once tool results have moved into user turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    text: str
    starts_in_reasoning: bool  # the completion goes on inside <think>


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    thinking: bool = False
    reasoning_effort: str | None = None
    drop_thinking: bool = True  # leave out reasoning from before the last user message


def encode_messages(
    messages: Sequence[Message], *, texts: RevisionTexts, options: EncodeOptions
) -> EncodedPrompt:
    """Raises InvalidRequest for an unknown effort level or a text the model directory does not have."""
    turns = _order_results(_merge(messages))
    keep_reasoning = not options.drop_thinking or any(_tools(turn) for turn in turns)
    if options.thinking and not keep_reasoning:
        turns = _forget(turns)
    writer = _Writer(
        texts=texts,
        thinking=options.thinking,
        keep_reasoning=keep_reasoning,
        last_user=_last_user(turns),
    )
    pieces = [BOS, _effort_prefix(texts, options)]
    reasoning_open = False
    for index, turn in enumerate(turns):
        pieces.append(writer.body(index, turn, answers_task=index > 0 and turns[index - 1].task is not None))
        last = index + 1 == len(turns)
        if last or isinstance(turns[index + 1], Assistant | Reminder):
            closing = writer.closing(index, turn)
            pieces.append(closing)
            if closing or not isinstance(turn, Reminder):
                reasoning_open = closing.endswith(THINK_START)
    return EncodedPrompt(text="".join(pieces), starts_in_reasoning=reasoning_open)


def attach(
    messages: Sequence[Message], *, tools: tuple[JsonObject, ...], response_format: JsonObject | None
) -> tuple[Message, ...]:
    """Give a request's tools and schema to its leading system message, or to an empty one put first."""
    if not tools and response_format is None:
        return tuple(messages)
    first = messages[0] if messages else None
    if isinstance(first, System):
        system, rest = first, messages[1:]
    else:
        system, rest = System(), messages
    system = replace(
        system, tools=tools or system.tools, response_format=response_format or system.response_format
    )
    return (system, *rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writer:
    texts: RevisionTexts
    thinking: bool
    keep_reasoning: bool
    last_user: int

    def body(self, index: int, turn: Turn, *, answers_task: bool) -> str:
        match turn:
            case System():
                return turn.content + self._appendix(turn)
            case Developer():
                return USER + turn.content + self._appendix(turn)
            case User():
                return USER + "\n\n".join(self._user_part(part) for part in turn.parts)
            case Reminder():
                return REMINDER + turn.content
            case Assistant():
                return self._reasoning(index, turn, answers_task) + self._answer(turn)

    def closing(self, index: int, turn: Turn) -> str:
        """What stands between a turn and the assistant's text, or ends the prompt."""
        if turn.task == "action":
            return ASSISTANT + (THINK_START if self.thinking else THINK_END) + "<｜action｜>"
        if turn.task is not None:
            return f"<｜{turn.task}｜>"
        if not isinstance(turn, User | Developer):
            return ""
        thinks = self.thinking and (self.keep_reasoning or index >= self.last_user)
        return ASSISTANT + (THINK_START if thinks else THINK_END)

    def _appendix(self, turn: System | Developer) -> str:
        appendix = ""
        if turn.tools:
            appendix += "\n\n" + self.texts.fill(
                revision.TOOLS,
                field="tools",
                tool_schemas="\n".join(_to_json(tool, "tools") for tool in turn.tools),
                dsml_token=DSML,
                thinking_start_token=THINK_START,
                thinking_end_token=THINK_END,
            )
        if turn.response_format:
            schema = _to_json(turn.response_format, "response_format")
            appendix += "\n\n" + self.texts.fill(
                revision.RESPONSE_FORMAT, field="response_format", schema=schema
            )
        return appendix

    def _user_part(self, part: str | ToolResult) -> str:
        if isinstance(part, str):
            return part
        return self.texts.fill(revision.TOOL_OUTPUT, field="messages", content=part.content)

    def _reasoning(self, index: int, turn: Assistant, answers_task: bool) -> str:
        if not self.thinking or answers_task:
            return ""
        return turn.reasoning + THINK_END if self.keep_reasoning or index > self.last_user else ""

    def _answer(self, turn: Assistant) -> str:
        end = "" if turn.unfinished else EOS
        if not turn.calls:
            return turn.content + end
        calls = "\n".join(
            self.texts.fill(
                revision.TOOL_CALL,
                field="messages",
                dsml_token=DSML,
                name=call.name,
                arguments=_arguments(call),
            )
            for call in turn.calls
        )
        block = self.texts.fill(
            revision.TOOL_CALLS,
            field="messages",
            dsml_token=DSML,
            tc_block_name=TOOL_CALLS_BLOCK,
            tool_calls=calls,
        )
        return turn.content + "\n\n" + block + end


def _effort_prefix(texts: RevisionTexts, options: EncodeOptions) -> str:
    """An unknown level is refused in chat mode too, where effort has no effect."""
    effort = options.reasoning_effort
    if effort is None:
        return ""
    levels = texts.effort_levels
    if effort not in levels:
        raise InvalidRequest(
            f"reasoning_effort must be one of {', '.join(levels)}, not {effort!r}", field="reasoning_effort"
        )
    name = levels[effort]
    return texts.text(name, field="reasoning_effort") if name and options.thinking else ""


def _merge(messages: Sequence[Message]) -> list[Turn]:
    """Tool results join user turns; neighbouring user turns become one, unless the first has a task."""
    turns: list[Turn] = []
    parts: list[str | ToolResult] = []  # of the user turn that is open, so that merging many stays linear
    task: str | None = None
    for message in messages:
        if isinstance(message, ToolResult):
            parts.append(message)
        elif isinstance(message, User):
            if parts and task is not None:
                turns.append(User(parts=tuple(parts), task=task))
                parts = []
            task = task if parts else message.task
            parts.extend(message.parts)
        else:
            if parts:
                turns.append(User(parts=tuple(parts), task=task))
                parts, task = [], None
            turns.append(message)
    if parts:
        turns.append(User(parts=tuple(parts), task=task))
    return turns


def _order_results(turns: list[Turn]) -> list[Turn]:
    """Put the tool results of each user turn in the order of the calls; text parts keep their places."""
    order: dict[str, int] = {}
    ordered: list[Turn] = []
    for turn in turns:
        if isinstance(turn, Assistant) and turn.calls:
            order = {call.call_id: number for number, call in enumerate(turn.calls) if call.call_id}
        ordered.append(_order_turn(turn, order) if isinstance(turn, User) and order else turn)
    return ordered


def _order_turn(turn: User, order: Mapping[str, int]) -> User:
    results = [part for part in turn.parts if isinstance(part, ToolResult)]
    if len(results) < 2:
        return turn
    # A result that names no known call counts as one of the first call.
    following = iter(sorted(results, key=lambda result: order.get(result.call_id, 0)))
    return replace(
        turn, parts=tuple(next(following) if isinstance(part, ToolResult) else part for part in turn.parts)
    )


def _forget(turns: list[Turn]) -> list[Turn]:
    """Drop developer turns from before the last user turn. (Reasoning from there is left out in writing.)"""
    last_user = _last_user(turns)
    return [turn for index, turn in enumerate(turns) if index >= last_user or not isinstance(turn, Developer)]


def _last_user(turns: Sequence[Turn]) -> int:
    return max((index for index, turn in enumerate(turns) if isinstance(turn, User | Developer)), default=-1)


def _tools(turn: Turn) -> tuple[JsonObject, ...]:
    return turn.tools if isinstance(turn, System | Developer) else ()


def _arguments(call: ToolCall) -> str:
    return "\n".join(
        f'<{DSML}parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else _to_json(value, 'messages')}</{DSML}parameter>"
        for name, value in _parse_arguments(call.arguments).items()
    )


def _parse_arguments(arguments: str) -> dict[str, object]:
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    return cast("dict[str, object]", parsed) if isinstance(parsed, dict) else {"arguments": arguments}


def _to_json(value: object, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} cannot be written as JSON: {error}", field=field) from None
