"""Reading and splitting the novels."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from models.demo.recipe.prose import Prose, ProseError, load_prose, split_chapters
from models.demo.recipe.rdata import character_vectors


def test_every_twelfth_chapter_of_each_novel_is_held_out_and_no_paragraph_is_in_both_parts(
    prose: Prose,
) -> None:
    held = [(chapter.novel, chapter.number) for chapter in prose.heldout]
    assert held == [("one", 12), ("one", 24), ("two", 12)]
    assert len(prose.train) == 40 - 3
    train = {paragraph for chapter in prose.train for paragraph in chapter.paragraphs}
    assert not train & {paragraph for chapter in prose.heldout for paragraph in chapter.paragraphs}


def test_lines_are_unwrapped_and_headings_title_and_end_are_dropped() -> None:
    lines = [
        "EMMA",
        "",
        "VOLUME I",
        "",
        "CHAPTER I",
        "",
        "“One _very_ long",
        "  line—here.”",
        "",
        "Another.",
        "VOLUME II",
        "Chapter 2",
        "",
        "* * *",
        "",
        "The chapter of accidents.",
        "FINIS",
        "A note.",
    ]
    chapters = split_chapters("emma", lines)
    assert [chapter.paragraphs for chapter in chapters] == [
        ('"One very long line--here."', "Another."),
        ("The chapter of accidents.",),
    ]
    assert [chapter.number for chapter in chapters] == [1, 2]


def test_a_plain_text_file_serves_as_novels(tmp_path: Path) -> None:
    file = tmp_path / "novel.txt"
    file.write_text("CHAPTER 1\n\nIt was late.\n\nCHAPTER 2\n\nIt was later.\n", encoding="utf-8")
    prose = load_prose(cache=tmp_path, file=file)
    assert [chapter.text for chapter in prose.train] == ["It was late.", "It was later."]


def test_a_package_with_another_digest_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "other.deb"
    file.write_bytes(b"!<arch>\n")
    with pytest.raises(ProseError, match=r"other\.deb is not"):
        load_prose(cache=tmp_path, file=file)


def test_a_missing_file_is_a_prose_error_and_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(ProseError, match="cannot be read"):
        load_prose(cache=tmp_path, file=tmp_path / "nowhere.deb")


def test_a_text_without_chapters_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "novel.txt"
    file.write_text("It was late.\n", encoding="utf-8")
    with pytest.raises(ProseError, match="no chapters"):
        load_prose(cache=tmp_path, file=file)


def test_a_failed_download_says_what_to_do_and_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ProseError, match="download it yourself"):
        load_prose(cache=cache, url=(tmp_path / "nowhere.deb").as_uri())
    wrong = tmp_path / "wrong.deb"
    wrong.write_bytes(b"something else")
    with pytest.raises(ProseError, match=r"not the pinned package \(14 bytes\)"):
        load_prose(cache=cache, url=wrong.as_uri())
    assert not cache.exists()


def test_character_vectors_come_out_of_a_package() -> None:
    package = _package({"novel": ["First line.", "", "Caf\u00e9."]})
    assert character_vectors(package, ("novel",)) == {"novel": ["First line.", "", "Caf\u00e9."]}


def test_a_truncated_package_is_a_value_error() -> None:
    package = _package({"novel": ["First line."]})
    with pytest.raises(ValueError, match="no member"):
        character_vectors(package[:40], ("novel",))
    with pytest.raises(ValueError, match="ar magic"):
        character_vectors(package[1:], ("novel",))


def test_a_variable_that_is_not_there_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        character_vectors(_package({"novel": ["First line."]}), ("other",))


def _package(vectors: dict[str, list[str]]) -> bytes:
    """A Debian package with one lazy-load database, written from R's format description."""
    blocks, places = b"", {}
    for name, lines in vectors.items():
        data = _serialized(struct.pack(">ii", 16, len(lines)) + b"".join(_chars(line) for line in lines))
        block = struct.pack(">I", len(data)) + zlib.compress(data)
        places[name] = (len(blocks), len(block))
        blocks += block
    variables = b"".join(struct.pack(">iiii", 13, 2, *place) for place in places.values())
    variables = struct.pack(">ii", 19 | 1 << 9, len(places)) + variables + _names(list(places), first=True)
    index = struct.pack(">ii", 19 | 1 << 9, 1) + variables + _names(["variables"], first=False)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name, content in (("rdx", zlib.compress(_serialized(index))), ("rdb", blocks)):
            member = tarfile.TarInfo(f"./usr/lib/R/site-library/made/data/Rdata.{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    members = (("debian-binary", b"2.0\n"), ("odd", b"x"), ("data.tar.xz", buffer.getvalue()))
    return b"!<arch>\n" + b"".join(_ar_member(name, content) for name, content in members)


def _serialized(item: bytes) -> bytes:
    return b"X\n" + struct.pack(">iiii", 3, 0x040201, 0x030500, 5) + b"UTF-8" + item


def _chars(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">ii", 9 | 1 << 15, len(data)) + data


def _names(names: list[str], *, first: bool) -> bytes:
    """The attribute list: a symbol is written out once and referred to afterwards."""
    symbol = struct.pack(">i", 1) + _chars("names") if first else struct.pack(">i", 1 << 8 | 255)
    values = struct.pack(">ii", 16, len(names)) + b"".join(_chars(name) for name in names)
    return struct.pack(">i", 2 | 1 << 10) + symbol + values + struct.pack(">i", 254)


def _ar_member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    assert len(header) == 60
    return header + content + b"\n" * (len(content) % 2)
