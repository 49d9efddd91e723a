"""What request bodies may say: msgspec Structs that decode and type-check JSON in one pass.

Called by `router.gateway.requests`. Fields that OpenAI clients send and that change nothing (`user`,
`metadata`, `store`, ...) are unknown here and so ignored; fields that would change the answer and are not
served are listed in `Unserved` and refused by name, since ignoring them would be a wrong answer that looks
right.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec

from rorqual.errors import InvalidRequest

Value = TypeVar("Value")

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""JSON has no largest integer; ours must fit the arithmetic behind them before any range is checked."""


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


class ChatBody(GenerationBody):
    messages: list[dict[str, Any]] | None = None
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateArguments | None = None


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
    chat_template_kwargs: TemplateArguments | None = None


def decode_body(decoder: msgspec.json.Decoder[Value], body: bytes) -> Value:
    """The body as its type. Raises InvalidRequest that says where the JSON or a type is wrong."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def check_unserved(body: Unserved) -> None:
    for name in Unserved.__struct_fields__:
        value = getattr(body, name)
        if value is not None and not _asks_for_nothing(name, value):
            raise InvalidRequest(f"{name} is not supported", field=name, code="unsupported_parameter")


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}


def _asks_for_nothing(name: str, value: Any) -> bool:
    # The types are compared too: True == 1 and False == 0 in Python.
    numbers = (int, float)
    return any(
        value == neutral
        and (type(value) is type(neutral) or (type(value) in numbers and type(neutral) in numbers))
        for neutral in _NEUTRAL.get(name, ())
    )


_PATH = re.compile(r" - at `\$\.?(.*?)`$", re.DOTALL)


def _wrong_type(text: str) -> InvalidRequest:
    """msgspec writes "Expected `int`, got `str` - at `$.max_tokens`"."""
    found = _PATH.search(text)
    message = text[: found.start()] if found else text
    field = found.group(1) if found else ""
    message = message.replace("`", "'")
    if not field:
        return InvalidRequest(f"the body: {message}")
    return InvalidRequest(f"{field}: {message}", field=field)
