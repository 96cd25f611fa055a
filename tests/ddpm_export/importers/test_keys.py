"""Two-way tables: every layout undoes itself, every part of a network has its place, all faults are in one error."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="not verified here: importers (no torch)")

import torch

from ddpm_export.importers import keys
from ddpm_export.importers.keys import HWIO, NIN, SAME, SQUEEZE, TRANSPOSE, Columns, Op, Row, SplitQkv, layer
from ddpm_export.importers.registry import Options, SettingsResolver
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpmx import ModelSpec
from ddpmx.errors import DdpmxError, FileFormatError, InputError

pytestmark = pytest.mark.torch

LAYOUTS: dict[str, tuple[Op, tuple[int, ...], tuple[int, ...]]] = {
    "same": (SAME, (3, 5), (3, 5)),
    "transpose": (TRANSPOSE, (3, 5), (5, 3)),
    "hwio": (HWIO, (2, 3, 5, 7), (7, 5, 2, 3)),
    "nin": (NIN, (3, 5), (5, 3, 1, 1)),
    "nin of one": (NIN, (1, 1), (1, 1, 1, 1)),
    "squeeze": (SQUEEZE, (5, 3), (5, 3, 1, 1)),
    "squeeze of one": (SQUEEZE, (1, 1), (1, 1, 1, 1)),
    "columns": (Columns((2, 0, 3, 1)), (3, 4), (3, 4)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_right_shape_and_undoes_itself(name):
    op, theirs, ours = LAYOUTS[name]
    before = torch.randn(theirs)
    (tensor,) = op.ours(before)
    assert tuple(tensor.shape) == ours
    (after,) = op.theirs(tensor)
    assert torch.equal(before, after)
    assert sorted(before.flatten().tolist()) == sorted(tensor.flatten().tolist())


def test_columns_take_theirs_by_number():
    weight = torch.tensor([[10.0, 11.0, 12.0, 13.0]])
    assert Columns((2, 0, 3, 1)).ours(weight)[0].tolist() == [[12, 10, 13, 11]]


@pytest.mark.parametrize("sides", [0, 1, 2])
@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_q_k_v_are_those_of_openai_s_attention(heads, new_order, sides):
    """Against what the two attentions of guided-diffusion do to the product: reshape and split, or chunk and reshape."""
    channels, length = 8, 5
    op = SplitQkv(heads, new_order, sides)
    weight, bias = torch.randn(3 * channels, channels, *(1,) * sides), torch.randn(3 * channels)
    x = torch.randn(channels, length)
    product = weight.flatten(1) @ x + bias[:, None]
    if new_order:
        expected = [part.reshape(heads, channels // heads, length) for part in product.chunk(3)]
    else:
        expected = product.reshape(heads, 3 * channels // heads, length).split(channels // heads, dim=1)
    for w, b, part in zip(op.ours(weight), op.ours(bias), expected, strict=True):
        assert w.shape == (channels, channels, 1, 1)
        got = (w.flatten(1) @ x + b[:, None]).reshape(heads, channels // heads, length)
        torch.testing.assert_close(got, part)
    assert torch.equal(op.theirs(*op.ours(weight))[0], weight)
    assert torch.equal(op.theirs(*op.ours(bias))[0], bias)


CONFIGS = {
    "Ho's": UNetConfig(3, 3, (16, 16), 32, (1, 2, 2), 2, (8,)),
    "one level": UNetConfig(3, 3, (8, 8), 32, (2,), 1, ()),
    "residual resampling": UNetConfig(3, 6, (16, 16), 32, (1, 2), 1, (16, 8), resample_blocks=True, classes=4),
    "pooling": UNetConfig(1, 1, (16, 8), 32, (1, 2), 1, (), average_pool=True),
    "further inputs": UNetConfig(3, 3, (8, 8), 32, (1,), 1, (), self_condition=True, condition=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_walk_finds_every_tensor_once_and_in_order(name):
    config = CONFIGS[name]
    found: list[str] = []
    blocks = []
    for slot in keys.walk(config):
        parts = [""] if slot.kind not in ("stage", "downsample", "upsample") else []
        if slot.residual:
            blocks.append(slot)
            at = slot.residual.removeprefix(slot.ours)
            parts += [f"{at}.{part}" for part in ("norm1", "conv1", "norm2", "conv2", *(["skip"] if slot.skip else []))]
            found += [f"{slot.projection}.{part}" for part in ("weight", "bias")]
        elif slot.kind in ("downsample", "upsample") and not config.average_pool:
            parts = [".conv"]
        if slot.attention:
            parts += [f"{slot.attention.removeprefix(slot.ours)}.{part}" for part in ("norm", "q", "k", "v", "out")]
        kinds = ("weight",) if slot.kind == "classes" else ("weight", "bias")
        found += [f"{slot.ours}{part}.{kind}" for part in parts for kind in kinds]
    assert sorted(found) == sorted(UNet(config).state_dict())
    assert [slot.projection for slot in blocks] == [f"time.projections.{n}" for n in range(len(blocks))]
    shapes = keys.unet_shapes(config)
    for slot in blocks:
        assert shapes[f"{slot.residual}.conv1.weight"][:2] == (slot.c_out, slot.c_in)
    for slot in keys.walk(config):
        if slot.kind in ("conv_in", "conv_out"):
            assert shapes[f"{slot.ours}.weight"][:2] == (slot.c_out, slot.c_in)


# --- faults ----------------------------------------------------------------------------------------------------------

ROWS = [*layer("a", "x"), *layer("b", "y", TRANSPOSE)]
THEIRS = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2), "b.weight": torch.ones(3, 2), "b.bias": torch.ones(2)}
SHAPES = {"x.weight": (2, 3), "x.bias": (2,), "y.weight": (2, 3), "y.bias": (2,)}


def test_all_faults_are_in_one_error():
    theirs = {**THEIRS, "c": torch.ones(1), "a.bias": torch.ones(2) / 0, "b.weight": torch.ones(2, 2)}
    del theirs["b.bias"]
    theirs["a.weight"] = theirs["a.weight"].long()
    with pytest.raises(FileFormatError) as caught:
        keys.to_ours(ROWS, theirs, shapes=SHAPES)
    message = str(caught.value)
    for fault in ("missing: b.bias", "surplus: c", "b.weight [2, 2]", "a.weight is int64", "infinities: a.bias"):
        assert fault in message
    assert "1 missing, 1 surplus, 1 of another shape, 1 not floats, 1 with NaN" in message


def test_ignored_names_may_be_present():
    theirs = {**THEIRS, "c.num_batches": torch.ones(1)}
    assert keys.to_ours(ROWS, theirs, shapes=SHAPES, ignore=("*.num_batches",)).keys() == SHAPES.keys()


def test_a_layout_that_does_not_fit_is_no_traceback():
    theirs = {**THEIRS, "b.weight": torch.ones(3, 2, 1)}
    with pytest.raises(FileFormatError, match="1 of another shape"):
        keys.to_ours(ROWS, theirs, shapes=SHAPES)


def test_a_network_with_more_than_the_table_is_refused():
    with pytest.raises(InputError, match="no names"):
        keys.to_ours(ROWS, THEIRS, shapes={**SHAPES, "z": (1,)})


def test_backwards_wants_exactly_our_tensors():
    ours = keys.to_ours(ROWS, THEIRS, shapes=SHAPES)
    back = keys.to_theirs(ROWS, ours)
    assert back.keys() == THEIRS.keys()
    assert all(torch.equal(back[name], THEIRS[name]) for name in back)
    with pytest.raises(FileFormatError, match="surplus"):
        keys.to_theirs(ROWS, {**ours, "z": torch.ones(1)})
    with pytest.raises(FileFormatError, match="missing"):
        keys.to_theirs(ROWS, {"x.weight": ours["x.weight"]})


# --- settings --------------------------------------------------------------------------------------------------------


def resolver(**values: object) -> SettingsResolver:
    return SettingsResolver(Options(values))


def test_the_user_comes_before_the_file_and_the_file_before_assumptions():
    heads = (1, 4)
    assert resolver(heads="4").resolve("heads", heads, known=1, source="config") == 4
    assert resolver().resolve("heads", heads, known=4, source="config") == 4
    settings = resolver()
    assert settings.resolve("heads", heads, assume="always") == 1
    assert settings.facts[0].assumed
    assert settings.resolve("order", ("old", "new")) == "old"
    assert [question.name for question in settings.questions] == ["order"]


def test_a_contradiction_is_recorded():
    settings = resolver(heads="4")
    settings.resolve("heads", (1, 4), known=1, source="config.json")
    assert settings.facts[0].source == "set by the user; config.json says 1"


@pytest.mark.parametrize(
    ("raw", "candidates", "value"),
    [("8", (4,), 8), ("2", (0.5,), 2.0), ("none", (1.0, None), None), ("true", (False, True), True), (7, (1,), 7)],
)
def test_a_value_is_parsed_to_the_type_of_the_candidates(raw, candidates, value):
    got = resolver(x=raw).resolve("x", candidates, closed=False)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("raw", "candidates", "closed"),
    [
        ("3", (1, 4), True),
        ("x", (4,), False),
        ("1", (False, True), False),
        ("1.5", (4,), False),
        ("", ("a",), True),
        ("[8]", ((32, 32),), False),
        ('["a", 8]', ((32, 32),), False),
    ],
)
def test_impossible_values_are_refused(raw, candidates, closed):
    with pytest.raises(InputError, match="x cannot be"):
        resolver(x=raw).resolve("x", candidates, closed=closed)


def test_an_unknown_setting_is_refused():
    settings = resolver(heads="4", heds="4")
    settings.resolve("heads", (1, 4))
    with pytest.raises(DdpmxError, match="heds"):
        settings.finish("openai", None, ModelSpec((3, 8, 8)), {})


def test_a_row_by_default_changes_nothing():
    assert Row(("a",), ("b",)).op is SAME
