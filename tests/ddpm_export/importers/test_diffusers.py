"""diffusers: the imported network and chain are what diffusers computes, and what is written back is what was read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: importers (no torch)")
pytest.importorskip("diffusers", reason="not verified here: against diffusers (not installed)")

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from ddpm_export.importers.diffusers_config import UNET_DEFAULTS, read_chain, scheduler_json
from ddpm_export.importers.probe import module_of
from ddpm_export.importers.registry import Imported, Options, convert, import_checkpoint
from ddpm_export.importers.settings import SettingsResolver
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import DdpmxError, FileFormatError, InputError, OutputError
from ddpmx.formats.spec import ModelSpec
from oracles.peer_weights import peer_weights
from oracles.random_weights import rerandomise

pytestmark = [pytest.mark.torch, pytest.mark.slow]

T = torch.tensor([0, 1, 37, 500, 998, 999])
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
HO = {"freq_shift": 1, "flip_sin_to_cos": False, "norm_eps": 1e-6, "downsample_padding": 0, "attention_head_dim": None}
NETWORKS: dict[str, dict[str, Any]] = {
    "its defaults": {},
    "Ho's": HO,
    "classes": {"num_class_embeds": 5},
    "two layers, deeper": {
        "layers_per_block": 2,
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    },
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
    "a learned variance": {"out_channels": 6},
    "not square, grey, swish": {"sample_size": (8, 16), "in_channels": 1, "out_channels": 1, "act_fn": "swish"},
    "groups": {"norm_num_groups": 8, "attention_head_dim": 32},
}


def theirs(**changes: Any) -> UNet2DModel:
    model = UNet2DModel(**{**SMALL, **changes})
    rerandomise(model)
    return model.eval().requires_grad_(False)


def scheduler(model: UNet2DModel, **changes: Any) -> DDPMScheduler:
    learned = model.config.out_channels == 2 * model.config.in_channels
    return DDPMScheduler(**{"variance_type": "learned_range" if learned else "fixed_large", **changes})


def pipeline(folder: Path, model: UNet2DModel | None = None, **changes: Any) -> Path:
    model = theirs() if model is None else model
    model.save_pretrained(folder / "unet")
    scheduler(model, **changes).save_pretrained(folder / "scheduler")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def edited(file: Path, **changes: Any) -> None:
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def error(imported: Imported, model: UNet2DModel) -> float:
    c, h, w = imported.spec.shape
    x = torch.randn((len(T), c, h, w), generator=torch.Generator().manual_seed(0))
    y = None if imported.config.classes is None else torch.arange(len(T)) % imported.config.classes
    with torch.no_grad():
        expected = model(x, T, y).sample
        got = module_of(imported)(x, T, y)
    got = torch.cat(got, dim=1) if isinstance(got, tuple) else got
    assert expected.abs().mean() > 0.1
    return float((got - expected).abs().max())


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_imported_network_is_what_diffusers_computes(name, tmp_path, figure):
    model = theirs(**NETWORKS[name])
    imported = import_checkpoint(pipeline(tmp_path, model))
    assert (imported.source, imported.questions) == ("diffusers", ())
    figure(f"diffusers, {name}: ε, t = 0…999", error(imported, model), at_most=1e-5)


def test_a_version_of_two_years_ago_computed_the_same(tmp_path, figure):
    with np.load(Path(__file__).parents[2] / "data" / "peers" / "diffusers_0_31_0.npz") as file:
        x, t, eps = (torch.from_numpy(file[key]) for key in ("x", "t", "eps"))
        config, shapes = json.loads(str(file["config"])), json.loads(str(file["shapes"]))
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {name: torch.from_numpy(value) for name, value in peer_weights(shapes).items()}
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    DDPMScheduler().save_config(tmp_path)
    with torch.no_grad():
        got = module_of(import_checkpoint(tmp_path))(x, t)
    figure("diffusers 0.31: ε, t = 0…999", float((got - eps).abs().max()), at_most=1e-5)


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_old_names_of_attention_in_an_old_bin(tmp_path):
    model = theirs()
    pipeline(tmp_path, model)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    weights = {}
    for name, tensor in model.state_dict().items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.") if ".attentions." in name else name
        weights[name] = tensor
    assert any("proj_attn" in name for name in weights)
    torch.save(weights, tmp_path / "unet" / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
    edited(
        tmp_path / "unet" / "config.json",
        down_block_types=["UNetResDownBlock2D", "UNetResAttnDownBlock2D"],
        up_block_types=["UNetResAttnUpBlock2D", "UNetResUpBlock2D"],
    )
    assert error(import_checkpoint(tmp_path), model) <= 1e-5


def test_a_missing_number_of_heads_is_diffusers_default_and_recorded(tmp_path):
    model = theirs(attention_head_dim=8)
    pipeline(tmp_path, model)
    edited(tmp_path / "unet" / "config.json", attention_head_dim=...)
    imported = import_checkpoint(tmp_path)
    assert error(imported, model) <= 1e-5
    assert [fact.value for fact in imported.facts if fact.assumed] == [8]
    one_head = import_checkpoint(tmp_path, Options({"head_channels": "none"}))
    assert one_head.config.heads_of(64) == 1


def test_a_null_number_of_heads_is_one_head(tmp_path):
    model = theirs(attention_head_dim=None)
    imported = import_checkpoint(pipeline(tmp_path, model))
    assert imported.config.heads_of(64) == 1
    assert error(imported, model) <= 1e-5


def test_every_default_is_that_of_diffusers():
    defaults = {name: value for name, value in UNet2DModel().config.items() if not name.startswith("_")}
    assert {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()} == dict(
        UNET_DEFAULTS
    )


# --- where things lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pipeline", "unet inside", "everything at the root", "averaged beside raw"])
def test_layouts(layout, tmp_path):
    model = theirs()
    folder = pipeline(tmp_path / "x", model)
    if layout == "unet inside":
        folder = folder / "unet"
    elif layout == "everything at the root":  # as google/ddpm-cifar10-32 on the hub
        for inside in ("unet", "scheduler"):
            for file in (folder / inside).iterdir():
                file.rename(folder / file.name)
    elif layout == "averaged beside raw":  # a checkpoint of diffusers' training example
        (folder / "unet").rename(folder / "unet_ema")
        theirs(sample_size=16).save_pretrained(folder / "unet")
    imported = import_checkpoint(folder)
    assert imported.spec.variance == "fixed_large"
    assert error(imported, model) <= 1e-5


def test_without_a_scheduler_the_chain_is_a_question(tmp_path):
    theirs().save_pretrained(tmp_path)
    imported = import_checkpoint(tmp_path)
    assert {question.name for question in imported.questions} >= {"schedule", "prediction", "timesteps"}
    values = {"schedule": "linear", "prediction": "v", "timesteps": "100"}
    spec = import_checkpoint(tmp_path, Options(values)).spec
    assert (spec.schedule, spec.prediction, spec.timesteps) == ("linear", "v", 100)


def test_weights_saved_alone_need_the_config_json_that_the_hint_writes(tmp_path):
    model = theirs()
    torch.save(
        {"state_dict": {f"unet.{name}": tensor for name, tensor in model.state_dict().items()}}, tmp_path / "x.pt"
    )
    with pytest.raises(FileFormatError, match=r"config\.json") as caught:
        import_checkpoint(tmp_path / "x.pt")
    assert "unet.save_config(FOLDER)" in str(caught.value)
    model.save_config(tmp_path)
    for path in (tmp_path / "x.pt", tmp_path):
        assert error(import_checkpoint(path), model) <= 1e-5


@pytest.mark.parametrize("named", [".", "unet_ema"])
def test_a_checkpoint_of_diffusers_training_is_imported_by_its_average(named, tmp_path):
    model = theirs()
    folder = pipeline(tmp_path / "run", model) / "checkpoint-500"
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=UNet2DModel, model_config=model.config)
    raw = theirs().requires_grad_(True)
    for _ in range(3):
        with torch.no_grad():
            raw.conv_in.bias += 1
        ema.step(raw.parameters())
    ema.save_pretrained(folder / "unet_ema")
    raw.save_pretrained(folder / "unet")
    imported = import_checkpoint(folder / named)
    assert imported.spec.variance == "fixed_large", "of the scheduler two folders up"
    facts = {fact.name: (fact.value, fact.source) for fact in imported.facts}
    assert facts["weights"][0] == "ema"
    assert facts["average"] == ("decay 0.5, 3 steps", "config.json, by EMAModel")
    average = UNet2DModel.from_pretrained(folder / "unet_ema")
    assert error(imported, average) <= 1e-5
    if named == ".":
        assert "--weights raw takes unet." in facts["weights"][1]
        chosen = import_checkpoint(folder, Options(weights="raw"))
        assert error(chosen, raw) <= 1e-5
        assert torch.equal(imported.raw["conv_in.bias"], chosen.tensors["conv_in.bias"])
    else:
        with pytest.raises(InputError, match="averaged weights") as caught:
            import_checkpoint(folder / named, Options(weights="raw"))
        hinted = str(caught.value).rpartition("Hint: name ")[2]
        assert error(import_checkpoint(hinted), raw) <= 1e-5


@pytest.mark.parametrize("named", [".", "unet", "unet/diffusion_pytorch_model.safetensors", "model_index.json"])
@pytest.mark.parametrize("known_by", ["index", "folder"])
def test_a_network_that_is_one_part_of_a_latent_model_is_refused(named, known_by, tmp_path):
    folder = pipeline(tmp_path / "ldm", theirs(sample_size=8))
    (folder / "vqvae").mkdir()
    (folder / "vqvae" / "config.json").write_text('{"_class_name": "VQModel"}')
    index = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    if known_by == "index":
        index["vqvae"] = ["diffusers", "VQModel"]
    if known_by == "folder" and named != "model_index.json":
        (folder / "model_index.json").unlink()
    else:
        (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(FileFormatError, match=r"a latent diffusion model, (.|\n)*vqvae \(VQModel\): x is the latent"):
        import_checkpoint(folder / named)


def test_other_parts_of_a_pipeline_are_named_and_the_hint_works(tmp_path):
    model = theirs()
    folder = pipeline(tmp_path / "audio", model)
    edited(folder / "model_index.json", mel=["audio_diffusion", "Mel"], vqvae=[None, None])
    with pytest.raises(FileFormatError, match=r"mel \(Mel\)") as caught:
        import_checkpoint(folder)
    assert "vqvae" not in str(caught.value), "a part that is null is not there"
    assert "copy unet/ and scheduler/ into a new folder" in str(caught.value)
    for part in ("unet", "scheduler"):
        (tmp_path / "new").mkdir(exist_ok=True)
        (folder / part).rename(tmp_path / "new" / part)
    assert error(import_checkpoint(tmp_path / "new"), model) <= 1e-5


def test_the_chain_of_latent_models_around_three_channels_asks_what_x_is(tmp_path):
    folder = pipeline(tmp_path, beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False)
    (question,) = import_checkpoint(folder).questions
    assert (question.name, question.candidates) == ("space", ("pixels", "latents"))
    assert import_checkpoint(folder, Options({"space": "pixels"})).questions == ()
    with pytest.raises(InputError, match="latent of an autoencoder"):
        import_checkpoint(folder, Options({"space": "latents"}))


def test_half_precision_weights_become_float32(tmp_path):
    model = theirs()
    pipeline(tmp_path, model.half())
    imported = import_checkpoint(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in imported.tensors.values())
    assert error(imported, model.float()) <= 1e-5


# --- what cannot be expressed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"act_fn": "gelu"},
        {"mid_block_scale_factor": 1.4},
        {"center_input_sample": True},
        {"up_block_types": ["UpBlock2D", "UpBlock2D"]},
        {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]},
        {"downsample_type": "resnet"},
        {"time_embedding_type": "fourier"},
        {"class_embed_type": "timestep"},
        {"add_attention": False},
        {"resnet_time_scale_shift": "scale_shift"},  # then the middle's attention has no norm
        {"time_embedding_dim": 77},
        {"_class_name": "UNet2DConditionModel"},
        {"of_the_future": 1},
        {"block_out_channels": [32, 48]},
        {"block_out_channels": 32},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_graph_cannot_express_is_refused_by_name(changes, tmp_path):
    pipeline(tmp_path)
    edited(tmp_path / "unet" / "config.json", **changes)
    with pytest.raises(FileFormatError) as caught:
        import_checkpoint(tmp_path)
    name, value = next(iter(changes.items()))
    assert any(word in str(caught.value) for word in (name, str(value), "one side only", "attn_norm_num_groups"))


@pytest.mark.parametrize(
    "changes",
    [
        {"thresholding": True},
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "laplace"},
        {"prediction_type": "flow"},
        {"variance_type": "learned"},
        {"variance_type": "fixed_large_log"},  # the square root of a logarithm: NaN in diffusers itself
        {"variance_type": "learned_range"},  # and the network has no second output
        {"_class_name": "EulerDiscreteScheduler"},
    ],
    ids=lambda changes: "-".join(map(str, next(iter(changes.items())))),
)
def test_a_chain_that_cannot_be_run_is_refused(changes, tmp_path):
    pipeline(tmp_path)
    edited(tmp_path / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(FileFormatError, match=str(next(iter(changes.values())))):
        import_checkpoint(tmp_path)


# --- the chain -------------------------------------------------------------------------------------------------------

SCHEDULES: list[dict[str, Any]] = [
    {"beta_schedule": "linear", "beta_end": 0.03},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": [0.01 + 0.001 * i for i in range(40)]},
]


@pytest.mark.parametrize("changes", SCHEDULES, ids=lambda changes: changes.get("beta_schedule", "trained_betas"))
def test_the_schedule_is_that_of_the_scheduler(changes, tmp_path):
    steps = {} if "trained_betas" in changes else {"num_train_timesteps": 40}
    model = theirs()
    imported = import_checkpoint(pipeline(tmp_path / "a", model, **changes, **steps))
    expected = DDPMScheduler(**changes, **steps).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(imported.spec.make_schedule().alpha_bar, expected, rtol=2e-5)
    convert(imported, "diffusers", tmp_path / "b")
    back = DDPMScheduler.from_pretrained(tmp_path / "b" / "scheduler").alphas_cumprod.double().numpy()
    np.testing.assert_allclose(back, expected, rtol=1e-6)


def test_a_ddim_scheduler_is_read_too(tmp_path):
    pipeline(tmp_path)
    DDIMScheduler(clip_sample=False, prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    imported = import_checkpoint(tmp_path)
    assert (imported.spec.clip, imported.spec.prediction, imported.spec.variance) == (None, "v", "fixed_small")
    assert any(fact.name == "variance" and fact.assumed for fact in imported.facts)


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ({}, {"variance_type": "fixed_small", "beta_schedule": "squaredcos_cap_v2"}),
        ({}, {"variance_type": "fixed_small_log"}),
        ({}, {"variance_type": "fixed_large", "clip_sample_range": 1.5}),
        ({}, {"prediction_type": "v_prediction", "clip_sample": True}),
        ({}, {"prediction_type": "sample"}),
        ({"out_channels": 6}, {"variance_type": "learned_range"}),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_the_chain_is_that_of_ddpm_pipeline(network, changes, tmp_path, monkeypatch, figure):
    steps = 50
    model = theirs(**network)
    imported = import_checkpoint(pipeline(tmp_path, model, num_train_timesteps=steps, **changes))
    noise = torch.randn((steps, 2, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    drawn = iter(noise)
    for module in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, **__: next(drawn))
    pipe = DDPMPipeline(model, scheduler(model, num_train_timesteps=steps, **changes))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(batch_size=2, num_inference_steps=steps, output_type="np").images
    assert next(drawn, None) is None  # x_T, and z at every t but 0

    spec, module_ = imported.spec, module_of(imported)
    table = make_table(spec.make_schedule(), spec.prediction, spec.variance)
    x = noise[0].double()
    for i, t in enumerate(table.timesteps.tolist()):
        p, q, a, b, sigma = table.rows[i]
        with torch.no_grad():
            out = module_(x.float(), torch.full((2,), t))
        out, var = (out[0].double(), out[1].double()) if isinstance(out, tuple) else (out.double(), None)
        x0 = (p * x + q * out).clamp(-spec.clip, spec.clip)
        if var is not None and sigma:
            c, d = table.learned[i]
            sigma = torch.exp(c + d * var)
        x = a * x0 + b * x + (sigma * noise[i + 1] if t > 0 else 0)
    got = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert got.std() > 0.02
    figure(f"chain of {steps} steps against DDPMPipeline, {changes}", np.abs(got - expected).max(), at_most=3e-4)


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_importing_and_converting_back_changes_no_bit(name, tmp_path):
    model = theirs(**NETWORKS[name])
    imported = import_checkpoint(pipeline(tmp_path / "a", model))
    convert(imported, "diffusers", tmp_path / "b")
    before = load_file(tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    written, read = (json.loads((tmp_path / x / "unet" / "config.json").read_text(), object_hook=_lists) for x in "ba")
    assert {k: v for k, v in written.items() if k[0] != "_" and k != "act_fn"} == {
        k: v for k, v in read.items() if k[0] != "_" and k != "act_fn"
    }


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


OURS = {
    "Ho's": UNetConfig(3, 3, (8, 8), 32, (1, 2), 1, (4,), 0.1, 32),
    "heads": UNetConfig(3, 3, (8, 8), 32, (1, 1), 2, (8,), 0.0, 8, heads=4),
    "everything": UNetConfig(
        1, 2, (8, 16), 32, (1, 2), 1, (8, 4), 0.0, 16, norm_eps=1e-5, cos_first=True, frequency_shift=0,
        symmetric_padding=True, head_channels=16, scale_shift=True, classes=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_a_network_of_ours_runs_in_diffusers_and_comes_back(name, tmp_path):
    config = OURS[name]
    network = UNet(config)
    rerandomise(network)
    variance = "learned_range" if config.learned_variance else "fixed_small"
    spec = ModelSpec((config.in_channels, *config.size), 100, "cosine", {"s": 0.01}, "v", variance, 2.0,
                     classes=config.classes)  # fmt: skip
    ours = Imported("ddpmx", config, spec, dict(network.state_dict()))
    convert(ours, "diffusers", tmp_path / "a")
    model = DDPMPipeline.from_pretrained(tmp_path / "a").unet.eval()
    assert error(ours, model) <= 1e-5
    back = import_checkpoint(tmp_path / "a")
    assert all(torch.equal(back.tensors[key], value) for key, value in ours.tensors.items())
    assert (back.spec.prediction, back.spec.variance, back.spec.clip) == ("v", variance, 2.0)
    np.testing.assert_array_equal(back.spec.make_schedule().betas, spec.make_schedule().betas)


@pytest.mark.parametrize(
    "changes",
    [{"time_scale": 0.25}, {"resample_blocks": True}, {"average_pool": True}, {"heads": 4}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_diffusers_cannot_compute_is_not_written(changes, tmp_path):
    config = UNetConfig(3, 3, (8, 8), 32, (1, 2), 1, (8,), 0.0, 32, **changes)
    ours = Imported("ddpmx", config, ModelSpec((3, 8, 8)), dict(UNet(config).state_dict()))
    with pytest.raises(InputError, match=next(iter(changes))):
        convert(ours, "diffusers", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    imported = import_checkpoint(pipeline(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(OutputError, match="not an empty folder"):
        convert(imported, "diffusers", tmp_path / "b")
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["mine"]


# --- damaged folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "surplus", "shape", "nan", "integers"])
def test_wrong_tensors_are_listed_in_one_error(kind, tmp_path):
    pipeline(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "mid_block.resnets.0.conv1.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "surplus":
        tensors["mid_block.resnets.7.conv1.weight"] = tensors[name].clone()
    else:
        tensors[name] = {
            "shape": tensors[name][:, :1].clone(),
            "nan": tensors[name] / 0,
            "integers": tensors[name].to(torch.int32),
        }[kind]
    file.unlink()
    torch.save(tensors, file.with_suffix(".bin"))
    with pytest.raises(DdpmxError, match="mid_block"):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize("junk", [None, [], {}, "x", -1, 1e300, True, [[]], [None, "8"], 10**30], ids=repr)
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_nonsense_in_a_field_is_an_error_or_harmless(file, junk, tmp_path):
    pipeline(tmp_path)
    whole = (tmp_path / file).read_text()
    refused = 0
    for name in json.loads(whole):
        edited(tmp_path / file, **{name: junk})
        try:
            import_checkpoint(tmp_path)
        except DdpmxError:
            refused += 1
        (tmp_path / file).write_text(whole)
    assert refused > 0


@pytest.mark.parametrize(
    ("changes", "prediction"),
    [({"predict_epsilon": False}, "x0"), ({"predict_epsilon": True}, "eps"), ({}, "eps")],
    ids=["x0", "eps", "silent"],
)
def test_the_first_releases_had_predict_epsilon(changes, prediction):
    scheduler = {"_class_name": "DDPMScheduler", **changes}
    contents = SimpleNamespace(configs={"scheduler_config.json": scheduler})
    spec = read_chain(SettingsResolver(Options()), contents, UNetConfig(1, 1, (8, 8), 8, (1,), 1, (), 0.0, 4))
    assert spec.prediction == prediction


@pytest.mark.parametrize(
    "changes",
    [
        {"predict_epsilon": False, "prediction_type": "epsilon"},
        {"predict_epsilon": 1},
        {"variance_scale": 2.0},
    ],
    ids=["contradiction", "no boolean", "unknown"],
)
def test_a_scheduler_with_contradictory_or_unknown_fields_is_refused(changes):
    contents = SimpleNamespace(configs={"scheduler_config.json": {"_class_name": "DDPMScheduler", **changes}})
    with pytest.raises(FileFormatError):
        read_chain(SettingsResolver(Options()), contents, UNetConfig(1, 1, (8, 8), 8, (1,), 1, (), 0.0, 4))


@pytest.mark.parametrize("change", [{"prediction": "mu"}, {"variance": "learned"}])
def test_a_chain_that_diffusers_would_read_otherwise_is_not_written(change):
    """Its "learned" takes σ² where ours is log σ², and it has no μ at all."""
    with pytest.raises(InputError, match="DDPMScheduler"):
        scheduler_json(ModelSpec((3, 8, 8), **change))
    assert scheduler_json(ModelSpec((3, 8, 8), variance="learned_range"))["variance_type"] == "learned_range"
