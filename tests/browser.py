"""A Chromium, spoken to over two pipes by its DevTools protocol: what a page is once it is laid out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
BROWSER = os.environ.get("PC_KERNELS_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
COMMANDS, ANSWERS = 3, 4  # the descriptors that --remote-debugging-pipe speaks of


class Browser:
    """A headless one without a page; the end of a `with` ends it."""

    def __init__(self, profile: Path) -> None:
        """`profile`: an empty folder."""
        assert BROWSER is not None
        (theirs, self.commands), (self.answers, answers) = os.pipe(), os.pipe()

        def wire() -> None:
            high = [os.dup2(end, 100 + end) for end in (theirs, answers)]  # out of the way of 3, 4
            for end, place in zip(high, (COMMANDS, ANSWERS), strict=True):
                os.dup2(end, place)

        self.process = subprocess.Popen(
            [BROWSER, "--headless=shell", "--no-sandbox", "--disable-gpu", "--no-zygote",
             "--single-process", f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            preexec_fn=wire, close_fds=False, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self.number, self.events = 0, list[str]()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)

    def look(self, url: str, expression: str) -> Any:
        """The value of a JavaScript expression in a page that is loaded."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable", session)
        self._call("Page.navigate", session, url=url)
        while "Page.loadEventFired" not in self.events:
            self._read()
        answer = self._call("Runtime.evaluate", session, expression=expression, returnByValue=True)
        return answer["result"]["value"]

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        of_page = {"sessionId": session} if session else {}
        os.write(self.commands, json.dumps(message | of_page).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            pass
        assert "result" in answer, answer
        return answer["result"]

    def _read(self) -> Any:
        """The next answer or event."""
        answer = json.loads(self._message())
        self.events.append(answer.get("method", ""))
        return answer

    def _message(self) -> bytes:
        message = b""
        while not message.endswith(b"\0"):
            byte = os.read(self.answers, 1)
            assert byte, "the browser ended"
            message += byte
        return message[:-1]
