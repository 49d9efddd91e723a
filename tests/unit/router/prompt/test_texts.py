from __future__ import annotations

import json
from pathlib import Path

import pytest

from rorqual.errors import ConfigError, InvalidRequest
from router.prompt.texts import NO_TEXTS, load_texts

RELEASE = '''
import os
from typing import Optional

eos_token: str = "<end>"
REASONING_EFFORT_MAX = (
    "First line.\\n"
    "Second line.\\n"
)
TOOLS_TEMPLATE = """Tools {dsml_token}
{tool_schemas}
"""
tool_output_template: str = "<r>{content}</r>"
tool_calls_template = "{tool_calls}" + eos_token
unset: Optional[str]
raise SystemExit("executed")
'''


def write_release(model_dir: Path, content: str) -> None:
    (model_dir / "encoding").mkdir()
    (model_dir / "encoding" / "encoding_dsv4.py").write_text(content, encoding="utf-8")


def test_texts_of_a_release_are_read_and_its_code_is_not_run(tmp_path: Path) -> None:
    write_release(tmp_path, RELEASE)
    texts = load_texts(tmp_path)
    assert texts.text("REASONING_EFFORT_MAX", field="x") == "First line.\nSecond line.\n"
    filled = texts.fill(
        "TOOLS_TEMPLATE",
        field="tools",
        dsml_token="D",
        tool_schemas="{a}",
        thinking_start_token="",
        thinking_end_token="",
    )
    assert filled == "Tools D\n{a}\n"
    with pytest.raises(
        InvalidRequest, match=r"encoding/encoding_dsv4\.py in the model directory does not define"
    ):
        texts.text("tool_calls_template", field="messages")


def test_prompt_json_is_read_alone_where_both_are_there(tmp_path: Path) -> None:
    write_release(tmp_path, RELEASE)
    (tmp_path / "prompt.json").write_text(json.dumps({"REASONING_EFFORT_MAX": "ours", "note": "ignored"}))
    texts = load_texts(tmp_path)
    assert dict(texts.texts) == {"REASONING_EFFORT_MAX": "ours"}
    assert texts.source == "prompt.json"


def test_a_directory_without_either_has_no_texts(tmp_path: Path) -> None:
    assert load_texts(tmp_path) is NO_TEXTS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"TOOLS_TEMPLATE": 3}', "key 'TOOLS_TEMPLATE' must be a string"),
        ('{"TOOLS_TEMPLATE": "nothing"}', "TOOLS_TEMPLATE lacks placeholder tool_schemas"),
        ('{"TOOLS_TEMPLATE": "{tool_schemas} {other}"}', "has placeholder {other}"),
        ('{"TOOLS_TEMPLATE": "{tool_schemas.__class__}"}', "has placeholder {tool_schemas.__class__}"),
        ('{"TOOLS_TEMPLATE": "{tool_schemas!r}"}', "has placeholder"),
        ('{"TOOLS_TEMPLATE": "{tool_schemas} {"}', "TOOLS_TEMPLATE: "),
        ('{"tool_call_template": "{name}"}', "lacks placeholder arguments"),
    ],
)
def test_bad_prompt_json_is_one_line_that_names_the_file(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "prompt.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_texts(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "prompt.json"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["def (", "x = '\0'", "(" * 5000])
def test_a_release_that_is_no_python_is_refused(tmp_path: Path, content: str) -> None:
    write_release(tmp_path, content)
    with pytest.raises(ConfigError, match=r"encoding_dsv4\.py: not Python"):
        load_texts(tmp_path)


def test_files_over_the_bound_are_refused(tmp_path: Path) -> None:
    (tmp_path / "prompt.json").write_text(json.dumps({"a": "x" * (1 << 20)}))
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        load_texts(tmp_path)


def test_bytes_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "prompt.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_texts(tmp_path)
