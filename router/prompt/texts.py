"""The long fixed texts of a prompt (tools block, effort prefix, ...): they belong to a checkpoint, not to us.

A model directory carries them in `prompt.json` (an object of strings) or in the release's own encoder,
`encoding/encoding_dsv4.py`, whose module-level string assignments are read with `ast`; it is never executed.
If both are there `prompt.json` is read alone: somebody put it there on purpose. With neither, plain chats
work, and a request that needs a text gets an InvalidRequest that says which file is missing.

`router.prompt` loads them once at start; `router.prompt.encoder` asks for them by name.
"""

from __future__ import annotations

import ast
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

from rorqual.errors import ConfigError, InvalidRequest

PROMPT_FILE = "prompt.json"
RELEASE_FILE = "encoding/encoding_dsv4.py"
FILE_BYTES_MAX = 1 << 20

TOOLS = "TOOLS_TEMPLATE"
RESPONSE_FORMAT = "response_format_template"
TOOL_CALL = "tool_call_template"
TOOL_CALLS = "tool_calls_template"
TOOL_OUTPUT = "tool_output_template"
EFFORT_HIGH = "REASONING_EFFORT_HIGH"
EFFORT_MAX = "REASONING_EFFORT_MAX"

# What a template may leave open, and what it must.
_PLACEHOLDERS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    TOOLS: (
        frozenset({"tool_schemas", "dsml_token", "thinking_start_token", "thinking_end_token"}),
        frozenset({"tool_schemas"}),
    ),
    RESPONSE_FORMAT: (frozenset({"schema"}), frozenset({"schema"})),
    TOOL_CALL: (frozenset({"dsml_token", "name", "arguments"}), frozenset({"name", "arguments"})),
    TOOL_CALLS: (frozenset({"dsml_token", "tc_block_name", "tool_calls"}), frozenset({"tool_calls"})),
    TOOL_OUTPUT: (frozenset({"content"}), frozenset({"content"})),
}
_PLAIN = frozenset({EFFORT_HIGH, EFFORT_MAX})

EffortLevels = Mapping[str, str | None]
"""Reasoning effort as a client names it -> the text that goes first in the prompt, or None."""

EFFORT_LEVELS_PREVIEW: EffortLevels = MappingProxyType(
    {"low": None, "medium": None, "high": None, "max": EFFORT_MAX}
)
"""The first release knows one text. Its lower levels are what thinking is without it."""

EFFORT_LEVELS_0731: EffortLevels = MappingProxyType({"low": None, "high": EFFORT_HIGH, "max": EFFORT_MAX})
"""The release of 31 July made the former "max" text its "high" and wrote a stronger "max"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionTexts:
    """The texts of one checkpoint revision. Templates were checked when read, so filling one cannot fail."""

    source: str | None  # the file they came from, relative to the model directory
    texts: Mapping[str, str]

    @property
    def effort_levels(self) -> EffortLevels:
        return EFFORT_LEVELS_0731 if EFFORT_HIGH in self.texts else EFFORT_LEVELS_PREVIEW

    def text(self, name: str, *, field: str) -> str:
        """Raises InvalidRequest, blaming `field`, if the model directory does not have this text."""
        found = self.texts.get(name)
        if found is not None:
            return found
        if self.source is None:
            missing = f"neither {RELEASE_FILE} nor {PROMPT_FILE} is in the model directory"
        else:
            missing = f"{self.source} in the model directory does not define it"
        raise InvalidRequest(f"{field} needs the model's own text {name}, but {missing}", field=field)

    def fill(self, name: str, /, *, field: str, **values: str) -> str:
        """The template `name` with all its placeholders given as `values`."""
        pieces: list[str] = []
        for literal, placeholder, _spec, _conversion in string.Formatter().parse(
            self.text(name, field=field)
        ):
            pieces.append(literal)
            if placeholder is not None:
                pieces.append(values[placeholder])
        return "".join(pieces)


NO_TEXTS = RevisionTexts(source=None, texts=MappingProxyType({}))


def load_texts(model_dir: Path) -> RevisionTexts:
    """Read a model directory's texts. Raises ConfigError naming a file that is there but cannot be used."""
    for name, read in ((PROMPT_FILE, _read_prompt_json), (RELEASE_FILE, _read_release)):
        file = model_dir / name
        if not file.is_file():
            continue
        found = read(_read_bounded(file), file)
        known = {key: text for key, text in found.items() if key in _PLACEHOLDERS or key in _PLAIN}
        for key, text in known.items():
            _check_template(key, text, file)
        return RevisionTexts(source=name, texts=MappingProxyType(known))
    return NO_TEXTS


def _read_bounded(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise ConfigError(f"{file}: larger than {FILE_BYTES_MAX} bytes")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


def _read_prompt_json(content: str, file: Path) -> dict[str, str]:
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: must hold a JSON object")
    found = cast("dict[str, object]", raw)
    for name, value in found.items():
        if not isinstance(value, str):
            raise ConfigError(f"{file}: key {name!r} must be a string")
    return cast("dict[str, str]", found)


def _read_release(content: str, file: Path) -> dict[str, str]:
    """Module-level `NAME = "..."` and `NAME: str = "..."`. Values that need evaluation are passed over."""
    try:
        module = ast.parse(content, filename=str(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{file}: not Python that can be parsed: {error}") from None
    found: dict[str, str] = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign):
            targets, value = [statement.target], statement.value
        else:
            continue
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found.update({target.id: value.value for target in targets if isinstance(target, ast.Name)})
    return found


def _check_template(name: str, text: str, file: Path) -> None:
    if name in _PLAIN:
        return
    allowed, required = _PLACEHOLDERS[name]
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{file}: {name}: {error}") from None
    for _literal, placeholder, spec, conversion in parsed:
        if placeholder is not None and (placeholder not in allowed or spec or conversion):
            raise ConfigError(
                f"{file}: {name} has placeholder {{{placeholder}}}; known are {sorted(allowed)}"
            )
    missing = required - {placeholder for _literal, placeholder, _spec, _conversion in parsed if placeholder}
    if missing:
        raise ConfigError(f"{file}: {name} lacks placeholder {sorted(missing)[0]}")
