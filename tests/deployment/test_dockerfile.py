"""docker/Dockerfile as a text: what each image has, and that compose.yaml and the command agree with it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement

from helpers.dockerfile import DOCKERFILE, ROOT, Stage, stages
from tidewright.config import Settings
from tidewright.launch.cli import main
from tidewright_gateway.config import GatewaySettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STAGES = stages()
TARGETS = ("gateway", "cpu", "gpu")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [line for line in PROJECT["dependencies"] if Requirement(line).name != "tidewright-client"]
"""Those of others; the client is built beside the package."""
targets = pytest.mark.parametrize("target", TARGETS)


def lineage(stage: Stage) -> list[Stage]:
    """It and what it is made from."""
    return [stage, *(lineage(STAGES[stage.base]) if stage.base in STAGES else [])]


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(re.sub("_", "-", line.lower()).split("==") for line in lines if not line.startswith("#"))


def understood(words: list[str]) -> click.Context:
    """As the command line `tidewright WORDS`; raises if it is none."""
    name, *arguments = words
    command = main.get_command(click.Context(main), name)
    assert command, name
    return command.make_context(name, list(arguments))


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_images_that_it_is_built_on_are_pinned() -> None:
    bases = {stage.base for stage in STAGES.values()} - STAGES.keys()
    assert len(bases) == 2
    for base in bases:
        assert re.search(r":\d+\.\d+[\d.]*-[a-z0-9-]+$", base), base


@targets
def test_a_target_is_run_by_tini_as_nobody_special(target: str) -> None:
    stage = STAGES[target]
    assert stage.entrypoint == ["tini", "--", "tidewright"]
    assert stage.last("USER") == "10001:10001"
    assert set(stage.labels) == {
        f"org.opencontainers.image.{n}" for n in ("title", "description", "licenses", "version", "revision")
    }
    assert f"ARG VERSION={PROJECT['version']}" in DOCKERFILE.read_text()
    ports = {Settings.model_fields[f"{kind}_port"].default for kind in ("http", "grpc", "metrics")}
    assert set(stage.ports) == ({GatewaySettings.model_fields["port"].default} if target == "gateway" else ports)


@targets
def test_a_targets_commands_exist(target: str) -> None:
    stage = STAGES[target]
    understood(stage.command)
    program, *health = stage.health
    assert program == "tidewright"
    timeout = understood(health).params["timeout"]
    assert float(stage.health_options["timeout"].rstrip("s")) > timeout  # or the command's own reason would be lost


@targets
def test_no_compiler_and_no_pip_come_into_a_target(target: str) -> None:
    """The stage copies one environment from the stage that made it, and installs nothing but tini."""
    (copied,) = [value for name, value in STAGES[target].steps if name == "COPY"]
    assert re.fullmatch(r"--from=build-\w+ /opt/tidewright /opt/tidewright", copied)
    installed = [
        package
        for stage in lineage(STAGES[target])
        for name, value in stage.steps
        if name == "RUN"
        for words in re.findall(r"apt-get install ([^&]*)", value)
        for package in words.split()
        if not package.startswith("-")
    ]
    assert installed == ["tini"]


def test_what_pip_installs_is_pinned() -> None:
    for stage in STAGES.values():
        for name, value in stage.steps:
            for command in (
                re.findall(r"\bpip (?:--python \S+ )?(?:install|wheel) [^&]*", value) if name == "RUN" else ()
            ):
                assert re.search(r" -c constraints(-gpu)?\.txt | --no-deps --no-index", command), command


def test_no_secrets() -> None:
    named = [value for stage in STAGES.values() for name, value in stage.steps if name in ("ENV", "ARG")]
    assert not [value for value in named if re.search(r"(?i)key|token|secret|passw", value)]
    assert "--mount=type=secret" not in DOCKERFILE.read_text()
    copied = {
        word
        for s in STAGES.values()
        for name, v in s.steps
        if name == "COPY" and "--from" not in v
        for word in v.split()[:-1]
    }
    ignored = set((ROOT / ".dockerignore").read_text().split())
    assert not copied & ignored
    assert {"monitoring", ".git", "**/*.key", "**/*.pem", "**/.env"} <= ignored


def test_every_copied_file_exists() -> None:
    for stage in STAGES.values():
        for value in (value for name, value in stage.steps if name == "COPY"):
            *sources, _ = value.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in STAGES
            else:
                assert all((ROOT / source).exists() for source in sources), value


@pytest.mark.parametrize("extras", [(), ("gateway",), ("server", "fallback", "triton-wheel")])
def test_the_requirements_are_those_of_the_extras(extras: tuple[str, ...]) -> None:
    command = [sys.executable, ROOT / "docker" / "requirements.py", *extras]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    expected = [
        *DEPENDENCIES,
        *(line for extra in extras for line in PROJECT["optional-dependencies"][extra]),
    ]
    assert done.stdout.splitlines() == expected


def test_the_client_that_the_images_get_needs_nothing_of_its_own() -> None:
    client = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text())["project"]
    assert {Requirement(line).name for line in client["dependencies"]} <= {
        Requirement(one).name for one in DEPENDENCIES
    }
    (needed,) = set(PROJECT["dependencies"]) - set(DEPENDENCIES)
    assert Requirement(needed).specifier.contains(client["version"])


def test_the_gpu_images_pins_are_whole() -> None:
    """They are of an older Python; torch is the same, and numpy what Triton 2.51 takes."""
    ours, other = pins("constraints.txt"), pins("docker/constraints-gpu.txt")
    (step,) = [value for name, value in STAGES["requirements-gpu"].steps if name == "RUN"]
    extras = step.partition("requirements.py")[2].partition(">")[0].split()
    required = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    assert {Requirement(line).name for line in [*DEPENDENCIES, *required]} <= other.keys()
    assert (other["torch"], other["numpy"]) == (ours["torch"], ours["numpy"])
    for line in [*DEPENDENCIES, *required]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(other[requirement.name]), line


def test_compose_builds_targets_and_checks_their_health_as_they_do() -> None:
    services: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    ours = {name: one for name, one in services.items() if one.get("image", "").startswith("tidewright:")}
    assert {one["build"]["target"] for one in ours.values()} == {"gateway", "cpu"}
    for name, service in ours.items():
        stage = STAGES[service["build"]["target"]]
        assert service["image"] == f"tidewright:{stage.name}"
        understood(service["command"])
        assert "init" not in service, f"{name}: the image has tini"
        if health := dict(service.get("healthcheck", {})):
            assert health.pop("test") == ["CMD", *stage.health], name
            assert {key.replace("_", "-"): value for key, value in health.items()} == stage.health_options, name
