"""What a request may ask for, and what it gets by not asking: bounds and defaults that both gateways share.

Called by the gateways before they hand a Generation over, and by `router.text`. Pure functions: a value in, a
checked value or an InvalidRequest naming the field out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rorqual.errors import InvalidRequest
from rorqual.session import TokenArray
from router.generation import ServedModel

NUM_CHOICES_MAX = 16
COMPLETION_TOKENS_DEFAULT = 16  # of a completion; a chat takes what fits
LOGIT_BIASES_MAX = 1024
STOP_STRINGS_MAX = 16
STOP_CHARS_MAX = 4096  # of all stop strings of a request; the matcher takes about 250 bytes for each
SESSION_KEY_CHARS_MAX = 256


def token_array(ids: Sequence[int], *, vocab_size: int, field: str) -> TokenArray:
    """Token ids of a client as the int32 array that the rest of the system carries."""
    try:
        array = np.asarray(ids, dtype=np.int64)
    except OverflowError:
        raise InvalidRequest(f"{field} has a number that is no token id", field=field) from None
    wrong = np.flatnonzero((array < 0) | (array >= vocab_size))
    if wrong.size:
        index = int(wrong[0])
        raise InvalidRequest(
            f"{field}[{index}] is {ids[index]}; the vocabulary has {vocab_size} tokens", field=field
        )
    return array.astype(np.int32)


def token_budget(
    prompt: TokenArray, wanted: int | None, *, model: ServedModel, prompt_field: str, budget_field: str
) -> int:
    """How many tokens may be generated: `wanted`, or all that fit. Raises when prompt and budget cannot
    fit."""
    if len(prompt) == 0:
        raise InvalidRequest(f"{prompt_field} must hold at least one token", field=prompt_field)
    room = model.sequence_tokens_max - len(prompt)
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens; prompt and completion together may have "
            f"{model.sequence_tokens_max}",
            field=prompt_field,
            code="context_length_exceeded",
        )
    if wanted is None:
        return room
    if wanted > room:
        raise InvalidRequest(
            f"{budget_field} is {wanted}; a prompt of {len(prompt)} tokens leaves {room} of "
            f"{model.sequence_tokens_max}",
            field=budget_field,
            code="context_length_exceeded",
        )
    return wanted


def check_num_choices(num_choices: int) -> int:
    if not 1 <= num_choices <= NUM_CHOICES_MAX:
        raise InvalidRequest(f"n must be between 1 and {NUM_CHOICES_MAX}, got {num_choices}", field="n")
    return num_choices


def check_num_logit_biases(num_biases: int, *, field: str) -> None:
    if num_biases > LOGIT_BIASES_MAX:
        raise InvalidRequest(
            f"{field} names {num_biases} tokens; at most {LOGIT_BIASES_MAX} are taken", field=field
        )


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > STOP_STRINGS_MAX:
        raise InvalidRequest(
            f"stop may hold at most {STOP_STRINGS_MAX} strings, got {len(stops)}", field="stop"
        )
    if not all(stops):
        raise InvalidRequest("stop must not hold an empty string", field="stop")
    num_chars = sum(map(len, stops))
    if num_chars > STOP_CHARS_MAX:
        raise InvalidRequest(
            f"stop may hold at most {STOP_CHARS_MAX} characters, got {num_chars}", field="stop"
        )
    return tuple(stops)


def check_session_key(key: str, *, field: str) -> str:
    if len(key) > SESSION_KEY_CHARS_MAX:
        raise InvalidRequest(
            f"{field} may hold at most {SESSION_KEY_CHARS_MAX} characters, got {len(key)}", field=field
        )
    return key


def check_model(asked: str | None, model: ServedModel) -> None:
    if asked and asked != model.name:
        raise InvalidRequest(
            f"the model {asked!r} does not exist; {model.name!r} is served",
            field="model",
            status=404,
            code="model_not_found",
        )
