"""What a chat asks of the encoder, from the several ways there are to say it: thinking, effort, roles.

Called by `router.gateway.requests`. Pure. How a prompt reads is the encoder's business and is not changed
here: this makes sure that nothing a client said is left out of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rorqual.errors import InvalidRequest
from router.gateway.schema import ChatBody, TokenizeBody

_EFFORTS = {"minimal": "low", "medium": "low"}
"""OpenAI's levels that a checkpoint may not know, as the one that all know and that adds nothing."""

_USER_ROLES = ("user", "tool")
"""The results of tools become part of a user turn."""

_TOOL_ROLES = ("system", "developer")
"""Who may bring tools, with which nothing is forgotten."""


def thinking_of(body: ChatBody | TokenizeBody) -> tuple[bool, str | None]:
    """Whether to think, and how hard. An effort asks for thinking unless something says otherwise; OpenAI's
    "none" asks for no thinking."""
    template = body.chat_template_kwargs
    effort = body.reasoning_effort
    if template is not None and template.reasoning_effort is not None:
        effort = template.reasoning_effort
    if effort == "none":
        effort = None
    elif effort is not None:
        effort = _EFFORTS.get(effort, effort)
    said = None if body.thinking is None else body.thinking.type == "enabled"
    if template is not None and template.thinking is not None:
        if said not in (None, template.thinking):
            raise InvalidRequest("thinking and chat_template_kwargs.thinking disagree", field="thinking")
        said = template.thinking
    return (effort is not None) if said is None else said, effort


def with_known_roles(messages: Sequence[Mapping[str, Any]], *, thinking: bool) -> list[Mapping[str, Any]]:
    """The messages with `developer` where the encoder would not leave it out.

    OpenAI's clients send `developer` where they used to send `system`. To V4's encoder it is a user of sorts,
    and a thinking prompt without tools forgets it once a later turn begins: it becomes `system` before the
    first user turn, and anywhere else it is refused where it would be forgotten.
    """
    roles = [message.get("role") for message in messages]
    if "developer" not in roles:
        return list(messages)
    first_user = next((index for index, role in enumerate(roles) if role in _USER_ROLES), 0)
    told: list[Mapping[str, Any]] = [
        {**message, "role": "system"} if role == "developer" and index < first_user else message
        for index, (message, role) in enumerate(zip(messages, roles, strict=True))
    ]
    has_tools = any(message.get("tools") for message in told if message.get("role") in _TOOL_ROLES)
    if thinking and not has_tools:
        _check_forgets_none(roles, first_user)
    return told


def _check_forgets_none(roles: Sequence[Any], first_user: int) -> None:
    turns = [index for index, role in enumerate(roles) if role in (*_USER_ROLES, "developer")]
    for index in turns[:-1]:
        if roles[index] == "developer" and index >= first_user:
            raise InvalidRequest(
                f"messages[{index}].role: this model forgets a developer message when it thinks and another"
                " turn follows; put it before the first user message, or send it as system or user",
                field=f"messages[{index}].role",
            )
