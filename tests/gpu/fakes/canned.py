"""Hand-written results of the check's steps: the figures are not measured."""

from __future__ import annotations

GPU = {"name": "NVIDIA H200", "sm": "9.0", "memory": 141 << 30}
DOCTOR = {
    "machine": {
        "ddpmx": "0.1.0",
        "python": "3.12.3 /home/alice/ddpmx/.venv/bin/python",
        "platform": "Linux-6.8-x86_64",
        "jetson": None,
        "gpus": [GPU],
        "driver_cuda": "13.0",
        "gpu_trouble": None,
    },
    "libraries": {
        "torch": {"version": "2.11.0", "cuda": "13.0", "gpu": True},
        "onnxruntime": {"version": "1.30.0", "providers": ["CPUExecutionProvider"]},
        "TensorRT": {"missing": "no module named tensorrt"},
        "TensorRT-RTX": {"version": "1.7.1.116", "libraries": ["/home/alice/x/libtensorrt_rtx.so.1"]},
        "chains on the GPU": {"version": "by CUDA 13.0", "why_no_while": None},
    },
    "findings": [{"what": "train", "works": True, "why": "torch 2.11.0 on the GPU", "fix": None}],
}

JUNIT = """<testsuites><testsuite name="pytest" hostname="{host}">
<testcase name="test_a"><properties><property name="measured" value="('ε, RMS', 1.5e-07, '≤ 0.0001')"/>
<property name="other" value="nonsense("/></properties></testcase>
<testcase name="test_b"><failure message="assert 1 == 2">long</failure></testcase>
<testcase name="test_c"><skipped message="not verified here: a chain in one launch (CUDA_ERROR_NOT_SUPPORTED)"/></testcase>
<testcase name="test_d"><error message="fixture broke">long</error></testcase>
</testsuite></testsuites>"""

CELL = {
    "batch": 1,
    "executor": "while",
    "failed": None,
    "p50_ms": None,
    "p95_ms": None,
    "mean_ms": 0.51,
    "bare_ms": 0.5,
    "ratio": 1.013,
    "host_us": 0.2,
    "chain_s": 0.51,
    "extrapolated": False,
    "images_per_s": 1.96,
    "memory": 1 << 28,
    "notes": [],
}
BENCH = {
    "file": {"runs_on": "TensorRT-RTX 1.7.1.116 on NVIDIA H200, SM 9.0", "load_s": 1.25},
    "cells": [CELL, {**CELL, "executor": "graph", "failed": "out of | memory"}],
    "left_out": [],
    "method": ["A step is the network, its noise and the update."],
}
ROW = {
    "run": "diffusers",
    "kind": "diffusers",
    "precision": "fp16",
    "batch": 1,
    "ms_per_step": 9.0,
    "images_per_s": 0.1,
}
PEERS = {
    "rows": [{**ROW, "ratio": 6.2, "ratio_range": [6.0, 6.4], "peak_gpu": None}],
    "versions": {"torch": "2.11.0"},
    "steps": 100,
    "rounds": 5,
    "same": "same network",
    "not_run": [{"run": "compiled", "why": "no\ncompiler"}],
}
SPEED = {
    "images": 256,
    "steps": 1000,
    "batch": 256,
    "plan": "x.plan",
    "runs_on": "X",
    "first_s": 9.0,
    "seconds": [7.5, 6.9],
}
SERVING = {
    "plan": "model-fp16.plan",
    "batch": 16,
    "steps": 200,
    "batcher_runs_on": "X, executor graph",
    "chain_runs_on": "X, executor while",
    "differing": 0,
    "images": 55,
    "chain_ms": 2.5,
    "batcher_ms": 2.75,
    "ratio": 1.1,
    "uniform_us": 3.5,
    "each_us": 4.0,
    "kernels_ratio": 1.0002,
}
PARITY = {
    "verdict": "PASSED: the PyTorch model",
    "ran_on": "TensorRT-RTX",
    "reference": {"made_with": "torch 2.11.0, cpu"},
    "rungs": [
        {
            "name": "ε, RMS",
            "value": 1e-5,
            "bound": 1e-4,
            "at_least": False,
            "passed": True,
            "worst": "",
            "skipped": None,
        },
        {
            "name": "free",
            "value": None,
            "bound": 0.99,
            "at_least": True,
            "passed": True,
            "worst": "",
            "skipped": "random",
        },
    ],
}
