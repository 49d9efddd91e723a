"""`rorqual.__version__` is what processes say of themselves; package and chart are released under the same."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

from rorqual import __version__

ROOT = Path(__file__).parents[3]


def test_package_and_chart_have_the_version_that_processes_say():
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = yaml.safe_load((ROOT / "deploy/helm/rorqual/Chart.yaml").read_text(encoding="utf-8"))
    assert (package["version"], chart["appVersion"]) == (__version__, __version__)
