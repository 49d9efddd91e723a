"""What a decoded body means: checked Generations, and how their answer is to look.

Called by `router.gateway.server` between decoding and generating. It waits for nothing but the prompt
encoder, and every failure is an InvalidRequest that names the field as the client wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from rorqual.errors import InvalidRequest
from rorqual.ids import RequestId, draw_request_id
from rorqual.sampling import LOGPROBS_MAX, SamplingParams
from rorqual.session import TokenArray, check_prompt_scores
from router.gateway.roles import thinking_of, with_known_roles
from router.gateway.schema import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    TokenizeBody,
    check_unserved,
    decode_body,
)
from router.generation import Generation, PromptSource, PromptTokens, ServedModel
from router.limits import (
    COMPLETION_TOKENS_DEFAULT,
    check_model,
    check_num_choices,
    check_num_logit_biases,
    check_stops,
    token_array,
    token_budget,
)

NUM_REQUEST_CHOICES_MAX = 128

SeedSource = Callable[[], int]
"""Draws a seed for a request that brought none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStyle:
    """How an answer is written, whatever is in it."""

    request_id: RequestId
    model_name: str
    num_choices: int  # per prompt
    stream: bool
    include_usage: bool  # of a stream; a whole answer always has it
    return_token_ids: bool
    logprobs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionPrompt:
    ids: TokenArray
    echo_text: str | None  # None: no echo


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatJob:
    style: AnswerStyle
    generation: Generation

    @property
    def num_choices(self) -> int:
        return self.style.num_choices


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionJob:
    style: AnswerStyle
    prompts: tuple[CompletionPrompt, ...]
    generations: tuple[Generation, ...]  # one per prompt
    num_logprobs: int  # alternatives shown per token
    prompt_only: bool  # max_tokens 0: the one token that is generated is not shown

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.style.num_choices


async def read_chat(
    body: ChatBody, *, model: ServedModel, prompts: PromptSource, draw_seed: SeedSource
) -> ChatJob:
    check_model(body.model, model)
    check_unserved(body)
    if body.top_logprobs is not None:
        if not 0 <= body.top_logprobs <= LOGPROBS_MAX:
            raise InvalidRequest(
                f"top_logprobs must be between 0 and {LOGPROBS_MAX}, got {body.top_logprobs}",
                field="top_logprobs",
            )
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", field="top_logprobs")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = _sampling(body, num_logprobs=num_logprobs, draw_seed=draw_seed)
    sampling.check(model.vocab_size)
    wanted, budget_field = _wanted_tokens(body, least=1)
    request_id = draw_request_id("chatcmpl")
    style = _style(body, request_id=request_id, model=model, logprobs=bool(body.logprobs))
    stops = _stops(body)
    prompt = await encode_messages(body, prompts=prompts, num_tokens_max=model.sequence_tokens_max)
    generation = Generation(
        request_id=request_id,
        prompt=prompt.ids,
        max_tokens=token_budget(
            prompt.ids, wanted, model=model, prompt_field="messages", budget_field=budget_field
        ),
        num_choices=style.num_choices,
        sampling=sampling,
        stop=stops,
        ignore_eos=bool(body.ignore_eos),
        split_reasoning=prompt.starts_in_reasoning,
    )
    return ChatJob(style=style, generation=generation)


async def read_completion(
    body: CompletionBody, *, model: ServedModel, prompts: PromptSource, draw_seed: SeedSource
) -> CompletionJob:
    check_model(body.model, model)
    check_unserved(body)
    echo = bool(body.echo)
    sampling = _sampling(
        body,
        num_logprobs=body.logprobs,
        num_prompt_logprobs=body.logprobs if echo else None,
        draw_seed=draw_seed,
    )
    sampling.check(model.vocab_size)
    wanted, budget_field = _wanted_tokens(body, least=0 if echo else 1)
    if wanted is None:
        wanted = COMPLETION_TOKENS_DEFAULT
    request_id = draw_request_id("cmpl")
    style = _style(body, request_id=request_id, model=model, logprobs=body.logprobs is not None)
    stops = _stops(body)
    encoded = await _encode_prompts(body, model=model, prompts=prompts)
    num_prompt_tokens = sum(len(prompt.ids) for prompt in encoded)
    check_prompt_scores(sampling, num_tokens=style.num_choices * num_prompt_tokens)
    budgets = [
        token_budget(
            prompt.ids, max(1, wanted), model=model, prompt_field="prompt", budget_field=budget_field
        )
        for prompt in encoded
    ]
    generations = tuple(
        Generation(
            request_id=request_id if len(encoded) == 1 else RequestId(f"{request_id}-{index}"),
            prompt=prompt.ids,
            max_tokens=budget,
            num_choices=style.num_choices,
            sampling=sampling,
            stop=stops,
            ignore_eos=bool(body.ignore_eos),
        )
        for index, (prompt, budget) in enumerate(zip(encoded, budgets, strict=True))
    )
    return CompletionJob(
        style=style,
        prompts=tuple(encoded),
        generations=generations,
        num_logprobs=body.logprobs or 0,
        prompt_only=wanted == 0,
    )


async def read_tokenize(
    body: TokenizeBody, *, model: ServedModel | None, prompts: PromptSource
) -> TokenArray:
    if model is not None:
        check_model(body.model, model)
    given = [name for name in ("text", "prompt", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequest("tokenize needs one of text, prompt or messages", field="text")
    if body.messages is not None:
        return (await encode_messages(body, prompts=prompts, num_tokens_max=None)).ids
    text = body.text if body.text is not None else body.prompt or ""
    return await prompts.aencode_text(text, field=given[0], num_tokens_max=None)


async def encode_messages(
    body: ChatBody | TokenizeBody, *, prompts: PromptSource, num_tokens_max: int | None
) -> PromptTokens:
    if body.messages is None:
        raise InvalidRequest("messages is missing", field="messages")
    thinking, effort = thinking_of(body)
    return await prompts.aencode_chat(
        with_known_roles(body.messages, thinking=thinking),
        thinking=thinking,
        reasoning_effort=effort,
        num_tokens_max=num_tokens_max,
    )


# --- parts of a request


def _style(body: GenerationBody, *, request_id: RequestId, model: ServedModel, logprobs: bool) -> AnswerStyle:
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", field="stream_options")
    return AnswerStyle(
        request_id=request_id,
        model_name=model.name,
        num_choices=check_num_choices(1 if body.n is None else body.n),
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        return_token_ids=bool(body.return_token_ids),
        logprobs=logprobs,
    )


def _sampling(
    body: GenerationBody,
    *,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None = None,
    draw_seed: SeedSource,
) -> SamplingParams:
    given: dict[str, Any] = {
        name: value for name in _SAMPLING_FIELDS if (value := getattr(body, name)) is not None
    }
    if given.get("top_k") == -1:  # how other servers write "all"
        given["top_k"] = 0
    return SamplingParams(
        seed=draw_seed() if body.seed is None else body.seed,
        logit_bias=_logit_bias(body.logit_bias or {}),
        logprobs=num_logprobs,
        prompt_logprobs=num_prompt_logprobs,
        **given,
    )


_SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def _logit_bias(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    check_num_logit_biases(len(given), field="logit_bias")
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(
                f"logit_bias has the key {key[:40]!r}, which is no token id", field="logit_bias"
            )
        biases[int(key)] = bias
    return tuple(sorted(biases.items()))


def _stops(body: GenerationBody) -> tuple[str, ...]:
    given = body.stop
    stops: Sequence[str] = () if given is None else [given] if isinstance(given, str) else given
    return check_stops(stops)


def _wanted_tokens(body: GenerationBody, *, least: int) -> tuple[int | None, str]:
    """The client's token budget and the name it used for it; the newer name wins."""
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    wanted: int | None = getattr(body, field)
    if wanted is not None and wanted < least:
        raise InvalidRequest(f"{field} must be at least {least}, got {wanted}", field=field)
    return wanted, field


# --- completion prompts: a text, token ids, or a list of either


async def _encode_prompts(
    body: CompletionBody, *, model: ServedModel, prompts: PromptSource
) -> list[CompletionPrompt]:
    if bytes(body.prompt) == b"null":
        raise InvalidRequest("prompt is missing", field="prompt")
    given = _split_prompts(bytes(body.prompt))
    num_choices = len(given) * check_num_choices(1 if body.n is None else body.n)
    if num_choices > NUM_REQUEST_CHOICES_MAX:
        raise InvalidRequest(
            f"prompts times n is {num_choices}; at most {NUM_REQUEST_CHOICES_MAX} choices are served at once",
            field="prompt",
        )
    encoded: list[CompletionPrompt] = []
    for index, prompt in enumerate(given):
        field = "prompt" if len(given) == 1 else f"prompt[{index}]"
        if isinstance(prompt, str):
            ids = await prompts.aencode_text(prompt, field=field, num_tokens_max=model.sequence_tokens_max)
            text = prompt if body.echo else None
        else:
            ids = token_array(prompt, vocab_size=model.vocab_size, field=field)
            text = prompts.decode(ids) if body.echo else None
        encoded.append(CompletionPrompt(ids=ids, echo_text=text))
    return encoded


_OPENING = re.compile(rb"\s*(\[?)\s*([\"\[]?)")
_PROMPT_DECODERS: dict[bytes, msgspec.json.Decoder[Any]] = {
    b'"': msgspec.json.Decoder(str),
    b'["': msgspec.json.Decoder(list[str]),
    b"[[": msgspec.json.Decoder(list[list[int]]),
    b"[": msgspec.json.Decoder(list[int]),
}


def _split_prompts(raw: bytes) -> list[str] | list[list[int]]:
    """By its opening characters, so that a million ids are decoded once, straight to integers."""
    opening = _OPENING.match(raw)
    kind = b"".join(opening.groups()) if opening else b""
    if kind not in _PROMPT_DECODERS:
        raise InvalidRequest(
            "prompt must be a string, a list of token ids, or a list of either", field="prompt"
        )
    found = _decode_prompt(_PROMPT_DECODERS[kind], raw)
    return [found] if kind in (b'"', b"[") else found


def _decode_prompt(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    try:
        return decode_body(decoder, raw)
    except InvalidRequest as error:
        detail = str(error).removeprefix("the body: ")
        raise InvalidRequest(f"prompt: {detail}", field="prompt") from None
