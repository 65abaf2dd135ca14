"""Starts a command as a container would: own file system, process ids and user; in a pod's network.

Done by a shell script with mount(8), pivot_root(8) and setpriv(1), which becomes the container's command: process 1.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from deployment.kubelet import image
from helpers.hosts import Host

_DEVICES = ("null", "zero", "full", "random", "urandom")
_SHM = "size=64m"  # as container runtimes give it
_GROUPS = {10001: "tidewright", 999: "redis"}


@dataclass(frozen=True)
class Mount:
    source: Path
    target: str
    read_only: bool = False


@dataclass
class Sandbox:
    hostname: str
    host: Host
    resolv_conf: str
    arguments: list[str]
    variables: dict[str, str]
    user: int
    group: int
    groups: list[int] = field(default_factory=list)
    mounts: list[Mount] = field(default_factory=list)
    read_only_root: bool = False
    privileges: bool = True
    """Keeps its capabilities, and may get new ones."""
    folder: str = "/"

    def start(self, root: Path, output: IO[bytes]) -> Running:
        """`root`: an empty folder to mount its file system on; seen only by the container.

        Call it in a thread that lives as long as the container: the kernel ends the container with it.
        """
        root.mkdir(parents=True, exist_ok=True)
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork"]
        command += ["--kill-child=KILL", "sh", "-c", self._script(root)]
        made, end = os.pipe()
        with self.host.inside():
            process = subprocess.Popen(command, stdin=end, stdout=output, stderr=output, start_new_session=True)
        os.close(end)
        os.read(made, 1)  # from here on, what is executed inside finds everything; nothing, if it can't be made
        os.close(made)
        return Running(process, self)

    def inside(self, arguments: Sequence[str]) -> list[str]:
        """A command as the container's user with its variables."""
        privileges = [] if self.privileges else ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        groups = [f"--groups={','.join(map(str, self.groups))}"] if self.groups else ["--clear-groups"]
        user = [f"--reuid={self.user}", f"--regid={self.group}", *groups, *privileges]
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        return ["setpriv", *user, "env", "-i", f"--chdir={self.folder}", *variables, *arguments]

    def _script(self, root: Path) -> str:
        lines = [
            "set -e",
            f"hostname {shlex.quote(self.hostname)}",
            f"mount -t tmpfs -o mode=0755 root {root}",
            f"cd {root}",
            "mkdir -p proc sys dev etc tmp run var/tmp mnt old",
            "chmod 1777 tmp var/tmp",
        ]
        for path in image.folders():
            lines += _link(path) if path.is_symlink() else _bind(Mount(path, str(path), read_only=True))
        lines += ["mount -t proc proc proc", "mount -t sysfs -o ro sysfs sys"]
        lines += [f"touch dev/{name} && mount --bind /dev/{name} dev/{name}" for name in _DEVICES]
        lines += ["ln -s /proc/self/fd dev/fd", "ln -s /proc/self/fd/1 dev/stdout", "ln -s /proc/self/fd/2 dev/stderr"]
        if not any(mount.target.rstrip("/") == "/dev/shm" for mount in self.mounts):
            lines += [f"mkdir dev/shm && mount -t tmpfs -o mode=1777,{_SHM} shm dev/shm"]
        for name, text in self._files().items():
            lines.append(f"printf %s {shlex.quote(text)} > etc/{name}")
        for mount in sorted(self.mounts, key=lambda mount: mount.target):
            lines += _bind(mount)
        lines += ["pivot_root . old", "cd /", "umount -l /old", "rmdir /old"]
        if self.read_only_root:
            lines.append("mount -o remount,ro /")
        lines.append("echo >&0")  # see start
        lines.append(f"exec {shlex.join(self.inside(self.arguments))} < /dev/null")
        return "\n".join(lines)

    def _files(self) -> dict[str, str]:
        users = {0: "root", **_GROUPS}
        return {
            "passwd": "".join(f"{name}:x:{number}:{number}::/:/bin/sh\n" for number, name in users.items()),
            "group": "".join(f"{name}:x:{number}:\n" for number, name in users.items()),
            "hostname": f"{self.hostname}\n",
            "hosts": f"127.0.0.1 localhost\n{self.host.address} {self.hostname}\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
            "resolv.conf": self.resolv_conf,
        }


class Running:
    """A container's processes."""

    def __init__(self, process: subprocess.Popen[bytes], sandbox: Sandbox) -> None:
        self._process, self._sandbox = process, sandbox

    @property
    def exit_code(self) -> int | None:
        """None while it runs; 1 if it was killed, as unshare(1) says no more of that."""
        return self._process.poll()

    @property
    def pid(self) -> int | None:
        """Of its process 1, as this machine sees it; None before it is there, or when it has ended."""
        try:
            children = psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return None
        return children[0].pid if children else None

    def processes(self) -> list[psutil.Process]:
        """All of it, process 1 first."""
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def execute(self, arguments: Sequence[str], timeout: float | None) -> subprocess.CompletedProcess[str]:
        """Runs a command in the container, as `kubectl exec`. Raises subprocess.TimeoutExpired."""
        pid = self.pid
        if pid is None:
            return subprocess.CompletedProcess(list(arguments), 137, "container not running", "")
        command = ["nsenter", f"--target={pid}", "--mount", "--pid", "--net", "--uts", "--ipc", "--"]
        command += self._sandbox.inside(arguments)
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
        ) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # nsenter and the command
                raise
        return subprocess.CompletedProcess(list(arguments), process.returncode, output, "")

    def send(self, number: int) -> None:
        if (pid := self.pid) is not None:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return

    def wait(self, seconds: float) -> bool:
        """Whether it ended within that time."""
        try:
            self._process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return False
        return True


def _bind(mount: Mount) -> list[str]:
    source, target = shlex.quote(str(mount.source)), shlex.quote(f".{mount.target}")
    make = f"mkdir -p {target}" if mount.source.is_dir() else f'mkdir -p "$(dirname {target})" && touch {target}'
    lines = [make, f"mount --bind {source} {target}"]
    return [*lines, f"mount -o remount,bind,ro {target}"] if mount.read_only else lines


def _link(path: Path) -> list[str]:
    return [f"ln -s {shlex.quote(os.readlink(path))} {shlex.quote(f'.{path}')}"]
