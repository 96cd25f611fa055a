"""The HTTP service: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddpmx import Pipeline, Sampling
from ddpmx.formats.png_text import read_png_text
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import from_uint8
from ddpmx.serve.batcher import Batcher
from ddpmx.tasks.variations import variations
from oracles import conditioning, gaussian
from oracles.toy_backend import ToyBackend

pytest.importorskip("fastapi", reason="not verified here: ddpmx serve (there is no FastAPI)")
from fastapi.testclient import TestClient

from ddpmx.serve.app import Limits, Service, make_app

SPEC = gaussian.SPEC


class Gated(ToyBackend):
    """Waits in each call while its gate is shut."""

    def __init__(self, **kind) -> None:
        super().__init__(**kind)
        self.gate = threading.Event()
        self.gate.set()

    def enqueue(self) -> None:
        self.gate.wait(5)
        super().enqueue()


@pytest.fixture
def serve():
    """Makes (client, service) of a backend; ends them with the test."""
    opened = []

    def make(backend=None, *, spec=SPEC, waiting=64, hosts=None, **options):
        service = Service(
            Batcher(spec, backend or ToyBackend(), batch=4, waiting=waiting), model="a" * 64, name="toy", **options
        )
        client = TestClient(make_app(service, hosts=hosts), raise_server_exceptions=False)
        client.__enter__()
        opened.append((client, getattr(backend, "gate", threading.Event())))
        return client, service

    yield make
    for client, gate in opened:
        gate.set()  # also after a failure: what waits at it would hold up the end
        client.__exit__(None, None, None)


def drawn(n, **options):
    sampling = Sampling.chosen(SPEC.timesteps, steps=options.pop("steps", 9))
    with Pipeline(SPEC, ToyBackend()) as pipeline:
        return pipeline.generate(n, batch=4, sampling=sampling, **options)


def test_one_image_is_a_png_that_says_where_it_is_from(serve, tmp_path):
    client, _ = serve()
    answer = client.get("/v1/images?seed=18446744073709551615&first=7&steps=9")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    (tmp_path / "a.png").write_bytes(answer.content)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), drawn(1, seed=2**64 - 1, first=7)[0])
    text = read_png_text(tmp_path / "a.png")[1]
    assert (text["seed"], text["index"], text["steps"], text["sampler"]) == (str(2**64 - 1), "7", "9", "unipc")


def test_several_images_are_a_zip_or_an_npz(serve):
    client, _ = serve()
    wanted = drawn(6, seed=3, first=10)
    for kind in ("png", "webp"):
        answer = client.post("/v1/images", json={"n": 6, "seed": 3, "first": 10, "steps": 9, "format": kind})
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.namelist() == [f"{index:05d}.{kind}" for index in range(10, 16)]
            pictures = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()]
        np.testing.assert_array_equal(np.stack(pictures), wanted)
    answer = client.post("/v1/images", json={"n": 6, "seed": 3, "first": 10, "steps": 9, "format": "npz"})
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content))["images"], wanted)


def test_classes_by_name_take_turns_by_the_image_s_index(serve):
    spec = conditioning.spec_of("classes", class_names=("a", "b", "c", "d", "e"), null_class=True)

    class Toy(ToyBackend):
        def enqueue(self) -> None:
            self.buffers.out[...] = 0.5 * self.buffers.x + conditioning.effect(self.buffers.inputs())

    client, _ = serve(Toy(), spec=spec)
    answer = client.get("/v1/images?n=3&first=1&labels=b&labels=4&guidance=2&format=npz")
    with Pipeline(spec, Toy()) as pipeline:
        wanted = pipeline.generate(3, first=1, labels=[4, 1, 4], guidance=2, batch=2)
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content))["images"], wanted)
    asked = {"n": 3, "first": 1, "labels": ["b", 4], "guidance": 2, "format": "npz"}
    answer = client.post("/v1/images", json=asked)
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content))["images"], wanted)
    assert client.post("/v1/images", json=asked | {"labels": [True]}).status_code == 422
    assert client.get("/v1/images?labels=f").json() == {
        "detail": "there is no class 'f'",
        "hint": "the model's are a, b, c, d, e",
    }


def base64_of(levels, kind="PNG") -> str:
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


def test_images_between_two_seeds(serve, tmp_path):
    client, _ = serve()
    x = [chain.initial(seed, np.arange(2, 5), SPEC.shape) for seed in (3, 9)]
    for share, weights in ((0, (1, 0)), (0.25, (3, 1)), (1, (0, 1))):
        a, b = np.float32(np.array(weights) / np.linalg.norm(weights))
        wanted = drawn(3, seed=3, first=2, x=a * x[0] + b * x[1])
        answer = client.get(f"/v1/images?n=3&seed=3&first=2&steps=9&towards=9&share={share}&format=npz")
        np.testing.assert_array_equal(np.load(io.BytesIO(answer.content))["images"], wanted)
    np.testing.assert_array_equal(drawn(3, seed=3, first=2, x=x[0]), drawn(3, seed=3, first=2))
    (tmp_path / "a.png").write_bytes(client.get("/v1/images?steps=9&towards=9&share=0.25").content)
    text = read_png_text(tmp_path / "a.png")[1]
    assert (text["seed"], text["towards"], text["share"]) == ("0", "9", "0.25")


def test_variations_of_a_picture(serve):
    client, _ = serve()
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    with Pipeline(SPEC, ToyBackend()) as pipeline:
        wanted = variations(
            pipeline, np.stack([picture] * 3), 0.3, sampling=Sampling.chosen(1000, steps=9), seed=5, first=1, batch=4
        )
    ask = {"n": 3, "seed": 5, "first": 1, "steps": 9, "init": base64_of(picture), "strength": 0.3}
    answer = client.post("/v1/images", json={**ask, "format": "npz"})
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content))["images"], wanted)
    kind, last = list(events(client.post("/v1/events", json=ask).text))[-1]
    assert kind == "drawn"
    assert base64.b64decode(last["levels"]) == wanted.tobytes()
    gif = base64_of(picture, "GIF")
    for changes, fact in (
        ({"init": base64_of(picture[:7])}, "it is 7×8 (height×width), and the model takes 8×8"),
        ({"init": gif}, "init: no PNG, JPEG or WebP"),
        ({"init": "no base64!"}, "init"),
        ({"init": None}, "strength is of init"),
        ({"towards": 3}, "exclude each other"),
        ({"strength": 0}, "strength"),
        ({"cond": base64_of(picture)}, "the model takes no condition"),
    ):
        answer = client.post("/v1/images", json=ask | changes)
        assert answer.status_code == 422, answer.text
        assert fact in answer.json()["detail"]


def test_a_condition_is_a_picture_of_any_size(serve):
    spec = conditioning.spec_of("condition", condition=3)

    class Toy(ToyBackend):
        def enqueue(self) -> None:
            self.buffers.out[...] = 0.5 * self.buffers.x + conditioning.effect(self.buffers.inputs())

    client, _ = serve(Toy(), spec=spec)
    levels = np.full((40, 40, 3), (10, 200, 90), np.uint8)
    with Pipeline(spec, Toy()) as pipeline:
        cond = np.broadcast_to(from_uint8(levels[0, 0])[:, None, None], (2, *spec.shape)).astype(np.float32)
        sampling = Sampling.chosen(spec.timesteps, steps=9)
        wanted = pipeline.generate(2, cond=np.ascontiguousarray(cond), batch=4, sampling=sampling)
    answer = client.post("/v1/images", json={"n": 2, "steps": 9, "cond": base64_of(levels), "format": "npz"})
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content))["images"], wanted)
    assert client.get("/v1/images").json()["hint"] == "POST with cond, in base64"
    large = np.zeros((3000, 3000), np.uint8)
    answer = client.post("/v1/images", json={"cond": base64_of(large)})
    assert "more than 4 megapixels" in answer.json()["detail"]


def events(text):
    for block in text.strip().split("\n\n"):
        if not block.startswith(":"):
            kind, data = block.split("\n", 1)
            yield kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_events_show_the_chain_and_end_with_the_images(serve):
    client, _ = serve()
    with Pipeline(SPEC, ToyBackend()) as pipeline:
        sampling = Sampling.chosen(SPEC.timesteps, steps=9)
        times = [step.t for step in pipeline.stream(2, batch=4, sampling=sampling)]
    answer = client.get("/v1/events?n=6&steps=9")
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = list(events(answer.text))
    steps = [data for kind, data in found if kind == "step"]
    assert steps
    assert all(data["t"] == times[data["step"] - 1] and data["steps"] == 9 for data in steps)
    kind, last = found[-1]
    levels = np.frombuffer(base64.b64decode(last["levels"]), np.uint8).reshape(6, 8, 8, 3)
    assert kind == "drawn"
    np.testing.assert_array_equal(levels, drawn(6))
    for data in steps:
        assert len(base64.b64decode(data["levels"])) == data["n"] * SPEC.shape[0] * 64


REFUSED = {
    "n=0": (422, "n"),
    "n=65": (422, "at most 64"),
    "seed=-1": (422, "seed"),
    f"seed={2**64}": (422, "seed"),
    "steps=1001": (422, "steps"),
    "sampler=euler": (422, "sampler"),
    "eta=2": (422, "eta"),
    "guidance=2": (422, "cannot be guided"),
    "labels=1": (422, "no classes"),
    "format=pickle": (422, "format"),
    "what=1": (422, "what"),
    "guidance=nan": (422, "finite"),
    "first=4294967295&n=2": (422, "beyond that"),
    "share=0.5": (422, "towards, which is missing"),
    "towards=1&share=1.5": (422, "share"),
    "init=aGk=": (422, "init"),
}


@pytest.mark.parametrize("query", REFUSED)
def test_what_is_refused(serve, query):
    client, _ = serve()
    for place in ("images", "events"):
        if place == "events" and "format" in query:
            continue
        answer = client.get(f"/v1/{place}?{query}")
        assert answer.status_code == REFUSED[query][0], answer.text
        assert REFUSED[query][1] in json.dumps(answer.json(), ensure_ascii=False)


def test_bodies_that_are_none(serve):
    client, _ = serve()
    for body, status in ((b"{", 422), (b"[]", 422), (b'{"n": "x"}', 422), (b'{"n": 1' + b" " * (1 << 20) + b"}", 413)):
        answer = client.post("/v1/images", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status, (body[:20], answer.text)
    for body in (b'{"n": NaN}', b'{"n": 1e999}', rb'{"n": "\ud800"}', rb'{"\ud800": 1}', b'{"labels": [NaN]}'):
        answer = client.post("/v1/images", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, type(answer.json()["detail"])) == (422, str), (body, answer.text)
    assert client.get("/v1/../../etc/passwd").status_code == 404
    assert client.get("/worker.js%00").status_code == 404


def test_a_key_and_the_names_of_the_host(serve):
    client, _ = serve(key="correct horse", hosts=["127.0.0.1", "testserver"])
    assert client.get("/v1/images?steps=2").status_code == 401
    assert client.get("/v1/images?steps=2", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/v1/images?steps=2", headers={"Authorization": "Bearer correct horse"}).status_code == 200
    assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/healthz").status_code == 200


def test_too_many_wait_and_a_deadline(serve):
    backend = Gated()
    client, service = serve(backend, waiting=6, limits=Limits(seconds=0.3))
    backend.gate.clear()
    other = service.batcher.submit(4, sampling=Sampling(steps=9))  # all of the batch
    for _ in range(1000):  # until it has its place
        if service.batcher.active == 4:
            break
        time.sleep(0.01)
    late = client.get("/v1/images?n=5&steps=9")
    assert (late.status_code, late.json()) == (504, {"detail": "not finished after 0.3 s"})
    service.batcher.submit(6, sampling=Sampling(steps=9))
    busy = client.get("/v1/images?n=1&steps=9")
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "5")
    assert client.get("/v1/events?steps=9").status_code == 429
    other.cancel()
    backend.gate.set()
    assert client.get("/healthz").status_code == 200


def test_figures_and_the_end(serve):
    client, service = serve()
    client.get("/v1/images?n=3&steps=4")
    client.get("/v1/images?guidance=2")
    client.get("/v1/events?guidance=2")
    text = client.get("/metrics").text
    for line in (
        'ddpmx_requests_total{outcome="drawn"} 1.0',
        'ddpmx_requests_total{outcome="invalid"} 2.0',
        "ddpmx_images_total 3.0",
        "ddpmx_images_waiting 0.0",
        "ddpmx_rows_active 0.0",
        "ddpmx_request_seconds_count 1.0",
    ):
        assert line in text, text
    assert client.get("/readyz").json() == {"ready": True}
    assert {"/v1/images", "/v1/events", "/healthz", "/metrics"} <= set(client.get("/openapi.json").json()["paths"])
    service.batcher.close()
    assert client.get("/v1/images").status_code == 503
    assert client.get("/readyz").status_code == 503


def test_a_network_that_breaks_is_500_and_no_longer_ready(serve):
    client, _ = serve(ToyBackend(poison=(999, np.nan)))
    answer = client.get("/v1/images?steps=3")
    assert answer.status_code == 500
    assert answer.json()["detail"] == "the network's output at t = 999 is not finite"
    assert client.get("/readyz").status_code == 200  # of that request alone
    assert list(events(client.get("/v1/events?steps=3").text))[-1][0] == "fault"


def test_the_page_asks_this_host_alone(serve):
    client, _ = serve()
    for name, kind in (
        ("", "text/html"),
        ("page.css", "text/css"),
        ("page.js", "text/javascript"),
        ("worker.js", "text/javascript"),
    ):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "://" not in answer.text
    model = client.get("/model.json").json()
    assert model["name"] == "toy"
    assert all(set(chain) == {"sampler"} for chain in model["chains"].values())
