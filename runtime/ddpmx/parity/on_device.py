"""What only a GPU can get wrong: the chain that runs there, held against the same network's chain in NumPy."""

from __future__ import annotations

import numpy as np

from ddpmx.backends.base import CopyingBackend
from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.cuda.executors import choose_executor
from ddpmx.cuda.kernels import Kernels
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import BackendError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.check import Check
from ddpmx.sampling import chain
from ddpmx.sampling.conditioning import example
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.sampling.runner import fitting_batch

IMAGES, STEPS, SEED = 3, 20, 0


def checks(backend: CopyingBackend, spec: ModelSpec) -> list[Check]:
    """One for each executor: the uint8 values that differ from NumPy's, of which there must be none.

    The network need not be trained for that. An executor that does not work here is not judged, and says why.

    Args:
        backend: the network. What it had bound is let go of.
        spec: the model.

    Raises:
        BackendError: the network could not be run.
    """
    batch = fitting_batch(backend.device.batches, IMAGES)
    indices = np.arange(min(IMAGES, batch))
    filled = np.concatenate([indices, np.repeat(indices[-1:], batch - len(indices))])
    table = make_table(spec.make_schedule(), spec.prediction, spec.variance, steps=min(STEPS, spec.timesteps))
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
    wanted = to_nhwc(last.x0)[: len(indices)]
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
        ) as made:
            network = device.network(batch, **made.at, conditioning=made.conditioning, stream=made.stream)
            try:
                choose_executor(made, network.enqueue, executor)
                got = made.run(seed=SEED, images=indices, conditioning=example(spec, indices))
            except BackendError as error:
                if executor == "plain":
                    raise
                found.append(Check(name, float("nan"), 0.0, skipped=": ".join(filter(None, (error.fact, error.note)))))
            else:
                differing = float(np.mean(np.asarray(got) != wanted))
                found.append(Check(name, differing, 0.0, worst="" if differing else "equal bit for bit"))
            finally:
                made.unprepare()
                network.close()
    return found
