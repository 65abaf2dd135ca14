"""A headless Chromium, driven over its own protocol (CDP)."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

from helpers.needs import needs

TIMEOUT = 60  # seconds


@needs("browser")
class Chromium:
    """One tab."""

    def __init__(self, folder: Path) -> None:
        """`folder`: for its profile."""
        program = shutil.which("chromium") or shutil.which("google-chrome")
        assert program, "install Chromium: apt-get install chromium"
        # Root has no sandbox, and containers little of /dev/shm.
        flags = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run"]
        options = [
            "--no-proxy-server",
            "--remote-debugging-port=0",
            "--window-size=900,700",
            f"--user-data-dir={folder}",
        ]
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen([program, *flags, *options, "about:blank"], stdout=self._log, stderr=self._log)
        port_file = folder / "DevToolsActivePort"
        deadline = time.monotonic() + TIMEOUT
        while not (port_file.exists() and port_file.read_text()):
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.02)
        url = f"http://127.0.0.1:{port_file.read_text().split()[0]}/json"
        pages = httpx.get(url, trust_env=False).json()
        page = next(one for one in pages if one["type"] == "page")
        self._socket = connect(page["webSocketDebuggerUrl"], proxy=None, max_size=None, ping_interval=None)
        self._number = 0
        self.complaints: list[str] = []
        """Of the console: exceptions, and what the Content-Security-Policy blocked."""
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=TIMEOUT))
            entry = message.get("params", {}).get("entry", {})
            if message.get("method") == "Runtime.exceptionThrown" or entry.get("level") in ("warning", "error"):
                self.complaints.append(json.dumps(message["params"]))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + TIMEOUT
        while not self.run(condition):
            assert time.monotonic() < deadline, (condition, self.run("document.body.innerText"), self.complaints)
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **key)

    def screenshot(self, dark: bool = False) -> bytes:
        """A PNG."""
        value = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self.call("Browser.close")
        self._socket.close()
        self._process.wait(TIMEOUT)
        self._log.close()

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
