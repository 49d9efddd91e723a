"""The demo model's reading: six novels by Jane Austen, cleaned and split into training and held-out chapters.

`models.demo.train` loads it once, and the other recipe modules take what is made here. The text is in the public
domain; it comes out of a Debian package (MIT) that is downloaded once, checked against a pinned digest, and kept in a
cache folder. No other module of the recipe may touch the network.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.demo.recipe.rdata import character_vectors

PACKAGE_FILE = "r-cran-janeaustenr_1.0.0-1_all.deb"
PACKAGE_URL = f"http://deb.debian.org/debian/pool/main/r/r-cran-janeaustenr/{PACKAGE_FILE}"
PACKAGE_SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
PACKAGE_BYTES_MAX = 4 << 20
DOWNLOAD_SECONDS_MAX = 60.0

NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
HELDOUT_EVERY = 12
PARAGRAPH = "\n\n"

_HEADING = re.compile(r"\s*(?:chapter|volume)\s+(?:[ivxlc]+|\d+)\.?\s*", re.IGNORECASE)
_ENDING = re.compile(r"\s*(?:finis|the end|a note on the text)\.?\s*", re.IGNORECASE)
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "_": "", "£": "L"})


class ProseError(Exception):
    """The novels cannot be had; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    novel: str
    number: int  # from 1, running through all volumes of a novel
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return PARAGRAPH.join(self.paragraphs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prose:
    train: tuple[Chapter, ...]
    heldout: tuple[Chapter, ...]


def load_prose(*, cache: Path, file: Path | None = None, url: str = PACKAGE_URL) -> Prose:
    """The six novels. `file` is the Debian package, or a plain text with "CHAPTER 1" headings, already at hand.

    Raises ProseError if nothing usable can be read or downloaded.
    """
    source = file or cache / PACKAGE_FILE
    if file is None and not source.exists():
        _download(url, source)
    try:
        data = source.read_bytes()
        if file is not None and file.suffix == ".txt":
            prose = split_novels({file.stem: data.decode("utf-8").splitlines()})
            if not prose.train:
                raise ProseError(f'{source} has no chapters; each must begin with a line like "CHAPTER 1"')
            return prose
        if hashlib.sha256(data).hexdigest() != PACKAGE_SHA256:
            raise ProseError(f"{source} is not {PACKAGE_FILE} as pinned; delete it or pass another file")
        return split_novels(character_vectors(data, NOVELS))
    except (OSError, UnicodeDecodeError) as error:
        raise ProseError(f"{source} cannot be read: {error}") from None


def split_novels(novels: Mapping[str, Sequence[str]]) -> Prose:
    """Lines of each novel to chapters; every twelfth chapter of a novel is held out."""
    chapters = [chapter for name, lines in novels.items() for chapter in split_chapters(name, lines)]
    return Prose(
        train=tuple(chapter for chapter in chapters if chapter.number % HELDOUT_EVERY),
        heldout=tuple(chapter for chapter in chapters if not chapter.number % HELDOUT_EVERY),
    )


def split_chapters(novel: str, lines: Sequence[str]) -> list[Chapter]:
    """What stands before the first heading (title, author, notices) and after the last word is dropped."""
    bodies: list[list[str]] = []
    for line in lines:
        if _HEADING.fullmatch(line):
            bodies.append([])
        elif _ENDING.fullmatch(line) and bodies:
            break
        elif bodies:
            bodies[-1].append(line)
    texts = [_paragraphs(body) for body in bodies]
    return [
        Chapter(novel=novel, number=number, paragraphs=paragraphs)
        for number, paragraphs in enumerate((text for text in texts if text), start=1)
    ]


def _paragraphs(lines: Sequence[str]) -> tuple[str, ...]:
    """Unwrapped: one string a paragraph, single spaces, ASCII punctuation, no underscores of emphasis."""
    blocks = "\n".join(line.rstrip() for line in lines).split("\n\n")
    cleaned = (" ".join(block.translate(_ASCII).split()) for block in blocks)
    return tuple(
        text.encode("ascii", "ignore").decode() for text in cleaned if any(char.isalpha() for char in text)
    )


def _download(url: str, target: Path) -> None:
    advice = f"download it yourself and pass it as a file: {url}"
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS_MAX) as response:
            data = response.read(PACKAGE_BYTES_MAX + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise ProseError(f"the novels cannot be downloaded ({error}); {advice}") from None
    if hashlib.sha256(data).hexdigest() != PACKAGE_SHA256:
        raise ProseError(f"what was downloaded is not the pinned package ({len(data)} bytes); {advice}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(target)
