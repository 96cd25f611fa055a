"""The Jetson example without a Jetson: its README's commands, and its server on the CPU and on a fake TensorRT 10.3."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

import ddpmx
from conftest import FASHION, GAUSSIAN_ONNX, TESTS
from ddpmx.backends import trt
from ddpmx.device.discovery import Gpus
from ddpmx.errors import BackendError, Cancelled, NumericError
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.system import doctor
from ddpmx.trt import build as trt_build
from ddpmx.trt import library as trt_library
from ddpmx_cli.main import app, run
from oracles import gaussian
from oracles.engines import NO_GPU, ORIN
from oracles.fake_tensorrt import FakeTrt
from oracles.parity import make_reference
from oracles.plans import TENSORRT, make_plan, name_of

pytestmark = pytest.mark.slow

EXAMPLE = TESTS.parent / "examples" / "jetson"
README = (EXAMPLE / "README.md").read_text(encoding="utf-8")
RECORD = dataclasses.replace(TENSORRT, platform="linux aarch64", batch=(1, 1, 4))
OTHER = dataclasses.replace(RECORD, version="10.7.0.23", options={**RECORD.options, "workspace": 256 << 20})
NOT_RUN = {"sudo", "git", "scp", "tar", "mv", "cd", "python3", ".", "pip", "journalctl"}
"""What the README has a person do that is no part of this project."""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("sh")).splitlines()
    lines += re.findall(r"^ExecStart(?:Pre)?=/home/you/ddpmx/\.venv/bin/(.*)$", "".join(blocks("ini")), re.MULTILINE)
    parts = [part for line in lines for part in line.partition(" #")[0].split("&&")]
    return [shlex.split(part) for part in parts]


OURS = [words for words in commands() if words[0] not in NOT_RUN]
DDPMX = list(dict.fromkeys(tuple(words[1:]) for words in OURS if words[0] == "ddpmx"))
SERVE = list(dict.fromkeys(tuple(words[2:]) for words in OURS if words[0] == "python"))
CURL = [words for words in OURS if words[0] == "curl"]


def called(subcommand: str) -> list[tuple[str, ...]]:
    found = [words for words in DDPMX if words[0] == subcommand]
    assert found, f"the README has no `ddpmx {subcommand}` any more"
    return found


@pytest.fixture(autouse=True)
def sigterm():
    """Commands say what it does, and the next test should not hear of it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """``cli("generate", "-n", "4")`` → (exit code, standard output, standard error), in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["ddpmx", *words])
        try:
            run()
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def serve():
    sys.path.insert(0, str(EXAMPLE))
    try:
        import serve
    finally:
        sys.path.remove(str(EXAMPLE))
    return serve


@pytest.fixture
def fitting(serve):
    return sys.modules["fitting"]


class Jetson(FakeTrt):
    """TensorRT 10.3, whose engines are the network of gaussian.onnx."""

    version = RECORD.version

    def library(self):
        return trt_library.Library(self, "TensorRT", self.version, self.logger)

    def engine(self):
        opened = super().engine()
        make = opened.create_execution_context
        opened.create_execution_context = lambda: make(None)
        return opened


@pytest.fixture
def jetson(plan_driver, monkeypatch, fitting, tmp_path):
    """An Orin with JetPack 6, as far as ddpmx asks; in ``tmp_path`` what was copied there, and no plan."""
    fake = Jetson(plan_driver, ((1, 1, 4),), name=name_of(gaussian.SPEC, RECORD).decode())
    monkeypatch.setattr(trt_library, "load", lambda flavour=None: fake.library())
    monkeypatch.setattr(trt_library, "host_platform", lambda: RECORD.platform)
    monkeypatch.setattr(trt, "gpus", lambda: ORIN)
    shutil.copy(GAUSSIAN_ONNX, tmp_path / "model.onnx")
    make_reference().save(tmp_path / "model.parity.npz")
    return fake


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "model.plan").write_bytes(plan_of(RECORD))
    return tmp_path / "model.plan"


def plan_of(record) -> bytes:
    version = tuple(int(n) for n in record.version.split("."))
    return make_plan(b"ftrt", version, gaussian.SPEC, record)


def expected(seed: int, steps: int) -> np.ndarray:
    with ddpmx.load(GAUSSIAN_ONNX) as pipeline:
        return pipeline.generate(1, seed=seed, steps=steps)[0]


def pixels(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG"
    return np.asarray(picture)


# --- the README ------------------------------------------------------------------------------------------------------


def test_every_command_is_ours_or_known_not_to_be():
    assert {words[0] for words in OURS} == {"ddpmx", "python", "curl"}
    assert {words[0] for words in DDPMX} == {"export", "doctor", "build", "parity", "generate", "bench"}, (
        "a command without a test below"
    )


@pytest.mark.parametrize("words", DDPMX, ids=" ".join)
def test_its_flags_exist(words):
    command = get_command(app).commands[words[0]]
    command.make_context(words[0], list(words[1:]))


@pytest.mark.long
@pytest.mark.torch
def test_export_writes_the_two_files_that_are_copied(cli, tmp_path):
    pytest.importorskip("torch", reason="not verified here: the README's `ddpmx export` (no torch)")
    tiny = "--width 4 --groups 2 --mult 1 --blocks 1 --attention 16 --batch 4 --sample-every 0"
    large_steps = "--steps 2 --lr 0.1 --warmup 1 --ema 0.5"  # so that the network answers something
    assert cli("train", "--data", str(FASHION), "--out", "runs/photos", *tiny.split(), *large_steps.split())[0] == 0
    for words in called("export"):
        code, _, err = cli(*words)
        assert code == 0, err
    copied = next(words[1:-1] for words in commands() if words[0] == "scp")
    for name in copied:
        assert (tmp_path / name).exists() or name == "ddpmx.tar.gz"
    assert not (tmp_path / "model.plan").exists()


def test_doctor_says_what_the_readme_says(cli, monkeypatch):
    missing = {"missing": "ModuleNotFoundError"}
    said = dict.fromkeys(doctor._PROBES, missing) | {
        "TensorRT": {"version": "10.3.0", "libraries": ["/usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0"]},
        "chains on the GPU": {"version": "by CUDA 12.6", "why_no_while": None},
    }
    by_code = {code: said[name] for name, code in doctor._PROBES.items()}
    monkeypatch.setattr(doctor, "_probe", by_code.__getitem__)
    monkeypatch.setattr(doctor, "gpus", lambda: ORIN)
    (words,) = called("doctor")
    code, out, _ = cli(*words)
    assert code == 0
    (block,) = blocks("text")
    for line in block.splitlines():
        assert f"  {line}" in out.splitlines()


@pytest.mark.parametrize("words", called("build"), ids=" ".join)
def test_build_with_tensorrt_rtx_in_place_of_tensorrt(cli, tmp_path, gaussian_onnx, words):
    pytest.importorskip("tensorrt_rtx", reason="not verified here: the README's `ddpmx build` (no TensorRT-RTX)")
    shutil.copy(gaussian_onnx, tmp_path / "model.onnx")
    code, out, err = cli(*words, "--library", "tensorrt-rtx")
    assert code == 0, err
    assert "batch 1…4 (best at 1)" in out
    assert "is up to date" in cli(*words, "--library", "tensorrt-rtx")[1], "at the second start it is left alone"


@pytest.mark.parametrize("words", called("parity"), ids=" ".join)
def test_parity_of_a_plan(jetson, plan, cli, tmp_path, words):
    code, out, err = cli(*words)
    assert code == 0, (out, err)
    assert "TensorRT 10.3.0.26 on Orin, SM 8.7" in out
    assert (tmp_path / "model.report" / "report.md").exists()


@pytest.mark.parametrize("words", called("generate"), ids=" ".join)
def test_generate_with_a_plan(jetson, plan, cli, tmp_path, words):
    code, out, err = cli(*words)
    assert code == 0, err
    assert "executor while" in out
    with ddpmx.load(GAUSSIAN_ONNX) as pipeline:
        few = pipeline.generate(1, seed=7, steps=50, sampler="unipc", spacing="trailing")[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "00000.png")), few)
    assert (tmp_path / "samples" / "grid.png").exists()


@pytest.mark.parametrize("words", called("bench"), ids=" ".join)
def test_bench_of_a_plan(jetson, plan, cli, words):
    code, out, err = cli(*words, "--seconds", "0.05")
    assert code == 0, err
    for batch in ("1", "4"):
        assert re.search(rf"^ *{batch}  while ", out, re.MULTILINE)


def test_a_plan_of_before_an_upgrade_names_the_command_of_the_readme(jetson, plan, cli):
    (again,) = (words for words in called("build") if "-o" in words)
    plan.write_bytes(
        plan_of(dataclasses.replace(OTHER, options={"workspace": 512 << 20, "level": None, "tf32": False}))
    )
    code, _, err = cli("generate", "--engine", "model.plan")
    assert code == 2
    assert "plans do not cross versions" in err
    assert f"Hint: ddpmx {' '.join(again)}" in err


def test_errors_in_the_table_of_troubles_are_those_that_ddpmx_raises():
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(ddpmx.__file__).parent.rglob("*.py"))
    foreign = {"No module named 'tensorrt'", "libnvinfer", "onnxruntime-gpu"}
    first = [line.split(" | ")[0] for line in README.split("## Trouble")[1].splitlines() if line.startswith("| ")][1:]
    said = {text for cell in first for text in re.findall("`([^`]+)`", cell)} - foreign
    assert len(said) >= 6
    assert [text for text in said if text not in sources] == []


def test_the_unit_is_one(tmp_path):
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("not verified here: the systemd unit (no systemd-analyze)")
    (text,) = blocks("ini")
    for program in ("ddpmx", "python"):
        (tmp_path / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / ".venv" / "bin" / program).symlink_to(sys.executable)
    unit = tmp_path / "ddpmx.service"
    unit.write_text(text.replace("/home/you/ddpmx", str(tmp_path)).replace("User=you", "User=root"))
    done = subprocess.run([analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60)
    assert "ddpmx.service" not in done.stdout + done.stderr


# --- the server on the CPU -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(*arguments: object):
    """(process, port) of serve.py, from its first line on."""
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLE / "serve.py"), *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what was started in the background may have Ctrl-C switched off, and its children too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        line = process.stdout.readline()
        started = re.match(r"http://127\.0\.0\.1:(\d+)/ by ", line)
        assert started, (line, process.communicate(timeout=30))
        yield process, int(started[1])
    finally:
        process.kill()
        _, err = process.communicate()
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def port():
    with started(GAUSSIAN_ONNX) as (_, port):
        yield port


def get(port: int, path: str) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type"), answer.read()
    finally:
        connection.close()


def parts(body: bytes) -> list[np.ndarray]:
    found = []
    while not body.startswith(b"--frame--"):
        head, _, body = body.partition(b"\r\n\r\n")
        length = re.fullmatch(rb"--frame\r\nContent-Type: image/png\r\nContent-Length: (\d+)", head)
        assert length, head
        found.append(pixels(body[: int(length[1])]))
        body = body[int(length[1]) :].removeprefix(b"\r\n")
    return found


@pytest.mark.parametrize(
    ("query", "seed", "steps"), [("seed=7&steps=50", 7, 50), ("steps=3", 0, 3), ("seed=1", 1, 1000)]
)
def test_an_image_is_the_one_that_generate_draws(port, query, seed, steps):
    status, kind, body = get(port, f"/image?{query}")
    assert (status, kind) == (200, "image/png")
    np.testing.assert_array_equal(pixels(body), expected(seed, steps))


def test_a_stream_shows_x0_in_the_making_and_ends_with_the_image(port):
    status, kind, body = get(port, "/stream?seed=7&steps=50&every=5")
    assert (status, kind) == (200, "multipart/x-mixed-replace; boundary=frame")
    *shown, last_but_one, last = parts(body)
    with ddpmx.load(GAUSSIAN_ONNX) as pipeline:
        steps = [to_nhwc(step.x0)[0].tobytes() for step in pipeline.stream(1, seed=7, steps=50)]
    fifths = iter(steps[4:-1:5])
    assert shown
    assert all(frame.tobytes() in fifths for frame in shown), "in their order; a slow client may miss some"
    assert last.tobytes() == last_but_one.tobytes() == steps[-1]


def test_clients_at_once_each_get_their_own_image(port):
    got = {}
    ready = threading.Barrier(6)

    def ask(seed):
        ready.wait(30)
        got[seed] = get(port, f"/{'image' if seed % 2 else 'stream'}?seed={seed}&steps=40")[2]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, body in got.items():
        np.testing.assert_array_equal(pixels(body) if seed % 2 else parts(body)[-1], expected(seed, 40))
    assert len(got) == 6


def test_clients_that_come_and_go_leave_nothing_behind(port):
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(b"GET /stream?every=1 HTTP/1.0\r\n\r\n")
            assert client.recv(1)
    assert get(port, "/image?steps=3")[0] == 200


def test_the_page_shows_the_stream_of_its_seed(port):
    status, kind, body = get(port, "/?seed=7&steps=20")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert b'<img src="/stream?seed=7&amp;steps=20"' in body
    assert b"seed=8&amp;steps=20" in body
    assert b'max="1000"' in body
    assert get(port, "/")[0] == 200


@pytest.mark.parametrize("words", CURL, ids=lambda words: words[-1])
def test_the_readme_s_urls(port, words):
    address = words[-1].removeprefix("http://127.0.0.1:8080")
    assert address != words[-1]
    assert get(port, address)[0] == 200


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/image?seed=x", "seed must be a whole number from 0 to 18446744073709551615, not 'x'"),
        ("/image?seed=18446744073709551616", "seed must"),
        ("/image?seed=-1", "seed must"),
        ("/image?seed=", "seed must"),
        ("/image?seed=%D9%A7", r"seed must be a whole number from 0 to 18446744073709551615, not '\u0667'"),
        ("/image?seed=1&seed=2", "'seed': only seed, steps are allowed, each once"),
        ("/image?steps=0", "steps must be a whole number from 1 to 1000, not '0'"),
        ("/image?steps=1001", "steps must"),
        ("/image?every=5", "'every': only seed, steps are allowed"),
        ("/stream?every=0", "every must"),
        ("/stream?colour=red%0Aand+green", r"'colour': only seed, steps, every are allowed"),
        ("/?seed=<script>", "seed must"),
    ],
)
def test_a_bad_query_is_400_and_one_line(port, path, says):
    status, kind, body = get(port, path)
    assert (status, kind) == (400, "text/plain; charset=utf-8")
    assert body.count(b"\n") == 1
    assert body.decode().startswith(says)


def test_elsewhere_is_nothing(port):
    assert get(port, "/etc/passwd")[0] == 404
    assert get(port, "//[")[0] == 404


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_in_the_middle_of_a_chain(number, code):
    with (
        started(GAUSSIAN_ONNX) as (process, port),
        socket.create_connection(("127.0.0.1", port), timeout=30) as client,
    ):
        client.sendall(b"GET /stream?every=1 HTTP/1.0\r\n\r\n")
        assert client.recv(1)
        process.send_signal(number)
        process.wait(30)
    assert process.returncode == code
    assert f"exit code {code}" in README or f"with {code}" in README


def test_what_cannot_be_served_is_said_with_exit_code_2(serve, monkeypatch, capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words in ([tmp_path / "none.onnx"], [GAUSSIAN_ONNX, "--port", port]):
            monkeypatch.setattr("sys.argv", ["serve.py", *map(str, words)])
            assert serve.main() == 2
            said = capsys.readouterr()
            assert said.err.startswith("Error: ")
            assert not said.out
    assert f"cannot listen on 127.0.0.1:{port}" in said.err


# --- who owns the pipeline -------------------------------------------------------------------------------------------


class Toy:
    """A pipeline by hand: what it does for a seed is given."""

    spec = gaussian.SPEC

    def __init__(self, **does):
        self.does = does
        self.begun = threading.Event()

    def generate(self, n, *, seed, steps, batch, cancel, preview):
        assert (n, batch) == (1, 1)
        return self.does.get(f"seed{seed}", lambda *_: np.zeros((1, 8, 8, 3), np.uint8))(self, cancel, preview)

    def for_ever(self, cancel, preview):
        step = ddpmx.Preview(0, *np.zeros((2, 1, 3, 8, 8), np.float32))
        while not cancel():
            self.begun.set()
            if preview is not None:
                preview(0, step)
            time.sleep(0)  # lets other threads run
        raise Cancelled("stopped")


@contextlib.contextmanager
def served(serve, pipeline):
    """(port, what ended the worker) of a server in this process."""
    ends = []

    def worker():
        try:
            serve.work(pipeline, server.jobs)
        except Exception as error:
            ends.append(error)

    with serve.Server(("127.0.0.1", 0), pipeline.spec) as server:
        threads = [threading.Thread(target=server.serve_forever, args=(0.01,)), threading.Thread(target=worker)]
        for thread in threads:
            thread.start()
        try:
            yield server.server_port, ends
        finally:
            server.jobs.put(None)  # no job: that ends the worker, if nothing else did
            server.shutdown()
            for thread in threads:
                thread.join(30)
            assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("path", ["/image", "/stream?every=1"])
def test_a_client_that_hangs_up_frees_the_worker(serve, path):
    pipeline = Toy(seed0=Toy.for_ever)
    with served(serve, pipeline) as (port, _):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert pipeline.begun.wait(30)
            assert path == "/image" or client.recv(1)
        assert get(port, "/image?seed=1")[0] == 200, "the first chain would never have ended"


@pytest.mark.parametrize("path", ["/image?seed=7&steps=50", "/stream?seed=7&steps=50"])
def test_a_client_that_only_closes_its_sending_side_gets_its_image(port, path):
    """As `nc -N` does."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        client.shutdown(socket.SHUT_WR)
        head, _, body = b"".join(iter(lambda: client.recv(1 << 16), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 ")
    assert head.count(b"HTTP/1.0") == 1
    shown = pixels(body) if path.startswith("/image") else parts(body)[-1]
    np.testing.assert_array_equal(shown, expected(7, 50))


def test_connections_have_a_limit(serve):
    with served(serve, Toy()) as (port, _), contextlib.ExitStack() as stack:
        before = threading.active_count()
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            for _ in range(serve.CONNECTIONS)
        ]
        deadline = time.monotonic() + 30
        while threading.active_count() < before + serve.CONNECTIONS and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(3):
            assert get(port, "/image") == (503, "text/plain", b"%d others are connected\n" % serve.CONNECTIONS)
        assert threading.active_count() == before + serve.CONNECTIONS
        for client in silent:
            client.close()
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert get(port, "/image")[0] == 200


def test_numbers_that_are_not_finite_end_one_request(serve):
    def fails(*_):
        raise NumericError("the network's output at t = 3 is not finite", note="step 1 of 2")

    with served(serve, Toy(seed0=fails)) as (port, ends):
        for path in ("/image", "/stream"):
            assert get(port, path) == (
                500,
                "text/plain; charset=utf-8",
                b"the network's output at t = 3 is not finite\n",
            )
        assert get(port, "/image?seed=1")[0] == 200
        assert ends == []


def test_a_gpu_that_fails_ends_the_server_and_the_client_hears_of_it(serve):
    error = BackendError("the GPU does not answer")

    def fails(*_):
        raise error

    with served(serve, Toy(seed0=fails)) as (port, ends):
        assert get(port, "/stream")[::2] == (500, b"the GPU does not answer\n")
    assert ends == [error]


def test_a_queue_has_an_end(serve):
    with serve.Server(("127.0.0.1", 0), gaussian.SPEC) as server:  # and nobody works
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for _ in range(serve.WAITING):
            server.jobs.put_nowait(None)
        status, _, body = get(server.server_port, "/image")
        server.shutdown()
    assert (status, body) == (503, b"16 others are waiting\n")


# --- a plan that fits ------------------------------------------------------------------------------------------------


@pytest.fixture
def builder(monkeypatch):
    """What trt_build.build was called with; it writes a plan for this machine, unless that is there."""
    calls = []

    def build(onnx, output, options):
        calls.append((onnx.name, options))
        reused = output.exists() and output.read_bytes() == plan_of(RECORD)
        output.write_bytes(plan_of(RECORD))
        return trt_build.Built(None, 1.0, reused, "")

    monkeypatch.setattr(trt_build, "build", build)
    return calls


def drawn(pipeline):
    with pipeline:
        return pipeline.generate(1, seed=7, steps=20, batch=1)[0]


def test_a_plan_that_fits_is_not_built(jetson, fitting, builder, plan):
    np.testing.assert_array_equal(drawn(fitting.open_pipeline(plan, plan.with_suffix(".onnx"))), expected(7, 20))
    assert builder == []


@pytest.mark.parametrize("there", [False, True], ids=["missing", "of another TensorRT"])
def test_a_plan_that_is_missing_or_does_not_fit_is_built(jetson, fitting, builder, tmp_path, capsys, there):
    path = tmp_path / "model.plan"
    if there:
        path.write_bytes(plan_of(OTHER))
    np.testing.assert_array_equal(drawn(fitting.open_pipeline(path, tmp_path / "model.onnx")), expected(7, 20))
    ((name, options),) = builder
    assert (name, options.batch) == ("model.onnx", (1, 1, 4))
    assert options == (dataclasses.replace(fitting.SMALL, workspace=256 << 20, level=3) if there else fitting.SMALL)
    assert f"building it from {tmp_path / 'model.onnx'}" in capsys.readouterr().out


def test_what_a_new_plan_does_not_mend_is_an_error(jetson, fitting, builder, plan):
    jetson.refuse = {"deserialize"}
    with pytest.raises(BackendError, match="cannot make the engine"):
        fitting.open_pipeline(plan, plan.with_suffix(".onnx"))
    assert builder == [], "it fits, and another one would be no better"


def test_the_cpu_never_stands_in_for_a_gpu(jetson, serve, fitting, builder, plan, monkeypatch, capsys):
    monkeypatch.setattr(trt, "gpus", lambda: Gpus(trouble=NO_GPU.trouble))
    monkeypatch.setattr("sys.argv", ["serve.py", str(plan)])
    assert serve.main() == 2, "although model.onnx lies beside it"
    said = capsys.readouterr()
    assert "there is none here" in said.err
    assert (said.out, builder) == ("", [])


@pytest.mark.parametrize("words", SERVE, ids=" ".join)
def test_the_readme_s_server_runs_the_plan(jetson, serve, plan, words, monkeypatch, capsys):
    def stopped(pipeline, jobs):
        raise KeyboardInterrupt

    monkeypatch.chdir(plan.parent)
    monkeypatch.setattr("sys.argv", ["serve.py", *words, "--port", "0"])
    monkeypatch.setattr(serve, "work", stopped)
    assert serve.main() == 130
    assert re.match(r"http://127.0.0.1:\d+/ by TensorRT 10.3.0.26 on Orin, SM 8.7, executor", capsys.readouterr().out)


def test_images_and_streams_of_a_plan(jetson, serve, plan):
    with ddpmx.load(plan) as pipeline, served(serve, pipeline) as (port, _):
        for _ in range(2):
            np.testing.assert_array_equal(pixels(get(port, "/image?seed=7&steps=20")[2]), expected(7, 20))
            np.testing.assert_array_equal(parts(get(port, "/stream?seed=8&steps=20")[2])[-1], expected(8, 20))
