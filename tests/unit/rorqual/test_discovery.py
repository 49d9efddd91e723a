"""Sources of addresses that look by themselves: what their texts mean, and that failures forget nobody."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rorqual.discovery import AddressSource, make_source, parse_source
from rorqual.discovery.looking import DnsSource, FileSource
from rorqual.errors import ConfigError

QUICK = 0.005


@asynccontextmanager
async def following(source: AddressSource) -> AsyncIterator[list[set[str]]]:
    """All sets that the source tells, in order, while it runs."""
    told: list[set[str]] = []
    running = asyncio.create_task(source.run(lambda addresses: told.append(set(addresses))))
    try:
        async with asyncio.timeout(10):
            yield told
        assert not running.done(), running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def write(path: Path, *addresses: str, pool: str = "p") -> None:
    """As a writer should: all of it at once."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"workers": [{"address": item, "pool": pool} for item in addresses]}))
    os.replace(partial, path)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("static:a:1,[::1]:2,a:1", {"addresses": ("a:1", "[::1]:2")}),
        ("dns:decode.here.svc:9000", {"name": "decode.here.svc", "port": 9000}),
        ("file:/x/workers.json?pool=decode", {"path": Path("/x/workers.json"), "pool": "decode"}),
        ("file:workers.json", {"path": Path("workers.json"), "pool": ""}),
        (
            "kubernetes:here?selector=a%3Db,rorqual.io/role=decode&port=http",
            {"namespace": "here", "selector": "a=b,rorqual.io/role=decode", "port_name": "http"},
        ),
        ("kubernetes:?selector=a=b", {"namespace": "", "selector": "a=b", "port_name": "session"}),
    ],
)
def test_a_text_says_where_workers_are(text: str, fields: dict[str, Any]) -> None:
    spec = parse_source(text, option="--discover")
    assert spec.text == text
    assert {name: getattr(spec, name) for name in fields} == fields


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a:1",
        "etcd:a:1",
        "static:",
        "static:a",
        "static:a:1,,b:2",
        "dns:name",
        "dns:name:0",
        "dns:name:99999",
        "file:",
        "file:?pool=x",
        "file:x?pol=x",
        "kubernetes:",
        "kubernetes:here",
        "kubernetes:Not_A_Name?selector=a=b",
        "kubernetes:?selector=",
        "kubernetes:?selector=a=b&prot=x",
        "kubernetes:?what",
    ],
)
def test_a_text_that_cannot_be_meant_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--discover"):
        parse_source(text, option="--discover")


async def test_a_list_is_told_once() -> None:
    source = make_source(parse_source("static:a:1,b:2", option="x"))
    assert source.last_error
    async with following(source) as told:
        await until(lambda: len(told) > 0)
        await asyncio.sleep(0.01)
    assert told == [{"a:1", "b:2"}]
    assert (source.last_error, source.num_failures) == ("", 0)


async def test_a_file_is_followed_as_it_is_replaced_and_its_pools_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    write(path, "a:1")
    source = FileSource(parse_source(f"file:{path}", option="x"), seconds=QUICK)
    other = FileSource(parse_source(f"file:{path}?pool=q", option="x"), seconds=QUICK)
    async with following(source) as told, following(other) as told_other:
        await until(lambda: told == [{"a:1"}] and told_other == [set()])
        write(path, "b:1", "[::1]:2")
        await until(lambda: len(told) == 2)
        write(path, "b:1", "[::1]:2", pool="q")
        await until(lambda: told_other[-1] == {"b:1", "[::1]:2"})
        write(path, pool="q")
        await until(lambda: told[-1] == set() and told_other[-1] == set())
    assert told == [{"a:1"}, {"b:1", "[::1]:2"}, set()]


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "{",
        "[]",
        "null",
        '{"workers": 5}',
        '{"workers": [5]}',
        '{"workers": [{"address": "a"}]}',
        '{"workers": [{"address": 5}]}',
        '{"workers": [{}]}',
        '{"workers": {"a:1": 2}}',
        '{"workers": [{"address": "a:1"}, {"address": "b"}]}',
        '{"worker": []}',
        "\xff",
    ],
)
async def test_a_malformed_file_changes_nothing_until_it_is_right_again(
    broken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "workers.json"
    write(path, "a:1")
    source = FileSource(parse_source(f"file:{path}", option="x"), seconds=QUICK)
    caplog.set_level(logging.INFO)
    async with following(source) as told:
        await until(lambda: told == [{"a:1"}])
        path.write_bytes(broken.encode("latin-1"))
        await until(lambda: source.num_failures >= 5)
        assert str(path) in source.last_error
        assert told == [{"a:1"}]
        write(path, "b:1")
        await until(lambda: told == [{"a:1"}, {"b:1"}] and not source.last_error)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("failed to ask" in text for text in messages) == 1
    assert sum("again" in text for text in messages) == 1


async def test_a_file_that_is_not_there_is_not_known_rather_than_empty(tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    source = FileSource(parse_source(f"file:{path}", option="x"), seconds=QUICK)
    async with following(source) as told:
        await until(lambda: source.num_failures >= 3)
        assert told == []
        write(path, "a:1")
        await until(lambda: told == [{"a:1"}])
        path.unlink()
        await until(lambda: bool(source.last_error))
        assert told == [{"a:1"}]
        write(path, "a:1")
        await until(lambda: not source.last_error)
        assert told == [{"a:1"}]


class Resolver:
    """What getaddrinfo says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts: list[str] | Exception = []
        self.num_asked = 0
        self.answers = asyncio.Event()
        self.answers.set()
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self.ask)

    async def ask(self, host: str, port: int, **_: object) -> list[Any]:
        self.num_asked += 1
        await self.answers.wait()
        if isinstance(self.hosts, Exception):
            raise self.hosts
        return [
            (
                socket.AF_INET6 if ":" in item else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (item, port, 0, 0) if ":" in item else (item, port),
            )
            for item in self.hosts
        ]


async def test_a_name_that_fails_or_has_no_address_keeps_whom_it_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolver = Resolver(monkeypatch)
    source = DnsSource(parse_source("dns:decode:9000", option="x"), seconds=QUICK)
    resolver.hosts = ["10.0.0.1", "fd00::1", "10.0.0.1"]
    async with following(source) as told:
        await until(lambda: told == [{"10.0.0.1:9000", "[fd00::1]:9000"}])
        for trouble in (
            socket.gaierror(-3, "Temporary failure in name resolution"),
            [],
            UnicodeError("label too long"),
        ):
            resolver.hosts = trouble
            failures = source.num_failures
            await until(lambda failures=failures: source.num_failures >= failures + 2)
            assert "decode" in source.last_error
            assert len(told) == 1
        resolver.hosts = ["10.0.0.2"]
        await until(lambda: told[1:] == [{"10.0.0.2:9000"}])
        assert source.last_error == ""


async def test_a_resolver_that_does_not_answer_is_asked_once_and_heard_when_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each look-up holds a thread until it ends."""
    resolver = Resolver(monkeypatch)
    resolver.answers.clear()
    spec = parse_source("dns:decode:9000", option="x")
    source = DnsSource(spec, seconds=QUICK, seconds_max=QUICK)
    async with following(source) as told:
        await until(lambda: source.num_failures >= 5)
        assert "no answer about decode" in source.last_error
        assert resolver.num_asked == 1
        resolver.hosts = ["10.0.0.1"]
        resolver.answers.set()
        await until(lambda: told == [{"10.0.0.1:9000"}])
        assert source.last_error == ""
