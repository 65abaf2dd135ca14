"""A pod's volumes as folders of this machine. Claims outlive it; what a ConfigMap or Secret becomes is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

from deployment.kubelet.environment import Find, MissingError, data_of, field_of
from deployment.kubelet.manifests import Manifest

_UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "K": 10**3, "M": 10**6, "G": 10**9}


class Volumes:
    def __init__(self, folder: Path, pod: Manifest, find: Find, claim: Callable[[str], Path]) -> None:
        """`claim`: the folder of a PersistentVolumeClaim. Raises MissingError."""
        self._folder, self._pod, self._find, self._claim = folder, pod, find, claim
        self._group = pod["spec"].get("securityContext", {}).get("fsGroup")
        self._mounted: list[Path] = []
        self._paths: dict[str, Path] = {}
        self._files: dict[str, dict[str, bytes]] = {}
        volumes = pod["spec"].get("volumes", ())
        for volume in volumes:  # all must be there before anything is made
            self._content(volume)
        for volume in volumes:
            self._paths[volume["name"]] = self._make(volume)

    def path(self, name: str) -> Path:
        return self._paths[name]

    def refresh(self) -> None:
        """Writes what has changed, as the kubelet does about once a minute: into a new folder, which takes the old
        one's place in one rename."""
        for volume in self._pod["spec"].get("volumes", ()):
            try:
                content = self._content(volume)
            except MissingError:
                continue  # what was written stays
            if content is not None and content != self._files[volume["name"]]:
                self._write(volume["name"], content)

    def remove(self) -> None:
        for path in self._mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _make(self, volume: Manifest) -> Path:
        if "persistentVolumeClaim" in volume:
            return self._claim(volume["persistentVolumeClaim"]["claimName"])
        path = self._folder / volume["name"]
        path.mkdir(parents=True)
        if "emptyDir" in volume:
            empty = volume["emptyDir"] or {}
            if empty.get("medium") == "Memory":
                size = f",size={_bytes(empty['sizeLimit'])}" if "sizeLimit" in empty else ""
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0777{size}", "volume", str(path)], check=True)
                self._mounted.append(path)
            self._permit(path, 0o777)
            return path
        self._paths[volume["name"]] = path
        content = self._content(volume)
        assert content is not None, f"this kind of volume is not supported: {volume}"
        self._write(volume["name"], content)
        return path

    def _content(self, volume: Manifest) -> dict[str, bytes] | None:
        """The files of a volume that is made of objects."""
        sources = volume["projected"]["sources"] if "projected" in volume else [volume]
        found: dict[str, bytes] = {}
        for source in sources:
            if "downwardAPI" in source:
                items = source["downwardAPI"]["items"]
                found |= {one["path"]: field_of(self._pod, one["fieldRef"]["fieldPath"]).encode() for one in items}
                continue
            kind = "ConfigMap" if "configMap" in source else "Secret" if "secret" in source else ""
            if not kind:
                return None
            reference = source.get("configMap") or source["secret"]
            name = reference.get("secretName") or reference["name"]
            data = data_of(self._find(kind, name), kind, name, reference.get("optional", False))
            if "items" in reference:
                missing = [one["key"] for one in reference["items"] if one["key"] not in data]
                if missing:
                    raise MissingError(f"references non-existent {kind} key: {missing[0]}")
                data = {one["path"]: data[one["key"]] for one in reference["items"]}
            found |= data
        return found

    def _write(self, name: str, content: dict[str, bytes]) -> None:
        """As the kubelet does: FILE -> ..data/FILE, ..data -> a folder that is never changed."""
        path = self._paths[name]
        new = path / f"..{uuid.uuid4().hex}"
        for file, data in content.items():
            target = new / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            self._permit(target, 0o644)
        new.mkdir(exist_ok=True)
        new.chmod(0o755)
        for top in {Path(file).parts[0] for file in content}:
            if not (path / top).is_symlink():
                (path / top).symlink_to(f"..data/{top}")
        old = os.readlink(path / "..data") if (path / "..data").is_symlink() else None
        (path / "..new").symlink_to(new.name)
        (path / "..new").rename(path / "..data")
        if old:
            shutil.rmtree(path / old)
        self._permit(path, 0o755)
        self._files[name] = content

    def _permit(self, path: Path, mode: int) -> None:
        path.chmod(mode)
        if self._group is not None:
            os.chown(path, 0, self._group)


def _bytes(quantity: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", str(quantity))
    assert found, quantity
    return int(float(found[1]) * _UNITS[found[2]])
