"""OpenAI's state dicts: the imported network and its chain are what their code computes, and files go both ways."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: OpenAI's checkpoints (no torch)")
pytest.importorskip("safetensors", reason="not verified here: OpenAI's checkpoints (no safetensors)")

import torch

from ddpm_export.importers import openai, openai_flags
from ddpm_export.importers.keys import to_theirs, unet_shapes
from ddpm_export.importers.openai_flags import PUBLISHED
from ddpm_export.importers.openai_keys import rows
from ddpm_export.importers.probe import module_of
from ddpm_export.importers.reading.contents import CheckpointContents
from ddpm_export.importers.registry import Imported, Options, convert, import_checkpoint, save_run
from ddpm_export.importers.settings import SettingsResolver
from ddpm_export.networks.unet import UNetConfig
from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import DdpmxError, FileFormatError, InputError, SpecError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling import chain
from oracles import openai_unet
from oracles.openai_unet import CASES, TIMESTEPS, Case

pytestmark = [pytest.mark.torch, pytest.mark.slow]

CONV, RESCALED, UPDOWN, NEW, POOL = (
    "improved, plain, one head, classes",
    "improved, scale-shift, 4 heads, t·1000/4000",
    "guided, resblock_updown, classes, legacy qkv",
    "guided, resblock_updown, classes, new qkv",
    "guided, no convolutions between levels",
)


def weights(case: Case) -> dict[str, torch.Tensor]:
    """Under OpenAI's names, by the table with which their own code took them."""
    new_order = case.flags.get("use_new_attention_order", False)
    return openai_unet._carried(openai_unet.network(case).state_dict(), case.config, new_order=new_order)


def options_for(case: Case, **more: object) -> Options:
    values: dict[str, object] = {"size": (8, 8), "schedule": "cosine", "timesteps": TIMESTEPS}
    values["rescale_timesteps"] = case.rescale_timesteps
    if width := case.flags.get("num_head_channels"):
        values["head_channels"] = width
    else:
        values["heads"] = case.flags["num_heads"]
    if case.config.heads != 1 or width:
        values["attention_order"] = "new" if case.flags.get("use_new_attention_order") else "legacy"
    return Options({**values, **more})


def saved(tmp_path: Path, content: object, name: str = "ema_0.9999_500000.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def imported_case(tmp_path: Path, name: str, **more: object) -> Imported:
    return import_checkpoint(saved(tmp_path, weights(CASES[name])), options_for(CASES[name], **more))


def with_tensors(tensors: dict[str, torch.Tensor], name: str = "ema_0.9999_500000.pt") -> CheckpointContents:
    path = Path("/nowhere") / name
    return CheckpointContents(path, "torch", tensors, file=path)


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_imported_network_is_what_their_code_computes(name, tmp_path, figure):
    case, imported = CASES[name], imported_case(tmp_path, name)
    assert (imported.source, imported.questions, imported.config) == ("openai", (), case.config)
    y = [] if case.config.classes is None else [torch.from_numpy(openai_unet.Y)]
    with torch.no_grad():
        outputs = module_of(imported)(torch.from_numpy(openai_unet.images(case)), torch.from_numpy(openai_unet.T), *y)
    with np.load(openai_unet.FILE) as stored:
        expected = torch.from_numpy(stored[name])
    for what, ours, theirs in zip(("ε", "var"), outputs, expected.chunk(2, dim=1), strict=True):
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        figure(f"{name}: {what} against its own code, max |Δ| / max", error, at_most=1e-5)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [(UPDOWN, {"attention_order": "new"}), (RESCALED, {"rescale_timesteps": False}), (POOL, {"heads": 1})],
)
def test_another_answer_to_a_question_is_another_network(name, wrong, tmp_path):
    values = {**options_for(CASES[name]).values, **wrong}
    if wrong == {"heads": 1}:
        del values["attention_order"]
    imported = import_checkpoint(saved(tmp_path, weights(CASES[name])), Options(values))
    case = CASES[name]
    y = [] if case.config.classes is None else [torch.from_numpy(openai_unet.Y)]
    with torch.no_grad():
        outputs = module_of(imported)(torch.from_numpy(openai_unet.images(case)), torch.from_numpy(openai_unet.T), *y)
    with np.load(openai_unet.FILE) as stored:
        assert np.abs(torch.cat(outputs, dim=1).numpy() - stored[name]).max() > 1e-3


def test_half_precision_becomes_float32(tmp_path):
    halved = {name: tensor.half() for name, tensor in weights(CASES[CONV]).items()}
    imported = import_checkpoint(saved(tmp_path, halved), options_for(CASES[CONV]))
    assert {tensor.dtype for tensor in imported.tensors.values()} == {torch.float32}
    assert torch.equal(imported.tensors["conv_in.weight"], halved["input_blocks.0.0.weight"].float())


@pytest.mark.parametrize("name", CASES)
def test_importing_and_converting_back_changes_no_bit(name, tmp_path):
    case = CASES[name]
    theirs = weights(case)
    imported = import_checkpoint(saved(tmp_path, theirs), options_for(case))
    convert(imported, "openai", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "model.pt", weights_only=True)
    if name == NEW:  # given back in the order that both projects read without a flag
        theirs = weights(CASES[UPDOWN])
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.items())
    again = import_checkpoint(tmp_path / "back")  # the flags beside it have every setting
    assert (again.config, again.spec, again.questions) == (imported.config, imported.spec, ())
    assert all(torch.equal(again.tensors[key], value) for key, value in imported.tensors.items())


@pytest.mark.parametrize(
    "more",
    [
        {"prediction": "x0", "clip": None, "schedule": "linear"},
        {"variance": "fixed_small", "timesteps": 1000},
        {"variance": "fixed_large", "dropout": 0.25, "timesteps": 500, "rescale_timesteps": True},
    ],
)
def test_settings_survive_the_way_there_and_back(more, tmp_path):
    tensors = weights(CASES[CONV])
    if "variance" in more:
        tensors |= {f"out.2.{part}": tensors[f"out.2.{part}"][:3].clone() for part in ("weight", "bias")}
    imported = import_checkpoint(saved(tmp_path, tensors), options_for(CASES[CONV], **more))
    convert(imported, "openai", tmp_path / "back")
    again = import_checkpoint(tmp_path / "back")
    assert (again.config, again.spec, again.questions) == (imported.config, imported.spec, ())


@pytest.mark.parametrize("new_order", [False, True])
def test_the_table_goes_both_ways(new_order):
    config = CASES[UPDOWN].config
    ours = openai_unet.network(CASES[UPDOWN]).state_dict()
    there = to_theirs(rows(config, new_order), ours)
    assert there.keys() == weights(CASES[UPDOWN]).keys()
    assert all(torch.equal(there[key], value) for key, value in weights(CASES[NEW if new_order else UPDOWN]).items())


# --- published networks ----------------------------------------------------------------------------------------------

MADE = {
    "cifar10": (446, 52546438, "80b29d6f201a8c8e", {256: 4}),
    "imagenet64": (450, 121063942, "0463057b42c021ed", {384: 4, 512: 4}),
    "imagenet64_cond": (451, 273049350, "5282b4d8ae2109d4", {576: 4, 768: 4}),
    "lsun_bedroom": (426, 113676678, "30881e4a8591a400", {512: 1}),
    "guided_imagenet64": (541, 295904454, "cdbf32c1675c84fb", {384: 6, 576: 9, 768: 12}),
    "guided_imagenet128": (493, 421529606, "c56d52445fdb2112", {512: 4, 768: 4, 1024: 4}),
    "guided_imagenet256": (567, 553838086, "e357403fc997eb00", {512: 8, 1024: 16}),
    "guided_imagenet256_uncond": (566, 552814086, "77e18ded5689d791", {512: 8, 1024: 16}),
    "guided_lsun": (566, 552814086, "77e18ded5689d791", {512: 8, 1024: 16}),
    "guided_lsun_nodropout": (566, 552814086, "77e18ded5689d791", {512: 8, 1024: 16}),
}
"""What OpenAI's own create_model made of each README's flags (improved-diffusion 1bc7bbb, guided-diffusion 22e0df8): how
many tensors and parameters, the first digits of the sha256 of the sorted lines "name [shape]", and how many heads its
attentions have, by their width."""

CHAINS = {
    "cifar10": (4000, "cosine", 0.25),
    "imagenet64": (4000, "cosine", 0.25),
    "imagenet64_cond": (4000, "cosine", 1),
    "guided_imagenet64": (1000, "cosine", 1),
}
"""T, the schedule and the scale of t; (1000, "linear", 1) for all others."""


def weightless(network: str | UNetConfig) -> dict[str, torch.Tensor]:
    """The tensors of a network, or of a published one, under OpenAI's names and without memory."""
    config = openai_flags.network(PUBLISHED[network].flags) if isinstance(network, str) else network
    ours = {key: torch.empty(shape, device="meta") for key, shape in unet_shapes(config).items()}
    return to_theirs(rows(config), ours)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_has_the_names_and_shapes_that_their_code_gives_it(name, tmp_path):
    tensors = weightless(name)
    lines = "\n".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(tensors.items()))
    parameters = sum(tensor.numel() for tensor in tensors.values())
    digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
    config = openai_flags.network(PUBLISHED[name].flags)
    heads = {width: config.heads_of(width) for width in config.attention_widths}
    assert (len(tensors), parameters, digest, heads) == MADE[name]


@pytest.mark.parametrize("by", ["the file's name", "--model"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_is_understood_without_a_question(name, by):
    tensors = weightless(name)
    contents = with_tensors(tensors, PUBLISHED[name].files[0] if by == "the file's name" else "model.pt")
    assert openai.recognise(contents)
    settings = SettingsResolver(Options({} if by == "the file's name" else {"model": name}))
    config, spec, new_order = openai.understand(settings, contents, tensors)
    assert settings.questions == []
    assert [fact.value for fact in settings.facts if fact.name == "model"] == [name]
    assert config == openai_flags.network(PUBLISHED[name].flags)
    timesteps, schedule, scale = CHAINS.get(name, (1000, "linear", 1))
    assert (spec.timesteps, spec.schedule, config.time_scale) == (timesteps, schedule, scale)
    assert (spec.variance, spec.prediction, spec.clip) == ("learned_range", "eps", 1)
    assert spec.classes == (1000 if name in ("imagenet64_cond", *list(PUBLISHED)[4:7]) else None)
    assert new_order == (name == "guided_imagenet64")


def test_the_structure_alone_decides_neither_schedule_nor_timesteps():
    """No shape shows them, and people train the same networks with others."""
    for name in PUBLISHED:
        tensors = weightless(name)
        settings = SettingsResolver(Options())
        openai.understand(settings, with_tensors(tensors), tensors)
        questions = {question.name: question for question in settings.questions}
        assert {"schedule", "timesteps"} <= questions.keys(), name
        assert "--model " in questions["schedule"].why


def test_another_network_than_the_named_model_is_refused(tmp_path):
    path = saved(tmp_path, weights(CASES[CONV]))
    with pytest.raises(InputError, match="not lsun_bedroom") as caught:
        import_checkpoint(path, Options({"model": "lsun_bedroom"}))
    assert "channels is 32, and 128 in lsun_bedroom" in str(caught.value)


@pytest.mark.parametrize("resample", [{}, {"resample_blocks": True}, {"average_pool": True}])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2), (1, 2, 2, 3)])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("attention", [(), (16,), (8,), (4, 2)])
def test_the_structure_is_read_from_names_and_shapes(resample, multipliers, blocks, attention):
    classes, scale_shift = (7, True) if blocks == 2 else (None, False)
    config = openai_flags.openai_unet(
        in_channels=1, out_channels=1 + (blocks == 1), size=(16, 16), channels=32, multipliers=multipliers,
        blocks=blocks, attention=attention, dropout=0.0, classes=classes, scale_shift=scale_shift, **resample,
    )  # fmt: skip
    seen = openai_flags.structure(config)
    if len(multipliers) == 1:  # without a second level nothing is resampled
        seen |= {"resample_blocks": False, "average_pool": False}
    tensors = weightless(config)
    assert openai._structure(tensors) == seen


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "questions"),
    [
        (CONV, {"size", "schedule", "timesteps", "rescale_timesteps", "heads", "attention_order"}),
        (UPDOWN, {"size", "schedule", "timesteps", "heads", "attention_order"}),  # T = 1000 comes first there
    ],
)
def test_settings_that_the_file_does_not_have_are_questions(name, questions, tmp_path):
    imported = import_checkpoint(saved(tmp_path, weights(CASES[name])))
    candidates = {question.name: question.candidates for question in imported.questions}
    assert candidates.keys() == questions
    assert set(candidates["schedule"]) == {"linear", "cosine"}
    assert set(candidates["timesteps"]) == {1000, 4000}
    assert set(candidates["attention_order"]) == {"legacy", "new"}
    assert set(candidates["heads"]) == {1, 2, 4, 8}  # one width: a head's width is a number of heads
    with pytest.raises(InputError, match="schedule"):
        save_run(imported, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_combination_of_candidates_that_differs_can_be_tried(tmp_path):
    """As --probe does. With one head both orders are the same, and one of them is left out."""
    contents = with_tensors(weights(CASES[CONV]))
    options = Options({"size": (8, 8), "timesteps": 4000})
    questions = openai.read(contents, options).questions
    assert all(question.probed for question in questions)
    tried = set()
    for choice in itertools.product(*(question.candidates for question in questions)):
        values = {question.name: value for question, value in zip(questions, choice, strict=True)}
        try:
            imported = openai.read(contents, options.with_values(values))
        except InputError:
            assert (values["heads"], values["attention_order"]) == (1, "new")
            continue
        assert imported.questions == ()
        qkv = imported.tensors["middle.0.attention.q.bias"].numpy().tobytes()
        tried.add((imported.config, imported.spec.schedule, qkv))
    assert len(tried) == (4 * 2 - 1) * 2 * 2


def test_a_data_parallel_prefix_is_no_part_of_a_name(tmp_path):
    tensors = {f"module.{name}": tensor for name, tensor in weights(CASES[CONV]).items()}
    imported = import_checkpoint(saved(tmp_path, tensors), options_for(CASES[CONV]))
    assert torch.equal(imported.tensors["conv_in.bias"], tensors["module.input_blocks.0.0.bias"])


def test_a_fixed_variance_is_a_question(tmp_path):
    tensors = weights(CASES[CONV])
    tensors |= {f"out.2.{part}": tensors[f"out.2.{part}"][:3].clone() for part in ("weight", "bias")}
    path = saved(tmp_path, tensors)
    assert [question.name for question in import_checkpoint(path, options_for(CASES[CONV])).questions] == ["variance"]
    spec = import_checkpoint(path, options_for(CASES[CONV], variance="fixed_small")).spec
    assert spec.variance == "fixed_small"


def test_the_linear_schedule_is_stretched_over_t(tmp_path):
    spec = imported_case(tmp_path, CONV, schedule="linear").spec
    betas = spec.make_schedule().betas
    assert np.array_equal(betas, np.linspace(0.25 * 0.0001, 0.25 * 0.02, 4000))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("heads", 3), ("heads", 0), ("timesteps", 0), ("size", (0, 8)), ("size", (9, 9)), ("schedule", "quad"),
     ("variance", "fixed_large"), ("prediction", "v"), ("colour", "red")],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(setting, value, tmp_path):
    with pytest.raises(InputError):
        imported_case(tmp_path, CONV, **{setting: value})


def test_averaged_weights_are_not_raw_ones(tmp_path):
    with pytest.raises(InputError, match="averaged"):
        import_checkpoint(
            saved(tmp_path, weights(CASES[CONV])), Options(options_for(CASES[CONV]).values, weights="raw")
        )


# --- damaged and foreign files ---------------------------------------------------------------------------------------


def change(tensors: dict[str, torch.Tensor], kind: str) -> str:
    """Damage the tensors, and return what the error should say."""
    if kind == "missing":
        del tensors["middle_block.1.qkv.bias"]
        return "1 missing.*middle_block.1.qkv.bias"
    if kind == "surplus":
        tensors["extra.weight"] = torch.zeros(2)
        return "1 surplus.*extra.weight"
    if kind == "NaN":
        tensors["out.0.bias"][3] = torch.nan
        return "1 with NaN.*out.0.bias"
    if kind == "shape":
        tensors["middle_block.0.in_layers.0.weight"] = torch.zeros(7)
        return "1 of another shape.*middle_block.0.in_layers.0.weight"
    if kind == "qkv":
        tensors["middle_block.1.qkv.weight"] = torch.zeros(3, 3, 1)
        return "1 of another shape.*middle_block.1.qkv.weight"
    if kind == "classifier":
        for name in [name for name in tensors if name.startswith("output_blocks.")]:
            del tensors[name]
        return "without the upward half"
    if kind == "upsampler":
        tensors["input_blocks.0.0.weight"] = torch.zeros(32, 6, 3, 3)
        return "enlarges images"
    if kind == "text":
        tensors["input_blocks.1.1.transformer_blocks.0.norm.weight"] = torch.zeros(32)
        return "cross-attention"
    if kind == "512":
        tensors["time_embed.0.weight"] = torch.zeros(256, 64)
        return "32 channels wide, and the time embedding 64"
    tensors["out.2.weight"] = torch.zeros(4, 32, 3, 3)
    return "channels in and out: 3 and 4"


@pytest.mark.parametrize(
    "kind",
    ["missing", "surplus", "NaN", "shape", "qkv", "classifier", "upsampler", "text", "512", "channels"],
)
def test_one_clear_error(kind, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in weights(CASES[CONV]).items()}
    message = change(tensors, kind)
    with pytest.raises(FileFormatError, match=f"(?s){message}"):
        import_checkpoint(saved(tmp_path, tensors), options_for(CASES[CONV]))


@pytest.mark.parametrize("name", ["input_blocks.0.0.weight", "out.2.weight", "input_blocks.1.0.out_layers.3.weight",
                                  "output_blocks.0.0.in_layers.2.weight", "input_blocks.2.0.op.weight",
                                  "time_embed.0.weight", "label_emb.weight"])  # fmt: skip
@pytest.mark.parametrize("shape", [None, (), (3,), (3, 3, 0, 0), (0, 32)])
def test_useless_shapes_are_refused(name, shape):
    tensors = weights(CASES[CONV])
    assert name in tensors
    del tensors[name]
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    elif name == "label_emb.weight":
        return  # a network without classes, and nothing else is wrong
    options = options_for(CASES[CONV], heads=1)
    with pytest.raises((FileFormatError, InputError, SpecError)):
        openai.read(with_tensors(tensors), options)


@pytest.mark.parametrize("line", ["--image_size", "image_size 32", "--image_size 3x2", "--noise_schedule quad", "'",
                                  "--rescale_timesteps maybe", "--dropout much"])  # fmt: skip
def test_a_damaged_file_of_flags_is_refused(line, tmp_path):
    (tmp_path / openai.FLAGS_FILE).write_text(line)
    with pytest.raises(FileFormatError, match=r"openai_flags\.txt"):
        import_checkpoint(saved(tmp_path, weights(CASES[CONV])))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "chain_of", "message"),
    [
        ({"norm_eps": 1e-6}, {}, "norm_eps"),
        ({"cos_first": False}, {}, "cos_first"),
        ({"symmetric_padding": False}, {}, "symmetric_padding"),
        ({"time_scale": 0.5}, {}, "time_scale"),
        ({"size": (8, 16)}, {"shape": (3, 8, 16)}, "square"),
        ({}, {"schedule": "quad"}, "schedule"),
        ({}, {"schedule": "linear", "timesteps": 2000}, "schedule"),
        ({}, {"prediction": "v"}, "predicts v"),
        ({}, {"schedule": "cosine", "clip": 2.0}, "±2"),
    ],
)
def test_what_their_code_cannot_compute_is_not_written(knobs, chain_of, message, tmp_path):
    config = UNetConfig(**{**vars(CASES[CONV].config), "classes": None, **knobs})
    spec = ModelSpec(**{"shape": (3, 8, 8), "variance": "learned_range", **chain_of})
    with pytest.raises(DdpmxError, match=message):
        convert(Imported("ddpmx", config, spec, {}), "openai", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- the chain -------------------------------------------------------------------------------------------------------


def p_sample(spec: ModelSpec, t: int, x: np.ndarray, eps: np.ndarray, v: np.ndarray, z: np.ndarray) -> np.ndarray:
    """One step of Nichol & Dhariwal 2021 in float64: Ho's mean (equation 11) about the clipped x̂_0; their equations 15, 17.

    At t = 0 the mean alone.
    """
    f = np.cos((np.arange(spec.timesteps + 1) / spec.timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_bar = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))
    now, before = alpha_bar[t], alpha_bar[t - 1] if t else 1.0
    beta = 1 - now / before
    x0 = np.clip((x - np.sqrt(1 - now) * eps) / np.sqrt(now), -1, 1)
    mean = (np.sqrt(before) * beta * x0 + np.sqrt(1 - beta) * (1 - before) * x) / (1 - now)
    if t == 0:
        return mean
    share = (v + 1) / 2
    return mean + np.exp((share * np.log(beta) + (1 - share) * np.log(beta * (1 - before) / (1 - now))) / 2) * z


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Imported, Path]:
    """A guided network with classes, over 12 steps."""
    folder = tmp_path_factory.mktemp("openai")
    imported = imported_case(folder, UPDOWN, timesteps=12)
    save_run(imported, folder / "run")
    return imported, folder


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), pytest.param("fp16", 2e-2, marks=pytest.mark.long)])
def test_its_export_runs_the_chain_of_the_paper(run, precision, bound, figure):
    pytest.importorskip("onnxruntime", reason="not verified here: the chain of an OpenAI network (no onnxruntime)")
    from ddpm_export.graph.onnx_export import export
    from ddpmx.backends.ort import open_onnx

    imported, folder = run
    network, spec = module_of(imported), imported.spec
    file = folder / f"{precision}.onnx"
    assert export(folder / "run", file, precision=precision).variance == "learned_range"
    images, y = np.arange(3), np.int32([0, 4, 2])
    x = chain.initial(7, images, spec.shape)
    backend = open_onnx(file, spec)
    table = make_table(spec.make_schedule(), "eps", "learned_range")
    steps = chain.run(
        backend, table, x, seed=7, images=images, conditioning_shapes=spec.conditioning_shapes, conditioning={"y": y}
    )
    worst, walked, visited = 0.0, x.astype(np.float64), []
    for step in steps:
        z = normal(7, images, step.t, Purpose.STEP, 192).reshape(x.shape).astype(np.float64) if step.t else 0 * x
        before = step.x.astype(np.float64) if precision == "fp16" else walked
        with torch.no_grad():
            outputs = network(torch.from_numpy(before).float(), torch.full((3,), step.t), torch.from_numpy(y))
        eps, v = (part.double().numpy() for part in outputs)
        walked = p_sample(spec, step.t, before, eps, v, z)
        worst = max(worst, np.abs(walked - step.x_next).max())
        visited.append(step.t)
    backend.close()
    assert visited == list(range(12))[::-1]
    # in half precision each step by itself: how an error grows in later steps depends on the network
    what = "the whole chain" if precision == "fp32" else "each step"
    figure(f"OpenAI's network, {precision}: {what} against float64", worst, at_most=bound)
