"""A headless Chromium driven over a pipe with its DevTools protocol: no driver program, no
package, no port.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
WHY_NOT = f"no browser on PATH ({', '.join(NAMES)}): apt-get install chromium"


class Page:
    """One page. ``messages`` are what it said to the console, errors, and requests that its
    policy refused.
    """

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._buffer, self._next = send, receive, b"", 0
        self.session: str | None = None
        self.messages: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask for one thing and wait for the answer; events on the way are noted."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer.get("result", {})
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._receive, 1 << 20)
            if not part:
                raise RuntimeError("the browser ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            text = details.get("exception", {}).get("description", details["text"])
            self.messages.append(f"exception: {text}")
        elif event["method"] == "Log.entryAdded":
            self.messages.append(f"{params['entry']['source']}: {params['entry']['text']}")
        elif event["method"] == "Runtime.consoleAPICalled":
            self.messages.append(
                "console: "
                + " ".join(str(a.get("value", a.get("description"))) for a in params["args"])
            )
        elif event["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(
        self,
        path: Path,
        fragment: str = "",
        *,
        ready: str = "document.documentElement?.dataset.ready",
        wait_s: float = 20,
    ) -> float:
        """Load a file and wait until ``ready`` holds; the seconds it took."""
        self.messages, self.requests = [], []
        self.call("Page.navigate", url="about:blank")
        began = time.monotonic()
        self.call("Page.navigate", url=f"{path.resolve().as_uri()}{fragment}")
        while not self(f"document.URL !== 'about:blank' && Boolean({ready})"):
            if time.monotonic() - began > wait_s:
                raise TimeoutError(f"not ready in {wait_s} s; {self.messages}")
            time.sleep(0.02)
        return time.monotonic() - began

    def __call__(self, script: str) -> Any:
        """The JSON value of an expression (a promise is waited for)."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(
                answer["exceptionDetails"]
                .get("exception", {})
                .get("description", answer["exceptionDetails"]["text"])
            )
        return answer["result"].get("value")

    def resize(self, width: int, height: int, *, dark: bool = False, media: str = "") -> None:
        """Size of the window in CSS pixels, colour scheme, and medium."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            media=media,
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def key(self, key: str) -> None:
        """Press one key where the focus is."""
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        codes = {"Enter": 13, "ArrowDown": 40, "ArrowUp": 38, "Tab": 9, "/": 191}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes.get(key, 0),
                **(text if kind == "keyDown" else {}),
            )

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        path.write_bytes(
            base64.b64decode(
                self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
            )
        )

    def pdf(self, path: Path) -> None:
        """What printing gives."""
        path.write_bytes(
            base64.b64decode(
                self.call(
                    "Page.printToPDF", printBackground=False, paperWidth=8.27, paperHeight=11.69
                )["data"]
            )
        )


@contextmanager
def browser(profile: Path, options: Sequence[str] = ()) -> Iterator[Page]:
    """A page in a browser of its own, which ends with the context."""
    to_browser, from_browser = os.pipe(), os.pipe()
    given = [
        "--headless=new",
        "--remote-debugging-pipe",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    given += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={profile}",
        *options,
    ]
    ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (to_browser[0], from_browser[1])]

    def connect() -> None:  # the protocol is read from descriptor 3 and written to 4
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    process = subprocess.Popen(
        [str(BROWSER), *given],
        preexec_fn=connect,
        close_fds=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for fd in (to_browser[0], from_browser[1], *ends):
        os.close(fd)
    page = Page(to_browser[1], from_browser[0])
    try:
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(1280, 900)
        yield page
    finally:
        process.kill()
        process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
