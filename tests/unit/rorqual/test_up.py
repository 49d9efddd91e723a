"""`rorqual up` with small real processes as workers and router: lives, deaths, and what is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.errors import ConfigError
from rorqual.up import parse_options, threads_per_worker

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")


def options_of(text: str) -> list[str]:
    return json.loads(text)["options"]


def test_the_ready_file_names_the_addresses_and_every_process(start_cluster):
    cluster = start_cluster({}, "--both", "2")
    ready = cluster.ready()
    assert set(ready) == {"http", "grpc", "processes"}
    assert ready["grpc"] == "127.0.0.1:2"
    processes = ready["processes"]
    assert len(processes) == len(set(processes)) == 1 + 2 * 2
    for pid in processes:
        os.kill(pid, 0)
    assert cluster.stop(signal.SIGTERM) == 0
    cluster.assert_gone(processes)
    assert not cluster.ready_file.exists(), "a stale ready file would mislead the next reader"


def test_children_get_their_options_and_the_router_every_workers_address(start_cluster):
    cluster = start_cluster(
        {}, "--both", "2", "--served-name", "whale", "--numerics", "served", "--slots", "7"
    )
    router = options_of(cluster.ready()["http"])
    assert router[router.index("--served-name") + 1] == "whale"
    assert "--api-key-file" not in router
    addresses = [router[i + 1] for i, option in enumerate(router) if option == "--worker"]
    assert len(addresses) == 2
    for address in addresses:
        worker = options_of(address)
        assert worker[worker.index("--listen") + 1] == "127.0.0.1:0"
        assert worker[worker.index("--numerics") + 1] == "served"
        assert worker[worker.index("--slots") + 1] == "7"
        assert "--pages" not in worker
        assert "--exact" not in worker


def test_keys_reach_the_router_in_a_file_of_its_own_and_never_in_an_argument(start_cluster, tmp_path):
    given = tmp_path / "keys"
    given.write_text("secret-b\n\nsecret-c\n")
    cluster = start_cluster({}, "--api-key", "secret-a", "--api-key-file", str(given))
    router = options_of(cluster.ready()["http"])
    assert not any("secret" in option for option in router)
    file = Path(router[router.index("--api-key-file") + 1])
    assert file != given
    assert file.read_text() == "secret-a\nsecret-b\nsecret-c\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert cluster.stop(signal.SIGTERM) == 0
    assert not file.exists()


def test_threads_are_shared_out_and_written_into_the_environment(start_cluster):
    cluster = start_cluster()  # the fake machine has 4 cores
    ready = json.loads(cluster.ready()["http"])
    assert ready["threads"] == "1", "the router computes nothing"
    worker = json.loads(ready["options"][ready["options"].index("--worker") + 1])
    assert worker["threads"] == "3"
    assert worker["options"][worker["options"].index("--threads") + 1] == "3"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_leaves_no_process_and_exits_zero(start_cluster, number):
    cluster = start_cluster()
    processes = cluster.ready()["processes"]
    assert cluster.stop(number) == 0
    cluster.assert_gone(processes)
    assert cluster.errors.read_text() == ""


@linux_only
def test_its_own_sigkill_leaves_no_process(start_cluster):
    cluster = start_cluster()
    processes = cluster.ready()["processes"]
    assert cluster.stop(signal.SIGKILL) == -signal.SIGKILL
    cluster.assert_gone(processes)


def test_a_stop_while_the_model_still_loads_is_orderly(start_cluster):
    cluster = start_cluster({"worker": {"says": ["weights 1 of 16 GB"], "is_never_ready": True}})
    while "weights 1 of 16 GB" not in cluster.output.read_text():
        assert cluster.process.poll() is None
    assert cluster.stop(signal.SIGINT) == 0
    assert not cluster.ready_file.exists()


def test_a_childs_death_is_told_with_its_last_lines_and_ends_the_rest(start_cluster):
    cluster = start_cluster({"router": {"says": ["the last straw"], "lives_seconds": 0.2}}, "--both", "2")
    processes = cluster.ready()["processes"]
    assert cluster.wait() == 1
    told = cluster.errors.read_text()
    assert told.startswith("rorqual up: router (process ")
    assert "killed by SIGKILL" in told
    assert "the last straw" in told
    assert "Traceback" not in told
    cluster.assert_gone(processes)


def test_a_dead_worker_is_named(start_cluster):
    cluster = start_cluster()
    processes = cluster.ready()["processes"]
    os.kill(processes[1], signal.SIGKILL)
    assert cluster.wait() == 1
    assert cluster.errors.read_text().startswith(f"rorqual up: both-0 (process {processes[1]}) died")
    cluster.assert_gone(processes)


def test_a_worker_that_cannot_start_ends_it_before_the_router_is_started(start_cluster):
    cluster = start_cluster({"worker": {"says": ["rorqual worker: shard 3 is broken"], "exits": 1}})
    assert cluster.wait() == 1
    assert "both-0" in cluster.errors.read_text()
    assert "exit status 1" in cluster.errors.read_text()
    assert "shard 3 is broken" in cluster.errors.read_text()
    assert "router |" not in cluster.output.read_text()


def test_a_child_that_ignores_sigterm_is_killed_at_the_deadline(start_cluster):
    cluster = start_cluster({"worker": {"is_deaf": True}}, "--stop-seconds", "0.4")
    processes = cluster.ready()["processes"]
    assert cluster.stop(signal.SIGTERM) == 0
    cluster.assert_gone(processes)
    assert "both-0 did not stop in time and was killed" in cluster.output.read_text()


def test_a_second_ctrl_c_does_not_wait_for_the_deadline(start_cluster):
    cluster = start_cluster({"worker": {"is_deaf": True}}, "--stop-seconds", "60")
    processes = cluster.ready()["processes"]
    cluster.process.send_signal(signal.SIGINT)
    while "stopping" not in cluster.output.read_text():
        assert cluster.process.poll() is None
    assert cluster.stop(signal.SIGINT) == 0  # within the 20 s that `stop` allows
    cluster.assert_gone(processes)


def test_a_start_that_takes_too_long_is_given_up(start_cluster):
    cluster = start_cluster({"worker": {"is_never_ready": True}}, "--start-seconds", "0.3")
    assert cluster.wait() == 1
    assert "starting both-0: not done after 0.3 s" in cluster.errors.read_text()


@pytest.mark.parametrize(
    ("ready", "complaint"),
    [
        ({"http": 7, "grpc": "x", "pid": 1}, "no text under 'http'"),
        ({"http": "x", "grpc": "x", "pid": "1"}, "names '1' as a process"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_ready_file_of_the_wrong_shape_is_refused(start_cluster, ready, complaint):
    cluster = start_cluster({"router": {"ready": ready}})
    assert cluster.wait() == 1
    assert complaint in cluster.errors.read_text()


def test_every_line_of_a_child_carries_its_name(start_cluster):
    cluster = start_cluster({"worker": {"says": ["loading", "ready"]}, "router": {"says": ["listening"]}})
    cluster.ready()
    cluster.stop(signal.SIGTERM)
    output = cluster.output.read_text()
    assert "both-0 | loading\nboth-0 | ready\n" in output
    assert "router | listening\n" in output
    assert "\x1b" not in output, "no colour into a file"
    assert "curl -N" in output


@pytest.mark.slow
def test_output_that_nobody_reads_stops_neither_children_nor_signals(start_cluster):
    cluster = start_cluster({"worker": {"floods_lines": 3000}}, stdout=subprocess.PIPE)
    processes = cluster.ready()["processes"]  # 3 MB were written into a pipe of 64 KiB
    assert cluster.stop(signal.SIGTERM) == 0
    cluster.assert_gone(processes)


def test_a_port_in_use_is_told_before_any_process_is_started(start_cluster):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        cluster = start_cluster({}, "--http", str(port))
        assert cluster.wait() == 1
    assert f"--http: cannot listen on 127.0.0.1:{port}: Address already in use" in cluster.errors.read_text()
    assert "starting" not in cluster.output.read_text()


def test_an_unwritable_ready_file_is_one_clear_line(start_cluster, tmp_path):
    cluster = start_cluster({}, "--ready-file", str(tmp_path / "nowhere" / "ready.json"))
    assert cluster.wait() == 1
    assert "--ready-file" in cluster.errors.read_text()
    assert cluster.errors.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--both", "0"], "--both must be between 1 and 64, not 0"),
        (["--http", "65536"], "--http must be a port"),
        (["--grpc", "-1"], "--grpc must be a port"),
        (["--prefill-tokens", "0"], "--prefill-tokens must be at least 1, not 0"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(argv, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_options(["--model", "m", *argv])


@pytest.mark.parametrize(
    ("num_cores", "num_workers", "exact", "threads"),
    [
        (2, 1, False, 1),
        (2, 4, False, 1),
        (1, 1, False, 1),
        (16, 1, False, 15),
        (16, 4, False, 3),
        (16, 1, True, 1),
    ],
)
def test_threads_per_worker_leave_a_core_for_the_router(num_cores, num_workers, exact, threads):
    assert threads_per_worker(num_cores=num_cores, num_workers=num_workers, exact=exact) == threads
