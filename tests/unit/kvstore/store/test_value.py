import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.keys import PageKey
from kvstore.store.contract import Kind
from kvstore.store.value import (
    HEADER_BYTES,
    VALUE_VERSION,
    Flaw,
    Form,
    check_value,
    decode_value,
    encode_value,
)
from rorqual.errors import ConfigError

FORM = Form("0123456789abcdef", "a-model")
PAGE = PageKey(bytes(range(16)))

forms = st.builds(Form, st.binary(min_size=8, max_size=8).map(bytes.hex), st.text(max_size=20))
pages = st.binary(min_size=16, max_size=16).map(PageKey)
kinds = st.sampled_from(Kind)


@given(forms, kinds, pages, st.binary(max_size=2000))
def test_a_payload_comes_back_as_it_went(form, kind, page, payload):
    value = encode_value(form, kind, page, payload)
    decoded = decode_value(form, kind, page, value)
    assert decoded == payload
    assert decoded.obj is value, "the payload was copied"
    assert decoded.readonly


@given(kinds, pages, st.binary(max_size=300), st.data())
def test_no_changed_byte_goes_unseen(kind, page, payload, data):
    value = bytearray(encode_value(FORM, kind, page, payload))
    place = data.draw(st.integers(0, len(value) - 1))
    value[place] ^= data.draw(st.integers(1, 255))
    assert isinstance(decode_value(FORM, kind, page, bytes(value)), Flaw)


@given(st.binary(max_size=300), st.data())
def test_no_lost_end_goes_unseen(payload, data):
    value = encode_value(FORM, Kind.PAGE, PAGE, payload)
    cut = value[: data.draw(st.integers(0, len(value) - 1))]
    assert decode_value(FORM, Kind.PAGE, PAGE, cut) is Flaw.TRUNCATED


@given(st.binary(max_size=300), st.binary(min_size=1, max_size=50))
def test_no_added_byte_goes_unseen(payload, more):
    value = encode_value(FORM, Kind.PAGE, PAGE, payload)
    assert decode_value(FORM, Kind.PAGE, PAGE, value + more) is Flaw.CORRUPT


@given(st.binary(max_size=300))
def test_bytes_of_others_are_never_taken_for_a_value(value):
    assert isinstance(check_value(value), Flaw)


@pytest.mark.parametrize(
    ("form", "kind", "page"),
    [
        (Form("0123456789abcdee", "a-model"), Kind.PAGE, PAGE),
        (Form("0123456789abcdef", "another"), Kind.PAGE, PAGE),
        (FORM, Kind.TAIL, PAGE),
        (FORM, Kind.PAGE, PageKey(bytes(16))),
    ],
    ids=["wire id", "model", "kind", "page"],
)
def test_a_sound_value_for_somebody_else_is_foreign(form, kind, page):
    value = encode_value(form, kind, page, b"rows")
    assert decode_value(FORM, Kind.PAGE, PAGE, value) is Flaw.FOREIGN
    assert not isinstance(check_value(value), Flaw)


def test_another_version_is_told_apart_from_damage():
    value = bytearray(encode_value(FORM, Kind.PAGE, PAGE, b"rows"))
    value[4] = VALUE_VERSION + 1
    assert decode_value(FORM, Kind.PAGE, PAGE, bytes(value)) is Flaw.VERSION


def test_the_bytes_of_a_value_stay_what_they_are():
    """Stored values outlive the code that wrote them: when this changes, so must VALUE_VERSION."""
    value = encode_value(FORM, Kind.TAIL, PAGE, b"the rows of a tail")
    assert len(value) == HEADER_BYTES + 18
    assert hashlib.sha256(value).hexdigest()[:16] == "38ffff3898daf999"


def test_a_value_shares_no_memory_with_what_it_was_made_of():
    payload = bytearray(b"rows")
    value = encode_value(FORM, Kind.PAGE, PAGE, memoryview(payload))
    payload[:] = b"gone"
    assert decode_value(FORM, Kind.PAGE, PAGE, value) == b"rows"


@pytest.mark.parametrize(
    "wire_id", ["", "0123456789ABCDEF", "0123456789abcde", "0123456789abcdefa", "0123456789abcde\n"]
)
def test_a_wire_id_is_sixteen_hex_digits(wire_id):
    with pytest.raises(ConfigError, match="16 hex digits"):
        Form(wire_id, "a-model")
