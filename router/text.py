"""From sampled tokens to the text a client sees: detokenise, stop at stop strings, split off the reasoning.

The dispatcher keeps one `ChoiceText` per choice and feeds it each step's tokens. No I/O, no clock; what a
choice holds back is bounded by its longest stop string and a few bytes.

The text of a choice is defined without reference to how tokens arrive: decode all its tokens but the hidden
ones (end of sentence, turn marks), cut at the stop string that completes first (of several completing at the
same character, the longest), then, for a completion that starts in reasoning, split at the first `</think>`,
which belongs to neither side. So stop strings apply to reasoning and content alike, and may span both. A
completion that never writes `</think>` is all reasoning. The mark is found in the text, where its own token
decodes to it and where a model spells it out of others.

A character is emitted once all its bytes are there: U+FFFD only ever stands for bytes that nothing can
complete. Text that may yet become part of a stop string is held back, and no more than that.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from router.limits import check_stops
from router.prompt.encoder import ASSISTANT, BOS, EOS, REMINDER, THINK_END, USER
from router.prompt.tokenizer import Tokenizer

_HIDDEN = (BOS, EOS, USER, ASSISTANT, REMINDER)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """What became certain with the tokens just fed."""

    text: str = ""
    reasoning: str = ""
    stopped: bool = False  # a stop string was completed, now or earlier
    stop_index: int | None = None  # the token that completed it, counted from the choice's first


class StopStrings:
    """Stop strings, compiled (Aho-Corasick): one dictionary look-up per character however many there are.

    Made once per request and shared by its choices. Raises InvalidRequest naming `stop`.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        check_stops(stops)
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match_chars = [0]  # length of the longest stop string that ends in this state
        for stop in stops:
            self._add(stop)
        self._fall = self._link()
        self._first = frozenset(self._next[0])

    def __bool__(self) -> bool:
        return bool(self._first)

    def scan(self, state: int, text: str) -> tuple[int, int, int]:
        """Go on from `state` (0 at first) over `text`.

        Returns the new state, the end of the first completed stop string in `text` (-1 if none: then all was
        read) and that string's length. It may have begun in earlier texts.
        """
        if not state and self._first.isdisjoint(text):
            return 0, -1, 0
        transitions, fall, match_chars = self._next, self._fall, self._match_chars
        for position, char in enumerate(text):
            target = transitions[state].get(char)
            while target is None and state:
                state = fall[state]
                target = transitions[state].get(char)
            state = target or 0
            if match_chars[state]:
                return state, position + 1, match_chars[state]
        return state, -1, 0

    def num_held(self, state: int) -> int:
        """How many of the last characters read may yet become part of a stop string."""
        return self._depth[state]

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            target = self._next[state].get(char)
            if target is None:
                target = len(self._next)
                self._next[state][char] = target
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match_chars.append(0)
            state = target
        self._match_chars[state] = len(stop)

    def _link(self) -> list[int]:
        """For each state the longest proper suffix that is a state too, breadth first."""
        fall = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self._match_chars[state] = self._match_chars[state] or self._match_chars[fall[state]]
            for char, target in self._next[state].items():
                back = fall[state]
                while char not in self._next[back] and back:
                    back = fall[back]
                fall[target] = self._next[back].get(char, 0)
                queue.append(target)
        return fall


class ChoiceText:
    """One choice's text as it grows. Without a tokenizer it stays empty and nothing stops it."""

    def __init__(
        self, *, tokenizer: Tokenizer | None, stops: StopStrings, split_reasoning: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = _hidden_ids(tokenizer)
        self._undecoded = b""  # the beginning of a character
        self._cutter = _Cutter(stops)
        self._splitter = _Cutter(_REASONING_END) if split_reasoning else None
        self._num_tokens = 0
        self._stop_index: int | None = None
        self._finished = False

    def feed(self, token_ids: Iterable[int], *, finished: bool = False) -> TextDelta:
        """Take the next tokens; `finished` says that no more will come and lets go of what was held back.

        Tokens after the stop are ignored, and whatever comes after the end.
        """
        certain: list[str] = []
        if self._finished:
            token_ids, finished = (), False
        for token_id in token_ids:
            certain.append(self._cutter.feed(self._decode(token_id)))
            self._num_tokens += 1
            if self._cutter.matched:
                self._finish(certain)
                break
        if finished and not self._finished:
            tail = codecs.utf_8_decode(self._undecoded, "replace", True)[0]
            certain.append(self._cutter.feed(tail))
            self._finish(certain)
        return self._delta("".join(certain))

    def _finish(self, certain: list[str]) -> None:
        self._finished = True
        if self._cutter.matched:
            self._stop_index = self._num_tokens - 1
        else:
            certain.append(self._cutter.flush())

    def _decode(self, token_id: int) -> str:
        if self._tokenizer is None or token_id in self._hidden:
            return ""
        data = self._undecoded + self._tokenizer.token_bytes(token_id)
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._undecoded = data[num_used:]
        return text

    def _delta(self, text: str) -> TextDelta:
        stopped = self._stop_index is not None
        splitter = self._splitter
        if splitter is None:
            return TextDelta(text=text, stopped=stopped, stop_index=self._stop_index)
        reasoning = splitter.feed(text)
        content = ""
        if splitter.matched:
            content = splitter.rest
            self._splitter = None
        elif self._finished:
            reasoning += splitter.flush()
        return TextDelta(text=content, reasoning=reasoning, stopped=stopped, stop_index=self._stop_index)


class _Cutter:
    """Lets text through up to the first match of some strings, holding back what may still become one."""

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._state = 0
        self._held = ""
        self.matched = False
        self.rest = ""  # what followed the match in the text that completed it

    def feed(self, text: str) -> str:
        if not self._strings or not text:
            return text
        self._state, end, match_chars = self._strings.scan(self._state, text)
        if end >= 0:
            self.matched = True
            self.rest = text[end:]
            return (self._held + text[:end])[:-match_chars]
        pending = self._held + text
        certain_chars = len(pending) - self._strings.num_held(self._state)
        self._held = pending[certain_chars:]
        return pending[:certain_chars]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _hidden_ids(tokenizer: Tokenizer | None) -> frozenset[int]:
    return frozenset() if tokenizer is None else tokenizer.special_ids_and(_HIDDEN)


_REASONING_END = StopStrings((THINK_END,))
