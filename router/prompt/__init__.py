"""The prompt side of the router: messages or text in, token ids out, exactly as the model was trained to read
them.

The gateways call `PromptEncoder`; nothing else outside this package encodes. It holds the model directory's
tokenizer and revision texts. Without a tokenizer.json everything that needs text is an InvalidRequest that
says so, and token ids still work. It never talks to a worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from rorqual.errors import InvalidRequest
from rorqual.session import TokenArray
from router.prompt.encoder import CONTROL_TOKENS, EncodedPrompt, EncodeOptions, attach, encode_messages
from router.prompt.messages import parse_messages, parse_response_format, parse_tools
from router.prompt.pool import EncodePool, PoolConfig, PoolStats
from router.prompt.texts import NO_TEXTS, RevisionTexts, load_texts
from router.prompt.tokenizer import (
    MEMO_BYTES_MAX,
    TOKENIZER_FILE,
    MemoStats,
    Tokenizer,
    unknown_token_text,
)

__all__ = ["PromptConfig", "PromptEncoder", "PromptStats", "PromptTokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    memo_bytes_max: int = MEMO_BYTES_MAX
    # Encoding this much holds the event loop for about 1.3 ms; more goes to a thread.
    inline_chars_max: int = 4096
    # Parsing and joining this many messages, parts and calls takes about as long.
    inline_entries_max: int = 512
    pool: PoolConfig = field(default_factory=PoolConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokens:
    ids: TokenArray
    text: str
    starts_in_reasoning: bool  # the completion begins inside <think>: split it at </think>


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptStats:
    memo: MemoStats
    pool: PoolStats


class PromptEncoder:
    """One model's way of reading. Made once per router; `close` when the router stops."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        texts: RevisionTexts = NO_TEXTS,
        config: PromptConfig | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._texts = texts
        self._config = config or PromptConfig()
        self._pool = EncodePool(self._config.pool)

    @classmethod
    def from_model_dir(cls, model_dir: Path, *, config: PromptConfig | None = None) -> PromptEncoder:
        """Raises ConfigError naming a file that is there but cannot be used."""
        config = config or PromptConfig()
        file = model_dir / TOKENIZER_FILE
        tokenizer = None
        if file.exists():
            tokenizer = Tokenizer.load(
                file, control_tokens=CONTROL_TOKENS, memo_bytes_max=config.memo_bytes_max
            )
        return cls(tokenizer=tokenizer, texts=load_texts(model_dir), config=config)

    def encode_chat(
        self,
        messages: object,
        *,
        thinking: bool = False,
        reasoning_effort: str | None = None,
        drop_thinking: bool = True,
        tools: object = None,
        response_format: object = None,
    ) -> PromptTokens:
        """Encode what a client sent as `messages` and so on. Raises InvalidRequest naming the field.

        `response_format` is a JSON schema, not OpenAI's wrapper around one.
        """
        tokenizer = self._need_tokenizer("messages")
        options = EncodeOptions(
            thinking=thinking, reasoning_effort=reasoning_effort, drop_thinking=drop_thinking
        )
        prompt = self._render(messages, options, tools, response_format)
        return _prompt_tokens(prompt, tokenizer.encode(prompt.text, field="messages"))

    async def aencode_chat(
        self,
        messages: object,
        *,
        thinking: bool = False,
        reasoning_effort: str | None = None,
        drop_thinking: bool = True,
        tools: object = None,
        response_format: object = None,
        num_tokens_max: int | None = None,
    ) -> PromptTokens:
        """As encode_chat, on a thread if it is long. Also raises Overloaded and StageTimedOut, and
        InvalidRequest for what must have more than `num_tokens_max` tokens."""
        tokenizer = self._need_tokenizer("messages")
        options = EncodeOptions(
            thinking=thinking, reasoning_effort=reasoning_effort, drop_thinking=drop_thinking
        )
        if _has_more_entries(messages, self._config.inline_entries_max):
            prompt = await self._pool.run(
                lambda: self._render(messages, options, tools, response_format), num_chars=0
            )
        else:
            prompt = self._render(messages, options, tools, response_format)
        ids = await self._aencode(tokenizer, prompt.text, "messages", num_tokens_max)
        return _prompt_tokens(prompt, ids)

    def encode_text(self, text: str, *, field: str = "prompt") -> TokenArray:
        """Encode text as it stands: no template, no BOS."""
        return self._need_tokenizer(field).encode(text, field=field)

    async def aencode_text(
        self, text: str, *, field: str = "prompt", num_tokens_max: int | None = None
    ) -> TokenArray:
        """As encode_text, on a thread if it is long. Also raises Overloaded and StageTimedOut, and
        InvalidRequest for what must have more than `num_tokens_max` tokens."""
        return await self._aencode(self._need_tokenizer(field), text, field, num_tokens_max)

    def decode(self, ids: TokenArray) -> str:
        """All of the text, control tokens too; empty without a tokenizer."""
        return self.tokenizer.decode(ids.tolist()) if self.tokenizer else ""

    def token_text(self, token_id: int) -> str:
        """A token as logprobs show it; `token_id:N` without a tokenizer or out of its range."""
        return self.tokenizer.token_text(token_id) if self.tokenizer else unknown_token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes | None:
        """A token's bytes as logprobs show them; None without a tokenizer."""
        return self.tokenizer.token_bytes(token_id) if self.tokenizer else None

    def stats(self) -> PromptStats:
        memo = self.tokenizer.memo_stats() if self.tokenizer else None
        return PromptStats(
            memo=memo or MemoStats(bytes_held=0, num_hits=0, num_misses=0), pool=self._pool.stats()
        )

    def close(self) -> None:
        """Blocks while a thread encodes: on a loop use `aclose`."""
        self._pool.close()

    async def aclose(self) -> None:
        await self._pool.aclose()

    def _render(
        self, messages: object, options: EncodeOptions, tools: object, response_format: object
    ) -> EncodedPrompt:
        attached = attach(
            parse_messages(messages),
            tools=parse_tools(tools),
            response_format=parse_response_format(response_format),
        )
        return encode_messages(attached, texts=self._texts, options=options)

    async def _aencode(
        self, tokenizer: Tokenizer, text: str, field: str, num_tokens_max: int | None
    ) -> TokenArray:
        num_tokens_min = tokenizer.num_tokens_min(text)
        if num_tokens_max is not None and num_tokens_min > num_tokens_max:
            # Seconds of a thread are not spent on a text that its length alone rules out.
            raise InvalidRequest(
                f"{field} has {num_tokens_min} tokens at the very least; prompt and completion together may"
                f" have {num_tokens_max}",
                field=field,
                code="context_length_exceeded",
            )
        # Cutting is a scan at about 1 GB/s; only then is it known how much is new.
        segments = tokenizer.segments(text)
        num_chars = tokenizer.num_unknown_chars(segments)
        config = self._config
        if num_chars <= config.inline_chars_max and len(segments) <= 2 * config.inline_entries_max:
            return tokenizer.encode_segments(segments, field=field)
        return await self._pool.run(
            lambda: tokenizer.encode_segments(segments, field=field), num_chars=num_chars
        )

    def _need_tokenizer(self, field: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(
                f"{field}: the model directory has no {TOKENIZER_FILE}, so text cannot be encoded; "
                "send the prompt as token ids",
                field=field,
            )
        return self.tokenizer


def _prompt_tokens(prompt: EncodedPrompt, ids: TokenArray) -> PromptTokens:
    return PromptTokens(ids=ids, text=prompt.text, starts_in_reasoning=prompt.starts_in_reasoning)


def _has_more_entries(messages: object, limit: int) -> bool:
    """Whether messages, their parts and their calls are more than `limit`, without counting them all."""
    if not isinstance(messages, list):
        return False
    num_entries = 0
    for message in cast("list[object]", messages):
        num_entries += 1
        if isinstance(message, dict):
            values = cast("dict[str, object]", message).values()
            num_entries += sum(
                len(cast("list[object]", value)) for value in values if isinstance(value, list)
            )
        if num_entries > limit:
            return True
    return False
