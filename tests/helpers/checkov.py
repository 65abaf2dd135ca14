"""checkov's policies on a folder of manifests or Terraform: exactly what was excepted with a reason may fail.

It runs offline, in an environment of its own that the cache folder keeps (its pins contradict ours).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.environments import install_with_pip, made, python_of
from tidewright.cache import cache_dir

PINS = Path(__file__).parent.parent / "deployment" / "checkov.txt"
_TIMEOUT = 240  # seconds of one run


@dataclass(frozen=True)
class Finding:
    """A check that failed, and where."""

    check: str
    name: str
    resource: str
    place: str


@dataclass(frozen=True)
class Report:
    passed: int
    failed: tuple[Finding, ...]
    unread: tuple[str, ...]
    """Files that it could not parse."""


def checkov(folder: Path, framework: str) -> Report:
    """`framework` is "kubernetes", "terraform" or another of checkov's. All its checks run; nothing is skipped."""
    environment = made(PINS, cache_dir() / "tools" / "checkov", install_with_pip)
    command = [str(python_of(environment)), "-m", "checkov.main", "--directory", str(folder), "--framework", framework]
    done = subprocess.run(
        [*command, "--skip-download", "--output", "json", "--soft-fail"],
        env={**os.environ, "LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"checkov ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    # One report, or a list of them if it looked for secrets as well; without anything to check only its summary.
    found: Any = json.loads(done.stdout)
    reports = [report for report in (found if isinstance(found, list) else [found]) if "results" in report]
    return Report(
        passed=sum(report["summary"]["passed"] for report in reports),
        failed=tuple(
            Finding(
                entry["check_id"],
                entry["check_name"],
                entry["resource"],
                f"{entry['file_path'].lstrip('/')}:{entry['file_line_range'][0]}",
            )
            for report in reports
            for entry in report["results"]["failed_checks"]
        ),
        unread=tuple(file for report in reports for file in report["results"]["parsing_errors"]),
    )


def check_policies(folder: Path, framework: str, exceptions: Mapping[str, str]) -> None:
    """Fails unless the checks that fail are those of `exceptions` (check id to reason), all of them and no others."""
    report = checkov(folder, framework)
    assert not report.unread, f"checkov can't read {', '.join(report.unread)}"
    assert report.passed > 0, f"checkov found nothing to check in {folder}"
    assert all(reason.strip() for reason in exceptions.values()), "an exception needs a reason"
    unexpected = [finding for finding in report.failed if finding.check not in exceptions]
    lines = "\n".join(f"  {found.check} {found.name}: {found.resource} ({found.place})" for found in unexpected)
    assert not unexpected, f"{len(unexpected)} of checkov's checks fail in {folder}:\n{lines}"
    stale = sorted(set(exceptions) - {finding.check for finding in report.failed})
    assert not stale, f"these exceptions have nothing left to except: {', '.join(stale)}"
