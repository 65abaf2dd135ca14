"""The variables of a container: ConfigMaps, Secrets, fields of the pod, and `$(NAME)` in values and arguments."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any

from deployment.kubelet.manifests import Manifest

Find = Callable[[str, str], Manifest | None]


class MissingError(Exception):
    """A ConfigMap or Secret, or a key of it, that is not there yet; the message is as Kubernetes has it."""


def environment(container: Manifest, pod: Manifest, find: Find) -> dict[str, str]:
    """`pod`: with its status. Raises MissingError."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        kind, reference = _reference(source)
        data = data_of(find(kind, reference["name"]), kind, reference["name"], reference.get("optional", False))
        prefix = source.get("prefix", "")
        found |= {f"{prefix}{name}": value.decode() for name, value in data.items()}
    for variable in container.get("env", ()):
        value = _value(variable, pod, find)
        if value is not None:
            found[variable["name"]] = expand(value, found)
    return found


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` is the variable, if there is one; `$$(NAME)` stays `$(NAME)`."""
    return re.sub(
        r"\$(\$|\(([-._a-zA-Z][-._a-zA-Z0-9]*)\))",
        lambda match: "$" if match[1] == "$" else variables.get(match[2], match[0]),
        text,
    )


def data_of(manifest: Manifest | None, kind: str, name: str, optional: bool = False) -> dict[str, bytes]:
    """Of a ConfigMap or Secret. Raises MissingError."""
    if manifest is None:
        if optional:
            return {}
        raise MissingError(f'{kind.lower()} "{name}" not found')
    texts = {**manifest.get("data", {}), **manifest.get("stringData", {})}
    plain = manifest.get("stringData", {}) if kind == "Secret" else texts
    found = {name: text.encode() for name, text in plain.items()}
    encoded = {**(manifest.get("data", {}) if kind == "Secret" else {}), **manifest.get("binaryData", {})}
    return {name: base64.b64decode(text) for name, text in encoded.items()} | found


def field_of(pod: Manifest, path: str) -> str:
    """A field of the pod, as the downward API names it."""
    path = re.sub(r"\['([^']+)'\]", lambda match: "." + match[1].replace(".", "\0"), path)
    value: Any = pod
    for part in path.split("."):
        value = value[part.replace("\0", ".")]
    return str(value)


def _reference(source: Manifest) -> tuple[str, Manifest]:
    for name, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
        if name in source:
            return kind, source[name]
    raise AssertionError(f"unknown envFrom: {source}")


def _value(variable: Manifest, pod: Manifest, find: Find) -> str | None:
    source = variable.get("valueFrom")
    if source is None:
        return variable.get("value", "")
    if "fieldRef" in source:
        return field_of(pod, source["fieldRef"]["fieldPath"])
    for name, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
        if name in source:
            reference = source[name]
            optional = reference.get("optional", False)
            data = data_of(find(kind, reference["name"]), kind, reference["name"], optional)
            if reference["key"] in data:
                return data[reference["key"]].decode()
            if optional:
                return None
            raise MissingError(f"couldn't find key {reference['key']} in {kind} {reference['name']}")
    raise AssertionError(f"unknown valueFrom: {source}")
