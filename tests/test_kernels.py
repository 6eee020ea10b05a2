"""Triton kernels: parity with the PyTorch code, in Triton's interpreter where there is no GPU, and
who decides which of both runs."""

import json
import os
import re
import subprocess
import sys

from conftest import ROOT
import pytest, torch

from seats_analysis.pruning import received, select

pytest.importorskip("triton", reason="no Triton for this platform")


@pytest.mark.parametrize(
    "cases, greedy, statistic",  # how many must differ, where numbers are spoilt, of the first 20
    [(15, 2, 11), pytest.param(80, 3, 15, marks=pytest.mark.nightly)],
)
def test_parity_on_random_shapes(cases, greedy, statistic):
    """In a process of its own; with other numbers for the kernels most cases differ (windows kept
    whole, or not at all, cannot)."""
    interpret = "0" if torch.cuda.is_available() else "1"
    settings = dict(PYTHONPATH=str(ROOT), TRITON_INTERPRET=interpret, OMP_NUM_THREADS="1")
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "interpreted.py", str(cases)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["cases"] == cases and found["wrong"] == dict(greedy=0, statistic=0), found["first"]
    spoiled = found["spoiled"]
    assert spoiled["greedy"] > greedy and spoiled["statistic"] > statistic, spoiled


@pytest.mark.parametrize(
    "setting, device, on",
    [
        (None, "cpu", False),
        ("0", "cpu", False),
        ("1", "cpu", True),
        (None, "cuda:0", True),
        ("0", "cuda", False),
    ],
)
def test_when_kernels_run(monkeypatch, setting, device, on):
    "On CUDA unless switched off; on the CPU only when asked for, which is for tests."
    monkeypatch.delenv("SEATS_TRITON", raising=False)
    if setting is not None:
        monkeypatch.setenv("SEATS_TRITON", setting)
    assert (received.triton_kernels(device) is not None) is on


def test_without_triton_pytorch_does_it(monkeypatch):
    "Nor for windows that are too large for the kernel."
    name = "seats_analysis.pruning.kernels"
    kernels = pytest.importorskip(name)
    monkeypatch.setenv("SEATS_TRITON", "1")
    monkeypatch.setattr(kernels, "LARGEST", 7)
    assert select.select_in_clip(torch.randn(8, 4), None, (8,), (3,)).sum() == 3
    monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    monkeypatch.delattr(name, raising=False)
    assert received.triton_kernels("cuda") is None
    assert select.select_in_clip(torch.randn(8, 4), None, (8,), (3,)).sum() == 3


def test_a_new_length_compiles_nothing():
    """Numbers that change from clip to clip are not compiled in, also where they are 1 or divisible
    by 16."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets, nothing is compiled")
    from seats_analysis.pruning import kernels

    for kernel in kernels._log_sums, kernels._column_sums:
        constant = sorted(p.name for p in kernel.params if p.do_not_specialize)
        assert constant == ["tiles", "tokens"]


# -------------------- compiled for GPUs that are not there


def assembled(kernel, types, constants, arch, warps=4):
    """Shared memory of a program in bytes, and what ptxas says about its registers: (shared,
    registers, bytes of spill loads)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    fixed = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
    built = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constexprs=fixed),
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=warps),
    )
    name = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
    said = subprocess.run(
        [get_ptxas(arch).path, "-v", name, "-", "-o", os.devnull],
        input=built.asm["ptx"],
        capture_output=True,
        text=True,
    ).stderr
    patterns = r"Used (\d+) registers", r"(\d+) bytes spill loads"
    return built.metadata.shared, *(int(re.search(p, said)[1]) for p in patterns)


INDEX = dict.fromkeys(("start", "size", "count", "block"), "*i64")
SHAPE = dict(
    tokens="i32",
    scale="fp32",
    **dict.fromkeys(("q_t", "q_h", "k_t", "k_h", "dim", "tiles"), "i32"),
    lse="*fp32",
    out="*fp32",
)


@pytest.mark.parametrize(
    "arch, widths, dims",  # A100; H100 and H200
    [
        (80, (16, 8192), (128,)),
        pytest.param(80, (512, 2048), (32, 64), marks=pytest.mark.nightly),
        pytest.param(90, (16, 512, 2048, 8192), (32, 64, 128), marks=pytest.mark.nightly),
    ],
)
def test_kernels_fit_a_gpu(arch, widths, dims):
    """Compiled as they are launched: shared memory as small as the smallest GPUs have, no registers
    spilt where time matters."""
    pytest.importorskip("triton.backends.nvidia.compiler")
    from seats_analysis.pruning import kernels

    found = {}
    for wide in (*widths, kernels.LARGEST):
        constants = kernels.greedy_launch(wide)
        warps = constants.pop("num_warps")
        types = dict(INDEX, distance="*fp32", keep="*u8")
        found["take", wide] = assembled(kernels._take_diverse, types, constants, arch, warps)

    def statistic(name, short, rows, dim):
        types = dict(INDEX, q=f"*{short}", k=f"*{short}", **SHAPE)
        return assembled(getattr(kernels, name), types, dict(ROWS=rows, DIM=dim), arch)

    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for dim in dims:  # heads of the embedded model, of the audio and of the vision tower
            for name in ("_log_sums", "_column_sums"):
                rows = kernels.tile_rows(dtype)
                found[name, short, dim] = statistic(name, short, rows, dim)
    assert max(shared for shared, *_ in found.values()) <= 48 * 1024, found
    for program, (*_, spilt) in found.items():
        assert spilt <= (0 if "bf16" in program else 256), program
    assert statistic("_column_sums", "fp32", 64, 128)[2] > 4096  # and it can tell
