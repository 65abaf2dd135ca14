"""Golden digests of what each overlay renders to, so that no change goes unseen: `python k8s/digests.py [--write]`."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

K8S = Path(__file__).resolve().parent
FILE = K8S / "digests.txt"


def overlays() -> list[Path]:
    return sorted(folder for folder in (K8S / "overlays").iterdir() if folder.is_dir())


def rendered(folder: Path) -> str:
    """As `kubectl apply -k` would send it. Raises subprocess.CalledProcessError, with kustomize's words in `stderr`."""
    command = ["kubectl", "kustomize", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def digests() -> str:
    """A line for each overlay, as `sha256sum` writes it."""
    return "".join(f"{hashlib.sha256(rendered(one).encode()).hexdigest()}  {one.name}\n" for one in overlays())


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(digests(), encoding="utf-8")
    elif sys.argv[1:]:
        sys.exit("usage: python k8s/digests.py [--write]")
    elif digests() != FILE.read_text(encoding="utf-8"):
        sys.exit(f"{FILE} differs:\n{digests()}If the change is meant, write them: python k8s/digests.py --write")
