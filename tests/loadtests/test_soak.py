"""A soak of half a minute, as `make soak` runs it for an hour: every request ends well, whatever is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.load_tests import soak
from loadtests.soak.verdict import unended


@pytest.mark.timeout(400)
def test_requests_survive_kills_and_every_stream_ends(tmp_path: Path) -> None:
    done = soak(tmp_path, "--minutes", "0.6", "--pause", "3", "--users", "3", "--scale", "0.02")
    report = done.report
    assert report, done.words
    assert "Traceback" not in done.words
    assert report["errors"] == {}, done.words
    assert unended(report["errors"]) == 0
    assert report["groups"]["protocol"].keys() == {"http", "websocket"}
    assert report["summary"]["served"] > 10
    assert report["kills"]
    assert all(kill["recovered_after"] is not None for kill in report["kills"]), report["kills"]
    assert report["probes"]["asked"] >= 10

    names = {one["name"] for one in report["processes"]}
    for part in ("engine", "stub of decoder", "stub of failsafe", "tritonserver", "serve"):
        assert {f"replica 1: {part}", f"replica 2: {part}"} <= names
    assert "gateway: gateway" in names
    gateway = next(one for one in report["processes"] if one["name"] == "gateway: gateway")
    assert gateway["mib_per_minute"] is not None
    owners = {one["pid"]: one["name"].partition(":")[0] for one in report["processes"]}
    assert all(owners[one["pid"]] == one["name"].partition(":")[0] for one in report["processes"])
    promises = [row["promise"] for row in report["verdict"]]
    assert len(set(promises)) == len(promises) > 4
    assert "Kills" in done.page
    assert (tmp_path / "gateway.log").read_text()
