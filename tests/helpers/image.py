"""Runs the steps of docker/Dockerfile, and containers of the result, without a container engine. It is no engine.

Each stage is a layer of overlayfs that begins as a copy of its base's; a step runs in namespaces of its own, chrooted.
There is no registry, so in place of the base image stands this machine's own root: its folders of users and of this
checkout hidden, and its Python at /usr/bin also as `python`. `base` names another.

A container has namespaces of processes and network, a read-only root, and tmpfs at /tmp and /dev/shm.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from helpers.dockerfile import ROOT, Stage, assignments, expanded, stages
from helpers.needs import needs

_COMPILERS = [
    f"/usr/bin/{name}" for name in ("*cc", "*c++", "*gcc*", "*g++*", "clang*", "*cpp*", "as", "*-as", "ld", "*-ld")
]
_BORROWED = "/opt/borrowed"
_EMPTY = 'for object; do :; done; exec /usr/bin/g++ -x c++ -c /dev/null -o "$object"'  # its last argument
_NO_PRIVILEGES = "--clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@needs("image")
class Builder:
    """`base`: the root folder in place of the base image.

    Without it, what takes minutes is left out: apt-get does nothing (this machine has the packages), the target cpu
    gets its dependencies from the environment of the tests, and of the kernels only those that are chosen here are
    compiled, not optimized; tests/devices/cpu/test_baselines.py compiles all.
    """

    def __init__(self, folder: Path, base: Path | None = None) -> None:
        self._folder = folder
        self._base = base or Path("/")
        self._stages = stages()
        self._layers: dict[str, Path] = {}
        self._environments: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        """What each RUN took."""

    @property
    def is_this_machine(self) -> bool:
        return self._base == Path("/")

    def build(self, name: str) -> Image:
        self._build(name)
        return Image(self, self._stages[name], self._layers[name], self._environments[name])

    def _build(self, name: str) -> None:
        if name in self._layers:
            return
        stage = self._stages[name]
        layer, environment = self._folder / name, {"PATH": _PATH, "HOME": "/root"}
        if stage.base in self._stages:
            self._build(stage.base)
            environment = dict(self._environments[stage.base])
            subprocess.run(["cp", "-a", self._layers[stage.base], layer], check=True)
        else:
            self._begin(layer)
        arguments: dict[str, str] = {}
        folder = self._workdir(stage.base)
        for instruction, value in stage.steps:
            if instruction == "ENV":
                environment |= assignments(expanded(value, environment | arguments))
            elif instruction == "ARG":
                arguments |= assignments(value)
            elif instruction == "WORKDIR":
                folder = value
                self._enter(layer, f"mkdir -p root{folder}")
            elif instruction == "COPY":
                self._copy(layer, value, folder)
            elif instruction == "RUN":
                self._run(layer, value, folder, environment)
        self._layers[name], self._environments[name] = layer, environment

    def _begin(self, layer: Path) -> None:
        """What a Python image has, and a Debian not."""
        (layer / "usr/local/bin").mkdir(parents=True)
        (layer / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        if self.is_this_machine:
            (layer / _BORROWED.lstrip("/")).mkdir(parents=True)
            for name, script in {"apt-get": "exit 0", "g++": _compiler()}.items():
                program = layer / "usr/local/bin" / name
                program.write_text(f"#!/bin/sh\n{script}\n")
                program.chmod(0o755)

    def _workdir(self, name: str) -> str:
        while name in self._stages:
            for instruction, value in reversed(self._stages[name].steps):
                if instruction == "WORKDIR":
                    return value
            name = self._stages[name].base
        return "/"

    def _copy(self, layer: Path, value: str, folder: str) -> None:
        *sources, target = value.split()
        destination = f"root{os.path.join(folder, target)}"
        script = ""
        if sources[0].startswith("--from="):
            other = sources.pop(0).removeprefix("--from=")
            self._build(other)
            script = self.mounted(self._layers[other], "from")
            paths = [f"from{source}" for source in sources]
        else:
            paths = [str(ROOT / source) for source in sources]
        for path, source in zip(paths, sources, strict=True):
            is_folder = not target.endswith("/") and not Path(source).suffix
            if is_folder:  # its content is copied
                script += f"mkdir -p {destination}; cp -a {path}/. {destination}/\n"
            else:
                script += f"cp -a {path} {destination}\n"
        # As .dockerignore has it.
        script += f"find {destination} -name __pycache__ -prune -exec rm -rf {{}} +\n" if "from/" not in script else ""
        self._enter(layer, script)

    def _run(self, layer: Path, value: str, folder: str, environment: Mapping[str, str]) -> None:
        script, words = "", value.split()
        while words[0].startswith("--mount="):
            target = assignments(words.pop(0).removeprefix("--mount=").replace(",", " "))["target"]
            cache = subprocess.check_output([sys.executable, "-m", "pip", "cache", "dir"], text=True).strip()
            Path(cache).mkdir(parents=True, exist_ok=True)
            script += f"mkdir -p root{target}; mount --bind {cache} root{target}\n"
        command = " ".join(words)
        if self.is_this_machine and "requirements.py server" in command:
            packages = "$(echo /opt/tidewright/lib/*/site-packages)"
            command = f"{command.partition('&&')[0]} && echo {_BORROWED} > {packages}/borrowed.pth"
        values = {**environment, **self.of_pip()}
        began = time.monotonic()
        command = f"set -e; cd {folder}; {command}"
        self._enter(layer, f"{script}exec {_in_root(values)} /bin/sh -c {shlex.quote(command)}")
        self.seconds[value] = time.monotonic() - began

    @staticmethod
    def of_pip() -> dict[str, str]:
        """Where packages come from is this machine's configuration, not the image's."""
        listed = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True)
        found = re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE)
        return {f"PIP_{name.replace('-', '_').upper()}": value for name, value in found if name != "constraint"}

    def _enter(self, layer: Path, script: str) -> None:
        """Runs it in a folder with the stage at `root`."""
        place = self._folder / "mounts"
        place.mkdir(exist_ok=True)
        script = self.mounted(layer, "root") + self.mounts() + self.of_a_build() + script
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", script],
            cwd=place,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise AssertionError(f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")

    def mounted(self, layer: Path, at: str) -> str:
        """Script: the layer on its base."""
        work = self._folder / "work" / os.urandom(4).hex()  # must be empty
        work.mkdir(parents=True)
        options = f"lowerdir={self._base},upperdir={layer},workdir={work}"
        return f"mkdir -p {at}; mount -t overlay overlay -o {options} {at}\n"

    def mounts(self) -> str:
        """What every root needs."""
        lines = ["mount -t proc proc root/proc", "mount --rbind /dev root/dev"]
        if self.is_this_machine:
            hidden = {"/root", "/home", "/tmp", f"/{ROOT.parts[1]}"}
            lines += [f"mount --bind {sysconfig.get_path('purelib')} root{_BORROWED}"]
            lines += [f"mount -t tmpfs tmpfs root{folder}" for folder in sorted(hidden) if Path(folder).is_dir()]
        return "".join(f"{line}\n" for line in lines)

    def of_a_build(self) -> str:
        """What a step may reach of this machine: its name servers, and the packages that its pip is pointed to."""
        if self.is_this_machine:
            return ""  # has them
        lines = ["cp /etc/resolv.conf root/etc/resolv.conf"]
        for found in re.findall(r"(?:^|[ /])(/[^ /][^ ]*)", " ".join(self.of_pip().values())):
            # An index of packages names files that stand beside it.
            path = Path(found).parent if Path(found).name == "simple" else Path(found)
            if path.is_dir():
                lines += [f"mkdir -p root{path}; mount --bind {path} root{path}"]
            elif path.is_file():
                lines += [f"mkdir -p root{path.parent}; touch root{path}; mount --bind {path} root{path}"]
        return "".join(f"{line}\n" for line in lines)


class Image:
    def __init__(self, builder: Builder, stage: Stage, layer: Path, environment: dict[str, str]) -> None:
        self._builder, self.stage, self.layer, self.environment = builder, stage, layer, environment
        if builder.is_this_machine:
            _remove_compilers(layer)

    def run(self, *arguments: str, beside: Container | None = None, **options: object) -> Container:
        """Its entrypoint with these arguments, or those of CMD. `beside`: shares that one's network, as in a pod."""
        command = [*self.stage.entrypoint, *(arguments or self.stage.command)]
        return Container(self, self._builder, command, beside, **options)  # type: ignore[arg-type]


class Container:
    """`volumes`: folders of this machine by where they are mounted. `online`: with its network and packages."""

    def __init__(
        self,
        image: Image,
        builder: Builder,
        command: Sequence[str],
        beside: Container | None,
        *,
        volumes: Mapping[str, Path] | None = None,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        online: bool = False,
    ) -> None:
        self.image = image
        self._folder = builder._folder / "containers" / os.urandom(4).hex()
        (self._folder / "root").mkdir(parents=True)
        self.log = log or self._folder / "log"
        self._environment = {**image.environment, "HOME": "/var/cache/tidewright", **(environment or {})}
        self._environment |= builder.of_pip() if online else {}
        self._user = image.stage.last("USER")
        script = builder.mounted(image.layer, "root") + (builder.of_a_build() if online else "")
        script += "mount -o remount,ro root\n"
        script += builder.mounts() + "umount -l root/tmp 2>/dev/null || true\n"
        script += "mount -t tmpfs -o mode=1777 tmpfs root/tmp; mount -t tmpfs -o mode=1777,size=1g tmpfs root/dev/shm\n"
        for target, source in (volumes or {}).items():
            script += f"mount --bind {source} root{target}\n"
        offline = beside is None and not online
        if offline:
            script += "ip link set lo up\n"
        script += f"cd root; exec {self._inside('.', command)}\n"
        namespaces = ["--mount", "--pid", "--fork", "--kill-child"] + (["--net"] if offline else [])
        enter = ["nsenter", "--net", "--target", str(beside.pid), "--"] if beside else []
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*enter, "unshare", *namespaces, "sh", "-ec", script],
                cwd=self._folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _inside(self, root: str, command: Sequence[str]) -> str:
        uid, _, gid = self._user.partition(":")
        drop = f"setpriv --reuid={uid} --regid={gid or uid} {_NO_PRIVILEGES}"
        words = [f"{name}={value}" for name, value in self._environment.items()]
        return f"chroot {root} {drop} env -i {shlex.join([*words, *command])}"

    @property
    def pid(self) -> int:
        """Of its process 1, as this machine sees it."""
        while not (children := psutil.Process(self.process.pid).children()):
            assert self.process.poll() is None, self.output()
            time.sleep(0.01)
        return children[0].pid

    def processes(self) -> list[psutil.Process]:
        one = psutil.Process(self.pid)
        return [one, *one.children(recursive=True)]

    def exec(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """As HEALTHCHECK and `kubectl exec` do."""
        script = f"cd {self._folder}/root; exec {self._inside('.', command)}"
        return subprocess.run(
            ["nsenter", "--mount", "--pid", "--net", "--target", str(self.pid), "--", "sh", "-c", script],
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def wait_healthy(self, timeout: float = 120) -> None:
        """By the image's HEALTHCHECK."""
        deadline = time.monotonic() + timeout
        while (answer := self.exec(*self.image.stage.health)).returncode:
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, answer.stderr + self.output()
            time.sleep(0.2)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, number: int, timeout: float = 60) -> int:
        """Sends a signal to process 1; the status that the container ends with."""
        os.kill(self.pid, number)
        return self.process.wait(timeout)

    def remove(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # with --kill-child, process 1 and so all of its namespace
            self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _compiler() -> str:
    """Script: a g++ that makes empty objects of what is compiled for another baseline than the one chosen here."""
    from tidewright.devices.cpu import build  # here, as it imports torch
    from tidewright.devices.cpu.baselines import fitting

    chosen = " ".join(fitting(build.processor())[0].flags)
    return f'case "$*" in *" {chosen} -c "*) ;; *" -c "*) {_EMPTY};; esac\nexec /usr/bin/g++ "$@" -O0'


def _in_root(environment: Mapping[str, str]) -> str:
    return "chroot root env -i " + shlex.join(f"{name}={value}" for name, value in environment.items())


def _remove_compilers(layer: Path) -> None:
    """Hides those of this machine, as the images have none. A device 0/0 is how overlayfs deletes a file."""
    (layer / "usr/local/bin/g++").unlink(missing_ok=True)
    for path in {path for pattern in _COMPILERS for path in glob.glob(pattern)}:
        target = layer / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            os.mknod(target, 0o020000, os.makedev(0, 0))
