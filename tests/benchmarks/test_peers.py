"""The peers' servers, played by a small server of our own that says what they would."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import psutil
import pytest

from tidewright.bench import peers
from tidewright.bench.targets import TargetError
from tidewright.bench.workloads import Request

# Answers as both do: vLLM joins two tokens in an event, llama.cpp holds one back and only counts it.
SERVER = """
import http.server, json, subprocess, sys

VLLM = [[7, 8], [9]]
LLAMA = [1, 3, 3]  # tokens so far; the last event only ends the answer

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["stream"] and body["ignore_eos"] and body["temperature"] == 0
        refused = body["prompt"] == [0]
        self.send_response(503 if refused else 200)
        self.end_headers()
        if refused:
            self.wfile.write(b"no room")
        elif self.path == "/v1/completions":
            assert body["max_tokens"] == 3
            for ids in VLLM:
                self.event({"choices": [{"text": "x", "token_ids": ids}]})
            self.wfile.write(b"data: [DONE]\\n\\n")
        elif self.path == "/completion":
            assert body["n_predict"] == 3
            for count in LLAMA:
                self.event({"content": "x", "tokens": [1], "tokens_predicted": count, "prompt": "long " * 50_000})

    def event(self, data):
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\\n\\n")

    def log_message(self, *arguments):
        print(sys.argv, flush=True)

subprocess.Popen(["sleep", "60"])  # as vLLM has its workers
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIDEWRIGHT_CACHE", str(tmp_path))
    return tmp_path / "peers"


def install(file: Path, code: str = SERVER) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(f"#!{sys.executable}\n{code}")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def install_both(home: Path, code: str = SERVER) -> list[peers.Peer]:
    install(home / "vllm" / "bin" / "vllm", code)
    install(home / "llama.cpp" / "build" / "bin" / "llama-server", code)
    (home / "llama.cpp" / "my-model.gguf").touch()
    return [peers.vllm(Path("/models/my-model")), peers.llama_cpp(Path("/models/my-model"))]


def test_tokens_are_counted_however_they_are_sent(home: Path) -> None:
    for peer in install_both(home):
        children = psutil.Process().children(recursive=True)
        with peers.running(peer) as target:
            outcomes = target.run([Request([1, 2], 3), Request([0], 3), Request([3], 3, at=0.2)])
            started = [child for child in psutil.Process().children(recursive=True) if child not in children]
        assert target.name == peer.name
        assert [outcome.tokens for outcome in outcomes] == [3, 0, 3]
        assert [outcome.responses for outcome in outcomes] == [2, 0, 2]
        assert outcomes[1].error == "HTTP status 503: no room"
        assert 0 < outcomes[2].first <= outcomes[2].last
        # Nothing is left of it, nor of what it started itself.
        assert len(started) == 2
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in started)


def test_an_answer_that_lacks_tokens_is_no_measurement(home: Path) -> None:
    with peers.running(install_both(home, SERVER.replace("[[7, 8], [9]]", "[[7]]"))[0]) as target:
        with pytest.raises(TargetError, match="1 tokens came where 3 were asked for"):
            target.run([Request([1], 3)])


def test_a_lost_connection_is_an_error_of_the_request(home: Path) -> None:
    peer = install_both(home, SERVER.replace("assert body", "assert not body", 1))[0]
    with peers.running(peer) as target:
        assert target.run([Request([1], 3)])[0].error.startswith("ServerDisconnectedError")


def test_a_server_that_ends_is_told_from_one_that_is_slow(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm, llama = install_both(home, "import time, sys\nif 'serve' in sys.argv: sys.exit(3)\ntime.sleep(60)")
    with pytest.raises(TargetError, match=r"vLLM \(see .*vLLM.log\) ended with code 3 before it was ready"):
        with peers.running(vllm):
            pass
    monkeypatch.setattr(peers, "START_TIMEOUT", 0.5)
    with pytest.raises(TargetError, match=r"llama.cpp \(see .*\) was not ready after 0.5 s"):
        with peers.running(llama):
            pass


def test_vllm_is_started_as_it_should_be_on_a_cpu(home: Path) -> None:
    tcmalloc = home / "vllm" / "tcmalloc" / "usr" / "lib" / "libtcmalloc_minimal.so.4"
    tcmalloc.parent.mkdir(parents=True)
    tcmalloc.touch()
    environment = install_both(home)[0].environment
    assert environment["LD_PRELOAD"].split(os.pathsep) == [str(tcmalloc), str(home / "vllm" / "lib" / "libiomp5.so")]
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == f"0-{psutil.cpu_count() - 1}"


def test_what_is_missing_says_how_to_get_it(home: Path) -> None:
    for make in (peers.vllm, peers.llama_cpp):
        with pytest.raises(peers.PeerMissingError, match="is not installed; to compare with it: make bench-peers"):
            make(Path("/models/my-model"))
    install_both(home)
    with pytest.raises(peers.PeerMissingError, match=r"llama.cpp's form of the model is not installed"):
        peers.llama_cpp(Path("/models/my-model"), "int8")
    with pytest.raises(peers.PeerMissingError, match=r"no type of weights like fp8"):
        peers.llama_cpp(Path("/models/my-model"), "fp8")
    with pytest.raises(peers.PeerMissingError, match=r"llama.cpp's form of the model is not installed"):
        peers.llama_cpp(Path("/models/another"))


def test_quantized_weights_have_files_of_their_own(home: Path, tmp_path: Path) -> None:
    install_both(home)
    (home / "llama.cpp" / "my-model-Q8_0.gguf").touch()
    model = tmp_path / "models" / "my-model"
    model.mkdir(parents=True)
    (model / "model.gguf").touch()
    for quantization, name, file in (
        ("int8", "llama.cpp Q8_0", home / "llama.cpp" / "my-model-Q8_0.gguf"),
        ("stored", "llama.cpp with the same file", model / "model.gguf"),
    ):
        peer = peers.llama_cpp(model, quantization)
        assert (peer.name, peer.command[2]) == (name, str(file))
    quantized = peers.vllm(model, home / "my-model-w8a8", "w8a8")
    assert (quantized.name, quantized.command[2]) == ("vLLM w8a8", str(home / "my-model-w8a8"))
