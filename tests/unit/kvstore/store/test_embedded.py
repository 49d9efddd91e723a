import os
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstore.store.embedded import EmbeddedFailed, EmbeddedServer


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_it_serves_evicts_and_keeps_nothing(start_server):
    server = start_server(memory_bytes=8 << 20)
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()
        settings = client.config_get("*")
        assert settings["maxmemory"] == str(8 << 20)
        assert settings["maxmemory-policy"] == "allkeys-lru"
        assert settings["save"] == ""
        assert settings["appendonly"] == "no"
        for number in range(200):
            client.set(f"value {number}", bytes(100_000))
        assert client.info("memory")["used_memory"] < 12 << 20


def test_nobody_gets_in_without_the_password(start_server):
    server = start_server()
    once = Retry(NoBackoff(), 0)
    with redis.Redis(port=server.port, retry=once) as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    password = urlsplit(server.url).password
    assert password
    with open(f"/proc/{server.pid}/cmdline") as command:
        assert password not in command.read()


def test_it_listens_on_loopback_only(start_server):
    server = start_server()
    with redis.Redis.from_url(server.url) as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"


def test_with_a_socket_file_there_is_no_port(start_server, tmp_path):
    server = start_server(socket_file=tmp_path / "store.sock")
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert client.config_get("port")["port"] == "0"
    assert (tmp_path / "store.sock").stat().st_mode & 0o777 == 0o700


def test_it_ends_with_its_context_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with EmbeddedServer(memory_bytes=4 << 20) as server:
        pid = server.pid
        assert list(tmp_path.iterdir()) != []
    assert not is_alive(pid)
    assert list(tmp_path.iterdir()) == []
    server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to see a process that is nobody's child")
def test_it_dies_with_its_parent_however_that_dies(tmp_path):
    script = (
        "import time\n"
        "from kvstore.store.embedded import EmbeddedServer\n"
        "server = EmbeddedServer(memory_bytes=4 << 20)\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.01)


def test_a_taken_port_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = EmbeddedServer(memory_bytes=4 << 20, port=taken.getsockname()[1])
        with pytest.raises(EmbeddedFailed, match="in use"):
            server.start()


def test_a_setting_nobody_knows_is_said():
    server = EmbeddedServer(memory_bytes=4 << 20, settings={"colour": "red"})
    with pytest.raises(EmbeddedFailed, match="did not start"):
        server.start()
    assert b"colour" in server.log
