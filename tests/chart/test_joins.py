"""What the chart's objects say of each other fits: names, selectors, ports, volumes, rights."""

import re
from typing import Any

import pytest

from autoscaler.policy import load_policy
from tests.harness.charts import RELEASE, VALUE_SETS, Manifest, containers, pod_specs, render
from tests.harness.promql import COPIED

ALL_SETS = ("", *VALUE_SETS, "everything")
GIVEN_SECRETS = {"client-keys", "front-door", "hub-token", "registry", "chat-tls"}  # of everything.yaml
GIVEN_CLAIMS = {"checkpoints", "kernels"}
COMPONENT = "app.kubernetes.io/component"
MADE_BY_LWS = "leaderworkerset.sigs.k8s.io/worker-index"


def all_pods(name: str) -> list[tuple[str, Manifest]]:
    return [(one["metadata"]["name"], pod) for one in render(name) for pod in pod_specs(one)]


def all_containers(name: str) -> list[tuple[str, Manifest, Manifest]]:
    return [(f"{owner}/{one['name']}", pod, one) for owner, pod in all_pods(name) for one in containers(pod)]


def named(name: str, kind: str) -> dict[str, Manifest]:
    return {one["metadata"]["name"]: one for one in render(name) if one["kind"] == kind}


def selected(selector: dict[str, str], pods: list[tuple[str, Manifest]]) -> list[tuple[str, Manifest]]:
    wanted = {key: value for key, value in selector.items() if key != MADE_BY_LWS}
    return [one for one in pods if wanted.items() <= one[1]["metadata"]["labels"].items()]


@pytest.mark.parametrize("name", ALL_SETS)
def test_each_service_selects_one_kind_of_pod_and_ports_that_it_has(name: str):
    services = named(name, "Service")
    assert services
    for service in services.values():
        found = selected(service["spec"]["selector"], all_pods(name))
        assert len(found) == 1, service["metadata"]["name"]
        assert found[0][0] == service["metadata"]["name"]
        ports = {port["name"] for one in containers(found[0][1]) for port in one.get("ports", [])}
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports, (service["metadata"]["name"], port)


@pytest.mark.parametrize("name", ALL_SETS)
def test_selectors_of_deployments_budgets_and_policies_find_pods(name: str):
    pods = all_pods(name)
    for one in render(name):
        spec = one.get("spec", {})
        found = spec.get("selector") if one["kind"] in ("Deployment", "PodDisruptionBudget") else None
        found = spec.get("podSelector") if one["kind"] == "NetworkPolicy" else found
        if found is None:
            continue
        hit = [owner for owner, _ in selected(found["matchLabels"], pods)]
        if one["kind"] == "Deployment":
            assert hit == [one["metadata"]["name"]]
        else:
            assert hit, (one["kind"], one["metadata"]["name"])


@pytest.mark.parametrize(
    ("sets", "host"),
    [
        ((), "0.0.0.0"),
        (("ipFamily=IPv6",), "[::]"),
        (("router.replicas=2", "router.podDisruptionBudget.minAvailable=50%"), "0.0.0.0"),
        (("router.listen=pod",), "$(POD_IP)"),
        (("router.listen=pod", "ipFamily=IPv6"), "[$(POD_IP)]"),
    ],
)
def test_a_forwarded_port_reaches_a_router(sets: tuple[str, ...], host: str):
    """A kubelet dials the pod's loopback for it, not its address."""
    found = [one for one in render("local", *sets) if one["kind"] == "Deployment"]
    (router,) = [one for one in found if one["metadata"]["labels"][COMPONENT] == "router"]
    arguments = router["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {f"--http={host}:8000", f"--grpc={host}:8001"} <= set(arguments)


@pytest.mark.parametrize("name", ALL_SETS)
def test_probes_ask_ports_that_are_there(name: str):
    for place, _, one in all_containers(name):
        ports = {port["name"] for port in one.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if place.endswith("/download"):
                continue
            asked = one[probe].get("httpGet") or one[probe]["tcpSocket"]
            assert asked["port"] in ports, (place, probe)


@pytest.mark.parametrize("name", ALL_SETS)
def test_mounts_have_volumes_and_volumes_are_mounted(name: str):
    for owner, pod in all_pods(name):
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert len(volumes) == len(pod["spec"]["volumes"]), owner
        mounted = {mount["name"] for one in containers(pod) for mount in one["volumeMounts"]}
        assert mounted == volumes, owner


@pytest.mark.parametrize("name", ALL_SETS)
def test_secrets_configmaps_claims_and_accounts_are_in_the_release_or_given(name: str):
    secrets = set(named(name, "Secret")) | GIVEN_SECRETS
    secrets |= {one["spec"]["secretName"] for one in named(name, "Certificate").values()}
    for owner, pod in all_pods(name):
        spec = pod["spec"]
        assert spec["serviceAccountName"] in named(name, "ServiceAccount"), owner
        assert {one["name"] for one in spec.get("imagePullSecrets", [])} <= secrets
        for volume in spec["volumes"]:
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets, (owner, volume)
            if "configMap" in volume:
                assert volume["configMap"]["name"] in named(name, "ConfigMap"), (owner, volume)
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in GIVEN_CLAIMS, (owner, volume)
        for one in containers(pod):
            for variable in one.get("env", []):
                found = variable.get("valueFrom", {}).get("secretKeyRef")
                assert found is None or found["name"] in secrets, (owner, variable)


@pytest.mark.parametrize("name", ALL_SETS)
def test_variables_that_a_value_uses_come_before_it(name: str):
    """Kubernetes leaves $(NAME) as it is, silently, where NAME is not yet known."""
    for place, _, one in all_containers(name):
        known: set[str] = set()
        for variable in one.get("env", []):
            assert used(variable.get("value", "")) <= known, (place, variable)
            known.add(variable["name"])
        made_by_lws = {"LWS_LEADER_ADDRESS"}
        assert used(" ".join(one.get("args", []))) <= known | made_by_lws, place


def used(text: str) -> set[str]:
    return {part.partition(")")[0] for part in text.split("$(")[1:]}


@pytest.mark.parametrize("name", ALL_SETS)
def test_every_container_is_restricted(name: str):
    for place, pod, one in all_containers(name):
        context, of_pod = one["securityContext"], pod["spec"]["securityContext"]
        assert of_pod["runAsNonRoot"] is True, place
        assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}, place
        assert context["allowPrivilegeEscalation"] is False, place
        assert context["readOnlyRootFilesystem"] is True, place
        assert context["capabilities"]["drop"] == ["ALL"], place
        assert "add" not in context["capabilities"], place
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            assert key not in pod["spec"], place


@pytest.mark.parametrize("name", ALL_SETS)
def test_every_container_has_resources_and_a_pinned_image(name: str):
    for place, _, one in all_containers(name):
        assert {"cpu", "memory"} & set(one["resources"]["requests"]), place
        assert one["resources"]["limits"], place
        tag = one["image"].rpartition(":")[2]
        assert "/" not in tag, place
        assert not tag.startswith("latest"), place


@pytest.mark.parametrize("name", ALL_SETS)
def test_a_device_that_is_asked_for_is_limited_alike(name: str):
    """Kubernetes refuses extended resources whose request and limit differ."""
    for place, _, one in all_containers(name):
        limits, requests = one["resources"]["limits"], one["resources"]["requests"]
        for key in (key for key in {*limits, *requests} if "/" in key):
            assert limits.get(key) == requests.get(key, limits.get(key)), (place, key)
            assert key in limits, (place, key)


@pytest.mark.parametrize("name", ALL_SETS)
def test_who_waits_for_a_model_to_load_is_given_the_time(name: str):
    """Routers too, which are ready when workers are."""
    workers = [pod for _, pod in all_pods(name) if pod["metadata"]["labels"][COMPONENT] == "worker"]
    probes = [containers(pod)[-1]["startupProbe"] for pod in workers]
    slowest = max(probe["periodSeconds"] * probe["failureThreshold"] for probe in probes)
    for owner, one in named(name, "Deployment").items():
        if one["metadata"]["labels"][COMPONENT] in ("worker", "router"):
            assert one["spec"]["progressDeadlineSeconds"] > slowest, owner
    for owner, one in named(name, "PodDisruptionBudget").items():
        assert one["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow", owner


@pytest.mark.parametrize("name", ALL_SETS)
def test_a_pod_may_drain_before_it_is_killed(name: str):
    for owner, pod in all_pods(name):
        (main,) = pod["spec"]["containers"]
        drains = [part.partition("=")[2] for part in main["args"] if part.startswith("--drain-seconds=")]
        if drains:
            slept = int(main["lifecycle"]["preStop"]["exec"]["command"][1])
            assert pod["spec"]["terminationGracePeriodSeconds"] > int(drains[0]) + slept, owner


@pytest.mark.parametrize("name", ALL_SETS)
def test_only_pods_that_ask_the_api_get_a_token(name: str):
    for _, pod in all_pods(name):
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        wanted = component in ("router", "autoscaler")
        assert pod["spec"]["automountServiceAccountToken"] is wanted


def rules(role: Manifest) -> set[tuple[str, ...]]:
    """One line for each verb on each resource."""
    return {
        (verb, f"{group}/{resource}", *item.get("resourceNames", []))
        for item in role["rules"]
        for group in item["apiGroups"]
        for resource in item["resources"]
        for verb in item["verbs"]
    }


SLICES = {(verb, "discovery.k8s.io/endpointslices") for verb in ("get", "list", "watch")}


def test_rights_are_these_and_no_others():
    roles = named("everything", "Role")
    assert rules(roles.pop("all-router")) == SLICES
    assert rules(roles.pop("all-autoscaler")) == SLICES | {
        ("get", "apps/deployments/scale", "all-prefill"),
        ("patch", "apps/deployments/scale", "all-prefill"),
        ("get", "leaderworkerset.x-k8s.io/leaderworkersets/scale", "all-decode"),
        ("patch", "leaderworkerset.x-k8s.io/leaderworkersets/scale", "all-decode"),
        ("get", "/pods"),
        ("list", "/pods"),
        ("create", "/events"),
        ("patch", "/events"),
        ("create", "coordination.k8s.io/leases"),
        ("get", "coordination.k8s.io/leases", "all-autoscaler"),
        ("update", "coordination.k8s.io/leases", "all-autoscaler"),
    }
    assert roles == {}
    kinds = {one["kind"] for one in render("everything")}
    assert not kinds & {"ClusterRole", "ClusterRoleBinding"}


@pytest.mark.parametrize("name", ALL_SETS)
def test_each_role_is_bound_to_an_account_of_the_release(name: str):
    bindings = named(name, "RoleBinding")
    assert set(bindings) == set(named(name, "Role"))
    for binding, one in bindings.items():
        assert one["roleRef"]["name"] == binding
        assert [subject["name"] for subject in one["subjects"]] == [binding]
        assert binding in named(name, "ServiceAccount")


AUTOSCALED = [name for name in ALL_SETS if name not in ("", "local")]


def policy_text(name: str, *sets: str) -> str:
    maps = [one for one in render(name, *sets) if one["kind"] == "ConfigMap" and "policy.yaml" in one["data"]]
    return maps[0]["data"]["policy.yaml"]


@pytest.mark.parametrize("name", AUTOSCALED)
def test_the_autoscaler_takes_its_policy_and_its_targets_are_there(name: str):
    policy = load_policy(policy_text(name), file=name)
    targets = {(one["kind"], one["metadata"]["name"]) for one in render(name)}
    for pool, found in policy.pools.items():
        assert found.target is not None, pool
        assert (found.target.kind, found.target.name) in targets


def test_the_policy_has_what_the_values_say():
    policy = load_policy(policy_text("everything"), file="everything")
    pool = policy.pools["prefill"]
    assert (pool.replicas.min, pool.replicas.max, pool.start_seconds) == (2, 9, 200.0)
    assert (pool.cost_per_hour, pool.devices, pool.hardware) == (32.5, 8, "h200")
    assert (pool.step.up, pool.step.down) == (4, 1)
    assert (pool.stabilisation.up_seconds, pool.stabilisation.down_seconds) == (10.0, 90.0)
    assert set(policy.pools) == {"prefill", "decode"}  # spare is not the autoscaler's


def test_the_local_values_can_have_an_autoscaler():
    policy = load_policy(policy_text("local", "autoscaler.enabled=true"), file="local")
    assert policy.model is None
    assert policy.pools["decode"].stabilisation.down_seconds == 60


def deployment(name: str, pool: str, *sets: str) -> Any:
    manifests = {one["metadata"]["name"]: one for one in render(name, *sets) if one["kind"] == "Deployment"}
    return manifests[f"{RELEASE}-rorqual-{pool}"]["spec"]


def replicas(name: str, pool: str, *sets: str) -> Any:
    return deployment(name, pool, *sets).get("replicas")


def test_no_replicas_are_no_replicas():
    assert replicas("local", "prefill", "pools.prefill.replicas=0") == 0
    sets = ("autoscaler.enabled=true", "pools.decode.autoscaling.min=0")
    assert load_policy(policy_text("local", *sets), file="local").pools["decode"].replicas.min == 0


def test_the_replicas_of_a_pool_that_the_autoscaler_has_are_left_to_it():
    # Without a cluster to ask, as for those who apply what `helm template` writes, a number would undo its own.
    sets = ("pools.prefill.autoscaling.min=3", "pools.prefill.replicas=2")
    assert replicas("h200", "prefill", *sets) is None
    assert replicas("h200", "prefill", *sets, "autoscaler.enabled=false") == 2
    # A dry run sets nothing: without a number the pool would fall to the one replica of Kubernetes' default.
    assert replicas("h200", "prefill", *sets, "autoscaler.dryRun=true") == 2


def test_a_pool_rolls_as_the_values_say():
    def roll(*sets: str) -> Any:
        return deployment("local", "decode", *sets)["strategy"]["rollingUpdate"]

    assert roll() == {"maxSurge": 1, "maxUnavailable": 0}
    without_room = ("workers.rollingUpdate.maxSurge=0", "workers.rollingUpdate.maxUnavailable=1")
    assert roll(*without_room) == {"maxSurge": 0, "maxUnavailable": 1}
    assert roll(*without_room, "pools.decode.rollingUpdate.maxSurge=2") == {
        "maxSurge": 2,
        "maxUnavailable": 1,
    }


def test_the_world_reaches_answers_by_http_and_grpc_and_no_metrics():
    """A GRPCRoute beside an HTTPRoute of the same host names is one that a Gateway must not accept."""
    sets = ("gatewayApi.enabled=true", "gatewayApi.parentRefs[0].name=g", "ingress.enabled=true")
    manifests = render("local", *sets)
    (route,) = (one for one in manifests if one["kind"] in ("HTTPRoute", "GRPCRoute"))
    (ingress,) = (one for one in manifests if one["kind"] == "Ingress")
    http, grpc = route["spec"]["rules"]
    public = ["/v1", "/tokenize", "/health"]
    assert [match["path"]["value"] for match in http["matches"]] == public
    assert [path["path"] for path in ingress["spec"]["rules"][0]["http"]["paths"]] == public
    assert grpc["matches"] == [{"path": {"type": "PathPrefix", "value": "/rorqual.v1.Generation"}}]
    services = {one["metadata"]["name"]: one["spec"] for one in manifests if one["kind"] == "Service"}
    backends = [rule["backendRefs"][0] for rule in (http, grpc)]
    ports = {port["port"]: port["name"] for port in services[backends[0]["name"]]["ports"]}
    assert [ports[backend["port"]] for backend in backends] == ["http", "grpc"]


@pytest.mark.parametrize("pool", ["on", "y", "null-a"])
def test_a_pool_may_have_a_name_that_yaml_takes_for_something_else(pool: str):
    sets = (f"pools.{pool}.role=both", f"pools.{pool}.family=cpu")
    (one,) = (
        m
        for m in render("local", *sets)
        if m["metadata"]["name"] == f"{RELEASE}-rorqual-{pool}" and m["kind"] == "Service"
    )
    assert one["spec"]["selector"]["rorqual.io/pool"] == pool


def test_grpc_in_clear_is_announced_as_such_and_with_tls_is_not():
    def protocol(name: str, *sets: str) -> str:
        (service,) = (
            m
            for m in render(name, *sets)
            if m["kind"] == "Service" and m["metadata"]["name"].endswith("-router")
        )
        return {port["name"]: port.get("appProtocol", "") for port in service["spec"]["ports"]}["grpc"]

    assert protocol("local") == "kubernetes.io/h2c"
    assert protocol("local", "gatewayTls.existingSecret=front-door") == ""


def test_what_is_downloaded_is_where_it_is_read():
    for owner, pod in all_pods("everything"):
        mounts = {
            one["name"]: mount
            for one in containers(pod)
            for mount in one["volumeMounts"]
            if mount["name"] == "model"
        }
        if mounts:
            (main,) = pod["spec"]["containers"]
            assert mounts["download"]["subPath"] == mounts[main["name"]]["subPath"] == "flash", owner
            assert mounts[main["name"]]["readOnly"] is True
            assert not mounts["download"].get("readOnly")


def test_routers_fetch_what_they_are_told_to_and_without_it_what_workers_do():
    def commands(*sets: str) -> dict[str, list[str]]:
        pods = [pod for one in render("everything", *sets) for pod in pod_specs(one)]
        found = [(pod, one) for pod in pods for one in pod["spec"].get("initContainers", [])]
        return {pod["metadata"]["labels"][COMPONENT]: one["command"] for pod, one in found}

    assert "*.safetensors" in commands()["router"]
    assert "*.safetensors" not in commands()["worker"]
    same = commands("model.download.routerCommand=null")
    assert same["router"] == same["worker"]


def test_a_gateway_is_told_of_routers_that_speak_tls():
    (policy,) = named("everything", "BackendTLSPolicy").values()
    (target,) = policy["spec"]["targetRefs"]
    (service,) = [
        one for one in named("everything", "Service").values() if one["metadata"]["name"] == target["name"]
    ]
    assert {port["name"]: port.get("appProtocol") for port in service["spec"]["ports"]} == {
        "http": "https",
        "grpc": None,
    }
    sets = ("gatewayApi.enabled=true", "gatewayApi.parentRefs[0].name=public")
    assert not [one for one in render("local", *sets) if one["kind"] == "BackendTLSPolicy"]


def test_only_root_is_given_a_capability_for_rdma():
    root = ("podSecurityContext.runAsUser=0", "podSecurityContext.runAsNonRoot=false")
    for sets, added in (((), None), (("podSecurityContext=null",), None), (root, ["IPC_LOCK"])):
        workers = [
            pod
            for one in render("h200", *sets)
            for pod in pod_specs(one)
            if pod["metadata"]["labels"][COMPONENT] == "worker"
        ]
        assert workers
        for pod in workers:
            assert containers(pod)[-1]["securityContext"]["capabilities"].get("add") == added


@pytest.mark.parametrize("name", ["gb200", "mixed"])
def test_workers_that_share_memory_by_nvlink_are_of_one_domain(name: str):
    (domain,) = named(name, "ComputeDomain").values()
    template = domain["spec"]["channel"]["resourceClaimTemplate"]["name"]
    found = [(owner, pod) for owner, pod in all_pods(name) if pod["spec"].get("resourceClaims")]
    assert len(found) == (2 if name == "gb200" else 1)
    for owner, pod in found:
        assert [one["resourceClaimTemplateName"] for one in pod["spec"]["resourceClaims"]] == [template], (
            owner
        )
        (near,) = pod["spec"]["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        labels = near["podAffinityTerm"]["labelSelector"]["matchLabels"]
        assert {other for other, one in found if labels.items() <= one["metadata"]["labels"].items()} == {
            o for o, _ in found
        }
        assert labels["app.kubernetes.io/instance"] == RELEASE


@pytest.mark.parametrize("name", ALL_SETS)
def test_monitors_scrape_ports_that_the_selected_have(name: str):
    for monitor in named(name, "ServiceMonitor").values():
        selector = monitor["spec"]["selector"]["matchLabels"]
        found = [
            one
            for one in named(name, "Service").values()
            if selector.items() <= one["metadata"]["labels"].items()
        ]
        assert len(found) == 1
        ports = {port["name"] for port in found[0]["spec"]["ports"]}
        assert {one["port"] for one in monitor["spec"]["endpoints"]} <= ports
    for monitor in named(name, "PodMonitor").values():
        (rule,) = monitor["spec"]["selector"]["matchExpressions"]
        found = [
            pod
            for _, pod in selected(monitor["spec"]["selector"]["matchLabels"], all_pods(name))
            if pod["metadata"]["labels"][rule["key"]] in rule["values"]
        ]
        assert {pod["metadata"]["labels"][rule["key"]] for pod in found} == set(rule["values"])
        for pod in found:
            ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
            assert {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_labels_that_alerts_and_dashboards_ask_for_are_copied_by_the_monitors():
    (of_pods,) = named("everything", "PodMonitor").values()
    (of_services,) = named("everything", "ServiceMonitor").values()
    copied = {*of_pods["spec"]["podTargetLabels"], *of_services["spec"]["targetLabels"]}
    assert {re.sub(r"[^A-Za-z0-9]", "_", label) for label in copied} == COPIED
    for _, pod in all_pods("everything"):
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "worker":
            assert set(of_pods["spec"]["podTargetLabels"]) <= set(pod["metadata"]["labels"])


def allowed(port: int, to: str) -> set[str]:
    """Components whose pods may connect there; "anybody" for all the world."""
    spec = named("everything", "NetworkPolicy")[f"all-{to}"]["spec"]
    found: set[str] = set()
    for rule in spec["ingress"]:
        if "ports" in rule and port not in {one["port"] for one in rule["ports"]}:
            continue
        for peer in rule.get("from", [{}]):
            labels = peer.get("podSelector", {}).get("matchLabels", {})
            found.add(
                labels.get("app.kubernetes.io/component")
                or peer.get("namespaceSelector", {}).get("matchLabels", {}).get("team", "anybody")
            )
    return found


def test_network_policies_let_in_those_who_have_business_there():
    assert allowed(8000, "router") == {"web", "autoscaler", "monitoring"}
    assert allowed(8001, "router") == {"web", "autoscaler"}
    assert allowed(9000, "worker") == {"router", "autoscaler", "worker"}
    assert allowed(9090, "worker") == {"monitoring", "worker"}
    assert allowed(9090, "autoscaler") == {"monitoring"}
    assert allowed(6379, "redis") == {"router", "worker"}
