"""Ho et al.'s TensorFlow checkpoints: names that their code wrote, and the ε that it computed with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: Ho et al.'s checkpoints (no torch)")
pytest.importorskip("safetensors", reason="not verified here: Ho et al.'s checkpoints (no safetensors)")

import torch

from ddpm_export.importers import ho_tf
from ddpm_export.importers.keys import to_theirs, unet_shapes
from ddpm_export.importers.reading.contents import CheckpointContents, open_checkpoint
from ddpm_export.importers.reading.tensor_bundle import TensorBundle
from ddpm_export.importers.settings import Imported, Options
from ddpm_export.networks.unet import UNet, UNetConfig, cifar10, lsun256
from ddpmx.errors import FileFormatError, InputError, SpecError
from ddpmx.sampling.request import Sampling
from oracles import tf_bundle
from oracles.tf_bundle import FIXTURES, values

pytestmark = pytest.mark.torch

ENTRIES = TensorBundle(FIXTURES / "ho.ckpt-790000").entries
EPS = np.load(FIXTURES / "ho_eps.npz")
CIFAR_KWARGS = {
    "num_diffusion_timesteps": 500,
    "beta_start": 0.0002,
    "beta_end": 0.03,
    "beta_schedule": "quad",
    "model_mean_type": "xstart",
    "model_var_type": "fixedsmall",
    "loss_type": "mse",
    "dropout": 0.25,
    "dataset": "cifar10",
}
LSUN_KWARGS = {
    "num_diffusion_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "loss_type": "noisepred",
    "dropout": 0.0,
    "block_size": 1,
    "dataset": "lsun",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tf_bundle.ho_checkpoint(tmp_path_factory.mktemp("ho"), ENTRIES)


@pytest.fixture(scope="module")
def contents(checkpoint) -> CheckpointContents:
    return open_checkpoint(checkpoint)


def read(contents: CheckpointContents, **values: object) -> Imported:
    return ho_tf.read(contents, Options({"size": "[8, 8]", "variance": "fixed_large", **values}))


def with_config(contents: CheckpointContents, **config: object) -> CheckpointContents:
    return CheckpointContents(
        contents.path, contents.kind, contents.tensors, contents.objects, config, {}, contents.file
    )


def with_tensors(contents: CheckpointContents, tensors: dict) -> CheckpointContents:
    return CheckpointContents(
        contents.path, "tensor-bundle", tensors, contents.objects, contents.config, {}, contents.file
    )


def weightless(config: UNetConfig, step: int) -> CheckpointContents:
    """A checkpoint of such a network, with averages alone: its tensors are zeros that take no memory."""
    shapes = unet_shapes(config)
    table = ho_tf.rows(config, average=True)
    ours = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    theirs = {
        name: op
        for row in table
        for name, op in zip(row.theirs, row.op.theirs(*(ours[n] for n in row.ours)), strict=True)
    }
    return CheckpointContents(Path("model.ckpt"), "tensor-bundle", theirs, {"step": step})


def settings(imported: Imported) -> dict[str, object]:
    return {fact.name: fact.value for fact in imported.facts}


# --- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_epsilon_is_that_of_the_original_code(contents, weights):
    imported = ho_tf.read(contents, Options({"size": [8, 8], "variance": "fixed_large"}, weights))
    network = UNet(imported.config).eval()
    network.load_state_dict(imported.tensors)
    x = torch.from_numpy(4 * values("x", (6, 8, 8, 3)).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        out = network(x, torch.from_numpy(EPS["t"])).numpy()
    assert np.abs(out - EPS[weights]).max() <= 1e-5 * np.abs(EPS[weights]).max()
    other = EPS["raw" if weights == "ema" else "ema"]
    assert np.abs(out - other).max() > 0.1, "swapping the two sets of weights would go unnoticed"


def test_the_oracle_depends_on_t():
    assert list(EPS["t"]) == [0, 1, 10, 250, 500, 999]
    assert all(np.abs(EPS["ema"][i] - EPS["ema"][j]).max() > 0.1 for i in range(6) for j in range(i))


def test_both_sets_of_weights_come_along_and_the_optimisers_do_not(contents):
    imported = read(contents)
    assert imported.raw is not None
    assert set(imported.raw) == set(imported.tensors) == set(UNet(imported.config).state_dict())
    raw = ho_tf.read(contents, Options({"size": [8, 8], "variance": "fixed_large"}, "raw"))
    assert all(torch.equal(imported.raw[name], tensor) for name, tensor in raw.tensors.items())
    assert len(ENTRIES) == 4 * len(imported.tensors) + 3


def test_there_and_back_is_the_identity(contents):
    imported = read(contents)
    back = ho_tf.variables(imported.config, imported.tensors)
    assert set(back) == {name for name in ENTRIES if name.endswith(ho_tf.AVERAGE)}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor.numpy(), values(name, ENTRIES[name].shape), strict=True)
    again = to_theirs(ho_tf.rows(imported.config), imported.tensors)
    assert set(again) == {name.removesuffix(ho_tf.AVERAGE) for name in back}


# --- what it is ------------------------------------------------------------------------------------------------------


def test_it_is_recognised_by_its_names(contents):
    assert ho_tf.recognise(contents) == "a TensorFlow checkpoint with model/temb/dense0/W"
    other = open_checkpoint(FIXTURES / "types.ckpt-12")
    assert ho_tf.recognise(other) is None
    with pytest.raises(FileFormatError, match="not a TensorFlow checkpoint of Ho et al"):
        ho_tf.read(other, Options())


def test_the_network_follows_from_names_and_shapes(contents):
    imported = read(contents)
    assert imported.config == UNetConfig(
        3, 3, (8, 8), channels=32, multipliers=(1, 2), blocks=2, attention=(4,), dropout=0.0
    )
    assert imported.spec.shape == (3, 8, 8)
    assert settings(imported)["step"] == 790000
    assert "published as" not in settings(imported), "another network than the published one of as many steps"
    assert imported.questions == ()


def test_without_the_size_attention_is_taken_to_be_at_16(contents):
    imported = ho_tf.read(contents, Options())
    assert imported.config.size == (32, 32)
    assert imported.config.attention == (16,)
    assert [fact.name for fact in imported.facts if fact.assumed and fact.name == "size"]
    (question,) = imported.questions
    assert (question.name, set(question.candidates)) == ("variance", {"fixed_large", "fixed_small"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "step", "variance", "name"),
    [
        (cifar10(), 790_000, "fixed_large", "CIFAR-10 of Ho et al."),
        (lsun256(), 2_388_000, "fixed_small", "LSUN bedroom of Ho et al."),
        (lsun256(), 1_761_000, "fixed_small", "LSUN cat of Ho et al."),
        (lsun256(), 4_432_000, "fixed_small", "LSUN church of Ho et al."),
        (lsun256(), 500_000, "fixed_small", None),
        (cifar10(), 2_388_000, "fixed_large", None),
    ],
)
def test_the_published_files_need_no_flags(config, step, variance, name):
    imported = ho_tf.read(weightless(config, step), Options())
    assert imported.questions == ()
    assert {**imported.config.to_json(), "dropout": 0} == {**config.to_json(), "dropout": 0}
    spec = imported.spec
    assert (spec.variance, spec.prediction, spec.clip) == (variance, "eps", 1.0)
    assert (spec.timesteps, spec.schedule, spec.schedule_params) == (
        *(1000, "linear"),
        {"beta_start": 1e-4, "beta_end": 0.02},
    )
    assert settings(imported).get("published as") == name
    assert imported.raw is None


def test_kwargs_json_is_read(tmp_path):
    imported = ho_tf.read(open_checkpoint(tf_bundle.ho_checkpoint(tmp_path, ENTRIES, CIFAR_KWARGS)), Options())
    spec = imported.spec
    assert (spec.timesteps, spec.schedule, spec.prediction, spec.variance) == (500, "quad", "x0", "fixed_small")
    assert spec.schedule_params == {"beta_start": 0.0002, "beta_end": 0.03}
    assert (imported.config.dropout, imported.config.size) == (0.25, (32, 32))
    assert imported.questions == ()
    assert not [fact for fact in imported.facts if fact.assumed and fact.name != "clip"]


def test_scripts_without_a_flag_for_the_variance_took_the_small_one(contents):
    imported = ho_tf.read(with_config(contents, **LSUN_KWARGS), Options())
    assert imported.spec.variance == "fixed_small"
    assert imported.config.size == (256, 256)
    assert imported.questions == ()


@pytest.mark.parametrize("schedule", ["linear", "quad", "const", "warmup10", "warmup50", "jsd"])
def test_each_schedule_of_hos_is_known(contents, schedule):
    mean = "xstart" if schedule == "jsd" else "eps"  # jsd ends at ᾱ = 0, from where ε alone cannot lead back
    kwargs = LSUN_KWARGS | {"beta_schedule": schedule, "model_mean_type": mean, "dataset": "x"}
    imported = read(with_config(contents, **kwargs))
    assert imported.spec.schedule == schedule


def test_the_users_options_come_before_kwargs_json(contents):
    imported = read(with_config(contents, **CIFAR_KWARGS), schedule="linear", timesteps="1000", prediction="eps")
    spec = imported.spec
    assert (spec.timesteps, spec.schedule, spec.prediction, spec.variance) == (1000, "linear", "eps", "fixed_large")
    assert spec.shape == (3, 8, 8)
    assert spec.schedule_params == {"beta_start": 1e-4, "beta_end": 0.02}, "those of quad are not linear's"


def test_without_attention_the_size_is_a_question(contents):
    tensors = {name: contents.tensors[name] for name in ENTRIES if "/attn_" not in name or "/mid/" in name}
    imported = ho_tf.read(with_tensors(contents, tensors), Options({"variance": "fixed_large"}))
    assert [question.name for question in imported.questions] == ["size"]
    assert imported.config.attention == ()


@pytest.mark.parametrize(
    ("stored", "step"), [(7, 7), (torch.nan, 790000), ([1, 2], 790000), (None, 790000), (True, 790000)]
)
def test_the_number_of_steps_is_that_of_global_step_or_of_the_name(contents, stored, step):
    tensors = {name: contents.tensors[name] for name in ENTRIES if name.endswith(ho_tf.AVERAGE)}
    tensors |= {} if stored is None else {"global_step": torch.tensor(stored)}
    assert settings(read(with_tensors(contents, tensors)))["step"] == step


def test_pooling_in_place_of_convolutions_is_seen(contents):
    config = UNetConfig(3, 3, (8, 8), channels=32, multipliers=(1, 2), attention=(4,), average_pool=True)
    imported = read(weightless(config, 1))
    assert imported.config.average_pool


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_mean_type": "xlast"}, "model_mean_type 'xlast', which ddpmx cannot run"),
        ({"model_mean_type": ["eps"]}, "model_mean_type .*which ddpmx cannot run"),
        ({"model_var_type": "learned"}, "model_var_type 'learned', and the network's output has 3 channels"),
        ({"model_var_type": {}}, "model_var_type .*which ddpmx cannot run"),
        ({"beta_schedule": "cosine"}, "beta_schedule 'cosine', which ddpmx cannot run"),
        ({"block_size": 2}, "block_size 2"),
        ({"num_diffusion_timesteps": "many"}, "num_diffusion_timesteps 'many'"),
        ({"num_diffusion_timesteps": -1}, "T must be"),
        ({"beta_end": [1]}, r"beta_end \[1\]"),
        ({"beta_end": 7}, "β_t must lie"),
        ({"dropout": "x"}, "dropout 'x'"),
    ],
)
def test_impossible_kwargs_are_refused(contents, change, text):
    config = with_config(contents, **CIFAR_KWARGS | change)
    with pytest.raises((FileFormatError, SpecError), match=text):
        ho_tf.read(config, Options())


@pytest.mark.parametrize(
    "values", [{"size": "[8]"}, {"size": "[]"}, {"size": "[0, 8]"}, {"size": '["a", 2]'}, {"size": "[7, 7]"}]
)
def test_impossible_sizes_are_refused(contents, values):
    with pytest.raises(InputError):
        read(contents, **values)


def with_log_variance(contents: CheckpointContents) -> dict[str, torch.Tensor]:
    """Tensors of a network that gives ε, as the original's, and log σ² = −3 everywhere."""
    tensors = {name: contents.tensors[name] for name in ENTRIES if name.endswith(ho_tf.AVERAGE)}
    W, b = (f"model/conv_out/{name}{ho_tf.AVERAGE}" for name in "Wb")
    tensors[W] = torch.cat([tensors[W], torch.zeros_like(tensors[W])], dim=3)
    tensors[b] = torch.cat([tensors[b], torch.full_like(tensors[b], -3.0)])
    return tensors


@pytest.mark.parametrize("mean", ["eps", "xprev"])
def test_a_learned_variance_and_mu_give_the_step_of_the_original_code(contents, mean):
    """Its p_sample, written out: μ is the network's first half, or follows from ε, and σ = exp(log σ² / 2)."""
    learned = with_tensors(with_config(contents, **CIFAR_KWARGS | {"model_mean_type": mean, "model_var_type": "learned"}),
                           with_log_variance(contents))  # fmt: skip
    imported = ho_tf.read(learned, Options({"size": "[8, 8]"}))
    spec = imported.spec
    assert (spec.variance, spec.prediction) == ("learned", {"eps": "eps", "xprev": "mu"}[mean])
    assert spec.clip == (1.0 if mean == "eps" else None)
    network = UNet(imported.config).eval()
    network.load_state_dict(imported.tensors)
    x = 4 * values("x", (6, 8, 8, 3)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        out, var = (each.numpy() for each in network(torch.from_numpy(x.copy()), torch.from_numpy(EPS["t"])))
    assert np.abs(out - EPS["ema"]).max() <= 1e-5 * np.abs(EPS["ema"]).max()
    assert np.array_equal(var, np.full_like(var, -3))
    table, t = Sampling().table(spec), 250
    number = int(np.flatnonzero(table.timesteps == t)[0])
    p, q, a, b, _ = table.rows[number]
    x0 = p * x + q * out
    mean_of_ours = a * (x0 if spec.clip is None else x0.clip(-1, 1)) + b * x
    betas = np.linspace(0.0002**0.5, 0.03**0.5, 500) ** 2
    beta, (before, bar) = betas[t], np.cumprod(1 - betas)[t - 1 : t + 1]
    eps0 = ((x - np.sqrt(1 - bar) * out) / np.sqrt(bar)).clip(-1, 1)
    theirs = out if mean == "xprev" else (
        beta * np.sqrt(before) / (1 - bar) * eps0 + (1 - before) * np.sqrt(1 - beta) / (1 - bar) * x
    )  # fmt: skip
    np.testing.assert_allclose(mean_of_ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert table.learned is not None
    c, d = table.learned[number]
    assert np.exp(c + d * var).max() == pytest.approx(np.exp(-1.5))


def test_channels_that_contradict_kwargs_json_are_refused(contents):
    with pytest.raises(FileFormatError, match="'fixedsmall', and the network's output has 6 channels"):
        ho_tf.read(with_tensors(with_config(contents, **CIFAR_KWARGS), with_log_variance(contents)), Options())


def test_missing_averages_are_no_reason_to_take_other_weights(contents):
    tensors = {name: contents.tensors[name] for name in ENTRIES if not name.endswith(ho_tf.AVERAGE)}
    with pytest.raises(FileFormatError, match=r"it holds no averages(\n.*)*--weights raw"):
        read(with_tensors(contents, tensors))
    raw = ho_tf.read(with_tensors(contents, tensors), Options({"size": [8, 8], "variance": "fixed_large"}, "raw"))
    assert raw.raw is None


def test_everything_that_is_wrong_with_the_weights_is_one_error(contents):
    tensors = {name: contents.tensors[name] for name in ENTRIES if name.endswith(ho_tf.AVERAGE)}
    del tensors[f"model/mid/attn_1/k/b{ho_tf.AVERAGE}"]
    tensors[f"model/mid/attn_9/k/b{ho_tf.AVERAGE}"] = torch.zeros(64)
    tensors[f"model/mid/block_1/conv1/b{ho_tf.AVERAGE}"] = torch.zeros(65)
    tensors[f"model/mid/block_1/conv2/b{ho_tf.AVERAGE}"] = torch.full((64,), torch.nan)
    tensors[f"model/mid/block_1/conv2/W{ho_tf.AVERAGE}"] = torch.zeros(3)
    with pytest.raises(FileFormatError, match="1 missing, 1 surplus, 2 of another shape, 1 with NaN") as caught:
        read(with_tensors(contents, tensors))
    for name in ("attn_1/k/b", "attn_9/k/b", "block_1/conv1/b", "block_1/conv2/b", "block_1/conv2/W"):
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["conv_in/W", "conv_out/W", "down_1/block_0/conv1/W"])
@pytest.mark.parametrize("shape", [None, (), (3,), (3, 3, 0, 0), (3, 3, 1, 7)])
def test_useless_shapes_are_refused(contents, name, shape):
    tensors = {name: contents.tensors[name] for name in ENTRIES if name.endswith(ho_tf.AVERAGE)}
    if shape is None:
        del tensors[f"model/{name}{ho_tf.AVERAGE}"]
    else:
        tensors[f"model/{name}{ho_tf.AVERAGE}"] = torch.zeros(shape)
    with pytest.raises((FileFormatError, InputError, SpecError)):
        read(with_tensors(contents, tensors))
