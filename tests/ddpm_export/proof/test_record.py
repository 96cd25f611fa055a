"""The record holds the network's outputs, and a file of another network does not pass the ladder."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the record of a network (no torch)")
pytest.importorskip("onnx", reason="not verified here: the record against exports (no onnx)")

import onnx
import torch
from onnx import TensorProto, numpy_helper

from conftest import FASHION
from ddpm_export.graph.onnx_export import export_network
from ddpm_export.networks.torch_backend import TorchBackend
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpm_export.proof import polygraphy_check, proof
from ddpm_export.proof.record import exact_float32, record, short_chain
from ddpm_export.training.checkpoint import load_network, weights_hash
from ddpm_export.training.data import load_dataset
from ddpm_export.training.diffusion import GaussianDiffusion
from ddpmx.backends.open import open_model
from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.errors import BackendError, DdpmxError, InputError, NumericError, SpecError
from ddpmx.formats import plan_file
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.check import BOUNDS
from ddpmx.parity.ladder import run_ladder
from ddpmx.parity.reference import Reference
from ddpmx.pipeline import Pipeline, load
from oracles.random_weights import rerandomise

pytestmark = [pytest.mark.torch, pytest.mark.slow]

STEPS = 50


def check_export(file, spec, run, reference):
    """As ``ddpmx export`` does it."""
    return proof.check_file(file, spec, *proof.judge_reduced(spec, run, reference))


@pytest.fixture(scope="module")
def network(trained) -> UNet:
    return load_network(trained.run)[0]


@pytest.fixture(scope="module")
def spec(trained) -> ModelSpec:
    return load_network(trained.run)[1]


@pytest.fixture(scope="module")
def progress() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def recorded(network, spec, progress) -> Reference:
    return record(network, spec, steps=STEPS, progress=lambda done, total: progress.append((done, total)))


def small_network(channels: int = 1, size: tuple[int, int] = (8, 8), *, seed: int | None = 0) -> UNet:
    """As it is initialised, or with random weights in every layer."""
    torch.manual_seed(0)
    network = UNet(UNetConfig(channels, channels, size, 8, (1,), 1, (), 0.0, 4)).eval().requires_grad_(False)
    if seed is not None:
        rerandomise(network, seed)
    return network


SMALL = ModelSpec((1, 8, 8), timesteps=40)


# --- the record ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def target_and_output(
    network: UNet, spec: ModelSpec, x0: np.ndarray, t: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(target, output) of the network at q(x_t | x_0), by the code of the training."""
    diffusion = GaussianDiffusion(spec.make_schedule(), spec.prediction)
    clean = torch.from_numpy(x0).float() / 127.5 - 1
    z = torch.from_numpy(normal(seed, range(len(x0)), t, Purpose.DIFFUSE, x0[0].size).reshape(x0.shape))
    steps = torch.full((len(x0),), t)
    x_t = diffusion.q_sample(clean, steps, z)
    return diffusion.target(clean, steps, z, x_t), network(x_t, steps.int())


def test_the_outputs_are_those_of_the_network_at_diffused_images(network, spec, recorded, figure):
    errors = []
    for k, t in enumerate(recorded.t.tolist()):
        _, out = target_and_output(network, spec, recorded.x0, t, recorded.seed)
        errors.append(np.abs(out.numpy().reshape(recorded.out[k].shape) - recorded.out[k]).max())
    figure("recorded outputs against the training's q(x_t | x_0): largest difference", max(errors), at_most=1e-6)
    assert len(recorded.t) == 32
    assert (recorded.t[0], recorded.t[-1]) == (0, 999)
    assert recorded.out.shape == (32, 2, 256)


def test_the_chain_is_the_pipelines(network, spec, recorded):
    by_pipeline = Pipeline(spec, TorchBackend(network)).generate(4, seed=0, steps=STEPS, batch=4)
    assert np.array_equal(recorded.final.transpose(0, 2, 3, 1), by_pipeline)
    assert by_pipeline.std() > 30, "images, not a flat grey"
    assert np.array_equal(recorded.x0, recorded.final[:2]), "without data, the network's own images"
    assert not recorded.real


@torch.no_grad()
def test_the_states_are_the_inputs_of_the_network(network, spec, recorded):
    stream = list(Pipeline(spec, TorchBackend(network)).stream(4, seed=0, steps=STEPS, batch=4))
    for i, number in enumerate(recorded.at.tolist()):
        preview = stream[number]
        assert np.array_equal(recorded.state[i], preview.x[0])
        out = network(torch.from_numpy(recorded.state[i : i + 1]), torch.tensor([preview.t], dtype=torch.int32))
        assert np.abs(out.numpy().reshape(-1) - recorded.state_out[i]).max() < 1e-6
    assert recorded.at[-1] == STEPS - 1


def test_the_loss_is_that_of_the_training(network, spec, recorded):
    diffusion = GaussianDiffusion(spec.make_schedule())
    losses = []
    for t in recorded.t.tolist():
        target, out = target_and_output(network, spec, recorded.x0, t, recorded.seed)
        losses.append(float((target - out).square().mean() / target.var(correction=0)))
    assert recorded.loss == pytest.approx(np.median(losses), rel=1e-4)
    assert diffusion.timesteps == 1000
    assert 0 < recorded.loss < 0.4
    assert recorded.trained


def test_progress_counts_to_its_total(recorded, progress):
    total = 2 * STEPS + 32 + len(recorded.at)  # the chain runs twice: as it is, and disturbed
    assert progress == [(i, total) for i in range(1, total + 1)]


def test_a_record_holds_its_spec_and_settings(network, spec, recorded):
    assert recorded.spec == spec
    assert recorded.spec.precision == "fp32"
    assert recorded.made_with == f"torch {torch.__version__}, cpu"
    assert (recorded.steps, recorded.seed) == (STEPS, 0)
    assert record(small_network(), SMALL.replace(precision="fp16"), steps=2).spec.precision == "fp32"


def test_a_record_survives_its_file(recorded, tmp_path):
    recorded.save(tmp_path / "x.parity.npz")
    again = Reference.load(tmp_path / "x.parity.npz")
    assert np.array_equal(again.out, recorded.out)
    assert np.array_equal(again.state_out, recorded.state_out)
    assert again.spec == recorded.spec


def test_two_records_are_equal_and_another_seed_is_another():
    network = small_network()
    one, two, other = (record(network, SMALL, steps=3, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.out, two.out)
    assert np.array_equal(one.final, two.final)
    assert not np.array_equal(one.state, other.state)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_of_every_prediction_is_relative_to_its_target(prediction):
    network, spec = small_network(), SMALL.replace(prediction=prediction)
    data = load_dataset(FASHION).images[:2, 4:12, 4:12]
    made = record(network, spec, data=data, steps=2)
    losses = []
    for t in made.t.tolist():
        target, out = target_and_output(network, spec, made.x0, t, 0)
        losses.append(float((target - out).square().mean() / max(float(target.var(correction=0)), 1e-6)))
    assert made.loss == pytest.approx(np.median(losses), rel=1e-3)


@pytest.mark.parametrize(("steps", "recorded"), [(None, 40), (1, 1), (7, 7), (40, 40), (100, 40)])
def test_the_chain_has_the_requested_steps_but_at_most_t(steps, recorded):
    reference = record(small_network(), SMALL, steps=steps)
    assert reference.steps == recorded
    assert reference.at[-1] == recorded - 1
    assert np.all(np.diff(reference.t) > 0)
    assert len(reference.t) == 32
    assert len(record(small_network(), SMALL.replace(timesteps=20), steps=2).t) == 20


@pytest.mark.parametrize(("shape", "steps"), [((1, 16, 16), 50), ((3, 128, 128), 50), ((3, 256, 256), 20)])
def test_large_images_have_a_shorter_chain(shape, steps):
    assert short_chain(shape) == steps


# --- real images -----------------------------------------------------------------------------------------------------


def test_real_images_are_taken_from_all_over_the_data(network, spec):
    data = load_dataset(FASHION).images[:500]
    made = record(network, spec, data=data, steps=5)
    assert made.real
    assert np.array_equal(made.x0.transpose(0, 2, 3, 1), data[[0, 499]])
    assert made.trained
    assert run_ladder(TorchBackend(network), spec, made).checks[2].passed


@pytest.mark.parametrize("shape", [(4, 16, 8, 1), (4, 1, 16, 16), (4, 16, 16, 3), (4, 16, 16), (0, 16, 16, 1)])
def test_images_of_another_size_are_refused(network, spec, shape):
    with pytest.raises(InputError, match="images"):
        record(network, spec, data=np.zeros(shape, np.uint8), steps=1)


# --- networks that cannot be recorded or checked ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (16, 12)])
def test_a_network_that_was_never_trained_has_nothing_to_record(size):
    """Its last layer is almost zero: an RMS of 1e-5."""
    with pytest.raises(InputError, match="output is nearly zero") as caught:
        record(small_network(3, size, seed=None), ModelSpec((3, *size), timesteps=40), steps=3)
    assert caught.value.hint == "train it first"


def test_the_chain_of_random_weights_is_not_checked(spec):
    network = small_network(1, (16, 16))
    made = record(network, spec.replace(weights=None), steps=10)
    assert made.loss > 0.5
    assert not made.trained
    result = run_ladder(TorchBackend(network), made.spec, made)
    assert result.passed
    assert "not trained" in result.checks[-1].skipped
    assert [check.skipped for check in result.checks[:-1]] == [None] * 9
    other = run_ladder(TorchBackend(small_network(1, (16, 16), seed=1)), made.spec, made)
    assert not other.passed, "its outputs are checked"


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_tf32_is_off_while_recording_and_then_as_it_was(monkeypatch, before, fails):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    were = matmul.allow_tf32, cudnn.allow_tf32
    seen = []
    network = small_network()

    def watch(*_):
        seen.append((matmul.allow_tf32, cudnn.allow_tf32))
        if fails:
            raise RuntimeError("out of memory")

    network.register_forward_pre_hook(watch)
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = before
        if fails:
            with pytest.raises(BackendError) as caught:
                record(network, SMALL, steps=2)
            assert "out of memory" in caught.value.note
        else:
            record(network, SMALL, steps=2)
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (before, before)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = were
    assert set(seen) == {(False, False)}


@pytest.mark.parametrize("user", ["matmul", "conv"])
def test_a_user_of_torch_s_newer_flags_can_record(user):
    """Beside them torch does not even tell of allow_tf32."""
    flags = {"matmul": torch.backends.cuda.matmul, "conv": torch.backends.cudnn.conv, "rnn": torch.backends.cudnn.rnn}
    was, chosen = flags[user].fp32_precision, {"matmul": "tf32", "conv": "ieee"}[user]

    def now():
        return {name: flag.fp32_precision for name, flag in flags.items()}

    try:
        flags[user].fp32_precision = chosen
        before = now()
        with pytest.raises(RuntimeError):
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32
        with exact_float32():
            assert set(now().values()) == {"ieee"}
        assert now() == before
    finally:
        flags[user].fp32_precision = was
    assert torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_outputs_that_are_not_finite_are_not_recorded():
    network = small_network()
    network.conv_out.bias[0] = torch.nan
    with pytest.raises(NumericError, match="not finite"):
        record(network, SMALL, steps=2)


def test_a_checkpoint_is_recorded_with_the_requested_weights(trained, spec, recorded):
    def cut(*args, **kwargs):
        return record(*args, **{**kwargs, "steps": 2})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "record", cut)
        ema, raw = proof.record_checkpoint(trained.run), proof.record_checkpoint(trained.run, weights="raw")
    assert ema.spec == spec
    assert raw.spec.weights == weights_hash(load_network(trained.run, "raw")[0].state_dict()) != spec.weights
    assert not np.allclose(ema.out, raw.out, atol=1e-3)
    for file, theirs in ((trained.fp32, raw), (trained.fp16, raw)):
        with pytest.raises(SpecError, match="another model") as caught:
            check_export(file, open_spec(file), trained.run, theirs)
        assert "weights" in caught.value.note


def test_a_checkpoint_has_a_short_chain_unless_a_full_one_is_requested(trained, monkeypatch):
    requested = []
    monkeypatch.setattr(proof, "record", lambda *_, steps, **__: requested.append(steps))
    proof.record_checkpoint(trained.run)
    proof.record_checkpoint(trained.run, full=True)
    assert requested == [50, None]


def test_images_are_brought_to_the_models_size(trained, tmp_path):
    from PIL import Image

    for i in range(3):
        Image.fromarray(np.full((40, 30, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.png")
    assert proof.images_for(tmp_path, trained.run).shape == (3, 16, 16, 1)
    assert proof.images_for(FASHION, trained.run).shape == (10000, 16, 16, 1)
    with pytest.raises(DdpmxError):
        proof.images_for(tmp_path / "missing", trained.run)


# --- exports against the record --------------------------------------------------------------------------------------


def open_spec(file: Path) -> ModelSpec:
    spec, backend = open_model(file)
    backend.close()
    return spec


def check_report(figure, what: str, result) -> None:
    for check in result.checks:
        if check.skipped is None:
            bound = {"at_least" if check.at_least else "at_most": check.bound}
            figure(f"{what} against the record: {check.name}", check.value, **bound)
    assert result.passed
    bounds = sum(check.skipped is None for check in result.checks)
    assert bounds >= 7
    assert result.verdict == f"PASSED: the PyTorch model, {bounds} of {bounds} bounds hold"


def test_the_module_itself_passes(network, spec, recorded):
    result = run_ladder(TorchBackend(network), spec, recorded)
    assert result.passed
    assert [check.value for check in result.checks[-2:]] == [1, 0], "all pixels within a level, no distance"
    assert result.curves["eps"].max() < 2e-6


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_export_passes(trained, recorded, precision, figure):
    file = getattr(trained, precision)
    result = check_export(file, open_spec(file), trained.run, recorded)
    check_report(figure, precision, result)
    assert "onnxruntime" in result.ran_on


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_mnn_model_passes(trained, recorded, tmp_path, precision, figure):
    """With the bounds of its precision, Winograd's convolutions and all."""
    from ddpmx.mnn import build, library

    try:
        library.load()
    except BackendError as why:
        pytest.skip(f"not verified here: MNN's models against PyTorch ({why.fact})")
    for low_memory in (False, True):
        file = tmp_path / f"{low_memory}.mnn"
        build.build(getattr(trained, precision), file, low_memory=low_memory)
        spec, backend = open_model(file)
        result = run_ladder(backend, spec, recorded)
        backend.close()
        assert result.passed, result.verdict
        figure(f"MNN, {precision}: ε, RMS", float(result.curves["eps"].max()), at_most=BOUNDS[precision].eps)


def test_half_precision_would_not_pass_as_float32(trained, recorded):
    """So the bounds distinguish the two."""
    _, backend = open_model(trained.fp16)
    result = run_ladder(backend, recorded.spec, recorded)
    backend.close()
    assert "ε, RMS" in [check.name for check in result.checks if not check.passed]
    assert result.curves["eps"].max() > 5 * BOUNDS["fp32"].eps


def with_changed_weights(file: Path, output: Path, change) -> Path:
    """A copy of the file, with the same metadata, in which one convolution is changed.

    It is the last of a block: the scale of one before a normalisation makes no difference.
    """
    model = onnx.load(file)
    [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == "up.2.stages.1.block.conv2.weight"]
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, output)
    return output


def a_percent(values: np.ndarray) -> None:
    values *= 1.01


def one_weight(values: np.ndarray) -> None:
    """One of 2304, by a tenth of the largest."""
    values.flat[values.size // 2] += 0.1 * np.abs(values).max()


def transposed(values: np.ndarray) -> None:
    values[...] = values[..., ::-1].copy() if values.ndim == 4 else values.T.copy().reshape(values.shape)


@pytest.mark.parametrize(
    ("precision", "change"), [("fp32", a_percent), ("fp32", one_weight), ("fp32", transposed), ("fp16", transposed)]
)
def test_a_file_with_other_weights_than_it_declares_fails(trained, recorded, tmp_path, precision, change):
    file = with_changed_weights(getattr(trained, precision), tmp_path / "model.onnx", change)
    result = check_export(file, open_spec(file), trained.run, recorded)
    assert not result.passed
    assert result.verdict.startswith("FAILED: this is not the PyTorch model: ε, ")
    assert "worst at t = " in result.verdict


# --- bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16(network, spec, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("bf16") / "model.onnx"
    assert export_network(network, spec, file, precision="bf16") == spec.replace(precision="bf16")
    return file


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert all(types[name] for node in graph.node for name in node.output), "the type of every value is known"
    return types


FULL_PRECISION = {
    "InstanceNormalization", "GroupNormalization", "LayerNormalization", "BatchNormalization",
    "Softmax", "LogSoftmax", "Exp", "Sin", "Cos", "Gemm",
}  # fmt: skip


@pytest.mark.long
def test_a_bf16_file_is_plain_onnx_of_opset_22(bf16, spec):
    model = onnx.load(bf16)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 22)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    onnx.checker.check_model(model, full_check=True)
    (entry,) = model.metadata_props
    assert ModelSpec.from_text(entry.value) == spec.replace(precision="bf16")
    assert [v.type.tensor_type.elem_type for v in model.graph.input] == [TensorProto.FLOAT, TensorProto.INT32]
    assert [v.type.tensor_type.elem_type for v in model.graph.output] == [TensorProto.FLOAT]


def test_a_bf16_file_computes_in_bf16_where_fp16_does(bf16, trained):
    model, half = onnx.load(bf16), onnx.load(trained.fp16)
    types, theirs = element_types(model), element_types(half)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    full = [node for node in convolutions if types[node.input[1]] == TensorProto.FLOAT]
    assert len(full) == 2
    assert full[0].input[0] == "x"
    assert full[-1].output[0] == "eps"
    for node in convolutions:
        if node not in full:
            assert {types[value] for value in (*node.input, *node.output)} == {TensorProto.BFLOAT16}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert products
    assert {types[value] for node in products for value in node.input} == {TensorProto.BFLOAT16}
    assert TensorProto.FLOAT16 not in types.values()

    def low(model: onnx.ModelProto, types: dict[str, int], kind: int) -> Counter[str]:
        return Counter(n.op_type for n in model.graph.node if any(types[v] == kind for v in n.input if v))

    assert low(model, types, TensorProto.BFLOAT16) == low(half, theirs, TensorProto.FLOAT16)


def test_norms_sums_softmax_and_time_path_of_a_bf16_file_are_float32(bf16):
    model = onnx.load(bf16)
    types = element_types(model)
    operators = Counter(node.op_type for node in model.graph.node)
    for op in ("Softmax", "InstanceNormalization", "Sin", "Cos", "Gemm"):
        assert operators[op] > 0, "there is something to find"
    for node in model.graph.node:
        if node.op_type in FULL_PRECISION or node.op_type.startswith("Reduce"):
            assert TensorProto.BFLOAT16 not in {types[name] for name in node.input if name}, node.op_type


def test_a_bf16_file_is_about_half_as_large(bf16, trained):
    assert 0.9 < bf16.stat().st_size / trained.fp16.stat().st_size < 1.1


def test_a_bf16_file_does_not_run_here_and_the_hint_says_where_it_does(bf16):
    with pytest.raises(BackendError, match="bfloat16") as caught:
        load(bf16)
    assert "ddpmx build" in caught.value.hint


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_widened_it_is_the_fp32_file_with_weights_rounded_to_half(bf16, trained, tmp_path, precision):
    """Every bit of ε, by ONNX Runtime: casts that do nothing change nothing."""
    file = {"fp16": trained.fp16, "bf16": bf16}[precision]
    half = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    rounded, kinds = onnx.load(trained.fp32), {each.name: each.data_type for each in onnx.load(file).graph.initializer}
    count = 0
    for each in rounded.graph.initializer:
        if kinds.get(each.name) == half:
            values = numpy_helper.to_array(each).astype(onnx.helper.tensor_dtype_to_np_dtype(half))
            each.CopyFrom(numpy_helper.from_array(values.astype(np.float32), each.name))
            count += 1
    assert count > 20
    onnx.save(rounded, tmp_path / "rounded.onnx")
    x, t = np.random.default_rng(0).standard_normal((4, 1, 16, 16)).astype(np.float32), np.array([0, 9, 500, 999])
    out = {}
    for path, widen in ((file, True), (tmp_path / "rounded.onnx", False), (trained.fp32, False)):
        with load(path, widen=widen, threads=1) as pipeline:
            assert pipeline.arithmetic == "fp32"
            out[path.stem] = pipeline.evaluate(x, t).out
    assert np.array_equal(out[file.stem], out["rounded"])
    assert not np.array_equal(out["fp32"], out["rounded"]), "control: of the weights as they were"


def test_in_place_of_a_bf16_file_the_module_is_checked_and_the_report_says_so(bf16, trained, spec, recorded, figure):
    result = check_export(bf16, spec.replace(precision="bf16"), trained.run, recorded)
    assert "NOT the file" in result.ran_on
    check_report(figure, "the bf16 module", result)
    figure("the bf16 module against the record: RMS error over 32 t", result.curves["eps"].max(), at_most=3e-2)
    assert result.curves["eps"].max() > BOUNDS["fp16"].eps / 3, "it did compute in bfloat16"


def test_the_values_of_a_bf16_file_are_those_of_the_module(bf16, network, spec):
    """Only onnx's own evaluator computes in bfloat16 here; it is slow, so it runs once, at one t."""
    from onnx.reference import ReferenceEvaluator

    from ddpm_export.graph.onnx_export import to_precision

    if tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 23):
        pytest.skip(f"not verified here: the values of a bf16 file (onnx {onnx.__version__} evaluates none)")
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, *spec.shape, generator=generator), torch.tensor([500], dtype=torch.int32)
    (by_file,) = ReferenceEvaluator(str(bf16)).run(None, {"x": x.numpy(), "t": t.numpy()})
    with torch.no_grad():
        exact, by_module = network(x, t).numpy(), to_precision(network, "bf16")(x, t).numpy()
    unit = np.sqrt(np.mean(exact**2))
    assert np.sqrt(np.mean((by_file - exact) ** 2)) < 3e-2 * unit
    assert np.sqrt(np.mean((by_file - by_module) ** 2)) < 3e-2 * unit


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="not verified here: a bf16 engine (no TensorRT-RTX)"
)
def test_an_engine_is_built_from_a_bf16_file(bf16, tmp_path):
    from ddpmx.trt import build as trt_build

    built = trt_build.build(bf16, tmp_path / "model.plan", trt_build.BuildOptions(batch=(1, 1, 2), targets=("8.9",)))
    assert plan_file.read_plan(tmp_path / "model.plan").spec.precision == "bf16"
    assert built.info.spec == open_spec_of_onnx(bf16)
    assert built.precision.startswith(("bf16:", "not verified"))


def open_spec_of_onnx(file: Path) -> ModelSpec:
    return ModelSpec.from_text(onnx.load(file).metadata_props[0].value)


# --- Polygraphy ------------------------------------------------------------------------------------------------------

needs_polygraphy = pytest.mark.skipif(
    importlib.util.find_spec("polygraphy") is None, reason="not verified here: Polygraphy's check (no polygraphy)"
)


@needs_polygraphy
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_polygraphy_agrees(trained, recorded, tmp_path, precision):
    from polygraphy.comparator import RunResults

    found = polygraphy_check.compare(getattr(trained, precision), recorded, results=tmp_path / "runs.json")
    assert found["passed"]
    assert found["verdict"].startswith("32 of 32 timesteps within ")
    assert found["runner"] == "ONNX Runtime"
    assert found["bound"] == BOUNDS[precision].eps_pixel * recorded.scale
    assert found["version"] in found["verdict"]
    runs = RunResults.load(str(tmp_path / "runs.json"))
    assert [name for name, _ in runs.items()] == ["PyTorch float32", "ONNX Runtime"]
    for name, iterations in runs.items():
        assert len(iterations) == 32
        for k, iteration in enumerate(iterations):
            kept = np.asarray(iteration["eps"]).reshape(recorded.out[k].shape)
            assert np.abs(kept - recorded.out[k]).max() <= (0 if name == "PyTorch float32" else found["bound"])


@needs_polygraphy
@pytest.mark.parametrize("change", [a_percent, transposed])
def test_polygraphy_finds_changed_weights(trained, recorded, tmp_path, change):
    file = with_changed_weights(trained.fp32, tmp_path / "model.onnx", change)
    found = polygraphy_check.compare(file, recorded)
    assert not found["passed"]
    assert not found["verdict"].startswith("32 of 32")


@needs_polygraphy
def test_polygraphy_names_how_many_timesteps_agree(trained, recorded):
    """The record is wrong at three of them, by more than the bound in one number."""
    out = recorded.out.copy()
    out[[0, 7, 31], 1, 100] += 0.001
    found = polygraphy_check.compare(trained.fp32, dataclasses.replace(recorded, out=out))
    assert not found["passed"]
    assert found["verdict"].startswith("29 of 32 timesteps")


@needs_polygraphy
def test_polygraphy_is_not_run_on_another_model(trained, recorded, spec):
    other = dataclasses.replace(recorded, spec=spec.replace(weights="1" * 64))
    with pytest.raises(SpecError, match="another model"):
        polygraphy_check.compare(trained.fp32, other)


@needs_polygraphy
def test_a_file_that_polygraphy_cannot_run_is_an_error(bf16, recorded):
    with pytest.raises(BackendError, match="cannot run"):
        polygraphy_check.compare(bf16, recorded)
