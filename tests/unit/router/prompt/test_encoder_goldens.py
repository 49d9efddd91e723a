"""The release's own golden prompts, where a folder with them is named; they are not ours to ship."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from router.prompt import PromptEncoder
from router.prompt.texts import load_texts
from router.prompt.tokenizer import Tokenizer

GOLDENS_VARIABLE = "RORQUAL_ENCODER_GOLDENS"
RELEASE_VARIABLE = "RORQUAL_RELEASE_DIR"
SCHEMAS = re.compile(r'^\{"name": .*\}$(\n^\{"name": .*\}$)*', re.MULTILINE)


@pytest.fixture(scope="module")
def goldens() -> Path:
    folder = os.environ.get(GOLDENS_VARIABLE)
    if not folder:
        pytest.skip(f"needs {GOLDENS_VARIABLE}, the folder with the release's test_input_N.json")
    return Path(folder)


@pytest.fixture(scope="module")
def golden_texts(goldens: Path) -> dict[str, str]:
    """The templates, recovered from what the release's encoder wrote with them."""
    output = (goldens / "test_output_1.txt").read_text(encoding="utf-8")
    tools = output[output.index("## Tools") : output.index("<｜User｜>")]
    escaped = tools.replace("{", "{{").replace("}", "}}")
    schemas = SCHEMAS.search(tools)
    assert schemas is not None
    escaped_schemas = schemas.group().replace("{", "{{").replace("}", "}}")
    start = output.index("<｜DSML｜tool_calls>", output.index("<think>The user wants"))
    block = output[start : output.index("<｜end▁of▁sentence｜>", start)]
    first_line, *call, last_line = block.split("\n")
    return {
        "TOOLS_TEMPLATE": escaped.replace(escaped_schemas, "{tool_schemas}"),
        "tool_calls_template": f"{first_line}\n{{tool_calls}}\n{last_line}",
        "tool_call_template": "\n".join([call[0], "{arguments}", call[-1]]).replace("get_weather", "{name}"),
        "tool_output_template": "<tool_result>{content}</tool_result>",
    }


@pytest.fixture(scope="module")
def golden_encoder(
    golden_texts: dict[str, str], v4_tokenizer: Tokenizer, tmp_path_factory: Any
) -> PromptEncoder:
    model_dir: Path = tmp_path_factory.mktemp("model")
    (model_dir / "prompt.json").write_text(json.dumps(golden_texts), encoding="utf-8")
    return PromptEncoder(tokenizer=v4_tokenizer, texts=load_texts(model_dir))


@pytest.mark.parametrize(
    ("number", "thinking", "sha256_prefix", "num_tokens"),
    [
        (1, True, "9b366d9d2eac842a", 541),
        (2, True, "ca66b01a1ac3a204", 53),
        (3, True, "b3b1cd8748b7b90d", 820),
        (4, False, "60e1643840ba9e4a", 582),
    ],
)
def test_golden_prompts_are_equal_to_the_byte(
    goldens: Path,
    golden_encoder: PromptEncoder,
    number: int,
    thinking: bool,
    sha256_prefix: str,
    num_tokens: int,
) -> None:
    case = json.loads((goldens / f"test_input_{number}.json").read_text(encoding="utf-8"))
    messages, tools = (case["messages"], case["tools"]) if isinstance(case, dict) else (case, None)
    prompt = golden_encoder.encode_chat(messages, tools=tools, thinking=thinking)
    assert prompt.text == (goldens / f"test_output_{number}.txt").read_text(encoding="utf-8")
    assert hashlib.sha256(prompt.text.encode()).hexdigest().startswith(sha256_prefix)
    assert len(prompt.ids) == num_tokens
    assert not prompt.starts_in_reasoning


def test_tools_block_without_tools_has_the_known_hash(
    golden_texts: dict[str, str], v4_tokenizer: Tokenizer
) -> None:
    block = golden_texts["TOOLS_TEMPLATE"].format(tool_schemas="")
    assert len(block.encode()) == 989
    assert hashlib.sha256(block.encode()).hexdigest().startswith("c7d3159308f7d076")
    assert len(v4_tokenizer.encode(block)) == 221


def test_effort_prefix_of_a_release_has_the_known_hash(v4_tokenizer: Tokenizer) -> None:
    release = os.environ.get(RELEASE_VARIABLE)
    if not release:
        pytest.skip(f"needs {RELEASE_VARIABLE}, a release's directory with encoding/encoding_dsv4.py")
    texts = load_texts(Path(release))
    encoder = PromptEncoder(tokenizer=v4_tokenizer, texts=texts)
    level = "high" if "REASONING_EFFORT_HIGH" in texts.texts else "max"
    messages = [{"role": "user", "content": "hello"}]
    with_prefix = encoder.encode_chat(messages, thinking=True, reasoning_effort=level)
    without = encoder.encode_chat(messages, thinking=True)
    bos = "<｜begin▁of▁sentence｜>"
    prefix = with_prefix.text.removeprefix(bos).removesuffix(without.text.removeprefix(bos))
    assert len(prefix.encode()) == 476
    assert hashlib.sha256(prefix.encode()).hexdigest().startswith("f7a24f3b3050d4a8")
    assert len(v4_tokenizer.encode(prefix)) == 79
