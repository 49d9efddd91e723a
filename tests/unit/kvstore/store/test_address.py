import pytest

from kvstore.keys import PageKey
from kvstore.store.address import parse_address
from kvstore.store.contract import Kind, StoreKey, tenant_label
from kvstore.store.names import account_name, parse_name, value_name
from rorqual.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "is_cluster", "options"),
    [
        ("redis://cache", False, {"host": "cache", "port": 6379}),
        ("redis://cache:7000/3", False, {"host": "cache", "port": 7000, "db": 3}),
        ("redis://me:a%40b@cache", False, {"username": "me", "password": "a@b", "host": "cache"}),
        ("rediss://cache?ssl_ca_certs=/ca.pem", False, {"ssl_ca_certs": "/ca.pem"}),
        ("redis+cluster://cache:7000", True, {"port": 7000}),
        ("rediss+cluster://:pw@cache", True, {"password": "pw"}),
        ("redis://cache?cluster=true", True, {"host": "cache"}),
        ("redis://cache?cluster=no", False, {"host": "cache"}),
        ("unix://:pw@/run/store.sock", False, {"path": "/run/store.sock", "password": "pw"}),
    ],
)
def test_a_url_is_taken_apart(url, is_cluster, options):
    address = parse_address(url)
    assert address.is_cluster is is_cluster
    assert options.items() <= address.options.items()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://me:secret@cache", "begins with one of"),
        ("", "begins with one of"),
        ("redis://me:secret@cache:port", "understood"),
        ("redis://me:secret@cache?colour=red", "'colour'"),
        ("redis://me:secret@cache?decode_responses=true", "'decode_responses'"),
        ("redis://me:secret@cache?cluster=maybe", "'maybe'"),
        ("redis+cluster://me:secret@cache/2", "database number"),
        ("rediss://me:secret@cache?ssl_colour=red", "cannot be used"),
        ("redis://me:secret@cache?db=one", "cannot be used"),
        ("unix://me:secret@", "no socket file"),
        ("redis://me:secret@[cache", "understood"),
    ],
)
def test_a_wrong_url_is_refused_without_showing_the_password(url, says):
    with pytest.raises(ConfigError) as refused:
        parse_address(url)
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)


def test_an_address_shows_no_password():
    address = parse_address("redis://me:secret@cache:7000/1")
    assert "secret" not in repr(address)
    assert address.shown == "redis://cache:7000/1"


@pytest.mark.parametrize("kind", Kind)
def test_a_name_is_read_back(kind):
    key = StoreKey(kind, tenant_label("a salt"), PageKey(bytes(range(16))))
    name = value_name("0123456789abcdef", key)
    read = parse_name(name)
    assert read is not None
    assert (read.wire_id, read.key) == ("0123456789abcdef", key)


@pytest.mark.parametrize(
    "other", [b"", b"rorqual:1:", b"rorqual:2:x", b"\xff\xfe", account_name(tenant_label(""))]
)
def test_other_names_are_not_taken_for_values(other):
    assert parse_name(other) is None


def test_tenants_have_labels_of_their_own_that_do_not_tell_the_salt():
    labels = {tenant_label(f"key:{number}") for number in range(1000)}
    assert len(labels) == 1000
    assert all(len(label) == 16 for label in labels)
