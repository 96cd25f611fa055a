"""Compares the chain on the GPU with the chain of the same network in NumPy."""

from __future__ import annotations

import numpy as np

from ddpmx.backends.base import CopyingBackend
from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.cuda.executors import choose_executor
from ddpmx.cuda.kernels import Kernels
from ddpmx.errors import BackendError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.check import Check
from ddpmx.parity.free_chain import saturated, too_few
from ddpmx.parity.reference import chain_table
from ddpmx.sampling import chain
from ddpmx.sampling.conditioning import example
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.sampling.runner import fitting_batch

IMAGES, STEPS, SEED = 3, 20, 0


def checks(backend: CopyingBackend, spec: ModelSpec) -> list[Check]:
    """One check per executor: the share of uint8 values that differ from NumPy's, which must be zero.

    The network need not be trained for this. An executor that does not work here is skipped, with the reason.

    Args:
        backend: the network. Its bound buffers are released.
        spec: its description.

    Raises:
        BackendError: the network could not be run.
    """
    batch = fitting_batch(backend.device.batches, IMAGES)
    indices = np.arange(min(IMAGES, batch))
    filled = np.concatenate([indices, np.repeat(indices[-1:], batch - len(indices))])
    table = chain_table(spec, min(STEPS, spec.timesteps))
    start = chain.initial(SEED, filled, spec.shape)
    conditioning = example(spec, filled)
    *_, last = chain.run(
        backend,
        table,
        start,
        seed=SEED,
        images=filled,
        clip=spec.clip,
        conditioning_shapes=spec.conditioning_shapes,
        conditioning=conditioning,
    )
    expected = to_nhwc(last.x0)[: len(indices)]
    backend.release()
    device = backend.device
    found: list[Check] = []
    with device.driver.current():
        kernels = Kernels.of(device.driver)
    for executor in reversed(device.executors):
        name = f"executor {executor} against the chain in NumPy, values that differ"
        with DeviceChain(
            device.driver,
            kernels,
            spec.shape,
            batch,
            table,
            clip=spec.clip,
            conditioning_shapes=spec.conditioning_shapes,
            description=device.description,
            stream=device.stream,
        ) as device_chain:
            network = device.network(
                batch, **device_chain.at, conditioning=device_chain.conditioning, stream=device_chain.stream
            )
            try:
                choose_executor(device_chain, network.enqueue, executor)
                images = device_chain.run(seed=SEED, images=indices, conditioning=example(spec, indices))
            except BackendError as error:
                if executor == "plain":
                    raise
                found.append(Check(name, float("nan"), 0.0, skipped=": ".join(filter(None, (error.fact, error.note)))))
            else:
                mine = np.asarray(images)
                differing = float(np.mean(mine != expected))
                worst = "" if differing else "equal bit for bit"
                if worst and (few := too_few(~saturated(mine, expected))) is not None:
                    worst += f"; but {few}"
                found.append(Check(name, differing, 0.0, worst=worst))
            finally:
                device_chain.unprepare()
                network.close()
    return found
