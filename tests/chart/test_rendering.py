"""The chart renders with both Helms, fits Kubernetes' schemas from the oldest version on, and refuses typos."""

import copy
import tarfile

import pytest
import yaml

from tests.harness.charts import (
    CHART,
    EVERYTHING,
    OTHER_KINDS,
    RELEASE,
    VALUE_SETS,
    flaws,
    helm,
    render,
    template,
    values_file,
)

ALL_SETS = ("", *VALUE_SETS, "everything")
HELMS = ("helm4", pytest.param("helm3", marks=pytest.mark.slow))
KUBERNETES = ("1.31", "1.36")  # the oldest that Chart.yaml takes, and a new one


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("name", ALL_SETS)
def test_helm_lint_finds_nothing(name: str, version: str):
    files = ["--values", str(values_file(name))] if name else []
    done = helm("lint", "--strict", str(CHART), *files, version=version)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout + done.stderr


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("name", ALL_SETS)
def test_every_manifest_fits_the_schemas_of_kubernetes(name: str, version: str):
    manifests = render(name, version=version)
    found = [
        f"{kubernetes}: {one['kind']} {one['metadata']['name']}: {flaw}"
        for kubernetes in KUBERNETES
        for one in manifests
        for flaw in flaws(one, kubernetes=kubernetes)
    ]
    assert found == []


@pytest.mark.parametrize("name", ALL_SETS)
def test_both_helms_render_the_same(name: str):
    def shown(version: str) -> list[dict[str, object]]:
        manifests = copy.deepcopy(render(name, version=version))
        for one in manifests:
            if one["kind"] == "Secret":  # a password is drawn each time
                one["data"]["password"] = ""
        return sorted(manifests, key=lambda one: (one["kind"], one["metadata"]["name"]))

    assert shown("helm4") == shown("helm3")


def test_no_two_objects_have_one_name():
    for name in ALL_SETS:
        names = [(one["apiVersion"], one["kind"], one["metadata"]["name"]) for one in render(name)]
        assert len(names) == len(set(names)), name


def test_with_all_switches_on_every_kind_is_there():
    kinds = {one["kind"] for one in render("everything")}
    assert kinds >= {kind for _, kind in OTHER_KINDS}
    assert kinds >= {"Ingress", "NetworkPolicy", "PodDisruptionBudget", "Secret", "Role", "ConfigMap"}


def test_nothing_that_needs_a_custom_resource_is_on_by_itself():
    others = {kind for _, kind in OTHER_KINDS}
    assert {one["kind"] for one in render("")} & others == set()


def test_no_value_set_of_cpus_needs_a_custom_resource():
    assert {one["kind"] for one in render("local")} & {kind for _, kind in OTHER_KINDS} == set()


def test_an_unknown_kind_and_an_unknown_field_are_flaws():
    strange = {"apiVersion": "example.org/v1", "kind": "Widget", "metadata": {"name": "a"}, "spec": {}}
    assert "no such kind" in flaws(strange, kubernetes="1.36")[0]
    (deployment, *_) = (one for one in render("local") if one["kind"] == "Deployment")
    wrong = copy.deepcopy(deployment)
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    assert "imagePullPolice" in flaws(wrong, kubernetes="1.31")[0]


def test_objects_of_a_release_have_its_name_and_labels():
    for one in render("local"):
        assert one["metadata"]["name"].startswith(f"{RELEASE}-rorqual"), one["kind"]
        assert one["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE, one["kind"]


@pytest.mark.parametrize(
    "typo",
    [
        "repicas=3",
        "router.replica=3",
        "router.options.requestMax=1",
        "router.service.ports=1",
        "workers.options.hotBufers=4",
        "workers.jitCache.sise=1Gi",
        "pools.decode.rollingUpdate.maxSurg=2",
        "pools.decode.familly=cuda",
        "pools.decode.autoscaling.maxx=4",
        "pools.decode.options.drafft=auto",
        "autoscaler.objectives.tftt=1",
        "model.download.imag=x",
        "monitoring.rule=true",
        "networkPolicy.client=x",
        "tls.certManager.issuer=x",
    ],
)
@pytest.mark.parametrize("version", HELMS)
def test_a_typo_in_values_is_refused_by_name(typo: str, version: str):
    done = template("local", typo, version=version)
    assert done.returncode != 0
    assert typo.partition("=")[0].rpartition(".")[2] in done.stderr


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("pools.decode.role=decoder", "role"),
        ("pools.decode.family=tpu", "family"),
        ("router.service.type=Loadbalancer", "type"),
        ("pools.router.role=both", "pools"),
        ("ipFamily=v6", "ipFamily"),
        ("monitoring.interval=often", "interval"),
        ("gatewayApi.enabled=true", "gatewayApi.parentRefs"),
        ("model.download.enabled=true", "model.download.image"),
        ("model.download.enabled=true,model.download.image=fetcher:1", "model.download.command"),
        ("store.existingSecret=mine", "redis.enabled and store.existingSecret"),
        (
            "gatewayTls.existingSecret=front,gatewayApi.enabled=true,gatewayApi.parentRefs[0].name=public",
            "gatewayApi.backendTls.hostname",
        ),
        ("router.replicas=2,router.podDisruptionBudget.minAvailable=2", "minAvailable"),
        ("router.replicas=2,router.podDisruptionBudget.minAvailable=51%", "no node could be drained"),
        ("router.replicas=2,router.podDisruptionBudget.minAvailable=half", "minAvailable"),
        ("autoscaler.enabled=true,pools.decode.autoscaling.enabled=false", "autoscaling.enabled"),
        ("pools.decode.rollingUpdate.maxSurge=0", "no worker could ever be replaced"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(wrong: str, told: str):
    done = template("local", wrong)
    assert done.returncode != 0
    assert told in done.stderr


@pytest.mark.parametrize("version", HELMS)
def test_the_package_holds_what_is_needed_and_no_more(version: str, tmp_path):
    done = helm("package", str(CHART), "--destination", str(tmp_path), version=version, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("rorqual-*.tgz")
    with tarfile.open(package) as archive:
        inside = {name.removeprefix("rorqual/") for name in archive.getnames()}
    here = {path.relative_to(CHART).as_posix() for path in CHART.rglob("*") if path.is_file()}
    assert inside == here


def test_the_values_of_everything_name_every_section():
    """So that a section that is added is rendered with all the others."""
    known = set(yaml.safe_load((CHART / "values.yaml").read_text()))
    asked = set(yaml.safe_load(EVERYTHING.read_text()))
    excused = {"nameOverride", "store", "podSecurityContext", "containerSecurityContext"}
    assert known - asked == excused
