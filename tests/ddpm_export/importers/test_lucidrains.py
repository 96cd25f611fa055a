"""denoising-diffusion-pytorch's checkpoints, against what its own code computed (``data/lucidrains``)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ddpm_export.graph.onnx_export import export_network
from ddpm_export.importers import lucidrains
from ddpm_export.importers.keys import to_theirs
from ddpm_export.importers.lucidrains_keys import rows
from ddpm_export.importers.registry import CheckpointContents, Options, import_checkpoint
from ddpm_export.networks.lucidrains_config import LucidrainsConfig, check_spec
from ddpm_export.networks.lucidrains_unet import LucidrainsUNet
from ddpm_export.networks.torch_backend import TorchBackend
from ddpmx.diffusion.samplers import make_table
from ddpmx.diffusion.schedule import Schedule, make_schedule
from ddpmx.errors import DdpmxError, FileFormatError, InputError, SpecError
from ddpmx.pipeline import load
from ddpmx.sampling import chain
from ddpmx.trt.build import build
from oracles.lucidrains import SIZE, TIMESTEPS, Case, cases, numbers, weights

pytestmark = [pytest.mark.torch, pytest.mark.slow]

CASES = cases()
NETWORKS = [name for name, case in CASES.items() if case.diffusion is None]
CHAINS = [name for name in CASES if name.startswith("chain")]
PLAIN = CASES["2.3.4 plain"]
CHAIN = CASES["chain 2.3.4 v, self-conditioning"]
ALONE = {"size": SIZE, "timesteps": 1000, "schedule": "cosine", "prediction": "eps"}
"""The settings that a U-Net without its diffusion leaves open."""


def unet_state(case: Case, seed: int = 1) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in weights(case.shapes, seed).items()}


def diffusion_state(case: Case, seed: int = 1, **buffers: np.ndarray) -> dict[str, torch.Tensor]:
    arrays = {**case.buffers, **buffers}
    unet = {f"model.{name}": tensor for name, tensor in unet_state(case, seed).items()}
    return {**{name: torch.from_numpy(array) for name, array in arrays.items()}, **unet}


def trainer(case: Case, **changes: object) -> dict[str, object]:
    """What a Trainer saves, with different averaged weights and wrong averaged buffers."""
    online, averaged = diffusion_state(case), diffusion_state(case, seed=2, betas=case.buffers["betas"] * 0.5)
    ema = {f"online_model.{name}": tensor for name, tensor in online.items()}
    ema |= {f"ema_model.{name}": tensor for name, tensor in averaged.items()}
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(7)}
    optimiser = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99)}]}
    file = {"step": 7, "model": online, "opt": optimiser, "ema": ema, "scaler": None, "version": case.release}
    return {**file, **changes}


@pytest.fixture
def read(tmp_path):
    """Saves, opens and reads a file."""

    def run(content: object, values: dict | None = None, **options):
        torch.save(content, tmp_path / "model-1.pt")
        return import_checkpoint(tmp_path / "model-1.pt", Options(values or {}, **options))

    return run


def settings_of(case: Case) -> dict[str, object]:
    """The settings of a U-Net alone that only the user can give."""
    values: dict[str, object] = dict(ALONE)
    unet = case.unet
    if unet.get("learned_variance"):
        del values["prediction"]
    if "sinusoidal_pos_emb_theta" in unet:
        values["theta"] = unet["sinusoidal_pos_emb_theta"]
    if "resnet_block_groups" in unet:
        values["groups"] = unet["resnet_block_groups"]
    if "mid_attn.fn.fn.to_qkv.weight" in case.shapes:
        values["release"] = case.release if case.release != "1.0.0" else "1.6.4"
    return values


def network_of(imported) -> LucidrainsUNet:
    network = LucidrainsUNet(imported.config)
    network.load_state_dict(imported.tensors)
    return network.eval().requires_grad_(False)


def output(network: LucidrainsUNet, case: Case) -> np.ndarray:
    x, x0_prev = map(torch.from_numpy, case.inputs())
    t = torch.from_numpy(TIMESTEPS).to(torch.int32)
    out = network(x, t, **({"x0_prev": x0_prev} if network.config.self_condition else {}))
    return (torch.cat(out, dim=1) if isinstance(out, tuple) else out).numpy()


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_its_outputs_are_theirs(read, name, figure):
    case = CASES[name]
    imported = read(unet_state(case), settings_of(case))
    assert imported.questions == ()
    assert imported.source == "lucidrains"
    error = np.abs(output(network_of(imported), case) - case.outputs).max()
    assert 0.5 < case.outputs.std() < 4
    figure(f"{name}: largest difference to denoising-diffusion-pytorch", error, at_most=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_import_loses_nothing(read, name):
    case = CASES[name]
    imported, theirs = read(unet_state(case), settings_of(case)), unet_state(case)
    back = to_theirs(rows(imported.config, wrapped="release" in settings_of(case)), imported.tensors)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in back)


@pytest.mark.parametrize(
    ("name", "release"), [("1.6.4 plain", "1.7.1"), ("1.7.1 plain", "1.7.3"), ("1.7.3 plain", "1.7.7")]
)
def test_another_release_would_be_another_network(read, name, release):
    """The reason why it is a question: the names are the same, the outputs are not."""
    case = CASES[name]
    imported = read(unet_state(case), {**settings_of(case), "release": release})
    assert np.abs(output(network_of(imported), case) - case.outputs).max() > 1e-3


def test_config_survives_json(read):
    config = read(unet_state(CASES["2.3.4 heads"]), ALONE).config
    assert config.heads == (2, 4, 8)
    assert config.full_attention == (True, False, True)
    assert LucidrainsConfig.from_json(config.to_json()) == config
    with pytest.raises(SpecError, match="not a U-Net"):
        LucidrainsConfig.from_json({**config.to_json(), "colour": 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (8, 9)},
        {"size": (8,)},
        {"heads": (4, 4)},
        {"full_attention": (1, 0, 1)},
        {"channels": 7},
        {"out_channels": 5},
        {"memory": -1},
        {"theta": float("nan")},
        {"block_norm": "batch"},
        {"block_norm": "group", "groups": 3},
        {"multipliers": ()},
        {"standardised": True},
        {"fourier": 3},
    ],
    ids=str,
)
def test_networks_that_cannot_be_built(changes):
    good = LucidrainsConfig(
        3, 3, (8, 8), 8, None, (1, 2, 4), full_attention=(False,) * 3, heads=(4,) * 3, head_channels=(8,) * 3
    )
    with pytest.raises(InputError):
        dataclasses.replace(good, **changes)


# --- the chain -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
def test_its_chain_is_theirs(read, name, figure):
    case = CASES[name]
    imported = read({"model": diffusion_state(case), "version": case.release, "step": 1}, {"size": SIZE})
    assert imported.questions == ()
    objective = "pred_noise" if "learned" in name else case.diffusion["objective"]
    assert imported.spec.prediction == {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}[objective]
    spec, images = imported.spec, np.arange(2)
    table = make_table(spec.make_schedule(), spec.prediction, spec.variance)
    x = chain.initial(0, images, spec.shape)
    backend = TorchBackend(network_of(imported))
    steps = chain.run(
        backend, table, x, seed=0, images=images, clip=spec.clip, conditioning_shapes=spec.conditioning_shapes
    )
    seen = [step.x_next.copy() for step in steps]
    states = len(seen) + 1  # with x_T
    error = max(
        np.abs(seen[place - 1] - theirs).max()
        for place, theirs in zip((states // 2, len(seen)), case.outputs, strict=True)
    )
    assert (np.abs(case.outputs[0]) < 1).mean() > 0.3, "not all of it is clipped"
    figure(f"{name}: largest difference to p_sample_loop", error, at_most=2e-5)


# --- schedule and objective ------------------------------------------------------------------------------------------

NAMES = {"sigmoid": "sigmoid_alpha_bar", "cosine": "cosine", "linear": "linear"}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("buffers")])
def test_schedule_and_objective_are_in_the_buffers(read, name, figure):
    case = CASES[name]
    buffers = {key: torch.from_numpy(array) for key, array in case.buffers.items()}
    imported = read({**diffusion_state(PLAIN), **buffers}, {"size": SIZE})
    assert imported.questions == ()
    spec = imported.spec
    assert spec.prediction == {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}[case.diffusion["objective"]]
    assert spec.schedule == NAMES[case.diffusion["beta_schedule"]]
    assert (spec.variance, spec.clip, spec.timesteps) == ("fixed_small", 1.0, 1000)
    ours, theirs = spec.make_schedule().betas, case.buffers["betas"].astype(np.float64)
    figure(f"{name}: largest relative difference of β", np.max(np.abs(ours / theirs - 1)), at_most=1e-4)


def test_the_files_own_betas_can_be_kept(read):
    imported = read(diffusion_state(CHAIN), {"size": SIZE, "schedule": "betas"})
    assert imported.spec.schedule == "betas"
    assert np.array_equal(imported.betas, CHAIN.buffers["betas"].astype(np.float64))


def test_betas_of_no_name_are_kept(read):
    case = CASES["chain 2.3.4 x0, self-conditioning"]
    imported = read(diffusion_state(case), {"size": SIZE})
    assert imported.spec.schedule == "betas"
    assert np.array_equal(imported.spec.betas, case.buffers["betas"].astype(np.float64))


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid_alpha_bar"])
@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("clip", [np.minimum, np.maximum])
def test_clipped_loss_weights_still_show_the_objective(schedule, gamma, clip):
    """min(SNR, γ) is Hang et al.'s; max was in some releases."""
    whole = make_schedule(schedule, 1000)
    clipped = clip(whole.snr, gamma)
    for objective, factor in (("pred_noise", whole.snr), ("pred_x0", 1.0), ("pred_v", whole.snr + 1)):
        assert list(lucidrains.objectives(whole, (clipped / factor).astype(np.float32))) == [objective]


def test_an_unknown_loss_weight_leaves_the_prediction_open(read):
    odd = np.linspace(1, 2, len(CHAIN.buffers["betas"]), dtype=np.float32)
    imported = read(diffusion_state(CHAIN, loss_weight=odd), {"size": SIZE})
    assert [question.name for question in imported.questions] == ["prediction"]
    assert read(diffusion_state(CHAIN, loss_weight=odd), {"size": SIZE, "prediction": "x0"}).spec.prediction == "x0"


def test_a_learned_variance_means_noise_whatever_the_loss_weight(read):
    case = CASES["chain 2.3.4 learned variance"]
    schedule = Schedule.from_betas(case.buffers["betas"].astype(np.float64))
    assert list(lucidrains.objectives(schedule, case.buffers["loss_weight"])) == ["pred_v"]
    spec = read(diffusion_state(case), {"size": SIZE}).spec
    assert (spec.prediction, spec.variance) == ("eps", "learned_range")


# --- the file --------------------------------------------------------------------------------------------------------


def test_averaged_weights_are_chosen_and_averaged_buffers_are_not(read):
    imported = read(trainer(CHAIN), {"size": SIZE})
    raw = read(trainer(CHAIN), {"size": SIZE}, weights="raw")
    name = "down.0.block1.conv1.weight"
    assert np.array_equal(imported.tensors[name], weights(CHAIN.shapes, 2)["downs.0.0.block1.proj.weight"])
    assert np.array_equal(raw.tensors[name], weights(CHAIN.shapes, 1)["downs.0.0.block1.proj.weight"])
    assert torch.equal(imported.raw[name], raw.tensors[name])
    assert imported.spec == raw.spec, "both by the buffers of what was trained"
    assert imported.spec.self_condition
    check_spec(imported.config, imported.spec)


def test_an_average_alone(read):
    imported = read(trainer(CHAIN)["ema"], {"size": SIZE})
    assert np.array_equal(imported.tensors["conv_in.weight"], weights(CHAIN.shapes, 2)["init_conv.weight"])


def test_open_settings(read):
    assert [question.name for question in read(trainer(CHAIN)).questions] == ["size"]
    case = CASES["1.6.4 plain"]
    questions = [question.name for question in read(unet_state(case)).questions]
    assert questions == ["release", "size", "timesteps", "schedule", "prediction"]


def test_the_release_in_the_file_decides_the_graph(read):
    case = CASES["chain 1.6.4 noise, cosine"]
    for version, (standardised, norm, divided) in {
        "1.6.4": ("plus", "layer", True),
        "1.7.0": ("least", "rms", True),
        "1.7.2": ("no", "rms", True),
        "1.7.5": ("no", "rms", False),
    }.items():
        config = read(trainer(case, version=version), {"size": SIZE}).config
        assert (config.standardised, config.attention_norm, config.divided) == (standardised, norm, divided)
    with pytest.raises(FileFormatError, match=r"0\.27\.0"):
        read(trainer(case, version="0.27.0"), {"size": SIZE})


def test_an_image_that_is_not_square(read):
    assert read(trainer(CHAIN), {"size": "[8, 16]"}).spec.shape == (3, 8, 16)


def without(state: dict, name: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key != name}


GOOD = diffusion_state(CHAIN)
FAULTS = {
    "missing": (without(GOOD, "model.downs.1.0.block2.proj.bias"), "1 missing"),
    "no time": (without(GOOD, "model.time_mlp.1.weight"), r"time_mlp\.1\.weight"),
    "surplus": ({**GOOD, "model.extra.weight": torch.zeros(2)}, "1 surplus"),
    "classes": ({**GOOD, "model.null_classes_emb": torch.zeros(2)}, "classifier-free"),
    "sequences": ({**GOOD, "model.init_conv.weight": torch.zeros(8, 3, 7)}, "dimensions"),
    "NaN": ({**GOOD, "model.final_conv.bias": torch.full((3,), torch.nan)}, "NaN"),
    "whole numbers": ({**GOOD, "model.final_conv.bias": torch.zeros(3, dtype=torch.int32)}, "not floats"),
    "another shape": ({**GOOD, "model.mid_attn.mem_kv": torch.zeros(2, 4, 5, 32)}, "of another shape"),
    "another gain": ({**GOOD, "model.mid_attn.norm.g": torch.zeros(1, 32)}, "of another shape"),
    "odd channels": ({**GOOD, "model.init_conv.weight": torch.zeros(8, 5, 7, 7)}, "channels"),
    "β": ({**GOOD, "betas": 1 - 2 * GOOD["betas"]}, "not a schedule"),
    "β of NaN": ({**GOOD, "betas": GOOD["betas"] * torch.nan}, "finite"),
    "β and weights": ({**GOOD, "loss_weight": GOOD["loss_weight"][1:]}, "lengths"),
    "older": (
        {**without(GOOD, "model.downs.0.3.1.weight"), "model.downs.0.3.weight": torch.zeros(8, 8, 4, 4)},
        r"before release 1\.0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_and_foreign_files(read, fault):
    content, message = FAULTS[fault]
    with pytest.raises(DdpmxError, match=message) as caught:
        read(content, {"size": SIZE})
    assert isinstance(caught.value, (FileFormatError, InputError))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 9}, "cannot be halved"),
        ({"size": SIZE, "data_range": "[0, 1]"}, r"\[−1, 1\]"),
        ({"size": SIZE, "schedule": "linear"}, "schedule"),
        ({"size": SIZE, "prediction": "score"}, "prediction"),
        ({"size": SIZE, "colour": "red"}, "colour"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(read, values, message):
    with pytest.raises(InputError, match=message):
        read(GOOD, values)


def test_the_file_of_another_project_is_refused():
    foreign = CheckpointContents(Path("model.pt"), "torch", {"conv_in.weight": torch.zeros(3)})
    assert lucidrains.recognise(foreign) is None
    with pytest.raises(FileFormatError, match="no network of this project"):
        lucidrains.read(foreign, Options())


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The ONNX file of a case, its spec and its network. Made once: an export takes seconds."""
    made: dict[tuple[str, str], tuple] = {}

    def get(case: Case, precision: str) -> tuple:
        if (case.name, precision) not in made:
            folder = tmp_path_factory.mktemp("lucidrains")
            alone = case.diffusion is None
            torch.save(unet_state(case) if alone else diffusion_state(case), folder / "model-1.pt")
            values = settings_of(case) if alone else {"size": SIZE}
            imported = import_checkpoint(folder / "model-1.pt", Options(values))
            spec = export_network(network_of(imported), imported.spec, folder / "model.onnx", precision=precision)
            made[case.name, precision] = folder / "model.onnx", spec, imported
        return made[case.name, precision]

    return get


SELF = CASES["2.3.4 self-conditioning"]
"""The network of :data:`CHAIN`, without a chain."""
EXPORTED = [
    pytest.param(CHAIN, SELF, "fp32", marks=pytest.mark.long),
    pytest.param(CHAIN, SELF, "fp16", marks=pytest.mark.long),
    pytest.param(*[CASES["2.3.4 learned variance"]] * 2, "fp16", marks=pytest.mark.long),
    pytest.param(*[CASES["1.6.4 plain"]] * 2, "fp16", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("case", "alone", "precision"), EXPORTED, ids=lambda value: getattr(value, "name", value))
def test_its_outputs_in_onnxruntime_are_theirs(exported, case, alone, precision, figure):
    file, spec, _ = exported(case, precision)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    x, x0_prev = alone.inputs()
    inputs = {"x": x, "t": TIMESTEPS.astype(np.int32), **({"x0_prev": x0_prev} if spec.self_condition else {})}
    assert [value.name for value in session.get_inputs()] == list(inputs)
    assert [value.name for value in session.get_outputs()] == list(spec.outputs)
    out = np.concatenate(session.run(None, inputs), axis=1)
    error, bound = np.abs(out - alone.outputs).max(), 2e-5 if precision == "fp32" else 1e-2
    figure(f"{case.name} in onnxruntime, {precision}: largest difference", error, at_most=bound)
    first = np.concatenate(session.run(None, {name: array[:1] for name, array in inputs.items()}), axis=1)
    assert np.abs(first - out[:1]).max() < bound / 5, "it depends on no other image of the batch"


@pytest.mark.long
@pytest.mark.parametrize("case", [CHAIN, CASES["1.6.4 plain"]], ids=lambda case: case.name)
def test_norms_softmax_and_time_path_stay_float32(exported, case):
    file, _, imported = exported(case, "fp16")
    model = onnx.shape_inference.infer_shapes(onnx.load(file), check_type=True, strict_mode=True, data_prop=True)
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    half = [n for n in graph.node if any(types[name] == onnx.TensorProto.FLOAT16 for name in n.input if name)]
    kinds = {node.op_type for node in graph.node}
    assert "Softmax" in kinds
    assert kinds & {"ReduceSum", "InstanceNormalization"}
    full = {"Softmax", "InstanceNormalization", "Sqrt", "Div", "Erf", "Sin", "Cos", "Exp", "Gemm"}
    assert not [n.op_type for n in half if n.op_type in full or n.op_type.startswith("Reduce")]
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len([node for node in half if node.op_type == "Conv"]) == len(convolutions) - 2, "all but first and last"
    assert len(convolutions) == sum(isinstance(m, torch.nn.Conv2d) for m in network_of(imported).modules())


@pytest.mark.long
def test_its_images_in_onnxruntime_are_theirs(exported):
    """x̂_0 of each step goes back into the network."""
    file, _, _ = exported(CHAIN, "fp32")
    with load(file) as pipeline:
        seen = pipeline.generate(2, seed=0, batch=2).astype(int)
    theirs = np.clip(np.floor(CHAIN.outputs[-1] * 127.5 + 128), 0, 255).transpose(0, 2, 3, 1)
    assert theirs.std() > 30
    assert np.abs(seen - theirs).max() <= 1


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_builds_a_plan(exported, tmp_path, precision):
    pytest.importorskip("tensorrt_rtx", reason="not verified here: TensorRT for RTX is not installed")
    file, spec, _ = exported(CHAIN, precision)
    built = build(file, tmp_path / "model.plan")
    assert built.info.spec == spec
    assert (spec.precision, spec.self_condition) == (precision, True)


def test_weights_are_a_function_of_the_name():
    assert np.array_equal(numbers("a", (2, 3)), numbers("a", (2, 3)))
    assert not np.array_equal(numbers("a", (6,)), numbers("b", (6,)))
