"""k8s/ against the code: commands, options, variables and probes are real, and times fit together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.manifests import (
    BASE,
    OVERLAYS,
    Object,
    Pod,
    of_kind,
    overlay,
    pods,
)
from helpers.rendered import all_pods, commands, config_file, parsed, variables
from tidewright.config import CONFIG_FILE_VARIABLE, Settings
from tidewright.launch import model_watch, server, watchdog
from tidewright_gateway.config import CONFIG_FILE_VARIABLE as GATEWAY_CONFIG_FILE_VARIABLE
from tidewright_gateway.config import GatewaySettings

OTHER_PROGRAMS = {"sleep", "redis-cli", "redis-server"}
START_MARGIN = 10.0  # seconds; launch/server.py waits so much longer than start_timeout
END_MARGIN = server.ANSWER_TIME + server.KILL_AFTER + server.END_TIMEOUT


def pre_stop(container: Object) -> float:
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    return float(seconds)


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
