"""Revision texts in our own words, to test tools without a release at hand; and a small tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import pytest
import tokenizers

from router.prompt.texts import RevisionTexts


@pytest.fixture(scope="session")
def own_texts() -> dict[str, str]:
    return {
        "TOOLS_TEMPLATE": (
            "Tools ({dsml_token}, {thinking_start_token}{thinking_end_token}):\n{tool_schemas}\n."
        ),
        "response_format_template": "Answer as {{JSON}}: {schema}",
        "tool_call_template": '<{dsml_token}invoke name="{name}">\n{arguments}\n</{dsml_token}invoke>',
        "tool_calls_template": "<{dsml_token}{tc_block_name}>\n{tool_calls}\n</{dsml_token}{tc_block_name}>",
        "tool_output_template": "<tool_result>{content}</tool_result>",
        "REASONING_EFFORT_MAX": "Think {hard}.\n",
    }


@pytest.fixture(scope="session")
def revision_texts(own_texts: dict[str, str]) -> RevisionTexts:
    return RevisionTexts(source="prompt.json", texts=MappingProxyType(own_texts))


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., tokenizers.Tokenizer]:
    """Makes the smallest vocabularies of V4's kind: ids 0..255 are one byte each, added tokens come after."""

    def make(*added: str | tokenizers.AddedToken) -> tokenizers.Tokenizer:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {char: number for number, char in enumerate(alphabet)}
        library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        library.add_tokens(
            [
                tokenizers.AddedToken(token, normalized=False) if isinstance(token, str) else token
                for token in added
            ]
        )
        return library

    return make
