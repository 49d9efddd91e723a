"""The chart's README is current."""

import importlib.util
import re
import sys
from types import ModuleType

import pytest
import yaml

from tests.harness.charts import CHART, VALUE_SETS


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart_readme", CHART.parent / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


README = (CHART / "README.md").read_text()
VALUES = (CHART / "values.yaml").read_text()


def test_the_table_of_values_is_current():
    assert generator().updated(README, VALUES) == README, "run: python deploy/helm/readme.py"


def test_every_value_is_in_the_table_once():
    described = re.findall(r"^## @param (\S+) ", VALUES, re.M)
    in_table = re.findall(r"^\| `([\w.]+)` \|", README.partition("<!-- begin")[2], re.M)
    assert in_table == described


def test_a_text_of_several_lines_is_one_row():
    text = "## @section A\n## @param a One\n## and more\n## @param b.c Two\na: 1\nb: {c: [x]}\n"
    rows = generator().table(text).splitlines()
    assert "| `a` | `1` | One and more |" in rows
    assert '| `b.c` | `["x"]` | Two |' in rows


def test_a_readme_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="begin of values"):
        generator().updated("# Nothing", VALUES)


def test_every_value_set_and_switch_that_is_named_is_there():
    for name in VALUE_SETS:
        assert f"values-{name}.yaml" in README
    values = yaml.safe_load(VALUES)
    for path in re.findall(
        r"`((?:monitoring|model|autoscaler|tls|redis|store|apiKeys)\.\w+(?:\.\w+)*)`", README
    ):
        if path in ("tls.crt", "tls.key"):  # keys of Secrets
            continue
        found = values
        for part in path.split("."):
            assert part in found, path
            found = found[part]


def test_the_version_of_kubernetes_is_that_of_the_chart():
    wanted = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"]
    assert f"Kubernetes {wanted.removeprefix('>=').removesuffix('.0-0')} or newer" in README
