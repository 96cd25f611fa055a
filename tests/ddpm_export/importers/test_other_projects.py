"""pesser/pytorch_diffusion, DDIM, pytorch-ddpm, ddpm-torch: the imported network is what their own code computes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: importers (no torch)")

import torch

from ddpm_export.importers import pytorch_ddpm
from ddpm_export.importers.probe import module_of
from ddpm_export.importers.registry import WRITERS, Imported, Options, convert, import_checkpoint
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpmx.errors import FileFormatError, InputError, SpecError
from ddpmx.formats.spec import ModelSpec
from oracles.peer_weights import peer_weights

pytestmark = pytest.mark.torch

PEERS = Path(__file__).parents[2] / "data" / "peers"
SETTINGS = {"timesteps": 1000, "schedule": "linear", "variance": "fixed_large", "size": (8, 8)}
SOURCES = {"pesser": "pesser", "ddim": "pesser", "pytorch_ddpm": "pytorch-ddpm", "ddpm_torch": "ddpm-torch"}


class Peer:
    """A committed output, and the weights that gave it."""

    def __init__(self, name: str) -> None:
        with np.load(PEERS / f"{name}.npz") as file:
            self.x, self.t, self.eps = (torch.from_numpy(file[key]) for key in ("x", "t", "eps"))
            shapes = json.loads(str(file["shapes"]))
        self.weights = {key: torch.from_numpy(value) for key, value in peer_weights(shapes).items()}
        if name == "pytorch_ddpm":
            self.weights[pytorch_ddpm.TABLE] = interleaved(1000, 32)

    def error(self, imported: Imported) -> float:
        with torch.no_grad():
            return float((module_of(imported)(self.x, self.t) - self.eps).abs().max())


def interleaved(timesteps: int, channels: int) -> torch.Tensor:
    """sin(t·f_0), cos(t·f_0), sin(t·f_1), …, f_i = 10000^(−2i/channels)."""
    angles = torch.arange(timesteps)[:, None] * 10000 ** (-torch.arange(0, channels, 2) / channels)[None, :]
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def options_for(name: str, **more: object) -> Options:
    values = {**SETTINGS, **({"prediction": "eps"} if SOURCES[name] != "pesser" else {})}
    if name == "pytorch_ddpm":
        del values["timesteps"], values["schedule"]
    return Options({**values, **more})


def saved(tmp_path: Path, content: object, name: str = "model.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("name", SOURCES)
def test_the_imported_network_is_what_their_code_computes(name, tmp_path, figure):
    peer = Peer(name)
    imported = import_checkpoint(saved(tmp_path, peer.weights), options_for(name))
    assert imported.source == SOURCES[name]
    assert imported.questions == ()
    figure(f"{name}: ε against its own code, t = 0…999", peer.error(imported), at_most=1e-5)


@pytest.mark.parametrize("name", SOURCES)
def test_settings_that_the_file_does_not_have_are_questions(name, tmp_path):
    imported = import_checkpoint(saved(tmp_path, Peer(name).weights))
    questions = {question.name for question in imported.questions}
    assert questions >= {"size", "variance"}
    assert ("schedule" in questions) == (name != "pytorch_ddpm")  # that code has one only
    assert ("timesteps" in questions) == (name != "pytorch_ddpm")  # that file has a table over t


def containers(name: str, weights: dict[str, torch.Tensor]) -> object:
    """What that project's training saves, with an average that differs from the model."""
    raw = {key: value + 1 if value.is_floating_point() and "timembedding.0" not in key else value
           for key, value in weights.items()}  # fmt: skip
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    return {
        "pesser": weights,
        "ddim": [{f"module.{key}": value for key, value in raw.items()}, optimizer, 3, 1000, weights],
        "pytorch_ddpm": {
            "net_model": raw,
            "ema_model": weights,
            "sched": {"base_lrs": [2e-4], "lr_lambdas": [None]},
            "optim": optimizer,
            "step": 5000,
            "x_T": torch.zeros(4, 3, 8, 8),
        },
        "ddpm_torch": {
            "model": raw,
            "optimizer": optimizer,
            "scheduler": {"last_epoch": 3},
            "ema": {"decay": 0.9999, "shadow": weights, "num_updates": 7},
            "epoch": 3,
        },
    }[name]


@pytest.mark.parametrize("name", SOURCES)
def test_the_average_is_chosen_and_the_raw_weights_are_kept(name, tmp_path):
    peer = Peer(name)
    path = saved(tmp_path, containers(name, peer.weights))
    averaged = import_checkpoint(path, options_for(name))
    assert peer.error(averaged) <= 1e-5
    if name == "pesser":
        return
    assert averaged.raw is not None
    bias = "conv_in.bias"
    torch.testing.assert_close(averaged.raw[bias], averaged.tensors[bias] + 1)
    raw = import_checkpoint(path, Options(options_for(name).values, weights="raw"))
    torch.testing.assert_close(raw.tensors[bias], averaged.tensors[bias] + 1)


def test_a_data_parallel_prefix_is_no_part_of_a_name(tmp_path):
    peer = Peer("pesser")
    path = saved(tmp_path, {f"module.{key}": value for key, value in peer.weights.items()})
    assert peer.error(import_checkpoint(path, options_for("pesser"))) <= 1e-5


@pytest.mark.parametrize("name", ["pesser", "ddim"])
def test_importing_and_converting_back_changes_no_bit(name, tmp_path):
    peer = Peer(name)
    imported = import_checkpoint(saved(tmp_path, peer.weights), options_for(name))
    convert(imported, "pesser", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "model.ckpt", weights_only=True)
    assert back.keys() == peer.weights.keys()
    assert all(torch.equal(back[key], value) for key, value in peer.weights.items())
    again = import_checkpoint(tmp_path / "back", options_for(name))
    assert again.config == imported.config
    assert all(torch.equal(again.tensors[key], value) for key, value in imported.tensors.items())


def test_pesser_refuses_what_its_code_cannot_compute(tmp_path):
    imported = import_checkpoint(saved(tmp_path, Peer("pytorch_ddpm").weights), options_for("pytorch_ddpm"))
    with pytest.raises(InputError, match="norm_eps"):
        convert(imported, "pesser", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"self_condition": True}, "the input x0_prev"),
        ({"condition": 2}, "the input cond"),
        ({"self_condition": True, "condition": 2}, "the inputs x0_prev and cond"),
    ],
)
def test_a_network_with_inputs_that_theirs_lack_is_not_written(to, inputs, named, tmp_path):
    config = UNetConfig(3, 3, (8, 8), 32, (1, 2), 1, (4,), 0.0, 32, **inputs)
    ours = Imported("ddpmx", config, ModelSpec((3, 8, 8), **inputs), dict(UNet(config).state_dict()))
    with pytest.raises(InputError, match=f"no network of {to} has {named}"):
        convert(ours, to, tmp_path / "new" / "theirs")
    assert list(tmp_path.iterdir()) == []
    # control: without them the network is refused for another reason, or written
    plain = UNetConfig(3, 3, (8, 8), 32, (1, 2), 1, (4,), 0.0, 32)
    with contextlib.suppress(InputError):
        convert(Imported("ddpmx", plain, ModelSpec((3, 8, 8)), dict(UNet(plain).state_dict())), to, tmp_path / "plain")
    assert (to == "openai") != (tmp_path / "plain").exists(), "OpenAI's embedding is another one than Ho's"


def test_a_spec_of_another_network_is_not_written(tmp_path):
    config = UNetConfig(3, 3, (8, 8), 32, (1, 2), 1, (4,), 0.0, 32, self_condition=True)
    ours = Imported("ddpmx", config, ModelSpec((3, 8, 8)), dict(UNet(config).state_dict()))
    with pytest.raises(SpecError, match="self-conditioning"):
        convert(ours, "diffusers", tmp_path / "theirs")
    assert list(tmp_path.iterdir()) == []


# --- pytorch-ddpm ----------------------------------------------------------------------------------------------------


def test_pytorch_ddpm_size_comes_from_its_noise_and_flags_from_its_flagfile(tmp_path):
    path = saved(tmp_path, containers("pytorch_ddpm", Peer("pytorch_ddpm").weights), "ckpt.pt")
    (tmp_path / "flagfile.txt").write_text("--beta_T=0.03\n--mean_type=xstart\n--var_type=fixedsmall\n--train\n")
    spec = import_checkpoint(path).spec
    assert (spec.shape, spec.prediction, spec.variance) == ((3, 8, 8), "x0", "fixed_small")
    assert spec.schedule_params["beta_end"] == 0.03
    assert spec.clip is None


def test_pytorch_ddpm_xprev_is_refused(tmp_path):
    path = saved(tmp_path, containers("pytorch_ddpm", Peer("pytorch_ddpm").weights), "ckpt.pt")
    (tmp_path / "flagfile.txt").write_text("--mean_type=xprev\n")
    with pytest.raises(FileFormatError, match="xprev"):
        import_checkpoint(path)


def test_a_table_of_another_embedding_is_refused(tmp_path):
    weights = Peer("pytorch_ddpm").weights
    weights[pytorch_ddpm.TABLE] = weights[pytorch_ddpm.TABLE].roll(1, dims=1)  # cos before sin
    with pytest.raises(FileFormatError, match="10000"):
        import_checkpoint(saved(tmp_path, weights), options_for("pytorch_ddpm"))


# --- known models ----------------------------------------------------------------------------------------------------


def test_a_published_model_by_name_answers_every_question(tmp_path):
    imported = import_checkpoint(saved(tmp_path, Peer("pesser").weights), Options({"model": "lsun_cat"}))
    assert imported.questions == ()
    assert (imported.spec.shape, imported.spec.variance) == ((3, 256, 256), "fixed_small")


def test_a_published_file_is_known_by_its_md5(tmp_path, monkeypatch):
    from ddpm_export.importers import pesser
    from ddpm_export.importers.registry import open_checkpoint

    path = saved(tmp_path, Peer("pesser").weights)
    monkeypatch.setattr(pesser, "KNOWN_FILES", {open_checkpoint(path).md5: "cifar10"})
    imported = import_checkpoint(path)
    assert imported.questions == ()
    assert imported.spec.variance == "fixed_large"
    assert any(fact.name == "model" and "MD5" in fact.source for fact in imported.facts)


def test_ddpm_torch_learned_variance_is_refused(tmp_path):
    weights = Peer("ddpm_torch").weights
    for part in ("weight", "bias"):
        weights[f"out_conv.2.{part}"] = weights[f"out_conv.2.{part}"].repeat_interleave(2, dim=0)
    with pytest.raises(FileFormatError, match="learned its variance"):
        import_checkpoint(saved(tmp_path, weights), options_for("ddpm_torch"))
