from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.errors import InvalidRequest
from router.prompt.encoder import EncodedPrompt, EncodeOptions, attach, encode_messages
from router.prompt.messages import parse_messages, parse_response_format, parse_tools
from router.prompt.texts import NO_TEXTS, RevisionTexts

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
U, A, R = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"

Raw = dict[str, Any]


def user(content: Any, **more: Any) -> Raw:
    return {"role": "user", "content": content, **more}


def assistant(content: str | None, reasoning: str | None = None, **more: Any) -> Raw:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **more}


def system(content: str, **more: Any) -> Raw:
    return {"role": "system", "content": content, **more}


def call(name: str, arguments: str, call_id: str | None = None) -> Raw:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str) -> Raw:
    return {"type": "function", "function": {"name": name, "description": "é"}}


def encode(
    *messages: Raw,
    texts: RevisionTexts = NO_TEXTS,
    tools: list[Raw] | None = None,
    response_format: Raw | None = None,
    **options: Any,
) -> EncodedPrompt:
    attached = attach(
        parse_messages(list(messages)),
        tools=parse_tools(tools),
        response_format=parse_response_format(response_format),
    )
    return encode_messages(attached, texts=texts, options=EncodeOptions(**options))


def test_chat_mode_closes_thinking_before_the_answer() -> None:
    prompt = encode(system("Be kind."), user("hello"))
    assert prompt.text == f"{BOS}Be kind.{U}hello{A}</think>"
    assert not prompt.starts_in_reasoning


def test_thinking_mode_opens_it() -> None:
    prompt = encode(user("hello"), thinking=True)
    assert prompt.text == f"{BOS}{U}hello{A}<think>"
    assert prompt.starts_in_reasoning


def test_earlier_reasoning_is_dropped_and_the_last_turns_kept() -> None:
    turns = [user("a"), assistant("b", "why b"), user("c"), assistant("d", "why d")]
    assert encode(*turns, thinking=True).text == (
        f"{BOS}{U}a{A}</think>b{EOS}{U}c{A}<think>why d</think>d{EOS}"
    )
    assert encode(*turns, thinking=True, drop_thinking=False).text == (
        f"{BOS}{U}a{A}<think>why b</think>b{EOS}{U}c{A}<think>why d</think>d{EOS}"
    )
    assert encode(*turns).text == f"{BOS}{U}a{A}</think>b{EOS}{U}c{A}</think>d{EOS}"


def test_tools_keep_all_reasoning_and_developer_messages(revision_texts: RevisionTexts) -> None:
    turns = [{"role": "developer", "content": "dev"}, user("a"), assistant("b", "why b"), user("c")]
    kept = encode(*turns, texts=revision_texts, tools=[tool("f")], thinking=True).text
    assert f"{U}dev{U}a{A}<think>why b</think>b{EOS}" in kept
    dropped = encode(*turns, thinking=True).text
    assert dropped == f"{BOS}{U}a{A}</think>b{EOS}{U}c{A}<think>"
    # Chat mode writes no reasoning but drops no developer.
    assert encode(*turns).text.startswith(f"{BOS}{U}dev{U}a{A}</think>b")


def test_tools_and_schema_follow_the_system_text(revision_texts: RevisionTexts) -> None:
    wanted_tools = '\n\nTools (｜DSML｜, <think></think>):\n{"name": "f", "description": "é"}\n'
    schema = {"type": "object"}
    with_system = encode(
        system("S"), user("u"), texts=revision_texts, tools=[tool("f"), tool("g")], response_format=schema
    ).text
    assert with_system == (
        f"{BOS}S{wanted_tools}"
        '{"name": "g", "description": "é"}\n.\n\nAnswer as {JSON}: {"type": "object"}'
        f"{U}u{A}</think>"
    )
    without_system = encode(user("u"), texts=revision_texts, tools=[tool("f")]).text
    assert without_system == f"{BOS}{wanted_tools}.{U}u{A}</think>"


def test_developer_carries_its_own_tools(revision_texts: RevisionTexts) -> None:
    prompt = encode(
        {"role": "developer", "content": "D", "tools": [tool("f")], "response_format": {"a": 1}},
        texts=revision_texts,
    )
    assert prompt.text == (
        f"{BOS}{U}D\n\nTools (｜DSML｜, <think></think>):\n"
        '{"name": "f", "description": "é"}\n.\n\nAnswer as {JSON}: {"a": 1}'
        f"{A}</think>"
    )


def test_calls_are_written_with_typed_parameters(revision_texts: RevisionTexts) -> None:
    arguments = '{"s": "a<b\\n\\"", "n": 1.5, "l": [1, "é"], "none": null, "o": {}}'
    prompt = encode(user("u"), assistant("text", tool_calls=[call("f", arguments)]), texts=revision_texts)
    assert prompt.text.split("</think>")[1] == (
        'text\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="s" string="true">a<b\n"</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">1.5</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="l" string="false">[1, "é"]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="none" string="false">null</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="o" string="false">{}</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}"
    )


def test_call_without_arguments_leaves_an_empty_line(revision_texts: RevisionTexts) -> None:
    prompt = encode(user("u"), assistant(None, tool_calls=[call("f", "{}")]), texts=revision_texts)
    assert '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>' in prompt.text


@pytest.mark.parametrize(
    "arguments", ["", "not json", "[1, 2]", "3", '"s"', '{"a":', "[" * 100_000, "9" * 5000]
)
def test_arguments_that_are_no_object_become_one_string(
    revision_texts: RevisionTexts, arguments: str
) -> None:
    prompt = encode(user("u"), assistant(None, tool_calls=[call("f", arguments)]), texts=revision_texts)
    assert f'<｜DSML｜parameter name="arguments" string="true">{arguments}</｜DSML｜parameter>' in prompt.text


def test_neighbouring_user_and_tool_messages_become_one_turn(revision_texts: RevisionTexts) -> None:
    prompt = encode(
        user("a"),
        user("b"),
        {"role": "tool", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
        user("c"),
        texts=revision_texts,
    )
    assert prompt.text == f"{BOS}{U}a\n\nb\n\n<tool_result>x\n\ny</tool_result>\n\nc{A}</think>"


def test_results_stand_in_the_order_of_the_calls(revision_texts: RevisionTexts) -> None:
    def result(call_id: str) -> Raw:
        return {"role": "tool", "tool_call_id": call_id, "content": call_id}

    calls = assistant(
        "", tool_calls=[call("f", "{}", "one"), call("f", "{}", "two"), call("f", "{}", "three")]
    )
    prompt = encode(
        user("q"), calls, result("three"), user("between"), result("one"), result("two"), texts=revision_texts
    )
    assert prompt.text.endswith(
        f"{U}<tool_result>one</tool_result>\n\nbetween\n\n"
        f"<tool_result>two</tool_result>\n\n<tool_result>three</tool_result>{A}</think>"
    )
    unnamed = assistant("", tool_calls=[call("f", "{}"), call("g", "{}")])
    as_sent = encode(user("q"), unnamed, result("b"), result("a"), texts=revision_texts)
    assert "<tool_result>b</tool_result>\n\n<tool_result>a</tool_result>" in as_sent.text


def test_reminder_after_a_user_message_comes_behind_the_assistants_tokens() -> None:
    reminder = {"role": "latest_reminder", "content": "now"}
    prompt = encode(user("a"), reminder, thinking=True)
    assert prompt.text == f"{BOS}{U}a{A}<think>{R}now"
    assert prompt.starts_in_reasoning
    assert encode(reminder, user("a")).text == f"{BOS}{R}now{U}a{A}</think>"
    assert not encode(user("a"), assistant("b"), reminder, thinking=True).starts_in_reasoning


def test_tasks_end_the_prompt_and_their_replies_have_no_reasoning() -> None:
    assert encode(user("a", task="action")).text == f"{BOS}{U}a{A}</think><｜action｜>"
    thinking = encode(user("a", task="action"), thinking=True)
    assert thinking.text == f"{BOS}{U}a{A}<think><｜action｜>"
    assert not thinking.starts_in_reasoning
    assert encode(user("a", task="title"), thinking=True).text == f"{BOS}{U}a<｜title｜>"
    reply = encode(user("a", task="query"), assistant("Search", "why"), thinking=True)
    assert reply.text == f"{BOS}{U}a<｜query｜>Search{EOS}"


def test_user_messages_merge_into_one_without_a_task_only() -> None:
    assert encode(user("a", task="title"), user("b")).text == f"{BOS}{U}a{U}b{A}</think>"
    assert encode(user("a"), user("b", task="title")).text == f"{BOS}{U}a\n\nb{A}</think>"


def test_unfinished_assistant_turn_has_no_end() -> None:
    assert encode(user("a"), assistant("be", wo_eos=True)).text == f"{BOS}{U}a{A}</think>be"


def test_effort_prefix_stands_right_after_bos(revision_texts: RevisionTexts) -> None:
    def start(**options: Any) -> str:
        return encode(system("S"), user("u"), texts=revision_texts, **options).text

    assert start(thinking=True, reasoning_effort="max").startswith(f"{BOS}Think {{hard}}.\nS{U}")
    for level in ("low", "medium", "high", None):
        assert start(thinking=True, reasoning_effort=level) == start(thinking=True)
    assert start(reasoning_effort="max") == start()


def test_effort_levels_follow_the_revision(own_texts: dict[str, str]) -> None:
    newer = RevisionTexts(
        source="prompt.json", texts=MappingProxyType(own_texts | {"REASONING_EFFORT_HIGH": "Once more.\n"})
    )
    high = encode(user("u"), texts=newer, thinking=True, reasoning_effort="high")
    assert high.text.startswith(f"{BOS}Once more.\n{U}")
    with pytest.raises(InvalidRequest, match="must be one of low, high, max, not 'medium'") as caught:
        encode(user("u"), texts=newer, reasoning_effort="medium")
    assert caught.value.field == "reasoning_effort"


@pytest.mark.parametrize(
    ("messages", "more", "field", "name"),
    [
        ([user("u")], {"tools": [tool("f")]}, "tools", "TOOLS_TEMPLATE"),
        ([user("u")], {"response_format": {"a": 1}}, "response_format", "response_format_template"),
        (
            [user("u")],
            {"thinking": True, "reasoning_effort": "max"},
            "reasoning_effort",
            "REASONING_EFFORT_MAX",
        ),
        ([user("u"), assistant("", tool_calls=[call("f", "{}")])], {}, "messages", "tool_call_template"),
        ([{"role": "tool", "content": "r"}], {}, "messages", "tool_output_template"),
    ],
)
def test_missing_texts_are_named_with_the_file(
    messages: list[Raw], more: dict[str, Any], field: str, name: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode(*messages, **more)
    assert caught.value.field == field
    assert caught.value.status == 400
    assert name in str(caught.value)
    assert "encoding/encoding_dsv4.py" in str(caught.value)
    assert "prompt.json" in str(caught.value)
    assert "\n" not in str(caught.value)


contents = st.text(alphabet="ab<｜>\n é", max_size=8)


@given(turns=st.lists(st.tuples(contents, contents), min_size=1, max_size=5), last=contents)
def test_a_chat_prompt_and_its_reply_begin_the_next_prompt(turns: list[tuple[str, str]], last: str) -> None:
    """What prefix caching lives on: history is never rewritten in chat mode."""
    messages: list[Raw] = [system("S")]
    for question, reply in turns:
        messages.append(user(question))
        before = encode(*messages).text + reply + EOS
        messages.append(assistant(reply))
        assert encode(*messages, user(last)).text.startswith(before + U)


def test_merging_many_messages_is_linear() -> None:
    prompt = encode(*([user("x")] * 100_000))
    assert len(prompt.text) == len(f"{BOS}{U}{A}</think>") + 100_000 + 2 * 99_999
