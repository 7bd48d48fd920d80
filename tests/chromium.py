"""A headless Chromium, driven by its DevTools protocol over a pipe: no port, no library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
)
PATIENCE = 60.0
"""Seconds without output after which a browser is given up."""


def installed() -> str | None:
    """The browser's program, None where there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One tab of a browser process; a context manager."""

    def __init__(self, folder: Path) -> None:
        def lay_pipes() -> None:  # the browser reads from descriptor 3 and writes to descriptor 4
            high = [os.dup(theirs[0]), os.dup(theirs[1])]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        to, back = os.pipe(), os.pipe()
        theirs, self._to, self._from = (to[0], back[1]), to[1], back[0]
        for end in theirs:
            os.set_inheritable(end, True)
        words = [str(installed()), *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            words,
            preexec_fn=lay_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in theirs:
            os.close(end)
        self._number, self._unread, self._session = 0, b"", None
        self.events: list[dict] = []
        (tab,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=tab["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{part}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: object) -> dict:
        """The answer to a command of the protocol; events until then are kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == self._number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self.events.append(told)

    def _read(self) -> dict:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._unread:
            if not select.select([self._from], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self._from, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._unread += piece
        told, _, self._unread = self._unread.partition(b"\0")
        return json.loads(told)

    def look(self, width: int, dark: bool = False, media: str = "screen") -> None:
        """Set the kind of screen that the page is shown on."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def open(self, file: Path) -> None:
        """Load a page from the disk and wait until it is complete."""
        self.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self._read())

    def run(self, script: str) -> object:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors that scripts threw, that the console was told, and that the log holds."""
        said = []
        for event in self.events:
            given = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                said.append(str(given["exceptionDetails"]))
            if event["method"] == "Runtime.consoleAPICalled" and given["type"] == "error":
                said.append(str(given["args"]))
            if event["method"] == "Log.entryAdded":
                said.append(given["entry"]["text"])
        return said

    def loaded(self) -> list[str]:
        """Addresses of everything that the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def picture(self, file: Path, whole: bool = True) -> None:
        """Write the visible part, or the whole page, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def printed(self, file: Path) -> None:
        """Write the page as it is printed, as PDF."""
        paper = self.call("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
        file.write_bytes(base64.b64decode(paper["data"]))
