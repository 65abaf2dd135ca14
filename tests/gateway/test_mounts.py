"""Files of the gateway that Kubernetes changes under it: keys, certificates and replicas from mounted volumes."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from gateway.test_keys_command import write_certificate
from helpers.api_keys import add
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from helpers.mount import Mount
from tidewright_gateway.auth.stores import FileStore

PATIENCE = 60.0  # seconds
BODY = {"model": MODEL, "prompt": "x", "max_tokens": 500}


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_of_a_mounted_secret_change(model_dir: Path, tmp_path: Path) -> None:
    """The stream of a revoked key ends, and not by itself, and the new key is good."""
    old = add(FileStore(tmp_path / "old.yaml"), "alice")
    new = add(FileStore(tmp_path / "new.yaml"), "bob")
    mount = Mount(tmp_path / "keys", keys__yaml=(tmp_path / "old.yaml").read_text())
    with EchoReplica() as echo, RunningGateway(model_dir, echo, keys=mount["keys.yaml"]) as gateway:
        echo.pause = 0.1

        def status(key: str) -> int:
            return gateway.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, headers=bearer(key)).status_code

        with httpx.stream(
            "POST",
            f"{gateway.url}/v1/completions",
            json=BODY | {"stream": True},
            headers=bearer(old),
            timeout=PATIENCE,
            trust_env=False,
        ) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            assert (status(old), status(new)) == (200, 401)
            mount.swap(keys__yaml=(tmp_path / "new.yaml").read_text())
            rest = list(lines)
        assert "[DONE]" not in rest[-1]
        assert "error" in rest[-1]
        assert len(rest) < 400  # of 500 tokens
        until(lambda: status(old) == 401)
        assert status(new) == 200


def test_replicas_of_a_mounted_config_map_change(model_dir: Path, tmp_path: Path) -> None:
    with EchoReplica(" a") as first, EchoReplica(" b") as second:
        mount = Mount(tmp_path / "replicas", replicas=first.grpc_url)
        with RunningGateway(model_dir, replicas=f"file:{mount['replicas']}", slow_start=0) as gateway:

            def text() -> str:
                answer = gateway.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
                assert answer.status_code == 200
                return str(answer.json()["choices"][0]["text"])

            assert text() == " a"
            mount.swap(replicas=f"{first.grpc_url}\n{second.grpc_url}\n")
            until(lambda: text() == " b")
            mount.swap(replicas=second.grpc_url)
            until(lambda: gateway.metric("replica_up", replica=first.grpc_url) == 0)
            assert {text() for _ in range(5)} == {" b"}


def certificate(folder: Path) -> tuple[dict[str, bytes], tuple[str, str]]:
    """A new one: as the files of a Secret, and their paths."""
    folder.mkdir()
    paths = write_certificate(folder)
    return dict(zip(("tls__crt", "tls__key"), (Path(path).read_bytes() for path in paths), strict=True)), paths


def test_the_gateway_s_certificate_in_a_mounted_secret_is_renewed(
    model_dir: Path, tmp_path: Path, echo: EchoReplica
) -> None:
    first, _ = certificate(tmp_path / "first")
    second, _ = certificate(tmp_path / "second")
    mount = Mount(tmp_path / "tls", **first)

    class Gateway(RunningGateway):
        def is_live(self) -> bool:
            return bool(self.shown())

        def shown(self) -> str:
            try:
                return ssl.get_server_certificate(("127.0.0.1", self.port), timeout=10)
            except OSError:
                return ""

    with Gateway(model_dir, echo, tls_cert=mount["tls.crt"], tls_key=mount["tls.key"]) as gateway:
        assert gateway.shown().strip() == first["tls__crt"].decode().strip()
        mount.swap(**second)
        until(lambda: gateway.shown().strip() == second["tls__crt"].decode().strip())


def test_certificates_for_the_replicas_are_renewed_and_no_stream_ends(model_dir: Path, tmp_path: Path) -> None:
    """New replicas have a certificate of a new CA and ask for one of it; those before them still end what they have."""
    (first, old_paths), (second, new_paths) = certificate(tmp_path / "first"), certificate(tmp_path / "second")
    with EchoReplica(" a", certificate=old_paths) as old, EchoReplica(" b", certificate=new_paths) as new:
        addresses = [one.grpc_url.replace("127.0.0.1", "localhost") for one in (old, new)]
        mount = Mount(tmp_path / "tls", **first)
        replicas = Mount(tmp_path / "replicas", replicas=addresses[0])
        options = {"replica_ca": mount["tls.crt"], "replica_cert": mount["tls.crt"], "replica_key": mount["tls.key"]}
        with RunningGateway(
            model_dir, replicas=f"file:{replicas['replicas']}", replica_tls=True, slow_start=0, **options
        ) as gateway:
            old.pause = 0.1

            def text() -> str:
                answer = gateway.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
                return str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else ""

            until(lambda: text() == " a")
            with httpx.stream(
                "POST",
                f"{gateway.url}/v1/completions",
                json=BODY | {"stream": True, "max_tokens": 150},
                timeout=PATIENCE,
                trust_env=False,
            ) as stream:
                lines = (line for line in stream.iter_lines() if line)
                next(lines)
                replicas.swap(replicas="\n".join(addresses))
                mount.swap(**second)
                until(lambda: text() == " b")
                rest = list(lines)
            assert rest[-1] == "data: [DONE]"
            assert sum('" a"' in line for line in rest) == 149


def test_a_certificate_for_the_replicas_that_is_none_is_refused_at_the_start(model_dir: Path, tmp_path: Path) -> None:
    good, bad = write_certificate(tmp_path)[0], tmp_path / "bad.pem"
    bad.write_text("nonsense")
    for options, said in (
        ({"replica_ca": bad}, "has no certificate in PEM"),
        ({"replica_cert": good, "replica_key": bad}, "replica_cert and replica_key are no certificate and its key"),
    ):
        done = RunningGateway(model_dir, replicas="a:1", replica_tls=True, **options).run_to_its_end()
        assert done.returncode == 1
        assert said in done.stderr


@pytest.mark.parametrize("option", ["keys", "tls_cert"])
def test_a_mount_that_is_missing_ends_the_start_with_a_line_that_names_it(
    model_dir: Path, tmp_path: Path, option: str
) -> None:
    values = {"tls_key": tmp_path / "tls.key"} if option == "tls_cert" else {}
    missing = tmp_path / "nothing" / "file"
    done = RunningGateway(model_dir, replicas="a:1", **{option: missing}, **values).run_to_its_end()
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if str(missing) in line]
    assert "no such file" in line
