"""The stages of docker/Dockerfile, read."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


@dataclass
class Stage:
    name: str
    base: str
    """Name of a stage, or of an image."""
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instructions that make files, in order: COPY, RUN, and what changes how they run (ENV, ARG, USER, WORKDIR)."""
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    health_options: dict[str, str] = field(default_factory=dict)

    def last(self, instruction: str) -> str:
        return next(value for name, value in reversed(self.steps) if name == instruction)


def stages(path: Path = DOCKERFILE) -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    defaults: dict[str, str] = {}
    stage: Stage | None = None
    for one in DockerfileParser(path=str(path)).structure:
        instruction, value = one["instruction"], one["value"]
        if instruction == "FROM":
            base, _, name = expanded(value, defaults).partition(" AS ")
            stage = found[name] = Stage(name, base)
        elif instruction == "ARG" and stage is None:
            defaults |= assignments(value)
        elif instruction != "COMMENT":
            assert stage
            _add(stage, instruction, value)
    return found


def _add(stage: Stage, instruction: str, value: str) -> None:
    if instruction in ("COPY", "RUN", "ENV", "ARG", "USER", "WORKDIR"):
        stage.steps.append((instruction, value))
    elif instruction == "ENTRYPOINT":
        stage.entrypoint = json.loads(value)
    elif instruction == "CMD":
        stage.command = json.loads(value)
    elif instruction == "LABEL":
        stage.labels |= assignments(value)
    elif instruction == "EXPOSE":
        stage.ports += [int(port) for port in value.split()]
    elif instruction == "HEALTHCHECK":
        options, _, command = value.partition("CMD ")
        stage.health = json.loads(command)
        stage.health_options = {name.lstrip("-"): text for name, text in (o.split("=") for o in options.split())}
    else:
        raise ValueError(f"{instruction} is not known here")


def assignments(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(text))


def expanded(text: str, values: dict[str, Any]) -> str:
    """$NAME and ${NAME}; an unknown one is an error."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: str(values[match[1]]), text)
