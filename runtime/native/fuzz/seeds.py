"""Seeds for the fuzzers: good files, files with one fault, and the words of each format.

    python runtime/native/fuzz/seeds.py FOLDER

writes FOLDER/{onnx,plan,spec}/ and a dictionary FOLDER/{onnx,plan,spec}.dict for each. Needs only ddpmx and numpy.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))

from ddpmx.formats import betas as free_betas
from ddpmx.formats import plan_file
from ddpmx.formats.envelope import wrap
from ddpmx.formats.spec import ModelSpec
from mutations.mutants import onnx_files
from oracles import plans, protobuf

SHAPE = (1, 8, 8)
BETAS = np.linspace(1e-4, 0.02, 20)
SPECS = [
    ModelSpec(SHAPE, timesteps=20),
    ModelSpec(
        SHAPE, timesteps=5, schedule="cosine", prediction="v", variance="fixed_small", clip=None, precision="fp16"
    ),
    ModelSpec(SHAPE, timesteps=5, schedule="sigmoid_beta", prediction="x0", weights="a" * 64, ddpmx="0.1.0"),
    ModelSpec(SHAPE, timesteps=5, classes=5, condition=2, self_condition=True, variance="learned_range"),
    ModelSpec(SHAPE, timesteps=20, schedule="betas", betas=BETAS),
]
INPUTS = {"x": (protobuf.FLOAT, ("batch", *SHAPE)), "t": (protobuf.INT32, ("batch",))}
OUTPUTS = {"eps": (protobuf.FLOAT, ("batch", *SHAPE))}
JSON_WORDS = [
    "null",
    "true",
    "false",
    "1e999",
    "-0.0",
    "9223372036854775808",
    r"\ud83d\ude00",
    r"\ud800",
    '"',
    "[",
    "{",
]
SPEC_WORDS = [f'"{field.name}":' for field in dataclasses.fields(ModelSpec)] + ['"coefficients":', '"model":']
SPEC_WORDS += [
    f'"{word}"'
    for word in ("linear", "cosine", "quad", "jsd", "betas", "eps", "x0", "v", "mu", "learned_range", "learned")
]
SPEC_WORDS += ["beta_start", "beta_end", "betas1 20 "]
RECORD_WORDS = [f'"{field.name}":' for field in dataclasses.fields(plan_file.PlanRecord)] + [
    '"workspace":',
    '"strip":',
]


def onnx_seeds() -> list[bytes]:
    """Files with every field that is read, and with every spec."""
    seeds = onnx_files()
    for spec in SPECS:
        inputs = INPUTS | {
            name: (protobuf.FLOAT, ("batch", *dims)) for name, dims in spec.conditioning_shapes.items() if name != "y"
        }
        if spec.classes is not None:
            inputs["y"] = (protobuf.INT32, ("batch",))
        metadata = {"ddpmx": spec.to_text()}
        if spec.betas is not None:
            metadata["ddpmx.betas"] = free_betas.to_text(spec.betas)
        seeds.append(protobuf.model(inputs, dict.fromkeys(spec.outputs, OUTPUTS["eps"]), metadata=metadata))
    places = ("../x", "/etc/passwd", "a/../b", "")
    seeds += [
        protobuf.model(INPUTS, OUTPUTS, graph=protobuf.field(5, protobuf.external_tensor(place))) for place in places
    ]
    return seeds


def plan_seeds() -> list[bytes]:
    """Inputs of fuzz_plan.cpp: a byte that says what follows, then a plan, or the content of its envelopes."""
    seeds = []
    for spec in SPECS:
        for record in (plans.RECORD, dataclasses.replace(plans.RECORD, options={"workspace": 1 << 30, "tf32": True})):
            plan = plans.make_plan(spec=spec, record=record)
            beside = json.dumps(plan_file.sidecar_json(len(plan), spec, record, {"seconds": 1.5})).encode()
            texts = (json.dumps(part.to_json()).encode() for part in (spec, record))
            seeds += [b"\0" + plan, b"\4" + plan + b"\n" + beside, b"\2" + b"\0".join(texts), b"\x08" + plan]
            texts = (json.dumps(part.to_json()).encode() for part in (spec, record))
            seeds.append(b"\2" + b"\0".join((*texts, beside)))
    seeds.append(b"\0" + plans.make_plan(b"ftrt", (10, 3, 0, 26), record=plans.TENSORRT))
    seeds += [b"\0" + plans.make_plan(tail=tail) for tail in (plans.elf(62), plans.elf(190), b"PE\0\0\x64\x86")]
    return seeds


def spec_seeds() -> list[bytes]:
    """Specs of callers, envelopes, and arrays of β."""
    seeds = []
    for spec in SPECS:
        seeds += [json.dumps(spec.to_json(whole=whole)).encode() for whole in (False, True)]
        seeds += [json.dumps({"model": spec.to_json()}).encode(), spec.to_text().encode()]
    seeds.append(json.dumps({"model": SPECS[-1].to_json(), "betas": BETAS.tolist()}).encode())
    seeds += [free_betas.to_text(betas).encode() for betas in (BETAS, BETAS[:1])]
    seeds.append(wrap("ddpmx1", SPECS[0].to_json() | {"timesteps": 0}).encode())
    return seeds


def dictionary(words: list[str | bytes]) -> str:
    """Words in the format of libFuzzer's dictionaries."""
    raws = [word.encode() if isinstance(word, str) else word for word in words]
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in raw) + '"\n' for raw in raws)


def main(folder: Path) -> None:
    """Write the seeds and dictionaries into ``folder``."""
    onnx_words: list[str | bytes] = ["ddpmx", "ddpmx.betas", "location", "ai.onnx", "batch", "eps", "var", "x0_prev"]
    onnx_words += [protobuf.varint(number << 3 | 2) for number in (1, 5, 6, 7, 11, 12, 13, 14, 15, 20, 22, 23, 25)]
    onnx_words += [b"\xff" * 9 + b"\x01", b"\xff" * 9 + b"\x7f"]
    plan_words: list[str | bytes] = ["ddpmx1 ", "engine1 ", "ftrt", "vtrt", "\x7fELF", b"PE\0\0\x64\x86", *RECORD_WORDS]
    kinds: dict[str, tuple[list[bytes], list[str | bytes]]] = {
        "onnx": (onnx_seeds(), onnx_words),
        "plan": (plan_seeds(), [*plan_words, *SPEC_WORDS, *JSON_WORDS]),
        "spec": (spec_seeds(), [*SPEC_WORDS, *JSON_WORDS]),
    }
    for kind, (seeds, words) in kinds.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds):
            (folder / kind / f"seed-{number:02}").write_bytes(seed)
        (folder / f"{kind}.dict").write_text(dictionary(words))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
