"""The chain in Triton's Python backend: ``model.py`` of a repository that ``ddpmx triton`` wrote is this.

Requests that Triton hands over together, and the rows of one request, share the network's batch, each at its own timestep.
Images are those of ``ddpmx generate`` with the same seed and ``--batch``, byte for byte.

Source of the interface: triton-inference-server/python_backend, README and ``triton_python_backend_utils``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.open import open_model
from ddpmx.diffusion.samplers import Sampler
from ddpmx.errors import BackendError, Cancelled, DdpmxError, InputError
from ddpmx.formats import model_file
from ddpmx.sampling.request import Sampling
from ddpmx.serve.batcher import Batcher, Ticket

LOOK_SECONDS = 0.25
"""Between two looks at whether a client has gone."""


@dataclass
class _Asked:
    """A request: a ticket for each of its rows, or what was wrong with it."""

    request: Any
    tickets: list[Ticket]
    error: DdpmxError | None = None

    def cancel(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()


class TritonPythonModel:
    """What Triton calls, in a process for each instance."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the model.

        Args:
            args: ``model_config`` (JSON), ``model_repository`` (this model's folder), ``model_version``,
                ``model_instance_kind`` and ``model_instance_device_id``, among others.

        Raises:
            DdpmxError: it cannot be opened. Triton then says why, and does not serve it.
        """
        import triton_python_backend_utils

        self._utils: Any = triton_python_backend_utils
        config = json.loads(args["model_config"])
        values = {key: value["string_value"] for key, value in config["parameters"].items()}
        if args.get("model_instance_kind") == "GPU":
            _use_gpu(int(args["model_instance_device_id"]))
        folder = Path(args["model_repository"]) / args["model_version"]
        spec = folder / "spec.json"
        found, backend = open_model(
            folder / values["file"],
            spec=model_file.read_spec(spec) if spec.is_file() else None,
            providers=[values["provider"]],
            threads=int(values["threads"]),
        )
        try:
            self._batcher = Batcher(found, backend, batch=int(values["batch"]))
        except BaseException:
            backend.close()
            raise
        self._most_images = int(values["most_images"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Draw what these requests ask for; a response for each, in their order."""
        asked = [self._asked(request) for request in requests]
        return [self._answer(each) for each in asked]

    def finalize(self) -> None:
        """Close the model."""
        self._batcher.close(drain=False)

    def _asked(self, request: Any) -> _Asked:
        asked = _Asked(request, [])
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            rows = [_row(inputs, row) for row in range(len(inputs["seed"]))]
            if len({row["n"] for row in rows}) > 1:
                raise InputError("n differs between the rows of a request", hint="a request for each")
            if (total := sum(row["n"] for row in rows)) > self._most_images:
                raise InputError(f"{total} images in a request", note=f"the most is {self._most_images}")
            for row in rows:
                asked.tickets.append(self._submit(row))
        except DdpmxError as error:
            asked.cancel()
            asked.error = error
        return asked

    def _submit(self, row: dict[str, Any]) -> Ticket:
        spec, n, labels = self._batcher.spec, row["n"], row["labels"]
        sampling = Sampling.chosen(spec.timesteps, sampler=cast("Sampler | None", row["sampler"]), steps=row["steps"])
        if labels is None and spec.classes is not None and not spec.null_class:
            raise InputError(f"missing labels: the model has {spec.classes} classes")
        if labels is not None:  # in turns by the image's index, as for ddpmx generate
            labels = [labels[index % len(labels)] for index in range(row["first"], row["first"] + n)]
        return self._batcher.submit(
            n, seed=row["seed"], first=row["first"], labels=labels, guidance=row["guidance"], sampling=sampling
        )

    def _answer(self, asked: _Asked) -> Any:
        try:
            if asked.error is not None:
                raise asked.error
            images = np.stack([_result(ticket, asked) for ticket in asked.tickets])
        except DdpmxError as error:
            asked.cancel()
            return self._utils.InferenceResponse(output_tensors=[], error=self._error(error))
        return self._utils.InferenceResponse(output_tensors=[self._utils.Tensor("images", images)])

    def _error(self, error: DdpmxError) -> Any:
        """An error for the client; servers before 23.05 know no codes."""
        kinds = ((InputError, "INVALID_ARG"), (Cancelled, "CANCELLED"))
        name = next((name for kind, name in kinds if isinstance(error, kind)), "INTERNAL")
        code = getattr(self._utils.TritonError, name, None)
        return self._utils.TritonError(str(error)) if code is None else self._utils.TritonError(str(error), code)


def _row(inputs: Mapping[str, NDArray[Any]], row: int) -> dict[str, Any]:
    """One row of a request, with the defaults of what it leaves open."""

    def value(name: str) -> Any:
        if name not in inputs:
            return None
        (found,) = inputs[name][row].tolist()
        return found

    sampler, labels = value("sampler"), inputs.get("labels")
    if isinstance(sampler, bytes):
        sampler = sampler.decode("utf-8", "replace")
    n = value("n")
    if n is not None and n < 1:
        raise InputError(f"n must be a whole number from 1 to 2**32, not {n}")
    if labels is not None and not labels.shape[1]:
        raise InputError("labels are empty", hint="leave them out, or pass one for each image")
    guidance = value("guidance")
    return {
        "seed": value("seed"),
        "n": 1 if n is None else n,
        "first": value("first") or 0,
        "steps": value("steps"),
        "sampler": sampler or None,
        "labels": None if labels is None else labels[row].tolist(),
        "guidance": 1.0 if guidance is None else guidance,
    }


def _result(ticket: Ticket, asked: _Asked) -> NDArray[np.uint8]:
    """The images of a row. A client that has gone away cancels them."""
    is_cancelled = getattr(asked.request, "is_cancelled", None)  # of servers from 23.10 on
    while True:
        try:
            return ticket.result(timeout=LOOK_SECONDS)
        except TimeoutError:
            if is_cancelled is not None and is_cancelled():
                asked.cancel()


def _use_gpu(number: int) -> None:
    """Make this process see one GPU, of those that the server sees. It has not touched any yet."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = seen.split(",") if seen else None
    if devices is not None and number >= len(devices):
        raise BackendError(f"there is no GPU {number}", note=f"CUDA_VISIBLE_DEVICES is {seen}")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(number) if devices is None else devices[number]
