"""docker/Dockerfile, executed: the steps of its targets, and the containers that come of it, without an engine."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from helpers.image import Builder, Container, Image

CACHE = "/var/cache/tidewright"
CHAT = (
    "import json, sys, urllib.request as r; "
    "body = json.dumps({'model': 'smollm2-135m', 'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 3});"
    "headers = {'Content-Type': 'application/json'};"
    "request = r.Request('http://127.0.0.1:8080/v1/chat/completions', body.encode(), headers);"
    "print(r.urlopen(request, timeout=60).read().decode())"
)
PIP = (
    "import subprocess; from tidewright.launch.model_sources import pip_command; "
    "subprocess.check_call([*pip_command(), '--version'])"
)
pytestmark = [pytest.mark.image, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def models(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cache with the prepared model and nothing else: no kernels that were compiled for this machine."""
    folder = tmp_path_factory.mktemp("cache")
    folder.parent.chmod(0o755)
    folder.chmod(0o755)
    shutil.copytree(model_dir, folder / "models" / model_dir.name)
    return folder


@pytest.fixture
def containers() -> Iterator[list[Container]]:
    started: list[Container] = []
    yield started
    for container in started:
        container.remove()


def fails(container: Container, *command: str) -> str:
    done = container.exec(*command)
    assert done.returncode, done.stdout
    return done.stderr


def wait_for(text: str, container: Container, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while text not in container.output():
        assert container.process.poll() is None, container.output()
        assert time.monotonic() < deadline, container.output()
        time.sleep(0.1)


def assert_is_contained(container: Container) -> None:
    """Nobody special, in a root that can't be written, with tini as process 1."""
    assert psutil.Process(container.pid).cmdline()[:3] == ["tini", "--", "tidewright"]
    assert {process.uids().effective for process in container.processes()} == {10001}
    for path in ("/", "/opt/tidewright", "/etc", "/usr/bin"):
        assert "Read-only file system" in fails(container, "touch", f"{path}/x")
    assert container.exec("touch", "/tmp/x", "/dev/shm/x").returncode == 0
    for program in ("g++", "gcc", "c++", "cc", "as", "ld", "clang", "/opt/tidewright/bin/pip"):
        assert "No such file" in fails(container, program, "--version")
    # The base's own pip, with which `prepare` fetches the embedded model.
    assert container.exec("python", "-c", PIP).returncode == 0


def check_that_the_gateway_needs_neither_torch_nor_triton(
    image: Image, models: Path, containers: list[Container]
) -> None:
    gateway = image.run(volumes={CACHE: models})
    containers.append(gateway)
    wait_for("The gateway listens on http://127.0.0.1:8080/v1", gateway)
    assert_is_contained(gateway)
    for module in ("torch", "pytriton", "onnxruntime", "onnx"):
        assert "ModuleNotFoundError" in fails(gateway, "python", "-c", f"import {module}")
    assert "no replica can take requests" in fails(gateway, *gateway.image.stage.health)
    assert "no server at" in fails(gateway, "tidewright", "chat", "Hi", "--url", "http://127.0.0.1:1")  # by the client
    assert gateway.stop(signal.SIGTERM) == 128 + signal.SIGTERM  # uvicorn ends by the signal that it got


@pytest.mark.server
@pytest.mark.gateway
@pytest.mark.chaos
def test_the_whole_stack_serves_from_read_only_roots(models: Path, containers: list[Container], tmp_path: Path) -> None:
    """The gateway alone, then both: CMD and HEALTHCHECK as they stand, one network as in a pod, and a model cache that
    can't be written.
    """
    builder = Builder(tmp_path)
    gateway = builder.build("gateway")
    check_that_the_gateway_needs_neither_torch_nor_triton(gateway, models, containers)
    check_that_it_serves(builder.build("cpu"), gateway, models, containers)


def check_that_it_serves(cpu: Image, gateway: Image, models: Path, containers: list[Container]) -> None:
    replica = cpu.run(volumes={CACHE: models}, environment={"TIDEWRIGHT_THREADS": "1"})
    containers.append(replica)
    wait_for("Ready after", replica)
    replica.wait_healthy()
    assert_is_contained(replica)
    (engine, *_) = [process for process in replica.processes() if "tidewright.engine" in process.cmdline()]
    assert any("/tidewright/devices/cpu/prebuilt/" in area.path for area in engine.memory_maps())
    assert "CPU kernels are off" not in replica.output()
    assert replica.exec("tidewright", "prepare", "--no-fallback").returncode == 0  # there is nothing to do

    front = gateway.run(beside=replica, volumes={CACHE: models})
    containers.append(front)
    wait_for("The gateway listens", front)
    front.wait_healthy()
    answer = json.loads(front.exec("python", "-c", CHAT, timeout=120).stdout)
    assert answer["usage"]["completion_tokens"] == 3

    # A stub that is killed leaves its engine to process 1, which must bury it.
    (stub, *_) = [process for process in replica.processes() if "/decoder/" in " ".join(process.cmdline())]
    stub.kill()
    wait_for("decoder is back after", replica)
    replica.wait_healthy()
    orphans = [process for process in psutil.Process(replica.pid).children() if process.ppid() == replica.pid]
    assert [process.status() for process in orphans if "tidewright" not in process.name()] == []

    assert front.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert replica.stop(signal.SIGTERM) == 0


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.gateway
@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_both_targets_from_a_root_of_debians_with_nothing_left_out(
    models: Path, containers: list[Container], tmp_path: Path
) -> None:
    """Every step of both as it stands. What it took, and sizes, are printed: `make test-image ARGS=-s`."""
    base = tmp_path / "base"
    packages = "python3,python3-venv,python3-pip,libpython3.11,ca-certificates"
    subprocess.run(["mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", base], check=True)
    builder = Builder(tmp_path / "build", base)
    images = builder.build("cpu"), builder.build("gateway")
    for step, seconds in builder.seconds.items():
        print(f"{seconds:7.1f} s  {step[:100]}")
    for image in images:
        size = subprocess.check_output(["du", "-sm", image.layer / "opt/tidewright"], text=True).split()[0]
        print(f"{size:>7} MB in /opt/tidewright of {image.stage.name}")
    check_that_it_serves(*images, models, containers)
    for image, option in zip(images, ("--no-fallback", "--tokenizer-only"), strict=True):
        check_that_it_prepares(image, option, tmp_path / image.stage.name, containers)


def check_that_it_prepares(image: Image, option: str, cache: Path, containers: list[Container]) -> None:
    """As the init container does it for a new volume."""
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    preparing = image.run("prepare", option, volumes={CACHE: cache}, online=True)
    containers.append(preparing)
    assert preparing.process.wait(600) == 0, preparing.output()
    made = cache / "models" / "smollm2-135m"
    assert (made / "tidewright.json").is_file()
    assert bool(list(made.glob("*.safetensors"))) == (option != "--tokenizer-only")
