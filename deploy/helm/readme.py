"""Writes the values' tables into the chart's README, out of values.yaml's comments: `python deploy/helm/readme.py`.

A comment `## @section TITLE` begins a table; `## @param KEY TEXT`, with lines `## TEXT` that go on, is a row of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent / "rorqual"
BEGIN, END = "<!-- begin of values -->", "<!-- end of values -->"
LONG = 60
"""Characters of a default from which on the table says only where it is."""


@dataclass(slots=True)
class Param:
    key: str
    text: str


@dataclass(slots=True)
class Section:
    title: str
    params: list[Param] = field(default_factory=list[Param])


def sections(text: str) -> list[Section]:
    """What the comments of a values.yaml say."""
    found: list[Section] = []
    is_going_on = False
    for line in text.splitlines():
        if title := re.fullmatch(r"## @section (.+)", line):
            found.append(Section(title[1]))
        elif param := re.fullmatch(r"## @param (\S+) (.+)", line):
            found[-1].params.append(Param(param[1], param[2]))
            is_going_on = True
        elif is_going_on and line.startswith("## "):
            found[-1].params[-1].text += " " + line.removeprefix("## ")
        else:
            is_going_on = False
    return found


def default_of(values: dict[str, Any], key: str) -> str:
    value: Any = values
    for part in key.split("."):
        value = value[part]
    shown = json.dumps(value)
    return f"`{shown}`" if len(shown) <= LONG else "see values.yaml"


def table(text: str) -> str:
    """The tables of a values.yaml, as Markdown."""
    values = yaml.safe_load(text)
    lines: list[str] = []
    for section in sections(text):
        lines += [f"### {section.title}", "", "| value | default | what it is |", "| --- | --- | --- |"]
        for param in section.params:
            shown = param.text.replace("|", "\\|")
            lines.append(f"| `{param.key}` | {default_of(values, param.key)} | {shown} |")
        lines.append("")
    return "\n".join(lines)


def updated(readme: str, values: str) -> str:
    """The README with the tables of these values. Raises ValueError where it has no place for them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table(values)}\n{END}{after}"


if __name__ == "__main__":
    path = CHART / "README.md"
    new = updated(path.read_text(encoding="utf-8"), (CHART / "values.yaml").read_text(encoding="utf-8"))
    path.write_text(new, encoding="utf-8")
