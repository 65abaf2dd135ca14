"""A folder as Kubernetes mounts a ConfigMap or Secret: files are links through `..data`, which is swapped at once."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path


class Mount:
    def __init__(self, folder: Path, **files: str | bytes) -> None:
        """`files`: content by name, with `__` in place of the dot."""
        self._folder, self._numbers = folder, itertools.count(1)
        folder.mkdir()
        self.swap(**files)

    def swap(self, **files: str | bytes) -> None:
        """As the kubelet does it: the new files in a folder of their own, one rename, and the old folder goes away."""
        data = self._folder / "..data"
        old = data.resolve() if data.exists() else None
        new = self._folder / f"..2026_01_01_00_00_00.{next(self._numbers)}"
        new.mkdir()
        for name, content in files.items():
            name = name.replace("__", ".")
            (new / name).write_bytes(content.encode() if isinstance(content, str) else content)
            link = self._folder / name
            if not link.is_symlink():
                link.symlink_to(Path("..data") / name)
        temporary = self._folder / "..data_tmp"
        temporary.symlink_to(new.name)
        temporary.rename(data)
        if old:
            shutil.rmtree(old)

    def __getitem__(self, name: str) -> str:
        """The path of a file."""
        return str(self._folder / name)
