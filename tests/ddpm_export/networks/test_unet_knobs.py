"""The knobs that make Ho's network that of his descendants: each against their own code."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the network's knobs (no torch)")

import torch
import torch.nn.functional as F

from ddpm_export.graph.onnx_export import export_network
from ddpm_export.networks.unet import Attention, Double, Downsample, Halve, ResidualBlock, UNet, UNetConfig, Upsample
from ddpm_export.networks.unet_config import check_spec
from ddpmx.errors import InputError, SpecError
from ddpmx.formats.spec import ModelSpec
from oracles import openai_unet
from oracles.random_weights import rerandomise

pytestmark = pytest.mark.torch

BASE = UNetConfig(3, 3, (16, 16), 32, (1, 2, 2), 1, (8,), 0.0, 8)
T = torch.arange(0, 1000, 37)

KNOBS = {
    "norm_eps": {"norm_eps": 1e-2},  # the usual ones are too small to be seen in random weights
    "cos_first": {"cos_first": True},
    "frequency_shift": {"frequency_shift": 0},
    "symmetric_padding": {"symmetric_padding": True},
    "head_channels": {"head_channels": 16},
    "scale_shift": {"scale_shift": True},
    "resample_blocks": {"resample_blocks": True},
    "classes": {"classes": 7},
    "learned variance": {"out_channels": 6},
}
ALL = {name: value for knob in KNOBS.values() for name, value in knob.items() if name != "symmetric_padding"}
SILENT = ("norm_eps", "cos_first", "frequency_shift", "symmetric_padding", "head_channels")
"""Knobs that no shape of any weight shows."""


def with_knobs(**knobs) -> UNetConfig:
    return dataclasses.replace(BASE, **knobs)


def random_network(config: UNetConfig) -> UNet:
    network = UNet(config).eval().requires_grad_(False)
    rerandomise(network)
    return network


def output(network: UNet, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """The output, with the variance behind it if there is one."""
    with torch.no_grad():
        out = network(x, t) if y is None else network(x, t, y)
    return torch.cat(out, dim=1) if isinstance(out, tuple) else out


def images(n: int, config: UNetConfig = BASE) -> torch.Tensor:
    return torch.randn(n, config.in_channels, *config.size, generator=torch.Generator().manual_seed(1))


def some_classes(n: int, config: UNetConfig) -> torch.Tensor | None:
    return None if config.classes is None else torch.arange(n, dtype=torch.int32) % config.classes


# --- against diffusers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers_unet():
    pytest.importorskip("diffusers", reason="not verified here: the knobs against diffusers' (not installed)")
    from oracles import diffusers_unet

    return diffusers_unet


def against_diffusers(diffusers_unet, config: UNetConfig, ours_config: UNetConfig) -> float:
    """max |Δ| / max |ε| over a grid of t, our network built from ``ours_config``."""
    theirs = diffusers_unet.twin(config)
    ours = UNet(ours_config).eval().requires_grad_(False)
    ours.load_state_dict(diffusers_unet.carry(theirs.state_dict(), config))  # strict: nothing is left over
    x, y = images(len(T)), some_classes(len(T), config)
    with torch.no_grad():
        wanted = theirs(x, T, None if y is None else y.long()).sample
    assert 0.1 < wanted.abs().max() < 100, "weights such that an error could be seen"
    return ((output(ours, x, T.int(), y) - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("knob", [*KNOBS, "all that fit together"])
def test_it_computes_what_diffusers_does(diffusers_unet, knob, figure):
    config = with_knobs(**KNOBS.get(knob, ALL))
    figure(
        f"{knob}, 28 t: max |ε − diffusers| / max |ε|", against_diffusers(diffusers_unet, config, config), at_most=1e-5
    )


@pytest.mark.parametrize("knob", SILENT)
def test_the_comparison_would_see_a_knob_that_is_off(diffusers_unet, knob):
    assert against_diffusers(diffusers_unet, with_knobs(**KNOBS[knob]), BASE) > 1e-3


# --- against OpenAI's networks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openai_outputs() -> dict[str, np.ndarray]:
    with np.load(openai_unet.FILE) as stored:
        return dict(stored)


def against_openai(case: openai_unet.Case, wanted: np.ndarray) -> float:
    y = None if case.config.classes is None else torch.from_numpy(openai_unet.Y)
    out = output(
        openai_unet.network(case), torch.from_numpy(openai_unet.images(case)), torch.from_numpy(openai_unet.T), y
    )
    return float(np.abs(out.numpy() - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", openai_unet.CASES)
def test_it_computes_what_openais_network_did(openai_outputs, name, figure):
    wanted = openai_outputs[name]
    assert wanted.shape == (8, 6, 8, 8)
    assert 0.3 < wanted.std() < 3
    error = against_openai(openai_unet.CASES[name], wanted)
    figure(f"{name}: max |Δ| / max |output|", error, at_most=1e-5)


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("improved, scale-shift, 4 heads, t·1000/4000", {"time_scale": 1.0}),
        ("improved, scale-shift, 4 heads, t·1000/4000", {"heads": 1}),
        ("improved, scale-shift, 4 heads, t·1000/4000", {"cos_first": False}),
        ("improved, plain, one head, classes", {"symmetric_padding": False}),
        ("guided, resblock_updown, classes, legacy qkv", {"head_channels": 32}),
        ("guided, no convolutions between levels", {"frequency_shift": 1}),
    ],
)
def test_the_comparison_with_openai_would_see_a_knob_that_is_off(openai_outputs, name, off):
    case = openai_unet.CASES[name]
    case = dataclasses.replace(case, config=dataclasses.replace(case.config, **off))
    assert against_openai(case, openai_outputs[name]) > 1e-3


def test_both_orders_of_openais_qkv_are_the_same_network_here(openai_outputs):
    legacy, new = (openai_outputs[f"guided, resblock_updown, classes, {order} qkv"] for order in ("legacy", "new"))
    assert np.abs(legacy - new).max() < 1e-5


# --- what each knob does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 4])
def test_each_head_attends_by_itself(heads):
    torch.manual_seed(0)
    layer = (
        Attention(8, with_knobs(heads=heads, channels=8, multipliers=(1, 1, 1), groups=4))
        .double()
        .requires_grad_(False)
    )
    rerandomise(layer)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    h = F.group_norm(x, 4, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2)
    q, k, v = (
        torch.einsum("oc,bcn->bon", m.weight[:, :, 0, 0], h) + m.bias[:, None] for m in (layer.q, layer.k, layer.v)
    )
    width = 8 // heads
    attended = []
    for channels in torch.arange(8).split(width):
        scores = torch.einsum("bcn,bcm->bnm", q[:, channels], k[:, channels]) / math.sqrt(width)
        attended.append(torch.einsum("bnm,bcm->bcn", scores.softmax(dim=2), v[:, channels]))
    wanted = x + layer.out(torch.cat(attended, dim=1).reshape(x.shape))
    assert torch.allclose(layer(x), wanted, atol=1e-5), "norm and softmax are float32"


def test_heads_by_number_and_by_width_are_the_same():
    x, t = images(2), torch.tensor([3, 900])
    by_width = random_network(with_knobs(head_channels=16))
    assert {m.heads for m in by_width.modules() if isinstance(m, Attention)} == {4}, "all are 64 wide here"
    assert torch.equal(output(by_width, x, t), output(random_network(with_knobs(heads=4)), x, t))


def test_symmetric_padding_sees_one_pixel_on_every_side():
    layer = Downsample(1, symmetric_padding=True).requires_grad_(False)
    taps = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    layer.conv.weight.copy_(taps)
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 0, 0] = 1
    assert layer(image)[0, 0].tolist() == [[5, 0], [0, 0]], "the middle tap"
    assert layer(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [
        [5 + 6 + 8 + 9, 4 + 5 + 6 + 7 + 8 + 9],
        [2 + 3 + 5 + 6 + 8 + 9, 45],
    ]


def test_without_convolutions_pixels_are_averaged_and_repeated():
    network = UNet(with_knobs(average_pool=True))
    ways = [*(level.resample for level in network.down), *(level.resample for level in network.up)]
    assert not any(list(way.parameters()) for way in ways)
    assert not any(isinstance(m, (Downsample, Upsample)) for m in network.modules())
    x = torch.randn(2, 3, 4, 6)
    small = ways[0](x)
    assert np.allclose(small.numpy(), x.numpy().reshape(2, 3, 2, 2, 3, 2).mean(axis=(3, 5)), atol=1e-6)
    assert np.array_equal(network.up[0].resample(small).numpy(), small.numpy().repeat(2, axis=2).repeat(2, axis=3))


def test_with_resample_blocks_only_they_resample():
    network = UNet(with_knobs(resample_blocks=True))
    blocks = {name: m for name, m in network.named_modules() if isinstance(m, ResidualBlock)}
    resampling = [name for name, block in blocks.items() if isinstance(block.resample, (Halve, Double))]
    assert resampling == ["down.0.resample", "down.1.resample", "up.0.resample", "up.1.resample"]
    assert not any(isinstance(m, (Downsample, Upsample)) for m in network.modules())
    halving = network.down[0].resample
    assert isinstance(halving.resample, Halve)
    torch.nn.init.zeros_(halving.conv2.weight)
    x = torch.randn(2, 32, 4, 4)
    assert torch.allclose(halving(x, torch.zeros(2, 32)), F.avg_pool2d(x, 2)), "what goes around is resampled alike"


def test_every_block_has_its_own_projection_in_running_order():
    network = UNet(with_knobs(resample_blocks=True, scale_shift=True))
    down = [32, 32, 64, 64, 64]
    up = [64, 64, 64, 64, 64, 64, 32, 32]
    assert [p.out_features for p in network.time.projections] == [2 * width for width in [*down, 64, 64, *up]]


def test_scaled_t_is_t_times_the_scale_also_between_whole_numbers():
    x = images(3)
    scaled = random_network(with_knobs(time_scale=0.25))
    plain = random_network(BASE)
    t = torch.tensor([0, 501, 3999], dtype=torch.int32)
    assert torch.equal(output(scaled, x, t), output(plain, x, t * 0.25))
    assert not torch.allclose(output(plain, x, t * 0.25), output(plain, x, (t * 0.25).floor()), atol=1e-3)


def test_each_image_has_its_own_class_and_one_without_embedding_changes_nothing():
    network = random_network(with_knobs(classes=4))
    x, t = images(4), torch.tensor([5, 5, 700, 700])
    y = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    together = output(network, x, t, y)
    for i in range(4):
        assert torch.allclose(output(network, x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], together[i], atol=1e-5)
    assert not torch.allclose(output(network, x, t, y.flip(0)), together, atol=1e-2)
    network.time.classes.weight.zero_()
    plain = UNet(BASE).eval().requires_grad_(False)
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if k != "time.classes.weight"})
    assert torch.equal(output(network, x, t, y), output(plain, x, t))


def test_a_class_is_required_if_and_only_if_there_are_classes():
    x, t = images(1), torch.tensor([1])
    with pytest.raises(InputError, match="takes no class"):
        UNet(BASE)(x, t, torch.tensor([0]))
    with pytest.raises(InputError, match="needs a class"):
        UNet(with_knobs(classes=2))(x, t)


def test_a_learned_variance_is_the_second_half_of_the_channels():
    network = random_network(with_knobs(out_channels=6))
    prediction, var = network(images(2), torch.tensor([1, 2]))
    assert prediction.shape == var.shape == (2, 3, 16, 16)
    network.conv_out.bias[3:] += 1
    moved = network(images(2), torch.tensor([1, 2]))
    assert torch.equal(moved[0], prediction)
    assert torch.allclose(moved[1], var + 1, atol=1e-5)


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm_eps": 0}, "norm_eps must be above 0"),
        ({"norm_eps": math.nan}, "norm_eps must be"),
        ({"norm_eps": "1e-6"}, "norm_eps must be"),
        ({"cos_first": 1}, "cos_first must be true or false"),
        ({"scale_shift": "false"}, "scale_shift must be true or false"),
        ({"symmetric_padding": None}, "symmetric_padding must be true or false"),
        ({"frequency_shift": 2}, "frequency_shift must be 0 or 1"),
        ({"frequency_shift": True}, "frequency_shift must be 0 or 1"),
        ({"time_scale": 0}, "time_scale must be a number above 0"),
        ({"time_scale": math.inf}, "time_scale must be"),
        ({"heads": 0}, "heads must be a whole number"),
        ({"heads": None}, "heads must be a whole number"),
        ({"heads": 3}, "width 64 cannot be split into 3 heads"),
        ({"head_channels": 128}, "width 64 cannot be split into heads of 128 channels"),
        ({"head_channels": 24}, "width 64 cannot be split into heads of 24 channels"),
        ({"heads": 2, "head_channels": 16}, "heads and head_channels contradict"),
        ({"resample_blocks": True, "average_pool": True}, "contradict"),
        ({"classes": 0}, "classes must be a whole number"),
        ({"classes": 10.0}, "classes must be a whole number"),
    ],
)
def test_impossible_knobs_are_refused(change, says):
    with pytest.raises(InputError, match=says):
        with_knobs(**change)


def test_heads_need_to_divide_only_widths_that_attend():
    config = UNetConfig(3, 3, (16, 16), 24, (1, 2, 4), 1, (4,), 0.0, 8, head_channels=32)
    assert config.attention_widths == (96, 96)
    with pytest.raises(InputError, match="width 24"):
        dataclasses.replace(config, attention=(4, 16))


@pytest.mark.parametrize(
    "knobs", [*KNOBS.values(), ALL, {"time_scale": 0.25, "average_pool": True, "heads": 2}], ids=str
)
def test_knobs_survive_json(knobs):
    config = with_knobs(**knobs)
    assert UNetConfig.from_json(json.loads(json.dumps(config.to_json()))) == config != BASE


def test_a_spec_from_before_there_were_knobs_is_hos():
    old = {"in_channels": 3, "out_channels": 3, "size": [32, 32], "channels": 128, "multipliers": [1, 2, 2, 2],
           "blocks": 2, "attention": [16], "dropout": 0.1, "groups": 32}  # fmt: skip
    config = UNetConfig.from_json(old)
    assert config == UNetConfig(3, 3, (32, 32))
    assert (config.norm_eps, config.frequency_shift, config.time_scale, config.heads) == (1e-6, 1, 1.0, 1)
    assert config.classes is config.head_channels is None
    knobs = ("cos_first", "symmetric_padding", "scale_shift", "resample_blocks", "average_pool")
    assert not any(getattr(config, knob) for knob in knobs)


IMAGE = (3, 16, 16)


@pytest.mark.parametrize(
    ("knobs", "spec", "says"),
    [
        ({}, ModelSpec((3, 16, 8)), "image"),
        ({}, ModelSpec(IMAGE, variance="learned_range"), "variance"),
        ({"out_channels": 6}, ModelSpec(IMAGE), "variance"),
        ({"out_channels": 4}, ModelSpec(IMAGE), "twice as many"),
        ({"classes": 3}, ModelSpec(IMAGE), "classes"),
        ({}, ModelSpec(IMAGE, classes=3), "classes"),
        ({"classes": 3}, ModelSpec(IMAGE, classes=4), "classes"),
        ({"classes": 3}, ModelSpec(IMAGE, classes=3, null_class=True), '"no class"'),
        ({"classes": 3, "null_class": True}, ModelSpec(IMAGE, classes=3), '"no class"'),
        ({}, ModelSpec(IMAGE, self_condition=True), "self-conditioning or the condition"),
        ({}, ModelSpec(IMAGE, condition=3), "self-conditioning or the condition"),
    ],
)
def test_a_spec_of_another_network_is_refused(knobs, spec, says, tmp_path):
    with pytest.raises(SpecError, match=says):
        check_spec(with_knobs(**knobs), spec)
    with pytest.raises(SpecError, match=says):
        export_network(UNet(with_knobs(**knobs)), spec, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_no_class_is_one_more_row_of_the_table():
    config = with_knobs(classes=3, null_class=True)
    network = UNet(config).eval()
    assert network.time.classes.weight.shape[0] == 4
    assert UNetConfig.from_json(config.to_json()) == config
    x, t = torch.zeros(1, *IMAGE), torch.zeros(1, dtype=torch.int64)
    network(x, t, torch.tensor([3]))
    with pytest.raises(IndexError):
        network(x, t, torch.tensor([4]))
    with pytest.raises(InputError, match="null_class is for networks with classes"):
        with_knobs(null_class=True)


def test_specs_that_fit():
    check_spec(with_knobs(classes=3, null_class=True), ModelSpec(IMAGE, classes=3, null_class=True))
    check_spec(BASE, ModelSpec(IMAGE))
    check_spec(with_knobs(out_channels=6, classes=3), ModelSpec(IMAGE, variance="learned_range", classes=3))
