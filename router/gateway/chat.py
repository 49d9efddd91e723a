"""How chat answers look: `chat.completion` whole and `chat.completion.chunk` streamed.

Called by `router.gateway.server`. Pure: updates in, bytes out; one writer per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from router.gateway.logprobs import chat_logprobs
from router.gateway.requests import AnswerStyle, ChatJob
from router.gateway.writers import EventTemplate, to_json, usage_json
from router.generation import ChoiceUpdate, Generation, PromptSource, Usage, finish_name


@dataclass(slots=True, kw_only=True)
class _Choice:
    """What a whole answer gathers; `role_sent` is all that a streamed one keeps."""

    role_sent: bool = False
    text: list[str] = field(default_factory=list[str])
    reasoning: list[str] = field(default_factory=list[str])
    logprobs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    token_ids: list[int] = field(default_factory=list[int])
    finish_reason: str | None = None


class ChatWriter:
    def __init__(self, job: ChatJob, *, names: PromptSource, created: int) -> None:
        self._job = job
        self._names = names
        self._created = created
        self._choices = [_Choice() for _ in range(job.style.num_choices)]
        self._template = EventTemplate(job.style, object_name="chat.completion.chunk", created=created)

    @property
    def style(self) -> AnswerStyle:
        return self._job.style

    @property
    def generations(self) -> Sequence[Generation]:
        return (self._job.generation,)

    def events(self, prompt: int, update: ChoiceUpdate) -> bytes:
        choice = self._choices[update.choice]
        style = self.style
        finish_reason = finish_name(update.finish_reason)
        shows_tokens = bool(update.tokens) and (style.logprobs or style.return_token_ids)
        if choice.role_sent and not (update.text or update.reasoning or finish_reason or shows_tokens):
            return b""  # tokens whose text is held back
        delta = b""
        if not choice.role_sent:
            choice.role_sent = True
            # OpenAI's first chunk has an empty content, which some clients rely on.
            delta = b'"role":"assistant",' + (b"" if update.text or update.reasoning else b'"content":"",')
        if update.reasoning:
            delta += b'"reasoning_content":%b,' % to_json(update.reasoning)
        if update.text:
            delta += b'"content":%b,' % to_json(update.text)
        logprobs = b"null"
        if style.logprobs and update.tokens:
            logprobs = to_json({"content": chat_logprobs(update.tokens, self._names), "refusal": None})
        fields = b',"delta":{%b},"logprobs":%b,"finish_reason":%b' % (
            delta[:-1],
            logprobs,
            to_json(finish_reason),
        )
        if style.return_token_ids:
            fields += b',"token_ids":' + to_json([token.token_id for token in update.tokens])
        return self._template.event(update.choice, fields)

    def last_event(self, used: Usage) -> bytes:
        if not self.style.include_usage:
            return b""
        return self._template.usage_event(usage_json(used))

    def add(self, prompt: int, update: ChoiceUpdate) -> None:
        choice = self._choices[update.choice]
        choice.text.append(update.text)
        choice.reasoning.append(update.reasoning)
        if self.style.logprobs:
            choice.logprobs += chat_logprobs(update.tokens, self._names)
        if self.style.return_token_ids:
            choice.token_ids += [token.token_id for token in update.tokens]
        if update.finish_reason is not None:
            choice.finish_reason = finish_name(update.finish_reason)

    def body(self, used: Usage) -> bytes:
        return to_json(
            {
                "id": self.style.request_id,
                "object": "chat.completion",
                "created": self._created,
                "model": self.style.model_name,
                "choices": [self._whole(index, choice) for index, choice in enumerate(self._choices)],
                "usage": usage_json(used),
            }
        )

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        if self._job.generation.split_reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        whole: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": {"content": choice.logprobs, "refusal": None} if self.style.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        if self.style.return_token_ids:
            whole["token_ids"] = choice.token_ids
        return whole
