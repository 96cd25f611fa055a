"""What calibration measures: each layer's largest input, its expected shift, and its part of the error.

A scale is set by the *largest* value over all states, not by a percentile or by the least squared error. Those clip a few
values a little more to round all others less, which is right for one call of a network. In a chain a clipped value is wrong
in the same direction in every step, and that adds up, where roundings average out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from ddpm_export.quantize.convolutions import Convolution, Float64, constant
from ddpm_export.quantize.graph import insert, rounded, set_bias, weight_and_scale
from ddpm_export.quantize.run import Runner
from ddpm_export.quantize.states import States
from ddpmx.errors import NumericError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.reference import chain_table

Sizes = dict[str, tuple[int, int]]
"""Height and width of the input of each convolution, by its name."""


def largest_values(
    model: onnx.ModelProto, layers: Mapping[str, Convolution], states: States
) -> tuple[dict[str, float], Sizes]:
    """The largest |value| of every convolution's input over all states, by the tensor's name; and the inputs' sizes.

    Raises:
        NumericError: a value is not finite.
    """
    names = sorted({one.input for one in layers.values()})
    runner, largest, sizes = Runner(model, names), dict.fromkeys(names, 0.0), {}
    for batch in states:
        for name, values in zip(names, runner(batch, names), strict=True):
            largest[name] = max(largest[name], float(np.abs(values.astype(np.float32)).max()))
            if not np.isfinite(largest[name]):
                raise NumericError(
                    f"an activation at t = {batch['t'][0]} is not finite",
                    note=f"the input {name}, in half precision",
                    hint="export it without --int8 and --fp8",
                )
            for one in layers.values():
                if one.input == name:
                    sizes[one.name] = (int(values.shape[2]), int(values.shape[3]))
    tiny = 1e-6  # a layer that sees nothing but zeros still needs a scale
    return {name: max(value, tiny) for name, value in largest.items()}, sizes


def multiplications(model: onnx.ModelProto, layers: Mapping[str, Convolution], sizes: Sizes) -> dict[str, int]:
    """How many multiplications each convolution makes for one image."""
    found = {}
    for name, one in layers.items():
        rows, columns = one.output_size(*sizes[name])
        found[name] = rows * columns * int(constant(model, one.weight).size)
    return found


def other_multiplications(model: onnx.ModelProto, states: States) -> int:
    """Those of all matrix products for one image: of attention and of the time path."""
    inferred = onnx.shape_inference.infer_shapes(model)
    nodes = [node for node in inferred.graph.node if node.op_type in ("MatMul", "Gemm")]
    if not nodes:
        return 0
    given = {tensor.name: tuple(tensor.dims) for tensor in inferred.graph.initializer}
    names = sorted({name for node in nodes for name in (*node.input[:2], node.output[0]) if name not in given})
    values = Runner(model, names)(states.batches[0], names)
    shapes = {**given, **{name: value.shape for name, value in zip(names, values, strict=True)}}
    batch = len(states.batches[0]["t"])
    return sum(int(np.prod(shapes[node.output[0]])) * int(shapes[node.input[0]][-1]) for node in nodes) // batch


def correct_biases(
    model: onnx.ModelProto,
    result: onnx.ModelProto,
    chosen: Mapping[str, Convolution],
    states: States,
    spec: ModelSpec,
) -> dict[str, float]:
    """Take the expected shift of each layer's output out of its bias (Nagel et al. 2019, section 4.2).

    A rounded weight times the mean of a positive input, what SiLU gives, is a shift of the output that is the same at every
    place and in every step. With W', q for what is rounded it is W'·E[q(x)] − W·E[x], since a convolution is linear.
    The shift differs between small and large t. The mean weighs every t by |A·q| of the sampler's table: by how much of the
    output's error the next state feels.

    Args:
        model: before.
        result: from :func:`~ddpm_export.quantize.graph.insert`; changed in place.
        chosen: its convolutions.
        states: of which the means are.
        spec: of ``result``.

    Returns:
        The RMS of each layer's shift over its channels.
    """
    if not chosen:
        return {}
    names = sorted({one.input for one in chosen.values()})
    runner = Runner(model, names)
    quantised = {name: weight_and_scale(result, name) for name in chosen}
    means: dict[str, list[Float64]] = {name: [] for name in chosen}
    felt = felt_by_t(spec)
    weights = [felt[int(batch["t"][0])] for batch in states]
    for batch in states:
        values = dict(zip(names, runner(batch, names), strict=True))
        for name, one in chosen.items():
            seen = values[one.input]
            patches = (one.mean_patch(rounded(seen, quantised[name][1], spec.precision)), one.mean_patch(seen))
            means[name].append(np.stack(patches))
    moved = {}
    for name, one in chosen.items():
        now, before = np.average(means[name], axis=0, weights=weights)
        weight = constant(model, one.weight)
        shift = one.mean_output(quantised[name][0], now) - one.mean_output(weight, before)
        bias = constant(model, one.bias).astype(np.float64) if one.bias else np.zeros(len(weight))
        set_bias(result, name, bias - shift)
        moved[name] = float(np.sqrt(np.mean(shift**2)))
    return moved


def felt_by_t(spec: ModelSpec) -> dict[int, float]:
    """|A·q| of the sampler's table for every t: what x_{t−1} feels of an error of the output."""
    table = chain_table(spec, spec.timesteps)
    return dict(zip(table.timesteps.tolist(), np.abs(table.rows[:, 2] * table.rows[:, 1]).tolist(), strict=True))


def errors_by_layer(
    model: onnx.ModelProto,
    chosen: Mapping[str, Convolution],
    largest: Mapping[str, float],
    states: States,
    spec: ModelSpec,
    *,
    seconds: float,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The mean squared error that each layer alone makes in x_{t−1}, over states of the chain.

    One layer at a time is in 8 bits, and all others are not. The error of the output is weighted by |A·q| of the sampler's
    table, which is what the next state feels of it. Roundings of different layers have nothing to do with each other, so
    that their squares add up, and each layer's is its part of the whole.

    Args:
        model: before.
        chosen: the layers.
        largest: from :func:`largest_values`.
        states: of the chain.
        spec: of the result.
        seconds: after which no further layer is begun. The last layers come first: they matter most.
        progress: called with (layers done, layers in all).

    Returns:
        By the layer's name; without those for which there was no time.
    """
    felt, own = felt_by_t(spec), states.own
    some = [{name: array[:4] for name, array in batch.items()} for batch in own[:: max(1, len(own) // 8)]]
    outputs = list(spec.outputs)[:1]
    whole = Runner(model)
    expected = [whole(batch, outputs)[0] for batch in some]
    found: dict[str, float] = {}
    begun = time.monotonic()
    for count, name in enumerate(reversed(list(chosen))):
        if time.monotonic() - begun > seconds:
            break
        runner = Runner(insert(model, {name: chosen[name]}, largest, spec.precision))
        total = 0.0
        for batch, right in zip(some, expected, strict=True):
            error = runner(batch, outputs)[0].astype(np.float64) - right
            total += float(np.mean(error**2)) * felt[int(batch["t"][0])] ** 2
        found[name] = total / len(some)
        if progress is not None:
            progress(count + 1, len(chosen))
    return found


def left_in_half(errors: Mapping[str, float], costs: Mapping[str, int], budget: int) -> list[str]:
    """The layers whose errors are largest for their multiplications, as long as the budget of those lasts.

    Args:
        errors: from :func:`errors_by_layer`.
        costs: multiplications of each layer.
        budget: of multiplications that may stay in half precision.

    Returns:
        Their names; only those whose error is above the mean of all.
    """
    usual = float(np.mean(list(errors.values()))) if errors else 0.0
    chosen: list[str] = []
    for name in sorted(errors, key=lambda name: errors[name] / costs[name], reverse=True):
        if errors[name] > usual and costs[name] <= budget:
            chosen.append(name)
            budget -= costs[name]
    return chosen


def correlation(
    before: onnx.ModelProto, after: onnx.ModelProto, states: States, spec: ModelSpec, names: Sequence[str]
) -> dict[str, list[float]]:
    """The error of the output by t: its size, and how much of it is a multiple of the output itself (He et al. 2023, PTQD).

    Args:
        before, after: the graph, and with 8-bit convolutions.
        states: where.
        spec: of the model.
        names: of its outputs; the first is looked at.

    Returns:
        ``t``; ``rms``, the error's, in units of the output's; ``factor`` k of e = k·out + rest; ``share``, of the squared
        error that k explains; ``sigma``, the RMS of the rest in x_{t−1} in units of σ_t.
    """
    table = chain_table(spec, spec.timesteps)
    rows = {int(t): row for t, row in zip(table.timesteps, table.rows, strict=True)}
    first, second = Runner(before), Runner(after)
    sums: dict[int, list[float]] = {}
    for batch in states.own:
        t = int(batch["t"][0])
        right = first(batch, names[:1])[0].astype(np.float64)
        error = second(batch, names[:1])[0].astype(np.float64) - right
        entry = sums.setdefault(t, [0.0, 0.0, 0.0, 0.0])
        for i, value in enumerate(((error**2).mean(), (right**2).mean(), (error * right).mean(), 1.0)):
            entry[i] += float(value)
    found: dict[str, list[float]] = {name: [] for name in ("t", "rms", "factor", "share", "sigma")}
    for t, (squares, own, product, count) in sorted(sums.items()):
        _, q, a, _, sigma = rows[t]
        k = product / own
        rest = max(squares - k * product, 0.0)
        found["t"].append(float(t))
        found["rms"].append(float(np.sqrt(squares / own)))
        found["factor"].append(k)
        found["share"].append(k * product / squares if squares else 0.0)
        found["sigma"].append(float(abs(a * q) * np.sqrt(rest / count) / sigma) if sigma else 0.0)
    return found
