"""A real browser for the pages' tests: headless Chromium, with the network watched.

Driven through its own pipe (--remote-debugging-pipe), so no driver and no package is needed beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60.0  # seconds for anything: a busy machine is no failure
CODES = {"Enter": 13, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, " ": 32}


class Browser:
    """One tab of a headless Chromium, spoken to by the DevTools protocol: JSON, each message ended by a zero byte."""

    def __init__(self, folder: Path) -> None:
        self.downloads = folder / "downloads"
        (read, self._to), (self._from, write) = os.pipe(), os.pipe()
        # The browser reads from descriptor 3 and writes to 4; high numbers don't get in their way.
        read, write = (fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20) for descriptor in (read, write))
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-extensions",
            "--mute-audio",
        ]
        flags += ["--disable-background-networking", f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"]
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', str(CHROMIUM), *flags, "about:blank"]
        with open(folder / "chromium.log", "wb") as log:
            self._process = subprocess.Popen(command, pass_fds=(read, write), stdout=log, stderr=log)
        os.close(read), os.close(write)
        self._rest, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(deadline)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return dict(answer["result"])

    def open(self, url: str, width: int = 1280, height: int = 800, phone: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && !document.getElementById('welcome')?.hidden")

    def run(self, expression: str) -> Any:
        told = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def until(self, expression: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.run(expression):
            assert time.monotonic() < deadline, (expression, self.run("document.body.innerText"))
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        for key in keys:
            told = {"key": key, "windowsVirtualKeyCode": CODES.get(key, ord(key[0].upper()))}
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else None)
            self.send("Input.dispatchKeyEvent", type="keyDown", **told, **({"text": text} if text else {}))
            self.send("Input.dispatchKeyEvent", type="keyUp", **told)

    def tap(self, selector: str) -> None:
        """Touch the middle of an element, which must be where nothing covers it."""
        spot = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": spot[0], "y": spot[1]}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def saved(self, name: str) -> Path:
        deadline = time.monotonic() + PATIENCE
        while not (self.downloads / name).is_file():
            assert time.monotonic() < deadline, list(self.downloads.iterdir()) if self.downloads.exists() else "nothing"
            time.sleep(0.05)
        return (self.downloads / name).rename(self.downloads / f"{self._number}-{name}")  # the next may be called alike

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._to), os.close(self._from)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._from, 2**20) if ready else b""
            assert chunk, "the browser is silent or gone"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))
