"""k8s/ against the code: commands, options, variables, ports, paths, metrics, names exist, and times fit together."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import promql_parser
import pytest
import yaml

from helpers.manifests import (
    BASE,
    COMPONENTS,
    K8S,
    OVERLAYS,
    ROOT,
    Object,
    Pod,
    of_kind,
    overlay,
    pods,
    selects,
    with_components,
)
from tidewright.config import CONFIG_FILE_VARIABLE, Settings
from tidewright.launch import model_watch, server, watchdog
from tidewright.launch.cli import main
from tidewright_gateway.config import CONFIG_FILE_VARIABLE as GATEWAY_CONFIG_FILE_VARIABLE
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics.catalogue import CATALOGUE
from tidewright_gateway.websocket.backend import PATH as WEBSOCKET

SECRETS = {
    # name: the keys that are read
    "tidewright-keys": {"keys.yaml"},
    "tidewright-hub": {"token"},
    "tidewright-redis": {"password"},
    "tidewright-metrics": {"key"},
    "tidewright-rendezvous": {"secret"},
    "tidewright-tls": {"tls.crt", "tls.key", "ca.crt"},
}
"""That the operator makes, as docs/deployment.md says."""
OTHER_IMAGES = {"redis:7.4-bookworm"}
OTHER_PROGRAMS = {"sleep", "redis-cli", "redis-server"}
START_MARGIN = 10.0  # seconds; launch/server.py waits so much longer than start_timeout
END_MARGIN = server.ANSWER_TIME + server.KILL_AFTER + server.END_TIMEOUT


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sequence[Object]]:
    """The base, all overlays, and the base with each component."""
    found: dict[str, Sequence[Object]] = {name: overlay(name) for name in (BASE, *OVERLAYS)}
    for name in COMPONENTS:
        found[f"base and {name}"] = with_components([name], tmp_path_factory.mktemp(name))
    return found


def all_pods(every: dict[str, Sequence[Object]]) -> Iterator[tuple[str, Sequence[Object], Pod]]:
    for name, objects in every.items():
        for pod in pods(objects):
            yield f"{name}: {pod.owner}", objects, pod


def variables(container: Object) -> dict[str, str]:
    """With texts for what comes from elsewhere, and references resolved as the kubelet does."""
    known = {"LWS_LEADER_ADDRESS": "leader.example", "LWS_WORKER_INDEX": "1"}
    for one in container.get("env", ()):
        source = one.get("valueFrom", {})
        value = one.get("value", "10.0.0.1" if "fieldRef" in source else "smollm2-135m")
        known[one["name"]] = expanded(value, known)
    return known


def expanded(text: str, known: dict[str, str]) -> str:
    """Raises KeyError: a variable that is not there, or not yet."""
    return re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], text)


def commands(container: Object) -> Iterator[list[str]]:
    """What is run in it: itself, its probes and hooks."""
    known = variables(container)
    own = [expanded(word, known) for word in (*container.get("command", ["tidewright"]), *container.get("args", ()))]
    yield own
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if "exec" in container.get(probe, {}):
            yield container[probe]["exec"]["command"]
    for hook in container.get("lifecycle", {}).values():
        yield hook["exec"]["command"]


def parsed(words: Sequence[str]) -> click.Context:
    """By the real command line. Raises click.UsageError."""
    context = main.make_context("tidewright", list(words[1:]))
    name, command, rest = main.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    return command.make_context(name, rest, parent=context)


def pre_stop(container: Object) -> float:
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    return float(seconds)


def config_file(objects: Sequence[Object], pod: Pod, path: str) -> str:
    """The content of a file in a pod that a ConfigMap holds."""
    folder, _, name = path.rpartition("/")
    (mount,) = [one for one in pod.containers[0]["volumeMounts"] if one["mountPath"] == folder]
    (volume,) = [one for one in pod.spec["volumes"] if one["name"] == mount["name"]]
    (found,) = [one for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"] == volume["configMap"]["name"]]
    return str(found["data"][name])


def settings(
    objects: Sequence[Object], pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings | GatewaySettings:
    """As the pod's command validates them, with its file and variables."""
    container = pod.containers[0]
    is_gateway = pod.component == "gateway"
    kind = GatewaySettings if is_gateway else Settings
    variable = GATEWAY_CONFIG_FILE_VARIABLE if is_gateway else CONFIG_FILE_VARIABLE
    file = tmp_path / "config.yaml"
    file.write_text(config_file(objects, pod, parsed(next(commands(container))).params["config"]))
    with monkeypatch.context() as patch:
        for name, value in variables(container).items():
            patch.setenv(name, value)
        patch.setenv(variable, str(file))
        return kind()


def test_every_command_is_one(every: dict[str, Sequence[Object]]) -> None:
    """Of containers, probes and hooks: by the real command line, or of a program that the image has."""
    ours = set()
    for where, _, pod in all_pods(every):
        for container in pod.all_containers:
            for words in commands(container):
                if words[0] == "tidewright":
                    ours.add(str(parsed(words).info_name))
                else:
                    assert words[0] in OTHER_PROGRAMS, where
    assert ours == {"serve", "gateway", "worker", "prepare", "health"}


def test_every_variable_is_an_option(every: dict[str, Sequence[Object]]) -> None:
    known = {
        *(f"TIDEWRIGHT_{name.upper()}" for name in Settings.model_fields),
        *(f"TIDEWRIGHT_GATEWAY_{name.upper()}" for name in GatewaySettings.model_fields),
        "TIDEWRIGHT_CACHE",
    }
    for where, _, pod in all_pods(every):
        for container in pod.all_containers:
            names = [one["name"] for one in container.get("env", ())]
            assert len(set(names)) == len(names), where
            for name in names:
                assert name in known or not name.startswith("TIDEWRIGHT_"), (where, name)


@pytest.mark.parametrize("name", [BASE, *OVERLAYS])
def test_every_option_is_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, found = overlay(name), {}
    for pod in pods(objects):
        if pod.component in ("gateway", "replica"):
            found[pod.component] = settings(objects, pod, tmp_path, monkeypatch)
    gateway, replica = found["gateway"], found["replica"]
    assert isinstance(gateway, GatewaySettings)
    assert isinstance(replica, Settings)
    assert gateway.model == replica.model
    assert (gateway.host, replica.host, replica.gateway_port) == ("0.0.0.0", "0.0.0.0", 0)
    assert (gateway.log_format, replica.log_format) == ("json", "json")
    assert gateway.replicas == f"dns:tidewright-replicas:{replica.grpc_port}"
    (service,) = [one for one in of_kind(objects, "Service") if one["metadata"]["name"] == "tidewright-replicas"]
    assert service["spec"]["clusterIP"] == "None"
    for pod in pods(objects):
        ports = {port["name"]: port["containerPort"] for port in pod.containers[0].get("ports", ())}
        if pod.component == "gateway":
            assert ports == {"http": gateway.port}
        elif pod.component == "replica":
            expected = {"http": replica.http_port, "grpc": replica.grpc_port, "metrics": replica.metrics_port}
            if replica.rendezvous:
                expected["rendezvous"] = int(replica.rendezvous.rpartition(":")[2])
            assert ports == expected


@pytest.mark.parametrize("name", OVERLAYS)
def test_as_many_gpus_as_ranks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = overlay(name)
    every_pod = list(pods(objects))
    (replica,) = [pod for pod in every_pod if pod.component == "replica"]
    options = settings(objects, replica, tmp_path, monkeypatch)
    assert isinstance(options, Settings)
    gpus = [
        int(pod.containers[0]["resources"]["limits"].get("nvidia.com/gpu", 0))
        for pod in every_pod
        if pod.component in ("replica", "worker")
    ]
    ranks = options.tensor_parallel_size // options.nodes
    assert set(gpus) == ({ranks} if options.device == "cuda" else {0})
    for group in of_kind(objects, "LeaderWorkerSet"):
        assert group["spec"]["leaderWorkerTemplate"]["size"] == options.nodes
        (worker,) = [pod for pod in every_pod if pod.component == "worker"]
        assert parsed(next(commands(worker.containers[0]))).params["ranks"] == ranks


@pytest.mark.parametrize("name", [BASE, *OVERLAYS])
def test_times_fit_together(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain ends before SIGKILL; a probe is no shorter than what it waits for."""
    objects = overlay(name)
    drain = 0.0
    for pod in pods(objects):
        if pod.component not in ("gateway", "replica"):
            continue
        options, container = settings(objects, pod, tmp_path, monkeypatch), pod.containers[0]
        assert options.shutdown_grace > 0
        drain = pre_stop(container) + options.shutdown_grace
        assert pod.spec["terminationGracePeriodSeconds"] >= drain + END_MARGIN, pod.owner
        if isinstance(options, GatewaySettings):
            assert of_kind(objects, "Deployment")[0]["spec"]["progressDeadlineSeconds"] >= 600
            continue
        startup, live = (
            container[probe]["periodSeconds"] * container[probe]["failureThreshold"]
            for probe in ("startupProbe", "livenessProbe")
        )
        assert startup >= options.start_timeout + START_MARGIN
        # A dead stub, a hung Triton: `serve` mends both, with a start of Triton at worst.
        mending = watchdog.HANG_AFTER + model_watch.RELOAD_PATIENCE + options.start_timeout + START_MARGIN
        assert live >= mending
        assert live >= options.shutdown_grace + END_MARGIN  # a drain that somebody asked for takes that long
        for worker in pods(objects):
            if worker.component == "worker":
                assert pre_stop(worker.containers[0]) >= drain
                assert worker.spec["terminationGracePeriodSeconds"] >= pre_stop(worker.containers[0]) + END_MARGIN


def test_probes_give_the_command_time_to_answer(every: dict[str, Sequence[Object]]) -> None:
    meanings = set()
    for where, _, pod in all_pods(every):
        for container in pod.containers:
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                words = container.get(kind, {}).get("exec", {}).get("command", [""])
                if words[0] == "tidewright":
                    params = parsed(words).params
                    assert params["timeout"] < container[kind]["timeoutSeconds"] <= 10, where
                    meanings.add((kind, params["live"]))
    # An engine that is away, and a drain, must never end a pod.
    assert meanings == {("startupProbe", False), ("readinessProbe", False), ("livenessProbe", True)}


def test_paths_of_probes_and_monitors_are_the_gateways(every: dict[str, Sequence[Object]]) -> None:
    routes = set(re.findall(r"^## \w+ (/\S+)$", (ROOT / "docs" / "gateway-api.md").read_text(), re.MULTILINE))
    routes.add(WEBSOCKET)
    asked = set()
    for _, objects, pod in all_pods(every):
        for container in pod.containers:
            asked |= {
                (kind, container[kind]["httpGet"]["path"])
                for kind in ("startupProbe", "readinessProbe", "livenessProbe")
                if "httpGet" in container.get(kind, {})
            }
        for monitor in of_kind(objects, "ServiceMonitor"):
            asked |= {("monitor", one["path"]) for one in monitor["spec"]["endpoints"]}
        for route in of_kind(objects, "HTTPRoute"):
            paths = {match["path"]["value"] for rule in route["spec"]["rules"] for match in rule["matches"]}
            assert not [one for one in ("/metrics", "/admin") if one in paths]
            asked |= {("exact", one) for one in paths - {"/v1", "/health"}}
    assert {path for _, path in asked} <= routes
    assert {("livenessProbe", "/health/live"), ("readinessProbe", "/health/ready")} <= asked
    assert ("livenessProbe", "/health/ready") not in asked


def test_every_port_named_is_one(every: dict[str, Sequence[Object]]) -> None:
    for name, objects in every.items():
        services = {one["metadata"]["name"]: one for one in of_kind(objects, "Service")}
        found = list(pods(objects))
        for service in services.values():
            behind = [pod for pod in found if service["spec"]["selector"].items() <= pod.labels.items()]
            assert behind, (name, service["metadata"]["name"])
            for port in service["spec"]["ports"]:
                for pod in behind:
                    assert ports_of(pod).get(port["targetPort"]) == port["port"], (name, pod.owner, port)
        for pod in found:
            for container in pod.containers:
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    for how in ("httpGet", "tcpSocket"):
                        if how in container.get(probe, {}):
                            assert container[probe][how]["port"] in ports_of(pod), (name, pod.owner)
        for monitor in of_kind(objects, "ServiceMonitor"):
            behind_it = [
                one for one in services.values() if selects(monitor["spec"]["selector"], one["metadata"]["labels"])
            ]
            assert len(behind_it) == 1, name
            assert {one["port"] for one in monitor["spec"]["endpoints"]} <= {
                port["name"] for port in behind_it[0]["spec"]["ports"]
            }
        for monitor in of_kind(objects, "PodMonitor"):
            watched = [pod for pod in found if selects(monitor["spec"]["selector"], pod.labels)]
            assert watched, name
            assert all(
                ports_of(pod)[one["port"]] == 8002 for pod in watched for one in monitor["spec"]["podMetricsEndpoints"]
            )
        for route in of_kind(objects, "HTTPRoute"):
            for rule in route["spec"]["rules"]:
                for backend in rule["backendRefs"]:
                    assert backend["port"] in {port["port"] for port in services[backend["name"]]["spec"]["ports"]}


def ports_of(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for one in pod.containers for port in one.get("ports", ())}


def test_every_image_is_a_target_of_the_dockerfile(every: dict[str, Sequence[Object]]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE))
    used = set()
    for where, _, pod in all_pods(every):
        for container in pod.all_containers:
            if container["image"] not in OTHER_IMAGES:
                found = re.fullmatch(r"(?:[\w.]+/)?tidewright:(?:\d+\.\d+\.\d+-)?([a-z]+)", container["image"])
                assert found, (where, container["image"])
                used.add(found[1])
            if container["name"] == "gateway":
                assert container["image"].endswith("gateway")
    assert used <= targets | {"gpu"}
    assert used == {"cpu", "gpu", "gateway"}


def test_every_reference_is_there_or_for_the_operator_to_make(every: dict[str, Sequence[Object]]) -> None:
    used: set[tuple[str, str]] = set()
    for where, objects, pod in all_pods(every):
        there = {(one["kind"], one["metadata"]["name"]): one for one in objects}
        assert ("ServiceAccount", pod.spec["serviceAccountName"]) in there, where
        if "priorityClassName" in pod.spec:
            assert ("PriorityClass", pod.spec["priorityClassName"]) in there, where
        for volume in pod.spec["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there, where
            if "secret" in volume:
                used |= {(volume["secret"]["secretName"], key) for key in files_below(pod, volume["name"])}
        for container in pod.all_containers:
            for one in container.get("env", ()):
                source = one.get("valueFrom", {})
                if reference := source.get("configMapKeyRef"):
                    assert reference["key"] in there["ConfigMap", reference["name"]]["data"], where
                if reference := source.get("secretKeyRef"):
                    used.add((reference["name"], reference["key"]))
        for monitor in of_kind(objects, "ServiceMonitor"):
            for one in monitor["spec"]["endpoints"]:
                secrets = [one["authorization"]["credentials"]]
                secrets += [one["tlsConfig"]["ca"]["secret"]] if "tlsConfig" in one else []
                used |= {(secret["name"], secret["key"]) for secret in secrets}
    assert used <= {(name, key) for name, keys in SECRETS.items() for key in keys}
    assert {name for name, _ in used} == SECRETS.keys()


def files_below(pod: Pod, volume: str) -> set[str]:
    """Names of files in a mounted Secret that options name."""
    (mount,) = {one["mountPath"] for c in pod.containers for one in c["volumeMounts"] if one["name"] == volume}
    text = " ".join(str(one.get("value", "")) for one in pod.containers[0]["env"])
    text += (K8S / "base" / "gateway.yaml").read_text()
    found = set(re.findall(rf"{mount}/([\w.]+)", text))
    assert found, volume
    return found


def test_the_secrets_are_in_the_guide() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    for name, keys in SECRETS.items():
        assert f"`{name}`" in text, name
        assert all(key in text for key in keys), name


def test_the_guides_commands_make_the_secrets(tmp_path: Path) -> None:
    """Run as they stand there, but for what a cluster would do with them."""
    for name in ("keys.yaml", "prometheus.key", "tls.crt", "tls.key", "ca.crt"):
        (tmp_path / name).write_text("a")
    guide = (ROOT / "docs" / "deployment.md").read_text()
    made = {}
    for command in re.findall(r"^kubectl -n tidewright create secret .*$", guide, re.MULTILINE):
        done = subprocess.run(
            ["bash", "-c", f"{command} --dry-run=client -o yaml"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_TOKEN": "hf_a"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
        secret = yaml.safe_load(done.stdout)
        assert secret["metadata"]["namespace"] == "tidewright"
        assert all(secret["data"].values()), command
        made[secret["metadata"]["name"]] = set(secret["data"])
    assert made == SECRETS


def test_pods_are_restricted(every: dict[str, Sequence[Object]]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and what goes beyond it."""
    for where, _, pod in all_pods(every):
        spec, allowed = pod.spec, {"configMap", "secret", "emptyDir", "ephemeral", "persistentVolumeClaim", "name"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), where
        assert all(volume.keys() <= allowed for volume in spec["volumes"]), where
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False, where
        # Else the Service tidewright-gateway would set TIDEWRIGHT_GATEWAY_PORT, an option.
        assert spec["enableServiceLinks"] is False, where
        for container in pod.all_containers:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert context["readOnlyRootFilesystem"] is True, where
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError", where
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), where
            assert "memory" in container["resources"]["limits"], where


def test_what_is_written_to_is_a_volume(every: dict[str, Sequence[Object]]) -> None:
    """The root file system is read-only."""
    for where, objects, pod in all_pods(every):
        volumes = {one["name"] for one in pod.spec["volumes"]}
        for one in of_kind(objects, "StatefulSet"):
            if pod.owner == f"StatefulSet/{one['metadata']['name']}":
                volumes |= {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", ())}
        for container in pod.all_containers:
            mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
            assert {one["name"] for one in mounts.values()} <= volumes, where
            if container["name"] == "redis":
                assert "/data" in mounts
                continue
            env = variables(container)
            assert "/tmp" in mounts, where
            assert env["TIDEWRIGHT_CACHE"] in mounts, where
            assert env.get("HF_HOME", env["TIDEWRIGHT_CACHE"]).startswith(env["TIDEWRIGHT_CACHE"]), where
            assert ("/dev/shm" in mounts) == (container["name"] in ("replica", "worker")), where
            read_only = mounts[env["TIDEWRIGHT_CACHE"]].get("readOnly", False)
            assert read_only == (container["name"] == "gateway"), where


def test_budgets_and_spreads_are_about_pods_that_there_are(every: dict[str, Sequence[Object]]) -> None:
    spreads = 0
    for name, objects in every.items():
        found = list(pods(objects))
        for budget in of_kind(objects, "PodDisruptionBudget"):
            assert any(selects(budget["spec"]["selector"], pod.labels) for pod in found), name
            assert budget["spec"]["maxUnavailable"] == 1
        for pod in found:
            for spread in pod.spec.get("topologySpreadConstraints", ()):
                spreads += 1
                assert selects(spread["labelSelector"], pod.labels), pod.owner
    assert spreads == 4


def test_updates_stop_at_a_pod_that_never_becomes_ready(every: dict[str, Sequence[Object]]) -> None:
    """And those that are ready serve on."""
    for name, objects in every.items():
        for one in of_kind(objects, "Deployment"):
            assert one["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}, name
        for one in of_kind(objects, "StatefulSet"):
            if one["metadata"]["name"] == "tidewright-replica":
                assert one["spec"]["podManagementPolicy"] == "Parallel"
                assert one["spec"]["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}
        for one in of_kind(objects, "LeaderWorkerSet"):
            assert one["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]["maxUnavailable"] == 1


def test_autoscalers_scale_what_there_is_by_metrics_that_there_are(every: dict[str, Sequence[Object]]) -> None:
    series = known_series()
    adapter = yaml.safe_load((K8S / "components" / "autoscaling-hpa" / "prometheus-adapter.yaml").read_text())["rules"]
    served = {kind: {rule["name"]["as"] for rule in adapter[kind]} for kind in ("custom", "external")}
    for rule in (*adapter["custom"], *adapter["external"]):
        query = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="a"')
        assert selected(query) | selected(rule["seriesQuery"]) <= series
    for kind in ("hpa", "keda"):
        objects = every[f"base and autoscaling-{kind}"]
        workloads = {
            (one["kind"], one["metadata"]["name"]): one for one in of_kind(objects, "Deployment", "StatefulSet")
        }
        scalers = of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
        assert len(scalers) == 2
        for scaler in scalers:
            target = scaler["spec"]["scaleTargetRef"]
            workload = workloads[target["kind"], target["name"]]
            assert "replicas" not in workload["spec"], "each apply would set it back"
            containers = {one["name"] for one in workload["spec"]["template"]["spec"]["containers"]}
            assert (scaler["spec"].get("minReplicas") or scaler["spec"]["minReplicaCount"]) >= 1
            for metric in scaler["spec"].get("metrics", ()):
                if metric["type"] == "ContainerResource":
                    assert metric["containerResource"]["container"] in containers
                else:
                    where = {"Pods": "custom", "External": "external"}[metric["type"]]
                    assert metric[metric["type"].lower()]["metric"]["name"] in served[where]
            for trigger in scaler["spec"].get("triggers", ()):
                if trigger["type"] == "cpu":
                    assert trigger["metadata"]["containerName"] in containers
                else:
                    assert selected(trigger["metadata"]["query"]) <= series


def known_series() -> set[str]:
    found = set()
    for prefix, specs in CATALOGUE.items():
        for spec in specs:
            suffixes = ("_bucket", "_sum", "_count") if spec.kind == "histogram" else ("",)
            found |= {f"{prefix}{spec.name}{suffix}" for suffix in suffixes}
    return found


def selected(query: str) -> set[str]:
    """Names of the series in a query, which must be valid."""
    found = set()

    def walk(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(str(node.name))
        for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
            child = getattr(node, name, None)
            if child is not None and not isinstance(child, str):
                walk(child)
        for child in getattr(node, "args", None) or ():
            walk(child)

    walk(promql_parser.parse(query))
    assert found
    return found
