"""`ddpmx serve`: the real server, from its first line to SIGTERM."""

from __future__ import annotations

import http.client
import io
import re
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from ddpmx import Sampling, load

pytest.importorskip("uvicorn", reason="not verified here: ddpmx serve (there is no uvicorn)")
pytest.importorskip("fastapi", reason="not verified here: ddpmx serve (there is no FastAPI)")


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_the_server_draws_and_ends_when_everything_is_drawn(gaussian_onnx):
    command = [sys.executable, "-m", "ddpmx_cli.main", "serve", str(gaussian_onnx), "--port", "0", "--batch", "4"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        port = int(re.search(r"a batch of 4: http://127\.0\.0\.1:(\d+)$", line)[1])
        status, data = get(port, "/v1/images?seed=5&steps=9")
        with load(gaussian_onnx) as pipeline:
            wanted = pipeline.generate(1, seed=5, batch=4, sampling=Sampling.chosen(1000, steps=9))
        assert status == 200
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), wanted[0])
        last: list[int] = []
        asking = threading.Thread(target=lambda: last.append(get(port, "/v1/images?steps=1000&n=2")[0]))
        asking.start()
        while b"ddpmx_rows_active 0.0" in get(port, "/metrics")[1] and asking.is_alive():
            pass
        server.send_signal(signal.SIGTERM)
        asking.join()
        assert last == [200]
        assert server.wait(30) in (0, 128 + signal.SIGTERM)
        assert server.stderr is not None
        assert server.stderr.read() == ""
    finally:
        server.kill()
        server.wait()


def test_the_second_signal_ends_it_at_once(gaussian_onnx):
    command = [
        sys.executable,
        "-m",
        "ddpmx_cli.main",
        "serve",
        str(gaussian_onnx),
        "--port",
        "0",
        "--most-images",
        "4096",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(re.search(r":(\d+)$", server.stdout.readline())[1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /v1/events?n=4096 HTTP/1.1\r\nHost: localhost\r\n\r\n")  # for minutes
            assert client.recv(12) == b"HTTP/1.1 200"
            server.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(0.5)
            server.send_signal(signal.SIGTERM)
            assert server.wait(5) == 128 + signal.SIGTERM
        assert server.stderr is not None
        assert server.stderr.read() == ""
    finally:
        server.kill()
        server.wait()


def test_what_is_not_served(refused, gaussian_onnx, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "cannot listen there" in refused("serve", gaussian_onnx, "--port", port)
    assert "cannot listen there" in refused("serve", gaussian_onnx, "--host", "nowhere.invalid")
    (tmp_path / "key").write_text("short\n")
    assert "at least 8" in refused("serve", gaussian_onnx, "--key-file", tmp_path / "key")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "a run is not served" in refused("serve", tmp_path / "run")
