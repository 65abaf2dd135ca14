"""The objects, the loop that makes pods of them, what names resolve to, and what a test asks."""

from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from deployment.kubelet.controllers import CONTROLLERS, revision_of
from deployment.kubelet.dns import NameServer
from deployment.kubelet.environment import MissingError
from deployment.kubelet.manifests import Manifest, key
from deployment.kubelet.network import Network
from deployment.kubelet.pod import Pod, World, force_remove

log = logging.getLogger(__name__)

_ROUND = 0.05  # seconds between two rounds of the controllers
_RESTART = "kubectl.kubernetes.io/restartedAt"
_FOLDER = "tidewright-node-"
_ZONE = "svc.cluster.local"


@dataclass(frozen=True)
class Event:
    about: str
    reason: str
    message: str


class Cluster:
    """One node, one namespace."""

    def __init__(self, seed: Callable[[str, Path], None] = lambda name, path: None, pace: float = 1.0) -> None:
        """`seed`: fills each new emptyDir and claim (its name, its folder). `pace`: seconds of a restart's back-off for
        each of Kubernetes'."""
        self.objects: dict[tuple[str, str], Manifest] = {}
        self.events: list[Event] = []
        self._seed, self._pace = seed, pace
        self._pods: list[Pod] = []
        self._lock = threading.RLock()
        self._over = threading.Event()

    def __enter__(self) -> Cluster:
        self.network = Network()
        remove_folders_of_the_dead()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
        self._folder.chmod(0o755)
        self.names = NameServer(self.network.node, self._addresses)
        self._world = World(
            network=self.network,
            folder=self._folder,
            find=lambda kind, name: self.objects.get((kind, name)),
            claim=self._claim,
            seed=self._seed,
            tell=self._tell,
            pace=self._pace,
        )
        self._thread = threading.Thread(target=self._reconcile_for_ever, name="controllers", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        force_remove(self._pods)
        self.names.stop()
        self.network.remove()
        rmtree(self._folder, ignore_errors=True)

    def apply(self, manifests: Iterable[Manifest]) -> None:
        """As `kubectl apply`: objects that are not named stay, and so do restarts that somebody asked for."""
        with self._lock:
            for manifest in manifests:
                new, old = copy.deepcopy(manifest), self.objects.get(key(manifest), {})
                asked = old.get("spec", {}).get("template", {}).get("metadata", {}).get("annotations", {}).get(_RESTART)
                if asked and "template" in new["spec"]:
                    metadata = new["spec"]["template"].setdefault("metadata", {})
                    metadata.setdefault("annotations", {}).setdefault(_RESTART, asked)
                self.objects[key(manifest)] = new
            for pod in self._pods:
                if pod.volumes is not None:
                    pod.volumes.refresh()

    def delete(self, kind: str, name: str) -> None:
        with self._lock:
            del self.objects[kind, name]

    def change(self, kind: str, name: str, how: Callable[[Manifest], None]) -> None:
        """As `kubectl edit`."""
        manifest = copy.deepcopy(self.objects[kind, name])
        how(manifest)
        self.apply([manifest])

    def scale(self, kind: str, name: str, replicas: int) -> None:
        self.change(kind, name, lambda manifest: manifest["spec"].update(replicas=replicas))

    def restart(self, kind: str, name: str) -> None:
        """As `kubectl rollout restart`."""

        def annotate(manifest: Manifest) -> None:
            metadata = manifest["spec"]["template"].setdefault("metadata", {})
            metadata.setdefault("annotations", {})[_RESTART] = str(time.time())

        self.change(kind, name, annotate)

    def is_rolled_out(self, kind: str, name: str) -> bool:
        """As `kubectl rollout status`: all pods are of the newest template and available, and no other is left."""
        spec = self.objects[kind, name]["spec"]
        group = spec.get("leaderWorkerTemplate")
        revision, wanted = (
            revision_of(group or spec["template"]),
            spec.get("replicas", 1) * (group or {}).get("size", 1),
        )
        pods = self.pods(kind, name)
        delay = spec.get("minReadySeconds", 0)
        return len(pods) == wanted and all(pod.revision == revision and pod.available(delay) for pod in pods)

    def pods(self, kind: str, name: str) -> list[Pod]:
        """Of a controller, in the order of their names; including those that are ending."""
        with self._lock:
            return sorted((pod for pod in self._pods if pod.owner == f"{kind}/{name}"), key=lambda pod: pod.name)

    def pod(self, name: str) -> Pod:
        """The one that is not ending, if there are two."""
        with self._lock:
            return next(pod for pod in reversed(self._pods) if pod.name == name)

    def endpoints(self, service: str) -> list[str]:
        """Addresses that the Service leads to."""
        spec = self.objects["Service", service]["spec"]
        return [pod.host.address for pod in self._selected(spec)]

    def said(self, about: str, reason: str) -> list[str]:
        """Messages of events about a pod whose name begins so."""
        return [one.message for one in list(self.events) if one.about.startswith(about) and one.reason == reason]

    def wait_until(self, holds: Callable[[], object], patience: float = 60.0) -> None:
        deadline = time.monotonic() + patience
        while not holds():
            assert time.monotonic() < deadline, f"not so after {patience:g} s\n{self.report()}"
            time.sleep(0.05)

    def report(self) -> str:
        """For a test that failed."""
        with self._lock:
            pods = list(self._pods)
        lines = [
            f"{pod.name}: ready={pod.ready} restarts={pod.restarts} ending={pod.deleting.is_set()}" for pod in pods
        ]
        lines += [f"{one.about} {one.reason}: {one.message}" for one in self.events[-30:]]
        return "\n".join([*lines, *(f"=== {pod.name}\n{pod.log[-3000:]}" for pod in pods)])

    def _reconcile_for_ever(self) -> None:
        while not self._over.wait(_ROUND):
            try:
                with self._lock:
                    self._reconcile()
            except Exception:
                log.exception("the controllers")

    def _reconcile(self) -> None:
        self._pods = [pod for pod in self._pods if not pod.gone.is_set()]
        for (kind, name), manifest in list(self.objects.items()):
            if kind in CONTROLLERS:
                CONTROLLERS[kind](manifest, self.pods(kind, name), self._create)
        for pod in self._pods:
            kind, _, name = pod.owner.partition("/")
            if (kind, name) not in self.objects:
                pod.delete()

    def _create(self, manifest: Manifest, owner: str, revision: str) -> None:
        self._pods.append(Pod(manifest, owner, revision, self._world))

    def _claim(self, name: str) -> Path:
        known = {
            f"{claim['metadata']['name']}-{manifest['metadata']['name']}"
            for (kind, _), manifest in self.objects.items()
            if kind == "StatefulSet"
            for claim in manifest["spec"].get("volumeClaimTemplates", ())
        }
        if ("PersistentVolumeClaim", name) not in self.objects and name.rpartition("-")[0] not in known:
            raise MissingError(f'persistentvolumeclaim "{name}" not found')
        path = self._folder / "claims" / name
        if not path.exists():
            path.mkdir(parents=True)
            path.chmod(0o777)
            self._seed(name, path)
        return path

    def _tell(self, about: str, reason: str, message: str) -> None:
        new = Event(about, reason, message)
        with self._lock:
            if next((one for one in reversed(self.events) if one.about == about), None) == new:
                return  # again
            self.events.append(new)
        log.info("%s %s: %s", about, reason, message)

    def _selected(self, spec: Manifest) -> list[Pod]:
        with self._lock:
            pods = [pod for pod in self._pods if spec["selector"].items() <= pod.labels.items()]
            return [pod for pod in pods if pod.ready or spec.get("publishNotReadyAddresses")]

    def _addresses(self, name: str) -> list[str] | None:
        """Of a Service (its ready pods': there is no other address), or of a pod by its hostname and subdomain."""
        parts = name.removesuffix(f".{_ZONE}").split(".")
        if not name.endswith(f".{_ZONE}") or len(parts) not in (2, 3):
            return None
        *hostname, service, namespace = parts
        manifest = self.objects.get(("Service", service))
        if manifest is None:
            manifest = self._group_service(service)
        if manifest is None or namespace != manifest["metadata"].get("namespace", "default"):
            return None
        pods = self._selected(manifest["spec"])
        if hostname:
            pods = [p for p in pods if (p.spec.get("hostname"), p.spec.get("subdomain")) == (hostname[0], service)]
            return [pod.host.address for pod in pods] or None
        return [pod.host.address for pod in pods]

    def _group_service(self, name: str) -> Manifest | None:
        """The headless Service that the LeaderWorkerSet's controller makes."""
        manifest = self.objects.get(("LeaderWorkerSet", name))
        if manifest is None:
            return None
        selector = {"leaderworkerset.sigs.k8s.io/name": name}
        return {"metadata": manifest["metadata"], "spec": {"selector": selector, "publishNotReadyAddresses": True}}


def remove_folders_of_the_dead() -> None:
    """What runs that were killed left in the temporary folder, and what is mounted there."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*-*"):
        found = re.match(rf"{_FOLDER}(\d+)-", folder.name)
        if found and not Path("/proc", found[1]).exists():
            mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
            for path in (one for one in mounted if Path(one).is_relative_to(folder)):
                subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)
            rmtree(folder, ignore_errors=True)
