"""How completion answers look: `text_completion`, whole and streamed, for one prompt or several.

Called by `router.gateway.server`. Pure: updates in, bytes out; one writer per request. Choice c of prompt p
has index p * n + c, as in OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rorqual.session import FinishReason
from router.gateway.logprobs import CompletionLogprobs
from router.gateway.requests import AnswerStyle, CompletionJob
from router.gateway.writers import EventTemplate, to_json, usage_json
from router.generation import ChoiceUpdate, Generation, PromptSource, TokenOut, Usage, finish_name

_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@dataclass(slots=True, kw_only=True)
class _Choice:
    lists: CompletionLogprobs
    echoed: bool = False
    text: list[str] = field(default_factory=list[str])
    logprobs: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _LISTS})
    token_ids: list[int] = field(default_factory=list[int])
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """An update as its choice shows it: with the echoed prompt, without the token of a request for none."""

    text: str
    logprobs: dict[str, list[Any]] | None
    token_ids: list[int]
    finish_reason: str | None


class CompletionWriter:
    def __init__(self, job: CompletionJob, *, names: PromptSource, created: int) -> None:
        self._job = job
        self._created = created
        self._choices = [
            _Choice(lists=CompletionLogprobs(names, num_alternatives=job.num_logprobs))
            for _ in range(len(job.prompts) * job.style.num_choices)
        ]
        self._template = EventTemplate(job.style, object_name="text_completion", created=created)

    @property
    def style(self) -> AnswerStyle:
        return self._job.style

    @property
    def generations(self) -> Sequence[Generation]:
        return self._job.generations

    def events(self, prompt: int, update: ChoiceUpdate) -> bytes:
        index = prompt * self.style.num_choices + update.choice
        piece = self._piece(prompt, self._choices[index], update)
        shows_tokens = bool(piece.token_ids) and (self.style.logprobs or self.style.return_token_ids)
        if not (piece.text or piece.finish_reason or shows_tokens):
            return b""  # tokens whose text is held back
        fields = b',"text":%b,"logprobs":%b,"finish_reason":%b' % (
            to_json(piece.text),
            to_json(piece.logprobs),
            to_json(piece.finish_reason),
        )
        if self.style.return_token_ids:
            fields += b',"token_ids":' + to_json(piece.token_ids)
        return self._template.event(index, fields)

    def last_event(self, used: Usage) -> bytes:
        if not self.style.include_usage:
            return b""
        return self._template.usage_event(self._usage(used))

    def add(self, prompt: int, update: ChoiceUpdate) -> None:
        choice = self._choices[prompt * self.style.num_choices + update.choice]
        piece = self._piece(prompt, choice, update)
        choice.text.append(piece.text)
        choice.token_ids += piece.token_ids
        if piece.logprobs is not None:
            for name in _LISTS:
                choice.logprobs[name] += piece.logprobs[name]
        if piece.finish_reason is not None:
            choice.finish_reason = piece.finish_reason

    def body(self, used: Usage) -> bytes:
        return to_json(
            {
                "id": self.style.request_id,
                "object": "text_completion",
                "created": self._created,
                "model": self.style.model_name,
                "choices": [self._whole(index, choice) for index, choice in enumerate(self._choices)],
                "usage": self._usage(used),
            }
        )

    def _usage(self, used: Usage) -> dict[str, Any]:
        return usage_json(replace(used, num_completion_tokens=0) if self._job.prompt_only else used)

    def _piece(self, prompt: int, choice: _Choice, update: ChoiceUpdate) -> _Piece:
        shown: tuple[TokenOut, ...] = () if self._job.prompt_only else update.tokens
        text = "" if self._job.prompt_only else update.text
        logprobs: dict[str, list[Any]] | None = None
        echo_text = self._job.prompts[prompt].echo_text
        if echo_text is not None and not choice.echoed:
            choice.echoed = True
            text = echo_text + text
            if self.style.logprobs:
                logprobs = choice.lists.of_prompt(self._job.prompts[prompt].ids, update.prompt_logprobs)
        if self.style.logprobs and shown:
            lists = choice.lists.of(shown)
            logprobs = {name: logprobs[name] + lists[name] for name in _LISTS} if logprobs else lists
        finish_reason = finish_name(update.finish_reason)
        if self._job.prompt_only and finish_reason is not None:
            finish_reason = FinishReason.LENGTH.value
        return _Piece(
            text=text,
            logprobs=logprobs,
            token_ids=[token.token_id for token in shown],
            finish_reason=finish_reason,
        )

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        whole: dict[str, Any] = {
            "index": index,
            "text": "".join(choice.text),
            "logprobs": choice.logprobs if self.style.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        if self.style.return_token_ids:
            whole["token_ids"] = choice.token_ids
        return whole
