"""The network is the paper's: its size, its order, its initial weights, and its outputs."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the network (no torch)")

import torch
import torch.nn.functional as F

from ddpm_export.networks import unet
from ddpm_export.networks.unet import (
    Attention,
    Downsample,
    GroupNorm32,
    ResidualBlock,
    Stage,
    UNet,
    UNetConfig,
    Upsample,
    cifar10,
    lsun256,
    sinusoidal_embedding,
)
from ddpm_export.networks.unet_config import attention_heights
from ddpmx.errors import InputError, SpecError

pytestmark = pytest.mark.torch


def without_weights(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


# --- the paper's two networks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "count"), [(cifar10(), 35_746_307), (lsun256(), 113_673_219)], ids=["cifar", "lsun"]
)
def test_parameter_counts(config, count):
    assert sum(p.numel() for p in without_weights(config).parameters()) == count


def test_widths_walk_down_and_up_as_in_the_paper():
    blocks = [m for m in without_weights(cifar10()).modules() if isinstance(m, ResidualBlock)]
    assert [(b.conv1.in_channels, b.conv2.out_channels) for b in blocks] == [
        *[(128, 128)] * 2,
        *[(128, 256), (256, 256)],
        *[(256, 256)] * 4,
        *[(256, 256)] * 2,  # the middle
        *[(512, 256)] * 3,
        *[(512, 256)] * 3,
        *[(512, 256), (512, 256), (384, 256)],
        *[(384, 128), (256, 128), (256, 128)],
    ]


@pytest.mark.parametrize(
    ("config", "digest"),
    [
        (cifar10(), "67146964a7663f35"),
        (lsun256(), "c58503c40de7d7f9"),
    ],
    ids=["cifar", "lsun"],
)
def test_names_and_shapes_of_the_weights_are_those_of_every_checkpoint_so_far(config, digest):
    lines = [f"{name} {list(tensor.shape)}" for name, tensor in without_weights(config).state_dict().items()]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


def test_a_skip_has_a_convolution_only_where_the_width_changes():
    for block in (m for m in without_weights(cifar10()).modules() if isinstance(m, ResidualBlock)):
        changes = block.conv1.in_channels != block.conv2.out_channels
        assert isinstance(block.skip, torch.nn.Conv2d) == changes


@pytest.mark.parametrize(
    ("config", "down", "up", "blocks"), [(cifar10(), 1, 2, 22), (lsun256(), 4, 1, 32)], ids=["cifar", "lsun"]
)
def test_attention_follows_every_block_of_height_16_and_one_in_the_middle(config, down, up, blocks):
    network = without_weights(config)
    stages = {name: module for name, module in network.named_modules() if isinstance(module, Stage)}
    assert len(stages) == blocks
    attending = {name for name, stage in stages.items() if isinstance(stage.attention, Attention)}
    assert attending == {
        *(f"down.{down}.stages.{j}" for j in range(2)),
        "middle.0",
        *(f"up.{up}.stages.{j}" for j in range(3)),
    }


def test_group_norms_have_32_groups_and_the_epsilon_of_tensorflow():
    norms = [m for m in without_weights(cifar10()).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 2 * 22 + 6 + 1
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-6)}


def test_dropout_is_in_every_block_and_silent_in_eval_mode():
    network = UNet(UNetConfig(1, 1, (8, 8), 8, (1, 2), 1, (4,), 0.5, 4))
    assert {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # the initial weights would hide what dropout does
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))


# --- initial weights -------------------------------------------------------------------------------------------------


def test_initial_weights_are_xavier_and_the_last_layer_of_each_branch_is_almost_zero():
    torch.manual_seed(0)
    network = UNet(UNetConfig(3, 3, (16, 16), 32, (1, 2), 1, (8,), 0.0, 32))
    almost_zero = 0
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name
            assert not module.bias.any(), name
        elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            weight = module.weight.detach().double()
            taps = weight[0, 0].numel()
            fan_in, fan_out = weight.shape[1] * taps, weight.shape[0] * taps
            last = name.endswith(("conv2", "attention.out")) or name == "conv_out"
            gain = 1e-5 if last else 1.0
            almost_zero += last
            bound = gain * math.sqrt(6 / (fan_in + fan_out))  # uniform over ±bound
            assert not module.bias.any(), name
            assert weight.abs().max() <= bound * (1 + 1e-6), name
            # the spread of the sample's own standard deviation is about 0.45/√n of it: this is five of those
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=2.3 / math.sqrt(weight.numel())), name
    assert almost_zero == 8 + 4 + 1, "each block's conv2, each attention's out, conv_out"


def test_the_output_of_a_fresh_network_is_almost_zero():
    torch.manual_seed(0)
    network = UNet(UNetConfig(1, 1, (8, 8), 8, (1, 2), 1, (4,), 0.0, 4)).eval()
    assert network(torch.randn(4, 1, 8, 8), torch.arange(4)).abs().max() < 1e-3


# --- layers ----------------------------------------------------------------------------------------------------------


def reference_embedding(t: np.ndarray, channels: int, divisor: int) -> np.ndarray:
    half = channels // 2
    frequencies = 10000.0 ** (-np.arange(half, dtype=np.float64) / divisor)
    angles = t[:, None].astype(np.float64) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


@pytest.mark.parametrize("channels", [16, 32, 128])
def test_embedding_at_all_t(figure, channels):
    t = np.arange(1000)
    embedding = sinusoidal_embedding(torch.from_numpy(t), channels)
    assert embedding.dtype == torch.float32
    half = channels // 2
    error = np.abs(embedding.numpy() - reference_embedding(t, channels, half - 1)).max()
    # angles up to 999 in float32 are off by up to 999·2⁻²⁴ ≈ 6e-5 before any sine is taken
    figure(f"time embedding of {channels} channels against float64, all t: max |Δ|", error, at_most=1.5e-4)


def test_embedding_begins_with_the_sines_and_ends_at_a_ten_thousandth():
    assert sinusoidal_embedding(torch.tensor([0]), 8).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    embedding = sinusoidal_embedding(torch.tensor([1]), 8)[0].double()
    assert embedding[3].item() == pytest.approx(1e-4, rel=1e-5), "divisor half − 1: the last frequency is 1/10000"
    # the relatives of this network that divide by half are far away
    assert np.abs(embedding.numpy() - reference_embedding(np.array([1]), 8, 4)).max() > 1e-3


def test_embedding_of_an_odd_width_ends_in_zero():
    embedding = sinusoidal_embedding(torch.arange(1000), 7)
    assert embedding.shape == (1000, 7)
    assert not embedding[:, 6].any()
    assert torch.equal(embedding[:, :6], sinusoidal_embedding(torch.arange(1000), 6))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_embedding_does_not_depend_on_the_type_of_t(dtype):
    t = torch.arange(1000)
    assert torch.equal(sinusoidal_embedding(t.to(dtype), 16), sinusoidal_embedding(t, 16))


def test_downsampling_pads_below_and_to_the_right_only():
    layer = Downsample(1)
    taps = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    with torch.no_grad():
        layer.conv.weight.copy_(taps)
        layer.conv.bias.zero_()

    def response(row: int, column: int) -> torch.Tensor:
        image = torch.zeros(1, 1, 6, 6)
        image[0, 0, row, column] = 1
        return layer(image)[0, 0].detach()

    # Output (i, j) sees rows 2i…2i+2 and columns 2j…2j+2.
    corner = torch.zeros(3, 3)
    corner[0, 0] = taps[0, 0, 0, 0]
    assert torch.equal(response(0, 0), corner), "with padding on all sides tap (1, 1) would stand here"
    last = torch.zeros(3, 3)
    last[2, 2] = taps[0, 0, 1, 1]
    assert torch.equal(response(5, 5), last)
    shared = torch.zeros(3, 3)
    shared[:2, :2] = taps[0, 0, [2, 0]][:, [2, 0]]
    assert torch.equal(response(2, 2), shared)


def test_upsampling_repeats_each_pixel():
    layer = Upsample(2)
    with torch.no_grad():
        layer.conv.weight.zero_()
        for channel in range(2):
            layer.conv.weight[channel, channel, 1, 1] = 1
        layer.conv.bias.zero_()
        x = torch.randn(3, 2, 4, 5)
        assert np.array_equal(layer(x).numpy(), x.numpy().repeat(2, axis=2).repeat(2, axis=3))


def test_group_norm_computes_in_float32_and_returns_the_type_of_its_input():
    norm = GroupNorm32(2, 4).eval()
    x = 300 * torch.randn(2, 4, 8, 8)  # squares pass 65504, the largest half
    out = norm(x.half())
    assert out.dtype == torch.float16
    groups = x.half().double().reshape(2, 2, -1)
    expected = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
    assert torch.allclose(out.double(), expected.reshape(x.shape), atol=2e-3)


def test_group_norm_epsilon_is_felt_where_the_variance_is_tiny():
    norm = GroupNorm32(1, 1)
    x = torch.tensor([1e-3, -1e-3]).reshape(1, 1, 1, 2)  # variance 1e-6
    assert norm(x).flatten()[0].item() == pytest.approx(1e-3 / math.sqrt(2e-6), rel=1e-5)


# --- configurations --------------------------------------------------------------------------------------------------

SMALL = {"in_channels": 1, "out_channels": 1, "size": (16, 16), "channels": 16, "multipliers": (1, 2), "groups": 8}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": (16,)}, "size must be 2 numbers"),
        ({"size": 16}, "size must be whole numbers"),
        ({"size": (16, 0)}, "size must be whole numbers"),
        ({"size": (16, 15)}, "16×15 cannot be halved"),
        ({"size": (16, 16.0)}, "size must be whole numbers"),
        ({"multipliers": ()}, "1 to 12 levels"),
        ({"multipliers": (1,) * 13}, "1 to 12 levels"),
        ({"multipliers": (65,)}, "at most 64 times"),
        ({"multipliers": (1, 0)}, "multipliers must be whole numbers"),
        ({"multipliers": "12"}, "multipliers must be whole numbers"),
        ({"attention": (8.5,)}, "attention must be whole numbers"),
        ({"channels": 0}, "channels must be a whole number"),
        ({"channels": True}, "channels must be a whole number"),
        ({"channels": 65537}, "channels must be a whole number"),
        ({"channels": 2, "groups": 1}, "channels must be at least 4"),
        ({"channels": 20}, "20 cannot be split into 8 groups"),
        ({"in_channels": 0}, "in_channels must be"),
        ({"out_channels": None}, "out_channels must be"),
        ({"blocks": 0}, "blocks must be"),
        ({"blocks": 65}, "at most 64 blocks"),
        ({"groups": -1}, "groups must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": math.nan}, "dropout must be"),
        ({"dropout": "0"}, "dropout must be"),
    ],
)
def test_impossible_numbers_are_refused(change, says):
    UNetConfig(**SMALL)
    with pytest.raises(InputError, match=says):
        UNetConfig(**{**SMALL, **change})


def test_a_config_survives_json():
    config = UNetConfig(3, 6, (24, 48), 20, (1, 3, 2), 3, (12, 6), 0.25, 5)
    assert UNetConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    "junk", [None, 3, "unet", [], {}, {"size": [16, 16]}, {**SMALL, "tails": 8}, {**SMALL, 3: 4}], ids=repr
)
def test_junk_is_not_a_config(junk):
    with pytest.raises(SpecError, match="network"):
        UNetConfig.from_json(junk)


# --- the whole network -----------------------------------------------------------------------------------------------


def test_images_need_not_be_square_and_each_has_its_own_t():
    torch.manual_seed(0)
    network = UNet(UNetConfig(3, 5, (8, 20), 8, (1, 2, 1), 1, (4,), 0.0, 4)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(3, 3, 8, 20), torch.tensor([0, 500, 999], dtype=torch.int32)
    with torch.no_grad():
        together = network(x, t)
        assert together.shape == (3, 5, 8, 20)
        assert together.dtype == torch.float32
        for index in range(3):
            alone = network(x[index : index + 1], t[index : index + 1])
            assert torch.allclose(together[index], alone[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(network(x, t.flip(0)), together, atol=1e-3), "t must matter"


NARROW = UNetConfig(3, 3, (16, 16), 32, (1, 2, 2, 2), 2, (8,), 0.0, 32)


def same_network(config: UNetConfig):
    """Ours and diffusers', with the same weights."""
    pytest.importorskip("diffusers", reason="not verified here: the network against diffusers' (not installed)")
    from oracles import diffusers_unet

    theirs = diffusers_unet.twin(config)
    ours = UNet(config).eval().requires_grad_(False)
    ours.load_state_dict(diffusers_unet.carry(theirs.state_dict(), config))  # strict: nothing is left over
    return ours, theirs


def compare(ours, theirs, size: tuple[int, int], t: torch.Tensor, batch: int) -> tuple[float, float]:
    """max |Δ| and max |ε| over one image for each t."""
    generator = torch.Generator().manual_seed(1)
    worst = largest = 0.0
    with torch.no_grad():
        for part in t.split(batch):
            x = torch.randn(len(part), 3, *size, generator=generator)
            wanted = theirs(x, part).sample
            worst = max(worst, (ours(x, part.int()) - wanted).abs().max().item())
            largest = max(largest, wanted.abs().max().item())
    return worst, largest


@pytest.mark.slow
def test_a_narrow_network_computes_what_diffusers_does_at_all_t(figure):
    ours, theirs = same_network(NARROW)
    worst, largest = compare(ours, theirs, NARROW.size, torch.arange(1000), batch=50)
    assert 0.1 < largest < 100, "weights such that an error could be seen"
    figure("32 channels, all 1000 t: max |ε − diffusers| / max |ε|", worst / largest, at_most=1e-5)


@pytest.mark.long
def test_the_cifar10_network_computes_what_diffusers_does(figure):
    ours, theirs = same_network(cifar10())
    t = torch.linspace(0, 999, 32).round().long()
    worst, largest = compare(ours, theirs, (32, 32), t, batch=8)
    assert 0.1 < largest < 100
    figure("CIFAR-10 widths, 32 t: max |ε − diffusers| / max |ε|", worst / largest, at_most=1e-5)


def swap_sin_and_cos(network, monkeypatch):
    monkeypatch.setattr(unet, "sinusoidal_embedding", lambda t, n, **_: sinusoidal_embedding(t, n).roll(n // 2, dims=1))


def divide_by_half(network, monkeypatch):
    def embedding(t, n, **_):
        return torch.from_numpy(reference_embedding(t.numpy(), n, n // 2)).float()

    monkeypatch.setattr(unet, "sinusoidal_embedding", embedding)


def count_t_from_one(network, monkeypatch):
    monkeypatch.setattr(unet, "sinusoidal_embedding", lambda t, n, **_: sinusoidal_embedding(t + 1, n))


def pad_on_all_sides(network, monkeypatch):
    conv = network.down[0].resample.conv
    network.down[0].resample.forward = lambda x: F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)


def forget_the_attention_scale(network, monkeypatch):
    attention = network.middle[0].attention
    attention.q.weight *= attention.q.in_channels**0.5


def forget_one_attention(network, monkeypatch):
    network.up[2].stages[2].attention = torch.nn.Identity()


@pytest.mark.parametrize(
    "fault",
    [
        swap_sin_and_cos,
        divide_by_half,
        count_t_from_one,
        pad_on_all_sides,
        forget_the_attention_scale,
        forget_one_attention,
    ],
)
def test_the_comparison_would_see(fault, monkeypatch):
    ours, theirs = same_network(NARROW)
    fault(ours, monkeypatch)
    worst, largest = compare(ours, theirs, NARROW.size, torch.tensor([10, 400, 999]), batch=3)
    assert worst > 1e-3 * largest, "a hundred times what the comparison allows"


@pytest.mark.parametrize(
    ("size", "levels", "heights"),
    [
        ((32, 32), 4, (16,)),  # the paper's for CIFAR-10
        ((256, 256), 6, (16,)),  # and for LSUN
        ((28, 28), 3, (14,)),
        ((48, 48), 4, (12,)),
        ((96, 96), 4, (12,)),
        ((100, 100), 3, (25,)),
        ((8, 8), 2, (8,)),
        ((80, 200), 4, (10,)),
        ((1, 32), 1, (1,)),
        ((256, 256), 3, ()),  # 64×64 is too large
    ],
    ids=str,
)
def test_attention_belongs_at_the_level_nearest_to_16(size, levels, heights):
    assert attention_heights(size, levels) == heights
    UNetConfig(1, 1, size, 8, (1,) * levels, 1, heights, 0.0, 4).check_attention()


def test_a_network_says_its_levels_in_a_line():
    text = UNetConfig(3, 3, (28, 20), 32, (1, 2, 2), 2, (14,), 0.1, 8).describe()
    assert (
        text == "28×20 (32) → 14×10 (64, attention) → 7×5 (64), 2 blocks a level, attention in the middle, dropout 0.1"
    )
