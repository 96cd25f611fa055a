"""The runs that ``peers.py`` compares, each in a process of its own, and the protocol of that process.

``python peers_runs.py JOB`` with a job as JSON reads one request per line, ``{"do": "load"}``, and replies with one line:
the result, or ``{"error": …}``. Arrays travel as .npz files. Standard output carries only replies; the output of libraries
goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `oracles` and `benchmarks`

SPACING = "leading"  # diffusers' default; at S = T there is only one

Float32 = NDArray[np.float32]


class Ddpmx:
    """ddpmx on an ONNX file, a plan or an MNN model."""

    def __init__(self, job: dict[str, Any]) -> None:
        import ddpmx

        self.job = job
        self.backend: Any = None
        self.versions = {"ddpmx": ddpmx.__version__}
        if Path(job["file"]).suffix == ".onnx":
            import onnxruntime

            self.versions["onnxruntime"] = onnxruntime.__version__
        if Path(job["file"]).suffix == ".mnn":
            from ddpmx.mnn import library

            self.versions["MNN"] = library.load().version()

    def load(self) -> str:
        from ddpmx import load

        self.pipeline = load(self.job["file"], **self._how())
        self.about = self.pipeline.spec.to_json()
        if "MNN" in self.versions:  # which makes its copies later, as many as a batch has parts
            return f"MNN {self.versions['MNN']}, CPU, threads: {self.job['threads']} at most"
        return self.pipeline.backend

    def _how(self) -> dict[str, Any]:
        """The options of ddpmx. A plan runs on TensorRT, by the executor that ddpmx chooses."""
        from ddpmx.formats.model_file import identify

        if identify(self.job["file"]) == "plan":
            return {}
        return {"providers": (self.job["device"],), "threads": self.job["threads"]}

    def eps(self, x: Float32, t: int) -> Float32:
        from ddpmx.backends.base import Buffers
        from ddpmx.backends.open import open_model

        if self.backend is None:  # a pipeline gives images, not ε: the file is opened once more
            _, self.backend = open_model(self.job["file"], **self._how())
        buffers = Buffers.of(len(x), x.shape[1:])
        buffers.x[...], buffers.t[...] = x, t
        self.backend.bind(buffers)
        self.backend.enqueue()
        return buffers.out

    def draw(self, batch: int, steps: int, seed: int) -> NDArray[Any]:
        return self.pipeline.generate(batch, seed=seed, batch=batch, steps=steps, spacing=SPACING)


class OnTorch(Ddpmx):
    """ddpmx with torch as its network, captured in the chain's stream: diffusers' kernels, without their launches."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        import ddpmx

        self.job, self.torch = job, torch
        self.backend: Any = None
        self.versions = {"ddpmx": ddpmx.__version__, "torch": torch.__version__}

    def load(self) -> str:
        from ddpmx.backends.base import CopyingBackend
        from ddpmx.device.driver import Driver
        from ddpmx.pipeline import Pipeline
        from gpu.torch_network import TorchDevice, of_checkpoint

        spec, call = of_checkpoint(self.job["checkpoint"], self.job["precision"])
        self.backend = CopyingBackend(TorchDevice(Driver(), self.torch, spec, call, largest=max(self.job["batches"])))
        self.pipeline, self.about = Pipeline(spec, self.backend.share()), spec.to_json()
        return self.pipeline.backend


class Loop:
    """A simple hand-written chain: a call of some runtime per step, NumPy's noise, new arrays everywhere.

    Args:
        module: of the runtime, imported here.
    """

    def __init__(self, module: str, job: dict[str, Any]) -> None:
        from ddpmx.formats.spec import ModelSpec

        self.job, self.module = job, module
        self.versions = {module: importlib.import_module(module).__version__}
        spec = ModelSpec.from_json(job["spec"])
        if spec.prediction != "eps":
            raise ValueError(f"this loop is written for ε, and the file predicts {spec.prediction}")
        self.spec, self.alpha_bar = spec, np.cumprod(1 - spec.make_schedule().betas)

    def load(self) -> str:
        """Open the file as ``runtimes.py`` does."""
        from benchmarks.runtimes import RUNTIMES

        _, self.call = RUNTIMES[self.module][1](self.job["file"], "eps", self.job["threads"])
        return f"{self.module}, CPU"

    def eps(self, x: Float32, t: int) -> Float32:
        out: Float32 = self.call(x, np.full(len(x), t, np.int32))
        return out

    def step(self, t: int, previous: int, x: Float32, eps: Float32, rng: np.random.Generator) -> Float32:
        now = float(self.alpha_bar[t])
        before = float(self.alpha_bar[previous]) if previous >= 0 else 1.0
        alpha = now / before
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        if self.spec.clip is not None:
            x0 = np.clip(x0, -self.spec.clip, self.spec.clip)
        x = before**0.5 * (1 - alpha) / (1 - now) * x0 + alpha**0.5 * (1 - before) / (1 - now) * x
        if previous < 0:
            return x
        large = self.spec.variance == "fixed_large"
        variance = 1 - alpha if large else (1 - alpha) * (1 - before) / (1 - now)
        return x + variance**0.5 * rng.standard_normal(x.shape, np.float32)

    def walk(self, timesteps: list[int], x: Float32, eps: Float32) -> tuple[Float32, Float32]:
        steps, noise = [], []
        for t, previous, x_t, out in zip(timesteps, [*timesteps[1:], -1], x, eps, strict=True):
            steps.append(self.step(t, previous, x_t, out, np.random.default_rng(t)))
            noise.append(np.random.default_rng(t).standard_normal(x_t.shape, np.float32))
        return np.stack(steps), np.stack(noise)

    def draw(self, batch: int, steps: int, seed: int) -> NDArray[Any]:
        rng = np.random.default_rng(seed)
        timesteps = [i * (self.spec.timesteps // steps) for i in range(steps)][::-1]
        x = rng.standard_normal((batch, *self.spec.shape), np.float32)
        for t, previous in zip(timesteps, [*timesteps[1:], -1], strict=True):
            x = self.step(t, previous, x, self.eps(x, t), rng)
        return np.round((x.transpose(0, 2, 3, 1).clip(-1, 1) + 1) * 127.5).astype(np.uint8)


class OrtLoop(Loop):
    """The same over ``session.run``, on a GPU too."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__("onnxruntime", job)

    def load(self) -> str:
        import onnxruntime

        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[self.job["device"]]
        if provider not in onnxruntime.get_available_providers():
            raise RuntimeError(f"onnxruntime {onnxruntime.__version__} has no {provider}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.job["threads"]
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(self.job["file"], options, providers=[provider])
        if self.session.get_providers()[0] != provider:
            raise RuntimeError(f"{provider} did not start")
        return f"onnxruntime {onnxruntime.__version__}, {provider}"

    def eps(self, x: Float32, t: int) -> Float32:
        out: Float32 = self.session.run(["eps"], {"x": x, "t": np.full(len(x), t, np.int32)})[0]
        return out


class Diffusers:
    """diffusers' DDPMPipeline as its documentation runs it, the progress bar off and images left as arrays."""

    def __init__(self, job: dict[str, Any]) -> None:
        import diffusers
        import torch

        self.job, self.torch = job, torch
        self.versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        torch.set_num_threads(job["threads"])
        torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions; the other runs keep float32 too

    def load(self) -> str:
        from diffusers import DDPMPipeline
        from safetensors.torch import load_file

        from ddpm_export.networks.unet import UNetConfig

        dtype = {"fp32": self.torch.float32, "fp16": self.torch.float16}[self.job["precision"]]
        unet = as_diffusers(UNetConfig.from_json(self.job["network"]), load_file(self.job["weights"]))
        pipeline = DDPMPipeline(unet, ddpm_scheduler(self.job["spec"])).to(self.job["device"], dtype)
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline
        return f"torch {self.torch.__version__}, {self.job['device']}"

    def eps(self, x: Float32, t: int) -> Float32:
        """The same call as in the pipeline."""
        unet, torch = self.pipeline.unet, self.torch
        with torch.no_grad():
            out = unet(torch.from_numpy(x).to(unet.device, unet.dtype), torch.tensor(t)).sample
        eps: Float32 = out.float().cpu().numpy()
        return eps

    def walk(self, timesteps: list[int], x: Float32, eps: Float32) -> tuple[Float32, Float32]:
        torch, scheduler = self.torch, ddpm_scheduler(self.job["spec"])
        scheduler.set_timesteps(len(timesteps))
        if scheduler.timesteps.tolist() != timesteps:
            raise RuntimeError(f"diffusers walks {scheduler.timesteps.tolist()[:5]}…, ddpmx {timesteps[:5]}…")
        steps, noise = [], []
        for t, x_t, out in zip(scheduler.timesteps, torch.from_numpy(x), torch.from_numpy(eps), strict=True):
            drawn = [torch.Generator().manual_seed(int(t)) for _ in range(2)]
            steps.append(scheduler.step(out, t, x_t, generator=drawn[0]).prev_sample.numpy())
            noise.append(torch.randn(x_t.shape, generator=drawn[1]).numpy())
        return np.stack(steps), np.stack(noise)

    def draw(self, batch: int, steps: int, seed: int) -> NDArray[Any]:
        generator = self.torch.Generator(self.job["device"]).manual_seed(seed)
        images: NDArray[Any] = self.pipeline(
            batch, generator=generator, num_inference_steps=steps, output_type="np"
        ).images
        return images


class Compiled(Diffusers):
    """The same pipeline, its network compiled: on a GPU with CUDA graphs, one for every batch."""

    def __init__(self, job: dict[str, Any]) -> None:
        compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
        if job["device"] == "cpu" and not any(name and shutil.which(name) for name in compilers):
            raise RuntimeError("torch.compile: no C++ compiler")
        super().__init__(job)

    def load(self) -> str:
        on = super().load()
        mode = "reduce-overhead" if self.job["device"] == "cuda" else None
        # dynamic=False: each batch size gets code of its own, the fastest that torch makes
        unet = self.torch.compile(self.pipeline.unet, mode=mode, dynamic=False)
        if mode:
            # the pipeline keeps t on the CPU, and a network with an input there gets no CUDA graph
            inner = unet.forward
            unet.forward = lambda sample, t: inner(sample, t.to(sample.device))
        self.pipeline.unet = unet
        return f"{on}, torch.compile{f' ({mode})' if mode else ''}"


class Source:
    """The common source of all runs: our network, its weights, its ONNX files, and its output in float32 on the CPU."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        self.job, self.torch, self.versions = job, torch, {"torch": torch.__version__}
        torch.set_num_threads(job["threads"])

    def load(self) -> str:
        from safetensors.torch import save_file

        from ddpm_export.networks.unet import UNet, cifar10
        from ddpmx.formats.spec import ModelSpec
        from oracles.random_weights import rerandomise

        if self.job["checkpoint"]:
            from ddpm_export.training.checkpoint import load_network

            network, spec = load_network(self.job["checkpoint"])
        else:
            network = UNet(small_network() if self.job["small"] else cifar10())
            rerandomise(network)
            spec = ModelSpec((network.config.in_channels, *network.config.size))
        self.network = network.eval().requires_grad_(False)
        save_file(self.network.state_dict(), self.job["weights"])
        if self.job["onnx"]:
            from ddpm_export.graph.onnx_export import export_network
        for precision, path in self.job["onnx"].items():
            export_network(self.network, spec, path, precision=precision)
        self.about = network.config.to_json()
        return str(sum(parameter.numel() for parameter in network.parameters()))

    def eps(self, x: Float32, t: int) -> Float32:
        torch = self.torch
        eps: Float32 = self.network(torch.from_numpy(x), torch.full((len(x),), t, dtype=torch.int32)).numpy()
        return eps


class Plan:
    """Builds a plan as ``ddpmx build`` does by default, but for all batch sizes of the benchmark."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.versions: dict[str, str] = {}

    def load(self) -> str:
        from ddpmx.formats.onnx_file import onnx_spec, read_onnx
        from ddpmx.trt.build import BuildOptions, build, default_batch

        spec = onnx_spec(Path(self.job["onnx"]), read_onnx(Path(self.job["onnx"])), None)
        low, best, high = default_batch(spec.shape)
        batch = low, best, max(high, *self.job["batches"])
        built = build(self.job["onnx"], self.job["file"], BuildOptions(batch=batch))
        return f"{built.info.flavour} {built.info.version}, batch {batch}, built in {built.seconds:.1f} s"


class MnnModel:
    """Makes an MNN model as ``ddpmx build --for mnn`` does."""

    def __init__(self, job: dict[str, Any]) -> None:
        from ddpmx.mnn import library

        self.job = job
        self.versions = {"MNN": library.load().version()}

    def load(self) -> str:
        from ddpmx.mnn.build import build

        built = build(self.job["onnx"], self.job["file"], low_memory=self.job["low_memory"])
        record = built.info.record
        return f"MNN {record.version}, parts of {record.part}, memory {record.memory}, made in {built.seconds:.1f} s"


def small_network() -> Any:
    """The network of ``--small``: 1.1 million parameters."""
    from ddpm_export.networks.unet import UNetConfig

    return UNetConfig(3, 3, (16, 16), 32, (1, 2, 2), 1, (8,), 0.0, 8)


def as_diffusers(config: Any, state: dict[str, Any]) -> Any:
    """diffusers' network of the same configuration with our weights. Each tensor must be used."""
    from oracles.diffusers_unet import names, twin

    model = twin(config)
    theirs = model.state_dict()
    left = dict(state)
    for ours, name in names(config).items():
        for part in ("weight", "bias"):
            if (tensor := left.pop(f"{ours}.{part}", None)) is not None:
                key = f"{name}.{part}"
                theirs[key] = tensor.reshape(theirs[key].shape)  # attention: 1×1 convolutions here, dense layers there
    assert not left, sorted(left)
    model.load_state_dict(theirs)
    return model


def ddpm_scheduler(values: dict[str, Any]) -> Any:
    """diffusers' scheduler for a ModelSpec as JSON."""
    from diffusers import DDPMScheduler

    from ddpmx.formats.spec import ModelSpec

    spec = ModelSpec.from_json(values)
    betas: dict[str, Any] = {"trained_betas": spec.make_schedule().betas}
    if spec.schedule == "linear":
        betas = {"beta_schedule": "linear", **spec.schedule_params}
    return DDPMScheduler(
        spec.timesteps,
        **betas,
        variance_type=spec.variance,
        clip_sample=spec.clip is not None,
        clip_sample_range=spec.clip or 1.0,
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[spec.prediction],
        timestep_spacing=SPACING,
    )


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ddpmx": lambda job: (Ddpmx if "file" in job else OnTorch)(job),
    "mnn": Ddpmx,
    "mnn-low": Ddpmx,
    "mnn1": Ddpmx,
    "diffusers": Diffusers,
    "compile": Compiled,
    "ort": OrtLoop,
    "openvino": partial(Loop, "openvino"),
    "ncnn": partial(Loop, "ncnn"),
    "source": Source,
    "plan": Plan,
    "mnn model": MnnModel,
}


# --- the process -----------------------------------------------------------------------------------------------------


def reply_to(run: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request, and return the reply."""
    what = request["do"]
    begun = time.perf_counter()
    if what == "load":
        description = run.load()
        return {"seconds": time.perf_counter() - begun, "description": description, "about": getattr(run, "about", {})}
    if what == "eps":
        with np.load(request["file"]) as arrays:
            x, timesteps = arrays["x"], arrays["t"].tolist()
        first, *rest = timesteps
        begun = time.perf_counter()
        outputs = [run.eps(x, first)]
        seconds = time.perf_counter() - begun
        np.savez(request["out"], eps=np.stack(outputs + [run.eps(x, t) for t in rest]))
        return {"seconds": seconds}
    if what == "walk":
        with np.load(request["file"]) as arrays:
            x_next, z = run.walk(arrays["t"].tolist(), arrays["x"], arrays["eps"])
        np.savez(request["out"], x_next=x_next, z=z)
        return {}
    assert what == "draw", what
    forget_peak()
    begun = time.perf_counter()
    images = run.draw(request["batch"], request["steps"], request["seed"])
    return {"seconds": time.perf_counter() - begun, "rss": peak_rss(), "shape": list(images.shape)}


def forget_peak() -> None:
    """Reset the peak of this process's memory. Where Linux does not allow that, the peak is that of its whole life."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """The peak of this process's resident memory, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(kinds: Mapping[str, Callable[..., Any]], reply_to: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> None:
    """Reply to requests until there are no more.

    Args:
        kinds: what makes a run of the job on the command line, by the job's kind.
        reply_to: the reply to a request other than the first.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    run: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        begun = time.perf_counter()
        try:
            if request["do"] == "start":
                run = kinds[job["kind"]](job)
                reply = {"seconds": time.perf_counter() - begun, "versions": run.versions}
            else:
                reply = reply_to(run, request)
        except Exception as error:  # any error is a reply
            text = f"{error}\n{getattr(error, 'note', None) or ''}".strip()
            reply = {"error": f"{type(error).__name__}: {text}"[:2000]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(KINDS, reply_to)
