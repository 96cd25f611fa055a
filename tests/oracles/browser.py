"""A page in headless Chromium, by the DevTools protocol over a pipe."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a web server for a folder, on the loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class Page:
    """A page of a browser.

    Args:
        folder: for the browser's profile.
        *flags: of Chromium's command line.
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
        if program is None:
            pytest.skip("not verified here: the page in a browser (there is no Chromium)")
        theirs, ours = os.pipe()
        back, answers = os.pipe()
        # the protocol is spoken over the descriptors 3 and 4
        command = 'exec "$@" 3<&"$IN" 4>&"$OUT"'
        self._process = subprocess.Popen(
            [
                *("bash", "-c", command, "bash", program, "--headless", "--no-sandbox", "--remote-debugging-pipe"),
                f"--user-data-dir={folder}",
                *flags,
            ],
            env={**os.environ, "IN": str(theirs), "OUT": str(answers)},
            pass_fds=(theirs, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self._to, self._from, self._number = os.fdopen(ours, "wb", 0), os.fdopen(back, "rb"), 0
        self._session: dict[str, str] = {}
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _message(self) -> bytes:
        data = bytearray()
        while (byte := self._from.read(1)) not in (b"\0", b""):
            data += byte
        assert byte, "the browser ended"
        return bytes(data)

    def open(self, address: str) -> None:
        """Go there."""
        self._call("Page.navigate", url=address)

    def offline(self) -> None:
        """Without a network from now on."""
        self._call("Network.enable")
        self._call(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )

    def run(self, script: str) -> Any:
        """The value of an expression, or of the promise that it is."""
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str, seconds: int = 180) -> None:
        """Wait for an expression to be true."""
        wait = f"(async () => {{ for (let i = 0; i < {10 * seconds} && !({condition}); i++)"
        self.run(f"{wait} await new Promise((resume) => setTimeout(resume, 100)); }})()")
        assert self.run(condition), f"{condition}: not after {seconds} s"

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        self._to.close()
        self._from.close()
