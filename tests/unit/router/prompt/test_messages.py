from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.errors import InvalidRequest
from router.prompt.messages import Assistant, User, parse_messages, parse_response_format, parse_tools

FINE = {"role": "user", "content": "fine"}


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        ("text", "messages[1]", "must be an object, not a string"),
        (None, "messages[1]", "must be an object, not null"),
        ({}, "messages[1].role", "must be one of system, user, assistant, tool, developer, latest_reminder"),
        ({"role": "robot", "content": ""}, "messages[1].role", "not 'robot'"),
        ({"role": ["user"], "content": ""}, "messages[1].role", "must be one of"),
        ({"role": "user"}, "messages[1].content", "must be a string or a list of text parts, not null"),
        ({"role": "user", "content": 3}, "messages[1].content", "not a number"),
        ({"role": "user", "content": True}, "messages[1].content", "not a boolean"),
        ({"role": "user", "content": {}}, "messages[1].content", "not an object"),
        ({"role": "user", "content": []}, "messages[1].content", "at least one part"),
        ({"role": "user", "content": ["a"]}, "messages[1].content[0]", "must be an object, not a string"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            "messages[1].content[1].type",
            "must be 'text', not 'image_url'",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": []}]},
            "messages[1].content[0].text",
            "must be a string, not a list",
        ),
        ({"role": "developer", "content": ""}, "messages[1].content", "must not be empty"),
        ({"role": "tool", "content": None}, "messages[1].content", "must be a string"),
        ({"role": "tool", "content": "", "tool_call_id": 1}, "messages[1].tool_call_id", "must be a string"),
        (
            {"role": "assistant", "content": "", "reasoning_content": 1},
            "messages[1].reasoning_content",
            "must be a string",
        ),
        ({"role": "assistant", "content": "", "wo_eos": 1}, "messages[1].wo_eos", "true or false"),
        ({"role": "assistant", "tool_calls": {}}, "messages[1].tool_calls", "must be a list, not an object"),
        ({"role": "assistant", "tool_calls": [1]}, "messages[1].tool_calls[0]", "must be an object"),
        (
            {"role": "assistant", "tool_calls": [{"type": "custom"}]},
            "messages[1].tool_calls[0].type",
            "must be 'function'",
        ),
        (
            {"role": "assistant", "tool_calls": [{}]},
            "messages[1].tool_calls[0].function",
            "must be an object",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            "messages[1].tool_calls[0].function.arguments",
            "must be a string, not an object",
        ),
        ({"role": "user", "content": "", "task": "dance"}, "messages[1].task", "not 'dance'"),
        ({"role": "user", "content": "", "task": []}, "messages[1].task", "must be one of"),
        ({"role": "system", "content": "", "tools": {}}, "messages[1].tools", "must be a list"),
        (
            {"role": "system", "tools": [{"function": {}}]},
            "messages[1].tools[0].function.name",
            "must be a string",
        ),
        ({"role": "system", "response_format": []}, "messages[1].response_format", "must be an object"),
    ],
)
def test_bad_messages_are_refused_by_the_name_of_the_field(message: Any, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_messages([FINE, message])
    assert caught.value.field == field
    assert caught.value.status == 400
    assert str(caught.value).startswith(field)
    assert words in str(caught.value)


@pytest.mark.parametrize("messages", [None, {}, "hi", 3, []])
def test_messages_must_be_a_list_with_something_in_it(messages: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_messages(messages)
    assert caught.value.field == "messages"


def test_content_may_be_missing_where_a_turn_can_do_without() -> None:
    assert parse_messages([{"role": "assistant"}]) == (Assistant(),)


def test_what_does_not_reach_the_prompt_is_ignored() -> None:
    message = {"role": "user", "content": "a", "name": "Bob", "mask": 1, "cache_control": {}}
    assert parse_messages([message]) == (User(parts=("a",)),)


def test_tools_keep_their_function_objects_as_sent() -> None:
    function = {"name": "f", "zeta": 1, "alpha": [2.0]}
    assert [list(tool.items()) for tool in parse_tools([{"type": "function", "function": function}])] == [
        list(function.items())
    ]
    assert parse_tools(None) == ()
    with pytest.raises(InvalidRequest, match=r"tools\[0\]\.function\.name must not be empty"):
        parse_tools([{"function": {"name": ""}}])


def test_an_empty_schema_is_none() -> None:
    assert parse_response_format(None) is None
    assert parse_response_format({}) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "tool_calls", "function", "name", "arguments", "tools", "task"]
            ),
            inner | st.sampled_from(["user", "system", "assistant", "tool", "text"]),
            max_size=5,
        )
    ),
    max_leaves=15,
)


@given(json_values)
def test_no_json_value_escapes_as_anything_but_an_invalid_request(value: Any) -> None:
    field = "messages"
    try:
        assert parse_messages(value)
    except InvalidRequest as error:
        field = error.field or "nothing"
    assert field.startswith("messages")
