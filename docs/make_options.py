"""Renews the tables of options in docs/configuration.md and docs/serving.md: `python docs/make_options.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from tidewright.config import Settings
from tidewright.resilience.config import ResilienceSettings
from tidewright_gateway.config import GROUPS

FOLDER = Path(__file__).parent
HEAD = "| option | values | default | while it runs | meaning |\n|---|---|---|---|---|\n"
KINDS = {int: "integer", float: "number", str: "text"}
SERVE = {
    "models": "`tidewright model load` and `tidewright model unload` those listed",
    "kv_cache_memory": "`tidewright memory --kv`",
    "ttft_target": "a request's own",
    "tpot_target": "a request's own",
    "adapters": "`tidewright lora load` and `tidewright lora unload`",
}
"""What changes an option of a running server; all others need a restart."""
GATEWAY = {
    "replicas": "a name or file is looked up again",
    "keys": "read again after a change",
    "jwt_jwks": "fetched again",
    "request_timeout": "a request's shorter `timeout`",
    **dict.fromkeys(("tls_cert", "tls_key"), "read again after a change"),
    **dict.fromkeys(("replica_ca", "replica_cert", "replica_key"), "read again after a change"),
}


def values(field: FieldInfo) -> str:
    """What an option may be set to, as its definition says."""
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    bounds: dict[str, float] = {}
    for constraint in field.metadata:
        for name in ("ge", "gt", "le", "lt"):
            if hasattr(constraint, name):
                bounds[name] = getattr(constraint, name)
    return f"{KINDS.get(kind, 'list')}{_range(**bounds)}"


def _range(ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None) -> str:
    least = "" if ge is None else f"{ge} or more"
    least = least if gt is None else f"more than {gt}"
    most = "" if le is None else f"{le} at most"
    most = most if lt is None else f"less than {lt}"
    if ge is not None and le is not None:
        return f", {ge} to {le}"
    return "".join(f", {part}" for part in (least, most) if part)


def table(options: Mapping[str, FieldInfo], while_running: Mapping[str, str]) -> str:
    rows = (
        f"| `{name}` | {values(field)} | {_default(field)} | {while_running.get(name, '')} | {field.description} |\n"
        for name, field in options.items()
    )
    return HEAD + "".join(rows)


def _default(field: FieldInfo) -> str:
    if field.default in ("", []):
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def configuration(page: str) -> str:
    return _replaced(page, "Configuration", table(Settings.model_fields, SERVE))


def serving(page: str) -> str:
    """The group of the resilience library stands in configuration.md."""
    before, heading, options = page.partition("\n## Options\n")
    for name, group in GROUPS.items():
        if group is not ResilienceSettings:
            options = _replaced(options, name, table(group.model_fields, GATEWAY))
    return before + heading + options


def _replaced(page: str, heading: str, made: str) -> str:
    """The first table of options behind the heading becomes `made`."""
    pattern = rf"(^#+ {heading}\n.*?)^\| option \|[^\n]*\n(?:\|[^\n]*\n)*"
    return re.sub(pattern, lambda match: match[1] + made, page, count=1, flags=re.DOTALL | re.MULTILINE)


PAGES = {"configuration.md": configuration, "serving.md": serving}

if __name__ == "__main__":
    for file, renewed in PAGES.items():
        path = FOLDER / file
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
