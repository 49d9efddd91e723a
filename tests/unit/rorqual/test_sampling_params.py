"""Sampling parameters are checked once, at the edge, by name."""

import math

import msgspec
import pytest

from rorqual.errors import InvalidRequest
from rorqual.sampling import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("temperature", 2.01),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("presence_penalty", -2.5),
        ("frequency_penalty", math.inf),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("logit_bias", ((100, 1.0),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((5, 101.0),)),
        ("choice", 1024),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(field, value):
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{"seed": 1, field: value}).check(100)
    assert caught.value.field == field
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 0},
        {"seed": 2**63 - 1, "temperature": 0.0, "top_p": 0.0, "min_p": 1.0, "top_k": 1},
        {"seed": 1, "logit_bias": ((0, -100.0), (99, 100.0)), "logprobs": 0, "prompt_logprobs": 20},
    ],
)
def test_the_ends_of_every_range_are_allowed(values):
    SamplingParams(**values).check(100)


def test_parameters_survive_the_wire_unchanged():
    params = SamplingParams(seed=3, temperature=0.7, logit_bias=((5, -1.5),), logprobs=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
