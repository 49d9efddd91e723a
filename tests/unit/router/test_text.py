from __future__ import annotations

import codecs
import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.errors import InvalidRequest
from router.prompt.tokenizer import Tokenizer
from router.text import ChoiceText, StopStrings

EOS, THINK, THINK_END = 1, 128821, 128822
PARTIAL = [
    236,
    25730,
    66924,
    105,
    46088,
    103,
    86387,
    257,
    109,
    118,
    175,
]  # pieces of emoji and rare characters


@dataclass
class Told:
    text: str = ""
    reasoning: str = ""
    stop_index: int | None = None
    stopped: bool = False


def tell(choice: ChoiceText, ids: list[int], cuts: list[int] | None = None) -> Told:
    """Feed in chunks of these sizes, then the rest at once with the end."""
    told = Told()
    position = 0
    for size in [*(cuts or []), len(ids)]:
        chunk = ids[position : position + size]
        position += size
        delta = choice.feed(chunk, finished=position >= len(ids))
        assert not told.stopped or delta.text + delta.reasoning == ""
        told.text += delta.text
        told.reasoning += delta.reasoning
        told.stopped = delta.stopped
        told.stop_index = delta.stop_index
        if position >= len(ids):
            break
    return told


@pytest.fixture(scope="module")
def hidden(v4_tokenizer_file: Path) -> frozenset[int]:
    """Straight from the file: what it calls special, and the turn marks, which it does not."""
    added = json.loads(v4_tokenizer_file.read_text(encoding="utf-8"))["added_tokens"]
    turns = {"<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"}
    return frozenset(token["id"] for token in added if token["special"] or token["content"] in turns)


def complete_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The characters that are complete after these tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(b"".join(tokenizer.token_bytes(token_id) for token_id in ids))


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Start and end of the stop that completes first, the longest of several. Slow and plain."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end - max(lengths), end
    return None


token_ids = st.one_of(
    st.sampled_from(PARTIAL),
    st.sampled_from([0, EOS, 2, 128803, 128804, 128828, THINK, THINK_END, 128825]),
    st.integers(0, 129279),
    st.sampled_from([65, 66, 67, 223, 33310]),
    st.just(129280 + 5),
)
spelled_end = st.sampled_from([["</", "think", ">"], ["<", "/", "th", "ink", ">"], ["</", "th", "</think>"]])


@st.composite
def completions(
    draw: st.DrawFn, tokenizer: Tokenizer, hidden: frozenset[int]
) -> tuple[list[int], list[int], list[str]]:
    """Tokens, those of them that show, and stop strings many of which occur in their text."""
    ids: list[int] = []
    for piece in draw(st.lists(token_ids | spelled_end, max_size=14)):
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += [token_id for part in piece for token_id in tokenizer.encode(part).tolist()]
    shown = [token_id for token_id in ids if token_id not in hidden]
    text = tokenizer.decode(shown)
    stops: list[str] = []
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, max(len(text) - 1, 0)))
        within = text[start : start + draw(st.integers(1, 6))]
        stops.append(
            draw(st.sampled_from([within or "x", within + "x", "x" + within, "\ufffd", "</think>", ">"]))
        )
    return ids, shown, stops


chunkings = st.lists(st.integers(0, 4), max_size=12)


@given(data=st.data())
@settings(max_examples=250, deadline=None)
def test_deltas_add_up_to_the_decoded_text_before_the_first_stop(
    v4_tokenizer: Tokenizer, hidden: frozenset[int], data: st.DataObject
) -> None:
    ids, shown, stops = data.draw(completions(v4_tokenizer, hidden))
    split = data.draw(st.booleans())
    choice = ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings(stops), split_reasoning=split)
    told = tell(choice, ids, data.draw(chunkings))
    whole = v4_tokenizer.decode(shown)
    found = first_stop(whole, stops)
    wanted = whole if found is None else whole[: found[0]]
    reasoning, _mark, content = wanted.partition("</think>") if split else ("", "", wanted)
    assert (told.reasoning, told.text) == (reasoning, content)
    assert told.stopped == (found is not None)
    if found is None:
        assert told.stop_index is None
    else:
        sizes = [
            len(complete_text(v4_tokenizer, [token for token in ids[: n + 1] if token not in hidden]))
            for n in range(len(ids))
        ]
        assert told.stop_index == next((n for n, size in enumerate(sizes) if size >= found[1]), len(ids) - 1)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_more_is_held_back_than_could_become_a_stop(
    v4_tokenizer: Tokenizer, hidden: frozenset[int], data: st.DataObject
) -> None:
    _ids, shown, stops = data.draw(completions(v4_tokenizer, hidden))
    choice = ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings(stops))
    told = ""
    for number, token_id in enumerate(shown):
        delta = choice.feed([token_id])
        if delta.stopped:
            break
        told += delta.text
        complete = complete_text(v4_tokenizer, shown[: number + 1])
        assert complete.startswith(told)
        held = complete[len(told) :]
        longest = max(
            (size for stop in stops for size in range(len(stop)) if complete.endswith(stop[:size])), default=0
        )
        assert len(held) == longest


def test_a_character_is_shown_once_it_is_whole(v4_tokenizer: Tokenizer) -> None:
    choice = ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings())
    ids = v4_tokenizer.encode("🐋 𠮷").tolist()
    deltas = [choice.feed([token_id]).text for token_id in ids]
    assert deltas[:2] == ["", "🐋"]
    assert "".join(deltas) == "🐋 𠮷"
    assert "\ufffd" not in "".join(deltas)


def test_half_a_character_at_the_end_is_flushed(v4_tokenizer: Tokenizer) -> None:
    choice = ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings())
    half = v4_tokenizer.encode("🐋").tolist()[0]
    assert choice.feed([33310, half]).text == "hello"
    assert choice.feed([], finished=True).text == "\ufffd"
    assert choice.feed([33310], finished=True).text == ""


def test_a_stop_is_found_across_chunks_and_tokens_after_it_are_ignored(v4_tokenizer: Tokenizer) -> None:
    ids = v4_tokenizer.encode("one two STOP three").tolist()
    choice = ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings(["two STOP"]))
    told = [choice.feed([token_id]) for token_id in ids]
    assert "".join(delta.text for delta in told) == "one "
    assert told[-1].stopped
    stopped_at = next(number for number, delta in enumerate(told) if delta.stopped)
    assert told[-1].stop_index == stopped_at
    assert v4_tokenizer.decode(ids[: stopped_at + 1]) == "one two STOP"
    assert choice.feed([], finished=True).text == ""


def test_the_stop_index_counts_within_one_chunk_too(v4_tokenizer: Tokenizer) -> None:
    ids = v4_tokenizer.encode("alpha beta gamma delta").tolist()
    choice = ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings(["beta"]))
    delta = choice.feed(ids)
    assert delta.text == "alpha "
    assert delta.stop_index is not None
    assert v4_tokenizer.decode(ids[: delta.stop_index + 1]).endswith("beta")


def test_of_two_stops_the_one_that_completes_first_counts(v4_tokenizer: Tokenizer) -> None:
    ids = v4_tokenizer.encode("abcdef").tolist()
    assert tell(ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings(["abcd", "c"])), ids).text == "ab"
    assert tell(ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings(["d", "bcd"])), ids).text == "a"


def test_reasoning_ends_at_its_token_or_at_its_spelling(v4_tokenizer: Tokenizer) -> None:
    for mark in ([THINK_END], v4_tokenizer.encode("</thi").tolist() + v4_tokenizer.encode("nk>").tolist()):
        choice = ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings(), split_reasoning=True)
        ids = [*v4_tokenizer.encode("why").tolist(), *mark, 33310, THINK_END, EOS]
        told = tell(choice, ids, [1] * len(ids))
        assert (told.reasoning, told.text) == ("why", "hello</think>")


def test_reasoning_may_never_end(v4_tokenizer: Tokenizer) -> None:
    choice = ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings(), split_reasoning=True)
    told = tell(choice, v4_tokenizer.encode("why not </thi").tolist())
    assert (told.reasoning, told.text) == ("why not </thi", "")


def test_stops_apply_to_reasoning_and_may_span_its_end(v4_tokenizer: Tokenizer) -> None:
    ids = [*v4_tokenizer.encode("one two").tolist(), THINK_END, *v4_tokenizer.encode("three").tolist()]

    def told(stop: str) -> tuple[str, str, bool]:
        choice = ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings([stop]), split_reasoning=True)
        told = tell(choice, ids, [1] * len(ids))
        return told.reasoning, told.text, told.stopped

    assert told("two") == ("one ", "", True)
    assert told("</think>") == ("one two", "", True)
    assert told("o</think>th") == ("one tw", "", True)
    assert told("ree") == ("one two", "th", True)


def test_turn_marks_and_special_tokens_are_not_shown(v4_tokenizer: Tokenizer) -> None:
    end_of_query, placeholder = 128846, 128000
    ids = [0, 128803, 33310, 128804, EOS, end_of_query, 2, 33310, placeholder]
    assert tell(ChoiceText(tokenizer=v4_tokenizer, stops=StopStrings()), ids).text == "hellohello"


def test_without_a_tokenizer_there_is_no_text_and_nothing_stops() -> None:
    choice = ChoiceText(tokenizer=None, stops=StopStrings(["a"]), split_reasoning=True)
    assert tell(choice, [1, 2, 3]) == Told()


@pytest.mark.parametrize(
    ("stops", "words"),
    [
        (["a"] * 17, "at most 16 strings, got 17"),
        (["a", ""], "must not hold an empty string"),
        (["a" * 4000, "b" * 97], "at most 4096 characters, got 4097"),
    ],
)
def test_bad_stops_are_refused(stops: list[str], words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        StopStrings(stops)
    assert caught.value.field == "stop"
    assert words in str(caught.value)


def per_token_us(choice: ChoiceText, ids: list[int]) -> float:
    started = time.perf_counter()
    for token_id in ids:
        choice.feed((token_id,))
    return (time.perf_counter() - started) / len(ids) * 1e6


def test_the_cost_of_a_token_does_not_grow_with_the_text(v4_tokenizer: Tokenizer) -> None:
    """Endless broken characters make a naive detokeniser quadratic, and near-stops a naive matcher."""
    worst_stop = StopStrings(["a" * 1000 + "b"])
    for ids in ([175] * 20_000, v4_tokenizer.encode("a").tolist() * 20_000):
        costs = [
            per_token_us(ChoiceText(tokenizer=v4_tokenizer, stops=worst_stop), ids[:num_tokens])
            for num_tokens in (2_000, 2_000, 20_000)
        ]
        assert costs[2] < 5 * min(costs[:2]) + 5
