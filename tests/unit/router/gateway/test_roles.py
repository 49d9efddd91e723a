"""Developer messages: nothing that a client said is left out of a prompt in silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.errors import InvalidRequest
from router.gateway.roles import with_known_roles
from router.prompt.encoder import EncodeOptions, encode_messages
from router.prompt.messages import parse_messages
from router.prompt.texts import NO_TEXTS


def said(*roles: str) -> list[dict]:
    return [{"role": role, "content": f"<{number}>"} for number, role in enumerate(roles)]


def roles_of(messages) -> list[str]:
    return [message["role"] for message in messages]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    ("given_roles", "roles"),
    [
        (["developer", "user"], ["system", "user"]),
        (["system", "developer", "user"], ["system", "system", "user"]),
        (
            ["developer", "developer", "user", "assistant", "user"],
            ["system"] * 2 + ["user", "assistant", "user"],
        ),
        (["developer"], ["developer"]),
        (["user", "developer"], ["user", "developer"]),
        (["user", "assistant", "developer", "assistant"], ["user", "assistant", "developer", "assistant"]),
    ],
)
def test_a_leading_developer_speaks_as_the_system_and_a_last_one_as_itself(given_roles, roles, thinking):
    assert roles_of(with_known_roles(said(*given_roles), thinking=thinking)) == roles


@pytest.mark.parametrize(
    ("roles", "index"),
    [
        (["user", "developer", "user"], 1),
        (["developer", "user", "assistant", "developer", "tool"], 3),
        (["developer", "developer"], 0),
    ],
)
def test_a_developer_whom_thinking_would_forget_is_refused_by_name(roles, index):
    with pytest.raises(InvalidRequest, match="forgets") as caught:
        with_known_roles(said(*roles), thinking=True)
    assert caught.value.field == f"messages[{index}].role"
    with_known_roles(said(*roles), thinking=False)


def test_with_tools_nothing_is_forgotten_so_nothing_is_refused():
    messages = said("system", "user", "developer", "user")
    messages[0]["tools"] = [{"type": "function", "function": {"name": "f"}}]
    assert with_known_roles(messages, thinking=True) == messages
    messages[1]["tools"] = messages[0].pop("tools")  # a user brings none
    with pytest.raises(InvalidRequest):
        with_known_roles(messages, thinking=True)


@given(
    roles=st.lists(st.sampled_from(["system", "developer", "user", "assistant"]), min_size=1, max_size=8),
    thinking=st.booleans(),
)
def test_what_is_not_refused_stands_in_the_prompt(roles, thinking):
    messages = said(*roles)
    try:
        known = with_known_roles(messages, thinking=thinking)
    except InvalidRequest:
        assert thinking
        assert "developer" in roles
        return
    prompt = encode_messages(parse_messages(known), texts=NO_TEXTS, options=EncodeOptions(thinking=thinking))
    assert [message["content"] in prompt.text for message in messages] == [True] * len(messages)
