"""Headless Chromium, driven over its own protocol, for tests that look at a page as people do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """One tab: goes to addresses, answers expressions, and keeps what the console said."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self.said: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Emulation"):
            if domain != "Emulation":
                self._ask(f"{domain}.enable")

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._socket.recv(timeout=60))
            if told.get("id") == self._number:
                assert "error" not in told, told
                return dict(told["result"])
            if told.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.said.append(json.dumps(told["params"]))

    def go(self, address: str) -> None:
        self._ask("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        return self._ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression: str, *, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def size(self, width: int, height: int = 900) -> None:
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        self._ask("Emulation.setEmulatedMedia", features=features)

    def scripts(self, *, are_on: bool) -> None:
        self._ask("Emulation.setScriptExecutionDisabled", value=not are_on)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            code = {"Tab": 9, "Enter": 13}[key]
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def text(self) -> str:
        """What is shown, read without running a script of the page."""
        root = self._ask("DOM.getDocument", depth=0)["root"]["nodeId"]
        node = self._ask("DOM.querySelector", nodeId=root, selector="body")["nodeId"]
        return re.sub(r"<[^>]+>", " ", self._ask("DOM.getOuterHTML", nodeId=node)["outerHTML"])


@contextmanager
def opened(folder: Path) -> Iterator[Tab]:
    """A tab of a browser of its own, without any other network than this machine's."""
    command = [
        str(chromium()), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
        f"--user-data-dir={folder / 'user'}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        place = folder / "user" / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (place.is_file() and len(place.read_text().split()) == 2):
            assert time.monotonic() < end and process.poll() is None, "the browser does not start"
            time.sleep(0.05)
        port, _ = place.read_text().split()
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            tab = next(each for each in json.load(answer) if each["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None, open_timeout=30) as socket:
            yield Tab(socket)
    finally:
        process.terminate()
        process.wait(timeout=30)
