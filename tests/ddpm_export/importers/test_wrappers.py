"""A network is found in whatever a program put around it, in every importer; and its average is known from it."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: importers (no torch)")

import torch

from ddpm_export.importers import unsupported, wrappers
from ddpm_export.importers.reading.contents import CheckpointContents
from ddpm_export.importers.registry import MODULES, Options, import_checkpoint, importer
from ddpm_export.importers.settings import Imported, SettingsResolver
from ddpmx.errors import FileFormatError, InputError
from oracles.peer_weights import peer_weights

pytestmark = pytest.mark.torch

MARKS = ("conv_in.weight", "down.")
PEERS = Path(__file__).parents[2] / "data" / "peers"


def network(value: float = 1.0) -> OrderedDict[str, torch.Tensor]:
    names = ("conv_in.weight", "conv_in.bias", "down.0.weight")
    return OrderedDict((name, torch.full((2, i + 1), value + i)) for i, name in enumerate(names))


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def contents(tensors: dict[str, torch.Tensor]) -> CheckpointContents:
    return CheckpointContents(Path("x.pt"), "torch", tensors, file=Path("x.pt"))


def taken(tensors: dict[str, torch.Tensor], weights: str = "ema") -> tuple[wrappers.Weights, str]:
    settings = SettingsResolver(Options(weights=weights))
    got = wrappers.take(contents(tensors), MARKS, settings.options, settings)
    (fact,) = settings.facts
    return got, f"{fact.value} ({fact.source})"


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "state_dict.",
        "model_state_dict.",
        "state_dict.model._forward_module.module._orig_mod.net.",
        "anything.at.all.",
    ],
)
def test_any_prefix_of_containers_attributes_and_wrappers_is_taken_away(prefix):
    got, line = taken(
        {**under(prefix, network()), "optimizer.state.0.exp_avg": torch.zeros(2)} if prefix else network()
    )
    assert list(got.chosen.tensors) == list(network())
    assert all(name in line for name in wrappers.WRAPPERS if name in prefix.split("."))
    assert got.raw is None


def test_a_wrapper_inside_the_network_is_taken_away():
    state = {name.replace("down.0", "down._checkpoint_wrapped_module.0"): tensor for name, tensor in network().items()}
    got, line = taken(state)
    assert list(got.chosen.tensors) == list(network())
    assert "activation checkpointing" in line


AVERAGED = {
    "a dict called ema": {**under("model.", network()), **under("ema.", network(5))},
    "ema_pytorch's": {
        **under("model.net.", network()),
        **under("ema.online_model.net.", network()),
        **under("ema.ema_model.net.", network(5)),
    },
    "a suffix": {**under("state_dict.model.", network()), **under("state_dict.model_ema.", network(5))},
    "camel case": {**under("net.", network()), **under("netEma.", network(5))},
    "AveragedModel, compiled": {
        **under("model._orig_mod.", network()),
        **under("best.module._orig_mod.", network(5)),
        "best.n_averaged": torch.tensor(3),
    },
    "Lightning's WeightAveraging": {
        **under("current_model_state.net.", network()),
        **under("state_dict.net.", network(5)),
    },
    "LitEma, of CompVis": {
        **under("state_dict.model.diffusion_model.", network()),
        **{f"state_dict.model_ema.diffusion_model{n.replace('.', '')}": t for n, t in network(5).items()},
        "state_dict.model_ema.decay": torch.tensor(0.9999),
        "state_dict.model_ema.num_updates": torch.tensor(3),
    },
    "EMAModel's or torch_ema's list": {
        **under("model.", network()),
        **{f"ema.shadow_params.{i}": tensor for i, tensor in enumerate(network(5).values())},
    },
}


@pytest.mark.parametrize("how", AVERAGED)
def test_the_average_is_the_default_and_a_flag_takes_what_was_trained(how):
    got, line = taken(AVERAGED[how])
    assert (got.chosen.tensors["conv_in.weight"] == 5).all()
    assert (got.chosen.tensors["down.0.weight"] == 7).all()
    assert got.raw is not None
    assert (got.raw.tensors["conv_in.weight"] == 1).all()
    assert line.startswith("ema (")
    assert f"--weights raw takes {got.raw.stored}" in line
    raw, line = taken(AVERAGED[how], "raw")
    assert (raw.chosen.tensors["conv_in.weight"] == 1).all()
    assert line.startswith("raw (")
    assert "the average is at" in line


def test_a_list_that_does_not_fit_is_no_average():
    tensors = {**under("model.", network()), "ema.shadow_params.0": torch.zeros(9, 9)}
    assert [found.averaged for found in wrappers.find(contents(tensors), MARKS)] == [False]
    assert "ema.shadow_params is no average of it: 1 tensors" in taken(tensors)[1]


def test_words_that_only_contain_ema_name_no_average():
    for name in ("schema.", "emapping.", "cinema.", "onlinemodel."):
        assert not taken(under(name, network()))[0].chosen.averaged


def test_several_networks_are_a_question_that_the_hint_answers():
    tensors = {**under("coarse.", network(1)), **under("fine._orig_mod.", network(2))}
    with pytest.raises(InputError, match="2 networks") as caught:
        taken(tensors)
    assert "coarse., fine._orig_mod." in str(caught.value)
    assert "--weights coarse." in str(caught.value)
    for place, value in (("coarse.", 1), ("coarse", 1), ("fine._orig_mod.", 2), ("fine.", 2)):
        assert (taken(tensors, place)[0].chosen.tensors["conv_in.weight"] == value).all()
    with pytest.raises(InputError, match="neither ema and raw"):
        taken(tensors, "best")


def test_a_module_that_two_attributes_hold_is_one_network():
    shared = network()
    assert taken({**under("net.", shared), **under("diffusion.model.", shared)})[0].chosen.prefix == "diffusion.model."


def test_an_average_alone_is_not_taken_for_what_was_trained():
    with pytest.raises(InputError, match="averaged weights only") as caught:
        taken(under("ema.", network()), "raw")
    assert "--weights ema" in str(caught.value)


def test_names_that_would_collide_stay_as_they_are():
    tensors = {**under("", network(1)), **under("module.", network(2))}
    assert len(wrappers.plain_names(contents(tensors))) == len(tensors)


def peer(name: str) -> dict[str, torch.Tensor]:
    with np.load(PEERS / f"{name}.npz") as file:
        shapes = json.loads(str(file["shapes"]))
    return {key: torch.from_numpy(value) for key, value in peer_weights(shapes).items()}


SETTINGS = {"size": (8, 8), "timesteps": 1000, "schedule": "linear", "variance": "fixed_large"}


@pytest.mark.parametrize("name", ["pesser", "ddpm_torch"])
def test_importers_read_a_network_compiled_inside_ddp_inside_lightning(name, tmp_path):
    options = Options({**SETTINGS, **({} if name == "pesser" else {"prediction": "eps"})})
    torch.save(peer(name), tmp_path / "plain.pt")
    wrapped = under("diffusion.module._orig_mod.", peer(name))
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer_states": [], "hyper_parameters": {}}, tmp_path / "x.ckpt")
    plain, lightning = (import_checkpoint(tmp_path / file, options) for file in ("plain.pt", "x.ckpt"))
    assert lightning.source == plain.source
    assert lightning.config == plain.config
    assert all(torch.equal(lightning.tensors[name], tensor) for name, tensor in plain.tensors.items())


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"ho-tf", "score-sde"}))  # TensorFlow's names; always refused
def test_every_importer_of_torch_files_finds_its_marks_under_any_prefix(name):
    marks = importer(name).MARKS
    state = {(mark + "0.weight" if mark.endswith(".") else mark): torch.zeros(1) for mark in marks}
    if name == "lucidrains":
        state["betas"] = torch.zeros(1)
    assert importer(name).recognise(contents(under("state_dict.a._orig_mod.b.module.", state)))


# --- what is no network ----------------------------------------------------------------------------------------------


def optimiser() -> dict:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    made = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    made.step()
    return made.state_dict()


OTHER = {
    "an optimiser": (optimiser(), "the state of an optimiser"),
    "one in a container": ({"optimizer": optimiser(), "step": 3}, "the state of an optimiser"),
    "SGD without momentum": (torch.optim.SGD([torch.zeros(1)], 0.1).state_dict(), "the state of an optimiser"),
    "a LoRA of peft": ({"base_model.model.to_q.lora_A.weight": torch.zeros(4, 2)}, "a LoRA"),
    "a LoRA of kohya": ({"lora_unet_mid_block.lora_down.weight": torch.zeros(4, 2)}, "a LoRA"),
    "a LoRA of diffusers": ({"unet.mid_block.attn.processor.to_q_lora.down.weight": torch.zeros(4, 2)}, "a LoRA"),
    "LyCORIS": ({"lora_unet_x.hada_w1_a": torch.zeros(4, 2)}, "a LoRA"),
    "an unmerged LoRA": (
        {"unet.to_q.base_layer.weight": torch.zeros(4, 2), "unet.to_q.lora_A.default.weight": torch.zeros(4, 2)},
        "not merged into it",
    ),
    "a textual inversion": ({"<cat-toy>": torch.zeros(768)}, "a textual inversion"),
    "the same of webui": ({"string_to_param": {"*": torch.zeros(2, 768)}, "name": "cat"}, "a textual inversion"),
    "a step": ({"step": 500}, "no weights in it\nNote: it holds step"),
    "CompVis' latent diffusion": (
        {"state_dict": {"first_stage_model.encoder.conv_in.weight": torch.zeros(4), "model.x.weight": torch.zeros(4)}},
        "a latent diffusion model",
    ),
    "an own one in Lightning": (
        {"state_dict": {**under("vae.decoder.", network()), **under("unet.", network())}},
        "a latent diffusion model",
    ),
    "an autoencoder": ({"encoder.conv_in.weight": torch.zeros(4), "quant_conv.weight": torch.zeros(4)}, "latent"),
    "none that is known": (network(), "a checkpoint of no project"),
}


@pytest.mark.parametrize("source", ["auto", "openai"])
@pytest.mark.parametrize("what", OTHER)
def test_what_is_no_ddpm_is_named(what, source, tmp_path):
    content, said = OTHER[what]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(FileFormatError) as caught:
        import_checkpoint(tmp_path / "x.pt", source=source)
    assert said in str(caught.value)
    assert "--from" not in str(caught.value)


def test_the_files_beside_an_optimiser_are_named(tmp_path):
    torch.save(optimiser(), tmp_path / "opt010000.pt")
    (tmp_path / "ema_0.9999_010000.pt").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"the weights may be in ema_0\.9999_010000\.pt"):
        import_checkpoint(tmp_path / "opt010000.pt")


def test_another_project_than_the_one_named_is_named(tmp_path):
    torch.save(peer("pesser"), tmp_path / "x.pt")
    with pytest.raises(FileFormatError, match="not a checkpoint of openai, but of pesser") as caught:
        import_checkpoint(tmp_path / "x.pt", source="openai")
    assert "--from pesser" in str(caught.value)
    assert import_checkpoint(tmp_path / "x.pt", Options(SETTINGS), source="pesser").questions == ()


def test_a_checkpoint_with_its_optimiser_beside_the_network_is_none():
    tensors = {**network(), **{f"optimizer.state.{i}.exp_avg": torch.zeros(1) for i in range(99)}}
    assert unsupported.refuse(contents(tensors)) is None


# --- latents ---------------------------------------------------------------------------------------------------------


def four_channels() -> dict[str, torch.Tensor]:
    state = peer("pesser")
    state["conv_in.weight"] = torch.zeros(state["conv_in.weight"].shape[0], 4, 3, 3)
    state["conv_out.weight"] = torch.zeros(4, state["conv_out.weight"].shape[1], 3, 3)
    state["conv_out.bias"] = torch.zeros(4)
    return state


def test_four_channels_are_pixels_only_if_the_user_says_so(tmp_path):
    torch.save(four_channels(), tmp_path / "x.pt")

    def read(**more: object) -> Imported:
        return import_checkpoint(tmp_path / "x.pt", Options({**SETTINGS, **more}))

    (question,) = read().questions
    assert (question.name, question.candidates) == ("space", ("pixels", "latents"))
    assert "4 channels" in question.why
    assert read(space="pixels").questions == ()
    with pytest.raises(InputError, match="latent of an autoencoder"):
        read(space="latents")
