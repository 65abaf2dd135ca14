"""distributed/secret.py: where ranks may do without a secret, at both ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.engine_process import PATIENCE, config
from tidewright.distributed.rank import REFUSED
from tidewright.distributed.ranks import RankError, Ranks
from tidewright.distributed.secret import SecretFileError, rendezvous_secret


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"])
def test_this_host_needs_none(host: str) -> None:
    assert rendezvous_secret("", host) is None


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "0.0.0.0", "192.168.1.5", "8.8.8.8", "fe80::1", "node-0", "localhost.example", "127.1", ""]
)
def test_any_other_address_needs_one(host: str, tmp_path: Path) -> None:
    with pytest.raises(SecretFileError, match="give each host the same --rendezvous-secret-file"):
        rendezvous_secret("", host)
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef\n")
    assert rendezvous_secret(str(file), host) == b"0123456789abcdef"


def test_rank_0_does_not_listen_without_one(tmp_path: Path) -> None:
    """The address is nobody's: listening there would have been another error."""
    with pytest.raises(RankError, match=r"the rendezvous 192\.0\.2\.1 can be reached from other hosts"):
        Ranks(config(tmp_path, tensor_parallel_size=2, nodes=2, rendezvous="192.0.2.1:29400"))


def test_a_rank_does_not_connect_without_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tidewright.distributed.rank", "192.0.2.1:29400", "1", "0", str(tmp_path), ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == REFUSED
    assert "the rendezvous 192.0.2.1 can be reached from other hosts" in done.stderr
