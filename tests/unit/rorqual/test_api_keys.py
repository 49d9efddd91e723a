"""API keys: what lets a client in, and which files and options are taken."""

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.api_keys import ApiKeyKeeper, ApiKeys, ApiKeySource, read_api_keys, write_api_key_file
from rorqual.errors import ConfigError


def test_without_keys_everyone_is_let_in():
    assert ApiKeys().accept(b"")


@pytest.mark.parametrize(
    ("authorization", "is_let_in"),
    [
        (b"Bearer alpha", True),
        (b"bearer  beta ", True),
        (b"Bearer gamma", False),
        (b"Bearer alph", False),
        (b"Bearer alphax", False),
        (b"Bearer", False),
        (b"alpha", False),
        (b"Basic alpha", False),
        (b"", False),
        (b"Bearer \xff\xfe", False),
    ],
)
def test_one_of_the_keys_lets_in_and_nothing_else(authorization, is_let_in):
    assert ApiKeys(("alpha", "beta")).accept(authorization) is is_let_in


KEYS = st.lists(st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1), min_size=1)


@given(keys=KEYS)
def test_what_is_written_is_read_again_and_lets_in(keys, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    write_api_key_file(file, keys)
    read = read_api_keys((), (file,))
    assert read == tuple(dict.fromkeys(keys))
    assert all(ApiKeys(read).accept(b"Bearer " + key.encode()) for key in keys)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_key_file_is_never_written_over_another_file(tmp_path):
    (tmp_path / "keys").write_text("mine")
    with pytest.raises(FileExistsError):
        write_api_key_file(tmp_path / "keys", ("k",))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "has no key"),
        (b" \n\n", "has no key"),
        (b"two words\n", "without spaces"),
        (b"\xff\xfe\n", "not UTF-8"),
        (b"k\n" * 600_000, "over 1048576 bytes"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_gives_no_key_is_refused_by_name_rather_than_opening_the_door(
    tmp_path, content, complaint
):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_api_keys((), (file,))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("key", ["", " ", "a b", "a\tb"])
def test_a_key_that_no_client_could_send_is_refused(key):
    with pytest.raises(ConfigError, match="--api-key: a key must be"):
        read_api_keys((key,), ())


def test_a_salt_is_a_function_of_the_key_that_does_not_show_it():
    keys = ApiKeys(("alpha", "beta"))
    assert keys.cache_salt(b"Bearer alpha") == ApiKeys(("alpha",)).cache_salt(b"bearer  alpha ")
    assert keys.cache_salt(b"Bearer alpha") != keys.cache_salt(b"Bearer beta")
    assert "alpha" not in keys.cache_salt(b"Bearer alpha")
    assert ApiKeys().cache_salt(b"Bearer alpha") == ""
    assert ApiKeys(("alpha",), shared_cache_salt="all").cache_salt(b"Bearer alpha") == "all"


def test_a_changed_file_is_taken_once_and_one_that_cannot_be_used_changes_nothing(tmp_path, caplog):
    caplog.set_level("INFO")
    file = tmp_path / "keys"
    file.write_text("alpha\n")
    keeper = ApiKeyKeeper(ApiKeySource(given=("always",), files=(file,)))
    assert keeper.keys == ("always", "alpha")
    assert keeper.changed() is None
    for bad in ("", "two words\n"):
        file.write_text(bad)
        assert keeper.changed() is None
    file.unlink()
    assert keeper.changed() is None
    assert keeper.keys == ("always", "alpha")
    assert caplog.text.count("kept the API keys in force") == 3
    assert keeper.changed() is None
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "keys").write_text("beta\n")
    file.symlink_to("data/keys")
    assert keeper.changed() == ("always", "beta")
    assert keeper.changed() is None
    assert "alpha" not in caplog.text
    assert "beta" not in caplog.text
