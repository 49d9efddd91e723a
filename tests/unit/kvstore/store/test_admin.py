"""`rorqual kv` and what is behind it, over a real server."""

import asyncio
import json

import pytest

from kvstore.store.admin import opened
from kvstore.store.cli import main
from kvstore.store.connections import ServerLost
from kvstore.store.contract import Kind, Miss, tenant_label
from kvstore.store.names import account_name
from rorqual.cli import main as rorqual
from rorqual.service import STORE_VARIABLE
from tests.harness.stores import (
    BUDGET,
    FORM,
    PAGE_BYTES,
    client,
    name,
    page_key,
    running,
    write_all,
)

ONE, OTHER = tenant_label("key:one"), tenant_label("key:other")
OF_ONE = [page_key(number, salt="key:one") for number in range(7)]
OF_OTHER = [page_key(number, salt="key:other", kind=Kind.TAIL) for number in range(3)]


async def fill(url, **changes):
    async with running(url, **changes) as store:
        await write_all(store, OF_ONE)
        await write_all(store, OF_OTHER)


@pytest.fixture
def filled(server):
    asyncio.run(fill(server.url, tenant_bytes_max=1 << 30))
    return server


async def test_stat_counts_by_wire_id_kind_and_tenant(server):
    await fill(server.url)
    async with client(server.url) as redis, opened(server.url) as admin:
        await redis.set("somebody else's", "value")
        counted = []
        stat = await admin.stat(counted.append)
        shares = {key: (share.num_values, share.num_bytes) for key, share in stat.shares.items()}
        assert shares == {
            (FORM.wire_id, Kind.PAGE, ONE): (7, 7 * PAGE_BYTES),
            (FORM.wire_id, Kind.TAIL, OTHER): (3, 3 * PAGE_BYTES),
        }
        assert counted[-1] == 10
        (node,) = stat.nodes
        assert int(node.info["used_memory"]) > 10 * PAGE_BYTES
        assert node.info["maxmemory_policy"] == "allkeys-lru"


async def test_ls_is_bounded_and_tells_ages(server):
    await fill(server.url, ttl_seconds=500.0)
    async with opened(server.url) as admin:
        assert len(await admin.ls(limit=4)) == 4
        listed = await admin.ls(limit=100, tenant=OTHER)
        assert {item.name.key for item in listed} == set(OF_OTHER)
        for item in listed:
            assert item.num_bytes == PAGE_BYTES
            assert item.idle_seconds is not None
            assert item.idle_seconds <= 60
            assert item.expires_seconds is not None
            assert 400 < item.expires_seconds <= 500


async def test_verify_finds_each_flaw_and_nothing_else(server):
    await fill(server.url)
    async with client(server.url) as redis, opened(server.url) as admin:
        sound = await admin.verify(limit=100)
        assert (sound.num_values, sound.num_bytes, sound.flaws) == (10, 10 * PAGE_BYTES, [])
        values = [await redis.get(name(key)) for key in OF_ONE]
        await redis.set(name(OF_ONE[0]), values[0][:-1] + b"?")
        await redis.set(name(OF_ONE[1]), values[1][:100])
        await redis.set(name(OF_ONE[2]), values[3])
        await redis.delete(name(OF_ONE[4]))
        await redis.lpush(name(OF_ONE[4]), "a list")
        verified = await admin.verify(limit=100)
        assert dict(verified.flaws) == {
            name(OF_ONE[0]): Miss.CORRUPT,
            name(OF_ONE[1]): Miss.TRUNCATED,
            name(OF_ONE[2]): Miss.FOREIGN,
            name(OF_ONE[4]): Miss.FOREIGN,
        }
        assert (await admin.verify(limit=3)).num_values == 3


async def test_flush_takes_one_tenant_with_its_account_and_nobody_else(server):
    await fill(server.url, tenant_bytes_max=1 << 30)
    async with client(server.url) as redis, opened(server.url) as admin, running(server.url) as store:
        assert await redis.exists(account_name(ONE), account_name(OTHER)) == 2
        assert await admin.flush(ONE) == 7
        assert await store.contains(OF_ONE, budget_seconds=BUDGET) == [False] * 7
        assert await store.contains(OF_OTHER, budget_seconds=BUDGET) == [True] * 3
        assert not await redis.exists(account_name(ONE))
        assert await redis.exists(account_name(OTHER))


async def test_many_values_are_gone_through_a_page_at_a_time(server):
    async with client(server.url) as redis, opened(server.url) as admin:
        pipeline = redis.pipeline(transaction=False)
        for number in range(5000):
            pipeline.set(name(page_key(number, salt="key:one")), b"x" * 100)
        await pipeline.execute()
        counted = []
        stat = await admin.stat(counted.append)
        assert len(counted) > 5
        assert sum(share.num_values for share in stat.shares.values()) >= 5000
        assert await admin.flush(ONE) == 5000


async def test_a_store_that_cannot_be_reached_is_said(start_server):
    server = start_server()
    server.stop()
    with pytest.raises(ServerLost, match=str(server.port)):
        async with opened(server.url):
            pass


def test_the_command_counts_lists_and_verifies(filled, capsys):
    assert main(["stat", "--url", filled.url]) == 0
    text = capsys.readouterr().out
    assert "allkeys-lru" in text
    assert f"{7 * PAGE_BYTES:,}" in text
    assert main(["ls", "--url", filled.url, "--limit", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["verify", "--url", filled.url]) == 0
    assert "10 values, 200,000 bytes: all sound" in capsys.readouterr().out


def test_the_command_speaks_json(filled, capsys):
    assert main(["stat", "--url", filled.url, "--json"]) == 0
    stat = json.loads(capsys.readouterr().out)
    assert [(item["kind"], item["values"]) for item in stat["values"]] == [("page", 7), ("tail", 3)]
    assert main(["ls", "--url", filled.url, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {item["page_key"] for item in listed} == {key.page.hex() for key in OF_ONE + OF_OTHER}
    assert main(["verify", "--url", filled.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"values": 10, "bytes": 200_000, "flaws": {}}


def test_verify_exits_with_one_when_something_is_wrong(filled, capsys):
    async def spoil():
        async with client(filled.url) as redis:
            await redis.append(name(OF_ONE[0]), "?")

    asyncio.run(spoil())
    assert main(["verify", "--url", filled.url]) == 1
    assert f"{name(OF_ONE[0]).decode()}: corrupt" in capsys.readouterr().out


def test_flush_wants_a_label_and_tells_how_many(filled, capsys):
    assert main(["flush", "--url", filled.url, "--tenant", ONE]) == 0
    assert capsys.readouterr().out == f"deleted 7 values of tenant {ONE}\n"
    for wrong in ([], ["--tenant", "*"], ["--tenant", "0123"]):
        with pytest.raises(SystemExit) as refused:
            main(["flush", "--url", filled.url, *wrong])
        assert refused.value.code == 2


def test_the_url_may_come_from_the_environment(filled, capsys, monkeypatch):
    monkeypatch.delenv(STORE_VARIABLE, raising=False)
    assert main(["stat"]) == 1
    assert STORE_VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(STORE_VARIABLE, filled.url)
    assert main(["stat"]) == 0


def test_a_lost_store_is_one_line_without_the_password(capsys):
    assert main(["stat", "--url", "redis://:secret@127.0.0.1:1"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("rorqual kv: 127.0.0.1:1")
    assert len(told.splitlines()) == 1
    assert "secret" not in told


def test_the_command_is_one_of_rorquals(capsys):
    with pytest.raises(SystemExit) as ended:
        rorqual(["kv", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("stat", "ls", "verify", "flush", "redis+cluster://"))


def test_an_empty_store_is_said(server, capsys):
    assert main(["stat", "--url", server.url]) == 0
    assert "nothing is stored" in capsys.readouterr().out
    assert main(["ls", "--url", server.url]) == 0
    assert capsys.readouterr().out == "nothing\n"


async def test_a_server_that_refuses_is_said(server):
    async with client(server.url) as redis:
        await redis.execute_command("ACL", "SETUSER", "blind", "on", ">pw", "~*", "+ping")
    with pytest.raises(ServerLost, match="lists no names"):
        async with opened(f"redis://blind:pw@127.0.0.1:{server.port}") as admin:
            await admin.ls(limit=5)


async def test_a_cut_value_has_no_negative_bytes(server):
    async with client(server.url) as redis, opened(server.url) as admin:
        await redis.set(name(OF_ONE[0]), "short")
        (item,) = await admin.ls(limit=5)
        assert item.num_bytes == 0
