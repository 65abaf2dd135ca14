"""What an image's name means here: the command of this environment that the image would run, its user and variables."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
_BIN = str(Path(sys.prefix) / "bin")
_SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    entrypoint: tuple[str, ...]
    command: tuple[str, ...] = ()
    user: int = 0
    environment: dict[str, str] = field(default_factory=dict)

    def arguments(self, command: list[str] | None, args: list[str] | None) -> list[str]:
        """`command` replaces the entrypoint and drops the image's own arguments, as in Kubernetes."""
        if command is not None:
            return [*command, *(args or ())]
        return [*self.entrypoint, *(args if args is not None else self.command)]


# As docker/Dockerfile has them.
_ENTRYPOINT = re.findall(r"^ENTRYPOINT (\[.*\])$", (REPOSITORY / "docker" / "Dockerfile").read_text(), re.MULTILINE)[-1]
_TIDEWRIGHT = Image(
    tuple(json.loads(_ENTRYPOINT)),
    ("serve", "--host", "0.0.0.0", "--gateway-port", "0"),
    10001,
    {
        "PATH": f"{_BIN}:{_SYSTEM}",
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TIDEWRIGHT_CACHE": "/var/cache/tidewright",
        "HOME": "/var/cache/tidewright",
    },
)
_REDIS = Image((), ("redis-server",), 999, {"PATH": _SYSTEM})


def find(name: str) -> Image:
    repository = name.partition("@")[0].rpartition("/")[2].partition(":")[0]
    if repository == "tidewright":
        return _TIDEWRIGHT
    assert repository == "redis", f"no command of this machine stands for the image {name}"
    return _REDIS


def folders() -> list[Path]:
    """Of this machine, what a container sees: programs, libraries, Python, this repository. Not /etc, /var, /home."""
    system = [Path("/") / name for name in ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")]
    system += [Path("/etc") / name for name in ("alternatives", "ld.so.cache", "ssl")]
    found = [path for path in system if path.exists()]
    for path in (Path(sys.base_prefix), REPOSITORY, Path(sys.prefix)):
        if not any(path.is_relative_to(other) for other in found):
            found.append(path)
    return found
