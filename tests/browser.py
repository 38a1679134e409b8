"""A browser for tests: Chromium without a window, told what to do by the DevTools protocol over a pair of pipes.

    apt-get install chromium

It needs nothing else: no driver, no port, no package. (PYTEST_DONT_REWRITE: there are no tests in here.)
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--mute-audio")
OPTIONS += ("--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync")
PATIENCE = 60  # seconds


def program() -> str | None:
    """The browser's path, if there is one."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """One tab. `send` is a command of the protocol, https://chromedevtools.github.io/devtools-protocol."""

    def __init__(self, process: subprocess.Popen, to_it: int, from_it: int):
        self.process, self.to_it, self.from_it = process, to_it, from_it
        self.unread = b""
        self.n_sent = 0
        self.events: list[dict] = []
        self.session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.send(f"{domain}.enable")
        self.send("Page.setLifecycleEventsEnabled", enabled=True)

    def send(self, method: str, **params) -> dict:
        """Its result; events that arrive meanwhile are kept."""
        self.n_sent += 1
        message = {"id": self.n_sent, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_it, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.n_sent:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def read(self) -> dict:
        """The next message."""
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.from_it], [], [], max(until - time.monotonic(), 0))
            assert ready, "the browser is silent"
            self.unread += os.read(self.from_it, 1 << 20)
        message, _, self.unread = self.unread.partition(b"\0")
        answer = json.loads(message)
        if "method" in answer:
            self.events.append(answer)
        return answer

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False, **features: str) -> None:
        """Load a page in a window of that size; `features` are media features, with _ for -."""
        self.resize(width, height)
        features = {"prefers_color_scheme": "dark" if dark else "light"} | features
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", features=named)
        self.load("about:blank")  # else a URL that differs in its fragment alone would not be loaded again
        self.events.clear()
        self.load(url)

    def load(self, url: str) -> None:
        loader = self.send("Page.navigate", url=url)["loaderId"]
        loaded = {"name": "load", "loaderId": loader}
        while not any(loaded.items() <= event["params"].items() for event in self.events):
            self.read()

    def resize(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def run(self, script: str):
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        """A key, pressed and let go."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        code = "Space" if key == " " else key
        held = {"key": key, "code": code, "windowsVirtualKeyCode": codes[key], "modifiers": 8 * shift}
        text = {"text": {"Enter": "\r", " ": " "}[key]} if key in ("Enter", " ") else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **held, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **held)

    def click(self, selector: str) -> None:
        """The mouse, on the middle of an element."""
        place = (
            "(() => { const e = document.querySelector(%s); e.scrollIntoView({block: 'center', behavior: 'instant'});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        x, y = self.run(place % json.dumps(selector))
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path, whole: bool = False) -> None:
        """Write what is seen, or the whole page, as a PNG file."""
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def accessible(self) -> list[dict]:
        """The nodes that a screen reader is told of: role, name, and properties."""
        found = []
        for node in self.send("Accessibility.getFullAXTree")["nodes"]:
            if node.get("ignored"):
                continue
            properties = {each["name"]: each["value"].get("value") for each in node.get("properties", ())}
            name = node.get("name", {}).get("value", "")
            found.append({"role": node["role"]["value"], "name": name, "id": node["nodeId"]} | properties)
        return found


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser, its profile in a folder that is the test's own."""
    read_by_it, to_it = os.pipe()
    from_it, written_by_it = os.pipe()

    def as_3_and_4() -> None:  # where it looks for them
        os.dup2(read_by_it, 13)
        os.dup2(written_by_it, 14)
        os.dup2(13, 3)
        os.dup2(14, 4)

    command = [program(), *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
    process = subprocess.Popen(
        command, preexec_fn=as_3_and_4, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(read_by_it)
    os.close(written_by_it)
    try:
        opened = Browser(process, to_it, from_it)
        yield opened
        opened.session = None
        opened.send("Browser.close")
    finally:
        process.terminate()
        process.wait(PATIENCE)
        os.close(to_it)
        os.close(from_it)
