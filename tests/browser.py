"""Pages in a headless Chromium, driven over its DevTools protocol by two pipes."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHROMIUM = shutil.which("chromium-headless-shell")
"""The browser; None where it is not installed."""
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--remote-debugging-pipe"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
_START = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts it with its pipes at descriptors 3, from which it reads, and 4."""
_MEASURE = """
(() => {
  const seen = [...document.querySelectorAll('body *')].filter(each => each.checkVisibility());
  const texts = seen.filter(each => [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  return {
    text: document.body.innerText,
    scroll: document.documentElement.scrollWidth,
    client: document.documentElement.clientWidth,
    smallest: Math.min(...texts.map(each => parseFloat(getComputedStyle(each).fontSize))),
    pictures: [...document.images].map(each => each.complete && each.naturalWidth > 0),
    lines: document.querySelectorAll('svg path.line').length,
    scripts: document.scripts.length,
    back: getComputedStyle(document.body).backgroundColor,
    color: getComputedStyle(document.body).color,
  };
})()
"""


class Browser:
    """An open browser with one tab."""

    def __init__(self, read: BinaryIO, write: BinaryIO) -> None:
        self._read, self._write, self._number = read, write, 0
        self._session: str | None = None
        self.requests: list[str] = []
        """URLs that were asked for since the page was opened, other than `data:`."""
        self.complaints: list[str] = []
        """What a console would show: errors, warnings and what a policy has blocked."""
        (target,) = (each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> dict[str, Any]:
        """Open a file in a window of this size and return what the page is like."""
        is_phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.requests.clear()
        self.complaints.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass
        found: dict[str, Any] = self.evaluate(_MEASURE)
        return found

    def evaluate(self, code: str) -> Any:
        """The value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _next(self) -> dict[str, Any]:
        """The next message, after noting what it says about the page."""
        text = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        message: dict[str, Any] = json.loads(text)
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent" if not params["request"]["url"].startswith("data:"):
                self.requests.append(params["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(params["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params))
        return message


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser that ends with the block."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as folder:
        to_browser, from_browser = os.pipe(), os.pipe()
        pipes = (to_browser[0], from_browser[1])
        command = [sys.executable, "-c", _START, *map(str, pipes), CHROMIUM, *_FLAGS, f"--user-data-dir={folder}"]
        process = subprocess.Popen(
            [*command, "about:blank"],
            pass_fds=pipes,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            with os.fdopen(from_browser[0], "rb") as read, os.fdopen(to_browser[1], "wb") as write:
                yield Browser(read, write)
        finally:
            process.kill()
            process.wait()
