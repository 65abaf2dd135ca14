"""Many tenants on one engine. `python -m benchmarks.tenancy [PART ...]`; wants an otherwise idle machine.

Each part is a module `benchmarks/tenancy_PART.py` with options of its own (`python -m benchmarks.tenancy_PART --help`)
and runs in a process of its own, here with its defaults. Without a PART all of them run, one after the other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PREFIX = "tenancy_"


def parts() -> dict[str, str]:
    """The first line of what each says of itself, by name."""
    found = sorted(Path(__file__).parent.glob(f"{PREFIX}*.py"))
    return {path.stem.removeprefix(PREFIX): path.read_text().split("\n", 1)[0].strip('"') for path in found}


def main() -> None:
    known = parts()
    listed = "\n".join(f"  {name:12} {line}" for name, line in known.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nParts:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *known], metavar="PART")
    chosen = parser.parse_args().parts or [*known]
    failed = []
    for name in chosen:
        print(f"\n== {name}: {known[name]}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{PREFIX}{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
