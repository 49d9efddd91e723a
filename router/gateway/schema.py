"""What request bodies may say: msgspec Structs that decode and type-check JSON in one pass.

Called by `router.gateway.server` and `router.gateway.requests`. Fields that OpenAI clients send and that
change nothing (`user`, `metadata`, `store`, ...) are unknown here and so ignored; fields that would change the
answer and are not served are listed in `Unserved` and refused by name, since ignoring them would be a wrong
answer that looks right.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from rorqual.errors import InvalidRequest
from rorqual.telemetry import one_line

Value = TypeVar("Value")

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""JSON has no largest integer; ours must fit the arithmetic behind them before any range is checked."""

CONTAINERS_MAX = 65_536
STRINGS_MAX = 4 * CONTAINERS_MAX
"""Objects and lists, and strings (keys too), in one body. A long chat has some thousands. The event loop waits
while a body is decoded: 15 MB of empty objects would take it four seconds, of keys one; within these bounds no
body took over a quarter of one."""


class Unserved(msgspec.Struct):
    """Fields that change what is generated and are not served. Values that ask for nothing are let
    through."""

    tools: Any = None
    tool_choice: Any = None
    response_format: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    web_search_options: Any = None
    suffix: Any = None
    best_of: Any = None
    min_tokens: Any = None
    stop_token_ids: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    include_stop_str_in_output: Any = None
    truncate_prompt_tokens: Any = None
    continue_final_message: Any = None
    add_generation_prompt: Any = None
    chat_template: Any = None
    enable_thinking: Any = None
    reasoning: Any = None
    thinking_token_budget: Any = None
    include_reasoning: Any = None
    separate_reasoning: Any = None
    verbosity: Any = None
    prompt_logprobs: Any = None
    skip_special_tokens: Any = None
    add_special_tokens: Any = None
    typical_p: Any = None
    regex: Any = None
    ebnf: Any = None
    json_schema: Any = None
    logits_processors: Any = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class GenerationBody(Unserved):
    """What chat and completions share. None means "not said" everywhere, as OpenAI clients may send null."""

    model: str | None = None
    max_tokens: Int64 | None = None
    max_completion_tokens: Int64 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    n: Int64 | None = None
    seed: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None


class TemplateArguments(msgspec.Struct, forbid_unknown_fields=True):
    thinking: bool | None = None
    reasoning_effort: str | None = None


class Thinking(msgspec.Struct, forbid_unknown_fields=True):
    """As in DeepSeek's own API."""

    type: Literal["enabled", "disabled"]


class ChatBody(GenerationBody):
    messages: list[dict[str, Any]] | None = None
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateArguments | None = None
    echo: Any = None  # served for completions only


class CompletionBody(GenerationBody):
    prompt: msgspec.Raw = msgspec.Raw(b"null")  # of several types: `requests` looks which
    logprobs: Int64 | None = None
    echo: bool | None = None


class TokenizeBody(msgspec.Struct):
    model: str | None = None
    text: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateArguments | None = None


def decode_body(decoder: msgspec.json.Decoder[Value], body: bytes) -> Value:
    """The body as its type. Raises InvalidRequest that says where the JSON or a type is wrong."""
    _check_num_values(body)
    try:
        with _collector_paused():
            return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def check_unserved(body: GenerationBody) -> None:
    names = Unserved.__struct_fields__
    for name in (*names, "echo") if isinstance(body, ChatBody) else names:
        value = getattr(body, name)
        if value is None or _asks_for_nothing(name, value):
            continue
        if name == "best_of" and type(value) is int and value == (1 if body.n is None else body.n):
            continue  # the best of as many as are asked for: all of them
        raise InvalidRequest(f"{name} is not supported", field=name, code="unsupported_parameter")


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),  # without tools, which are refused, there is nothing to choose
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "enable_thinking": (False,),
    "reasoning": ({}, {"effort": None}),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "verbosity": ("medium",),
    "skip_special_tokens": (True,),
    "add_special_tokens": (False,),
    "typical_p": (1,),
    "logits_processors": ([],),
    "echo": (False,),
}


def _asks_for_nothing(name: str, value: Any) -> bool:
    # The types are compared too: True == 1 and False == 0 in Python.
    numbers = (int, float)
    return any(
        value == neutral
        and (type(value) is type(neutral) or (type(value) in numbers and type(neutral) in numbers))
        for neutral in _NEUTRAL.get(name, ())
    )


def _check_num_values(body: bytes) -> None:
    """Without building any. Quotes and braces in strings are text, as any program in a prompt has."""
    if _num_containers(body) <= CONTAINERS_MAX and body.count(b'"') <= 2 * STRINGS_MAX:
        return
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 2 * STRINGS_MAX:
        raise InvalidRequest(f"the body has over {STRINGS_MAX} strings")
    if _num_containers(b"".join(unescaped.split(b'"')[::2])) > CONTAINERS_MAX:
        raise InvalidRequest(f"the body has over {CONTAINERS_MAX} objects and lists")


def _num_containers(data: bytes) -> int:
    return data.count(b"{") + data.count(b"[")


@contextmanager
def _collector_paused() -> Generator[None]:
    """Decoding makes no garbage, but looking for some among all that is made takes longer than making it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


MESSAGE_CHARS_MAX = 300
_PATH = re.compile(r" - at `\$\.?(.*?)`$", re.DOTALL)


def _wrong_type(text: str) -> InvalidRequest:
    """msgspec writes "Expected `int`, got `str` - at `$.max_tokens`"."""
    found = _PATH.search(text)
    message = text[: found.start()] if found else text
    field = found.group(1) if found else ""
    # It may quote a name out of the body, whatever that holds.
    message = one_line(message.replace("`", "'"))
    if len(message) > MESSAGE_CHARS_MAX:
        message = f"{message[:MESSAGE_CHARS_MAX]}..."
    if not field:
        return InvalidRequest(f"the body: {message}")
    return InvalidRequest(f"{field}: {message}", field=field)
