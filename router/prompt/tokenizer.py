"""Text to token ids and back, for byte-level BPE vocabularies (DeepSeek-V4's is one).

Owns the vocabulary, every token's bytes and a memo of recent segments. `router.prompt` encodes with it,
`router.text` reads `token_bytes` to detokenise. Safe to call from several threads.

A prompt is cut at the control tokens the encoder writes, and each segment is encoded on its own and
remembered: a conversation's history costs a look-up, not an encoding, and always gives the same ids. That
equals encoding the whole text at once because the library too splits at such tokens before anything else, as
long as none of them can overlap another added token; tokens that could are not cut at.

Ids stand for bytes here, not for the library's DecodeStream: that decodes its whole backlog again for each
token until the backlog is valid UTF-8, so a run of n broken characters costs n^2 (measured: 360 us a token
after 4,000 of them, where a look-up stays under 1 us), and random or badly sampled text is full of them.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers

from rorqual.errors import ConfigError, InvalidRequest
from rorqual.session import TokenArray

TOKENIZER_FILE = "tokenizer.json"
VOCAB_MAX = 1 << 22
MEMO_BYTES_MAX = 32 << 20
MEMO_ENTRY_BYTES = 300  # a dict entry, a str and an array header, besides their contents


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoStats:
    bytes_held: int
    num_hits: int
    num_misses: int


class Tokenizer:
    """One model's vocabulary. `control_tokens` are where prompts may be cut."""

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        *,
        control_tokens: Iterable[str] = (),
        memo_bytes_max: int = MEMO_BYTES_MAX,
    ) -> None:
        _check_decoder(library)
        # A file may bring settings of its training; a prompt is never cut short or filled up here.
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._bytes = _token_bytes(library)
        self._memo = _Memo(memo_bytes_max)
        added = library.get_added_tokens_decoder()
        names = {token.content: token_id for token_id, token in added.items()}
        self._boundaries = {
            name: np.array([names[name]], dtype=np.int32)
            for name in _sound_boundaries(library, control_tokens)
        }
        alternatives = "|".join(re.escape(name) for name in sorted(self._boundaries, key=len, reverse=True))
        self._cut = re.compile(f"({alternatives})") if alternatives else None
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._special_ids_and: dict[tuple[str, ...], frozenset[int]] = {}
        self._token_bytes_max = max(map(len, self._bytes), default=0)
        self._keeps_text = library.normalizer is None or not _changes_text(library.normalizer)

    @classmethod
    def load(
        cls, file: Path, *, control_tokens: Iterable[str] = (), memo_bytes_max: int = MEMO_BYTES_MAX
    ) -> Tokenizer:
        """Raises ConfigError naming the file. Takes about half a second for 130,000 tokens."""
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from None
        try:
            library = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # noqa: BLE001  the library raises bare Exception for any bad file
            raise ConfigError(f"{file}: not a tokenizer: {error}") from None
        try:
            return cls(library, control_tokens=control_tokens, memo_bytes_max=memo_bytes_max)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written like this in tokenizer.json."""
        return self._library.token_to_id(text)

    def special_ids_and(self, names: tuple[str, ...]) -> frozenset[int]:
        """The ids of the special tokens and of those written like `names`: made once, over a thousand ids."""
        found = self._special_ids_and.get(names)
        if found is None:
            ids = (self.token_id(name) for name in names)
            found = self.special_ids.union(token_id for token_id in ids if token_id is not None)
            self._special_ids_and[names] = found
        return found

    def num_tokens_min(self, text: str) -> int:
        """No encoding of `text` has fewer tokens: none of them stands for more than the longest one's bytes."""
        if not self._keeps_text or not self._token_bytes_max:
            return 0
        return -(-len(text) // self._token_bytes_max)

    def segments(self, text: str) -> list[str]:
        """Cut at control tokens; every second segment is one."""
        return [text] if self._cut is None else self._cut.split(text)

    def num_unknown_chars(self, segments: Sequence[str]) -> int:
        """How much of this would have to be encoded, rather than looked up."""
        return sum(len(segment) for segment in segments[::2] if segment not in self._memo)

    def encode(self, text: str, *, field: str = "prompt") -> TokenArray:
        """The ids of `text` as it stands: nothing is put before it. Raises InvalidRequest blaming `field`."""
        return self.encode_segments(self.segments(text), field=field)

    def encode_segments(self, segments: Sequence[str], *, field: str = "prompt") -> TokenArray:
        arrays: list[TokenArray] = []
        for number, segment in enumerate(segments):
            if number % 2:
                arrays.append(self._boundaries[segment])
            elif segment:
                arrays.append(self._encode_segment(segment, field))
        return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """All tokens, special ones too. Bytes that are no UTF-8 read U+FFFD, ids out of range nothing."""
        table, size = self._bytes, len(self._bytes)
        data = b"".join([table[token_id] for token_id in ids if 0 <= token_id < size])
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for: part of a character, perhaps. Empty for an id out of range."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        r"""The token as a string, different for different bytes: `bytes:\xf0\x9f` if it is no UTF-8."""
        if not 0 <= token_id < len(self._bytes):
            return unknown_token_text(token_id)
        data = self._bytes[token_id]
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def memo_stats(self) -> MemoStats:
        return self._memo.stats()

    def _encode_segment(self, segment: str, field: str) -> TokenArray:
        known = self._memo.get(segment)
        if known is not None:
            return known
        try:
            segment.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{field} holds half a surrogate pair (U+{ord(segment[error.start]):04X}), which is no text",
                field=field,
            ) from None
        # The batch call skips offsets, which nearly halves the time of long texts, and it lets go of the
        # interpreter lock. One text at a time, since a batch would take every core and the ranks need them.
        encodings = self._library.encode_batch_fast([segment], add_special_tokens=False)
        ids = np.array(encodings[0].ids, dtype=np.int32)
        self._memo.put(segment, ids)
        return ids


def unknown_token_text(token_id: int) -> str:
    """What stands for a token that has no text: out of range, or the model has no tokenizer."""
    return f"token_id:{token_id}"


class _Memo:
    """Segment -> ids, least recently used out first, bounded by the bytes it holds.

    What alone would fill an eighth of it is not kept: one huge prompt must not push out everybody's history.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._entries: OrderedDict[str, TokenArray] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes_held = 0
        self._num_hits = 0
        self._num_misses = 0

    def __contains__(self, segment: str) -> bool:
        with self._lock:
            return segment in self._entries

    def get(self, segment: str) -> TokenArray | None:
        with self._lock:
            found = self._entries.get(segment)
            if found is None:
                self._num_misses += 1
                return None
            self._num_hits += 1
            self._entries.move_to_end(segment)
            return found

    def put(self, segment: str, ids: TokenArray) -> None:
        size = _entry_bytes(segment, ids)
        if size * 8 > self._bytes_max:
            return
        with self._lock:
            if segment in self._entries:  # two threads encoded it at once
                return
            self._entries[segment] = ids
            self._bytes_held += size
            while self._bytes_held > self._bytes_max:
                self._bytes_held -= _entry_bytes(*self._entries.popitem(last=False))

    def stats(self) -> MemoStats:
        with self._lock:
            return MemoStats(
                bytes_held=self._bytes_held, num_hits=self._num_hits, num_misses=self._num_misses
            )


def _entry_bytes(segment: str, ids: TokenArray) -> int:
    width = 1 if segment.isascii() else 4
    return len(segment) * width + ids.nbytes + MEMO_ENTRY_BYTES


def _check_decoder(library: tokenizers.Tokenizer) -> None:
    state = cast("dict[str, Any]", json.loads(library.decoder.__getstate__())) if library.decoder else {}
    kind = state.get("type")
    if kind != "ByteLevel":
        raise ConfigError(f"decoder is {kind!r}; only 'ByteLevel' is served")


def _token_bytes(library: tokenizers.Tokenizer) -> list[bytes]:
    """Bytes by id. Gaps in the vocabulary stand for nothing."""
    char_bytes = _char_bytes()
    vocabulary = library.get_vocab(with_added_tokens=True)
    highest = max(vocabulary.values(), default=-1)
    if highest >= VOCAB_MAX:
        raise ConfigError(f"token id {highest} is out of range; at most {VOCAB_MAX} ids are served")
    table = [b""] * (highest + 1)
    for piece, token_id in vocabulary.items():
        try:
            table[token_id] = bytes([char_bytes[char] for char in piece])
        except KeyError:  # an added token, written as it reads
            table[token_id] = piece.encode("utf-8")
    return table


def _char_bytes() -> dict[str, int]:
    """How byte-level vocabularies write bytes: as the Latin-1 character where that is visible, the others, in
    order, as the characters from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + number): byte for number, byte in enumerate(hidden)
    }


def _sound_boundaries(library: tokenizers.Tokenizer, control_tokens: Iterable[str]) -> list[str]:
    """The control tokens at which cutting a text cannot change its ids.

    The library finds added tokens leftmost-longest before anything else, in two passes. A control token is
    always found where it is written unless another added token can overlap it there.
    """
    if library.normalizer is not None and _changes_text(library.normalizer):
        return []
    added = library.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return []
    names = {token.content for token in added}
    return [
        name
        for name in dict.fromkeys(control_tokens)
        if name in names and not any(_overlap(name, other) for other in names)
    ]


def _changes_text(normalizer: Any) -> bool:
    state = cast("dict[str, Any]", json.loads(normalizer.__getstate__()))
    return not (state.get("type") == "Sequence" and not state.get("normalizers"))


def _overlap(name: str, other: str) -> bool:
    """Whether two different occurrences of these strings can share characters of one text."""
    if name != other and (name in other or other in name):
        return True
    lengths = range(1, min(len(name), len(other)))
    return any(name[-length:] == other[:length] or other[-length:] == name[:length] for length in lengths)
