"""The chat page in a real browser, before a real gateway and a real Triton."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from helpers.chromium import Chromium
from helpers.gateway import RunningGateway
from helpers.triton import RunningServer

READY = "document.readyState == 'complete' && (document.getElementById('model')?.textContent ?? '').startsWith('smol')"
# Each answer is long enough to be in the middle of it.
LONG_ANSWERS = """
const sendAsItIs = WebSocket.prototype.send;
WebSocket.prototype.send = function (text) {
  const message = JSON.parse(text);
  if (message.request) message.request.min_tokens = 1000;
  sendAsItIs.call(this, JSON.stringify(message));
};"""
LAST = "[...document.querySelectorAll('#chat p.assistant')].at(-1)"


@pytest.fixture(scope="module")
def gateway(model_dir: Path, server: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, server) as running:
        yield running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def page(gateway: RunningGateway, chromium: Chromium) -> Chromium:
    chromium.complaints.clear()
    chromium.call("Page.navigate", url=gateway.url)
    chromium.wait(READY)
    chromium.run(LONG_ANSWERS)
    return chromium


def ask(page: Chromium, text: str) -> None:
    page.run("document.getElementById('text').focus()")
    page.type(text)
    page.press_enter()


def test_a_chat_streams_shows_its_speed_and_stops(
    page: Chromium, gateway: RunningGateway, server: RunningServer, tmp_path: Path
) -> None:
    server.wait_idle()
    assert page.run("document.getElementById('model').textContent") == "smollm2-135m"
    ask(page, "<img src=x onerror=alert(1)> Write a very long story about the sea.")
    page.wait(f"({LAST}?.textContent.length ?? 0) > 0")
    text = page.run(f"{LAST}.textContent")
    page.wait(f"{LAST}.textContent.length > {len(text)}")  # it streams
    assert page.run("document.getElementById('send').disabled")
    page.run("document.getElementById('stop').click()")
    page.wait("!document.getElementById('send').disabled")
    server.wait_idle()
    assert "tokens/s" in page.run("document.getElementById('speed').textContent")
    assert "first token" in page.run("document.getElementById('speed').textContent")
    assert page.run("document.querySelector('#chat p.user').textContent").startswith("<img src=x")
    assert page.run("document.images.length") == 0
    assert page.run("document.getElementById('error').hidden")

    shots = [page.screenshot(), page.screenshot(dark=True)]
    backs = []
    for name, shot in zip(("light", "dark"), shots, strict=True):
        (tmp_path / f"{name}.png").write_bytes(shot)
        image = Image.open(io.BytesIO(shot)).convert("RGB")
        assert len(image.getcolors(1 << 24)) > 50  # text and not a blank page
        backs.append(sum(image.getpixel((2, 2))))
    assert backs[0] > 600 > 150 > backs[1]

    ask(page, "And then?")  # it knows the chat
    page.wait("document.querySelectorAll('#chat p').length == 4")
    page.wait(f"{LAST}.textContent != ''")
    page.run("document.getElementById('new').click()")
    assert page.run("document.querySelectorAll('#chat p').length") == 0
    server.wait_idle()
    assert page.complaints == []


def test_an_answer_goes_on_after_the_connection_broke(page: Chromium, gateway: RunningGateway) -> None:
    ask(page, "Count from one to fifty.")
    page.wait(f"({LAST}?.textContent.length ?? 0) > 0")
    page.run("window.broken = socket; socket.close()")
    page.wait("socket && socket != broken && socket.readyState == WebSocket.OPEN")
    text = page.run(f"{LAST}.textContent")
    page.wait(f"{LAST}.textContent.length > {len(text)}")
    assert page.run("answer.tokens == answer.seq")  # none came twice
    page.run("document.getElementById('stop').click()")
    page.wait("!document.getElementById('send').disabled")
    assert page.run("document.getElementById('error').hidden")


def test_errors_are_shown_and_the_key_stays_in_this_tab(page: Chromium, gateway: RunningGateway) -> None:
    page.run("document.getElementById('key').value = 'secret'; document.getElementById('key').onchange()")
    assert page.run("[localStorage.length, document.cookie]") == [0, ""]
    assert page.run("sessionStorage.getItem('key')") == "secret"
    page.call("Page.navigate", url=gateway.url)
    page.wait(READY)
    assert page.run("document.getElementById('key').value") == "secret"
    page.run("model = 'gpt-9'")
    ask(page, "Hello?")
    page.wait("!document.getElementById('error').hidden")
    assert "there is no model 'gpt-9'" in page.run("document.getElementById('error').textContent")
    assert page.run("document.querySelectorAll('#chat p.assistant').length") == 0
    for control in ("key", "text"):
        assert page.run(f"document.getElementById('{control}').labels[0].innerText")


def test_the_page_may_load_nothing_from_elsewhere(gateway: RunningGateway) -> None:
    for path, kind in (("/", "text/html"), ("/page/chat.js", "text/javascript"), ("/page/chat.css", "text/css")):
        response = gateway.http.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"] == f"{kind}; charset=utf-8"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "unsafe" not in response.headers["content-security-policy"]
        assert "http://" not in response.text
        assert "innerHTML" not in response.text
    assert gateway.http.get("/page/../config.py").status_code == 404
