"""A folder as the kubelet mounts Secrets and service accounts: files are links into a folder of a version, and versions
are exchanged as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


class Mounted:
    def __init__(self, folder: Path, content: Mapping[str, bytes]) -> None:
        self.folder = folder
        self._num_versions = 0
        folder.mkdir()
        for name in content:
            (folder / name).symlink_to(f"..data/{name}")
        self.hold(content)

    def hold(self, content: Mapping[str, bytes]) -> None:
        self._num_versions += 1
        version = self.folder / f"..{self._num_versions}"
        version.mkdir()
        for name, data in content.items():
            (version / name).write_bytes(data)
        link = self.folder / "..data_tmp"
        link.symlink_to(version.name)
        os.replace(link, self.folder / "..data")
