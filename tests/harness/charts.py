"""The chart of `deploy/helm/rorqual` as tests see it: rendered by a real helm, and checked against Kubernetes."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from tests.harness.cluster_tools import tool

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "rorqual"
EVERYTHING = CHART.parents[2] / "tests" / "chart" / "everything.yaml"
VALUE_SETS = ("local", "h200", "b200", "gb200", "mi355x", "mixed")
RELEASE = "demo"
NAMESPACE = "serving"

OTHER_KINDS = {
    # Of custom resources: fields of spec that must be there. Their schemas are not Kubernetes' own.
    ("resource.nvidia.com/v1beta1", "ComputeDomain"): ("numNodes", "channel"),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): ("leaderWorkerTemplate",),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): ("parentRefs", "rules"),
    ("gateway.networking.k8s.io/v1", "BackendTLSPolicy"): ("targetRefs", "validation"),
    ("cert-manager.io/v1", "Certificate"): ("secretName", "issuerRef"),
    ("cert-manager.io/v1", "Issuer"): (),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): ("selector", "endpoints"),
    ("monitoring.coreos.com/v1", "PodMonitor"): ("selector", "podMetricsEndpoints"),
    ("monitoring.coreos.com/v1", "PrometheusRule"): ("groups",),
}

Manifest = dict[str, Any]


def helm(
    *arguments: str, version: str = "helm4", folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run helm without any cluster's configuration."""
    home = str(folder or "/nonexistent")
    environment = {"PATH": os.environ["PATH"], "HOME": home, "KUBECONFIG": "/nonexistent"}
    return subprocess.run(
        [str(tool(version)), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )


def values_file(name: str) -> Path:
    """Of a value set; `everything` is the tests' own, with all switches on."""
    return EVERYTHING if name == "everything" else CHART / f"values-{name}.yaml"


def template(name: str, *sets: str, version: str = "helm4") -> subprocess.CompletedProcess[str]:
    """Render the chart with a value set ("" for none) and `--set`s, whatever comes of it; KEY={...} is JSON."""
    files = ["--values", str(values_file(name))] if name else []
    more = [part for one in sets for part in ("--set-json" if "={" in one else "--set", one)]
    command = ["template", RELEASE, str(CHART), "--namespace", NAMESPACE, *files, *more]
    return helm(*command, version=version)


@functools.cache
def _parsed(name: str, sets: tuple[str, ...], version: str) -> list[Manifest]:
    done = template(name, *sets, version=version)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one]


def render(name: str, *sets: str, version: str = "helm4") -> list[Manifest]:
    """What the chart makes of a value set; all callers get the same objects, and change copies of them alone."""
    return list(_parsed(name, sets, version))


def flaws(manifest: Manifest, *, kubernetes: str) -> list[str]:
    """What that version's API would refuse; an unknown kind is a flaw."""
    kind = (manifest.get("apiVersion", ""), manifest.get("kind", ""))
    if kind in OTHER_KINDS:
        metadata, spec = manifest.get("metadata", {}), manifest.get("spec", {})
        missing = [f"spec.{field}" for field in OTHER_KINDS[kind] if field not in spec]
        missing += ["metadata.name"] if not metadata.get("name") else []
        unknown = set(manifest) - {"apiVersion", "kind", "metadata", "spec"}
        return [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown]
    try:
        kubernetes_validate.validate(manifest, kubernetes, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(str(part) for part in error.path)}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{kind[0]} {kind[1]}: no such kind in Kubernetes {kubernetes}"]
    return []


def pod_specs(manifest: Manifest) -> list[Manifest]:
    """The pod templates in it: metadata and spec."""
    spec = manifest.get("spec", {})
    if manifest.get("kind") == "Deployment":
        return [spec["template"]]
    if manifest.get("kind") == "LeaderWorkerSet":
        both = spec["leaderWorkerTemplate"]
        return [both[part] for part in ("leaderTemplate", "workerTemplate") if part in both]
    return []


def containers(pod: Manifest) -> list[Manifest]:
    """All of a pod template, those that only start it too."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
