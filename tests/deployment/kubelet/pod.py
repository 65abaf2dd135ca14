"""One pod, from its volumes to its end."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deployment.kubelet import image
from deployment.kubelet.container import Container
from deployment.kubelet.environment import Find, MissingError, environment, expand
from deployment.kubelet.manifests import Manifest
from deployment.kubelet.network import Network, delete
from deployment.kubelet.sandbox import Mount, Sandbox
from deployment.kubelet.volumes import Volumes


@dataclass(frozen=True)
class World:
    """What a pod needs of its cluster."""

    network: Network
    folder: Path
    find: Find
    claim: Callable[[str], Path]
    seed: Callable[[str, Path], None]
    """Fills a new volume of that name, as if this node had it before."""
    tell: Callable[[str, str, str], None]
    """An event: about what, its reason, its message."""
    pace: float


class Pod:
    def __init__(self, manifest: Manifest, owner: str, revision: str, world: World) -> None:
        self.name: str = manifest["metadata"]["name"]
        self.owner, self.revision = owner, revision
        self._world = world
        self.host = world.network.add()
        self.manifest = {**manifest, "status": {"podIP": self.host.address, "hostIP": world.network.node.address}}
        self.spec: Manifest = manifest["spec"]
        self.labels: dict[str, str] = manifest["metadata"].get("labels", {})
        self.folder = world.folder / f"{self.name}-{self.host.name.rpartition('-')[2]}"
        self.folder.mkdir(parents=True)
        self.containers = [self._container(spec) for spec in self.spec["containers"]]
        self.init_containers = [self._container(spec) for spec in self.spec.get("initContainers", ())]
        self.created_at = time.monotonic()
        self.ready_since: float | None = None
        self.deleting, self.gone = threading.Event(), threading.Event()
        self.volumes: Volumes | None = None
        self._thread = threading.Thread(target=self._run, name=f"pod-{self.name}", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        now = not self.deleting.is_set() and all(container.ready for container in self.containers)
        if now != (self.ready_since is not None):
            self.ready_since = time.monotonic() if now else None
        return now

    def available(self, min_ready_seconds: float) -> bool:
        return self.ready and time.monotonic() - (self.ready_since or 0) >= min_ready_seconds

    @property
    def restarts(self) -> int:
        return sum(container.restarts for container in (*self.init_containers, *self.containers))

    def container(self, name: str = "") -> Container:
        """The first, if it has no name."""
        return next(one for one in (*self.containers, *self.init_containers) if name in ("", one.name))

    @property
    def log(self) -> str:
        return "\n".join(f"--- {one.name}\n{one.log}" for one in (*self.init_containers, *self.containers))

    def delete(self) -> None:
        """Asks it to end; returns at once."""
        self.deleting.set()

    def kill(self) -> None:
        """At the end of the tests: without grace."""
        self.spec["terminationGracePeriodSeconds"] = 0
        self.deleting.set()
        delete(self.host.name)  # with all its processes

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._make_volumes():
                for container in self.init_containers:
                    container.run(self.deleting, until_success=True)
                if not self.deleting.is_set():
                    self._run_containers()
        finally:
            if self.volumes is not None:
                self.volumes.remove()
            delete(self.host.name)
            for folder in self.folder.glob("*.root"):
                shutil.rmtree(folder, ignore_errors=True)
            self.gone.set()

    def _make_volumes(self) -> bool:
        """Waits for what is missing; False if the pod was deleted meanwhile."""
        world = self._world
        while not self.deleting.is_set():
            try:
                self.volumes = Volumes(self.folder / "volumes", self.manifest, world.find, world.claim)
            except MissingError as error:
                world.tell(self.name, "FailedMount", f"MountVolume.SetUp failed: {error}")
                self.deleting.wait(0.2)
                continue
            for volume in self.spec.get("volumes", ()):
                if "emptyDir" in volume:
                    world.seed(volume["name"], self.volumes.path(volume["name"]))
            return True
        return False

    @property
    def _grace(self) -> float:
        return self.spec.get("terminationGracePeriodSeconds", 30)

    def _run_containers(self) -> None:
        keepers = [
            threading.Thread(target=container.run, args=(self.deleting,), name=f"{self.name}-{container.name}")
            for container in self.containers
        ]
        for keeper in keepers:
            keeper.daemon = True
            keeper.start()
        self.deleting.wait()
        deadline = time.monotonic() + self._grace
        enders = [threading.Thread(target=one.terminate, args=(deadline,), daemon=True) for one in self.containers]
        for ender in enders:
            ender.start()
        for thread in (*enders, *keepers):
            thread.join()

    def _container(self, spec: Manifest) -> Container:
        hosts = (self._world.network.node, self.host)
        with_grace = {**spec, "grace": self.spec.get("terminationGracePeriodSeconds", 30)}

        def tell(reason: str, message: str) -> None:
            self._world.tell(self.name, reason, message)

        return Container(with_grace, self.folder, hosts, lambda: self._sandbox(spec), tell, self._world.pace)

    def _sandbox(self, spec: Manifest) -> Sandbox:
        found = image.find(spec["image"])
        variables = {"HOSTNAME": self.name, **found.environment, **environment(spec, self.manifest, self._world.find)}
        arguments = found.arguments(spec.get("command"), spec.get("args"))
        security = {**self.spec.get("securityContext", {}), **spec.get("securityContext", {})}
        user = security.get("runAsUser", found.user)
        if security.get("runAsNonRoot") and user == 0:
            raise MissingError("container has runAsNonRoot and image will run as root")
        groups = [security["fsGroup"]] if "fsGroup" in security else []
        return Sandbox(
            hostname=self.spec.get("hostname", self.name),
            host=self.host,
            resolv_conf=self._resolv_conf(),
            arguments=[expand(argument, variables) for argument in arguments],
            variables=variables,
            user=user,
            group=security.get("runAsGroup", user),
            groups=groups,
            mounts=[self._mount(one) for one in spec.get("volumeMounts", ())],
            read_only_root=security.get("readOnlyRootFilesystem", False),
            privileges=security.get("allowPrivilegeEscalation", True),
            folder=spec.get("workingDir", "/"),
        )

    def _mount(self, mount: Manifest) -> Mount:
        assert self.volumes is not None
        path = self.volumes.path(mount["name"]) / mount.get("subPath", "")
        if mount.get("subPath") and not path.exists():
            path.mkdir(parents=True, mode=0o777)
        return Mount(path, mount["mountPath"], mount.get("readOnly", False))

    def _resolv_conf(self) -> str:
        namespace = self.manifest["metadata"].get("namespace", "default")
        search = f"{namespace}.svc.cluster.local svc.cluster.local cluster.local"
        return f"nameserver {self._world.network.node.address}\nsearch {search}\noptions ndots:5\n"


def force_remove(pods: list[Pod]) -> None:
    for pod in pods:
        with contextlib.suppress(Exception):
            pod.kill()
    for pod in pods:
        pod.join()
