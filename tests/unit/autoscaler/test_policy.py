"""Policies: what is read, what is refused and by which words, and the schema that says the same."""

import contextlib
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.policy import PolicyError, load_policy, policy_schema
from rorqual.session import Role

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = ROOT / "docs" / "autoscaler-policy.schema.json"

POLICY = """
version: 1
interval_seconds: 5
objectives: {ttft: {percentile: 90, seconds: 2.0}, itl: {percentile: 95, seconds: 0.05}}
model: flash
pools:
  front:
    role: prefill
    replicas: {min: 1, max: 32}
    hardware: h200
    devices: 8
    cost_per_hour: 8.5
    target: {kind: Deployment, name: x}
  back:
    role: decode
    replicas: {max: 4}
routers: ["kubernetes:?selector=a"]
"""

REFUSED = [
    (
        "replicas: {min: 1, max: 32}",
        "replicas: {min: 1, mx: 32}",
        "p.yaml:9: unknown key pools.front.replicas.mx",
        1,
    ),
    ("hardware: h200", "hardware: h20", "did you mean h200?", 1),
    ("min: 1, max: 32", "min: 40, max: 32", "min 40 is above max 32", 0),
    ("percentile: 90", "percentile: 0", "objectives.ttft.percentile", 1),
    ("percentile: 95", "percentile: 99.95", "objectives.itl.percentile", 1),
    ("devices: 8", "devices: true", "pools.front.devices", 1),
    ("devices: 8", "devices: .inf", "pools.front.devices is no finite number", 1),
    ("devices: 8", "devices: 0", "pools.front.devices", 1),
    ("version: 1", "version: 2", "version", 1),
    ("    role: decode\n", "", "pools.back.role is missing", 1),
    ("role: decode", "role: both", "role both", 0),
    ("devices: 8", "devices: 8\n    devices: 9", "p.yaml:12: 'devices' is there twice", 0),
    ("  front:", "  Front_1:", "'Front_1' is no name of a pool", 1),
    ("model: flash", "model: flush", "did you mean flash?", 0),
    ("model: flash\n", "", "predicts nothing without a model", 0),
    ("seconds: 2.0", "seconds: .nan", "objectives.ttft.seconds is no finite number", 0),
    ("kind: Deployment", "kind: Pod", "pools.front.target.kind", 1),
    ("model: flash", "model: [", "p.yaml:", 0),
    ("model: flash", "model: &a flash", "", -1),
    ("model: flash", "1: 2", "unknown key 1", 1),
    ("pools:", "pool:", "did you mean pools?", 1),
]
"""What is put in place of what, words of the error, and whether the schema alone sees it (-1: it is no fault)."""


def test_a_policy_is_read_with_what_is_left_out():
    policy = load_policy(POLICY, file="p.yaml")
    front, back = policy.pools["front"], policy.pools["back"]
    assert (front.role, back.role) == (Role.PREFILL, Role.DECODE)
    assert (back.replicas.min, back.replicas.max, back.hardware) == (1, 4, None)
    assert (front.stabilisation.down_seconds, front.step.up, policy.survive_losses) == (300.0, 8, 1)
    assert front.target is not None
    assert front.target.name == "x"
    assert policy.routers == ("kubernetes:?selector=a",)


@pytest.mark.parametrize(("old", "new", "words", "by_schema"), REFUSED)
def test_what_is_wrong_is_named_and_the_schema_agrees(old, new, words, by_schema):
    assert POLICY.count(old) >= 1
    text = POLICY.replace(old, new, 1)
    if by_schema < 0:
        load_policy(text, file="p.yaml")
        return
    with pytest.raises(PolicyError) as caught:
        load_policy(text, file="p.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    if by_schema:
        assert not is_valid(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("[1]", "is no mapping"),
        ("version: &x 1\nmodel: *x", "p.yaml:2: aliases are not read"),
        ("version: !!python/object:os.system 1", "could not determine a constructor"),
        ("{a: " * 2000, "p.yaml"),
        ("version: !!bool zzz", "cannot be read as YAML"),
        ("version: !!timestamp abc", "cannot be read as YAML"),
        ("# " + "x" * 300_000, "characters"),
    ],
)
def test_text_that_is_no_policy_is_refused_in_one_line(text, words):
    with pytest.raises(PolicyError, match=r"p\.yaml") as caught:
        load_policy(text, file="p.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_published_schema_is_current_and_takes_the_example():
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == policy_schema()
    jsonschema.Draft202012Validator.check_schema(policy_schema())
    assert is_valid(yaml.safe_load(POLICY))


def is_valid(tree: object) -> bool:
    return jsonschema.Draft202012Validator(policy_schema()).is_valid(tree)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_no_text_ends_in_another_error(text):
    with contextlib.suppress(PolicyError):
        load_policy(text, file="p.yaml")
