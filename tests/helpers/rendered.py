"""The rendered manifests as a test looks at them: their pods, and what each container runs and is told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import click

from helpers.manifests import (
    Object,
    Pod,
    of_kind,
    pods,
)
from tidewright.launch.cli import main


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


def config_file(objects: Sequence[Object], pod: Pod, path: str) -> str:
    """The content of a file in a pod that a ConfigMap holds."""
    folder, _, name = path.rpartition("/")
    (mount,) = [one for one in pod.containers[0]["volumeMounts"] if one["mountPath"] == folder]
    (volume,) = [one for one in pod.spec["volumes"] if one["name"] == mount["name"]]
    (found,) = [one for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"] == volume["configMap"]["name"]]
    return str(found["data"][name])


def ports_of(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for one in pod.containers for port in one.get("ports", ())}
