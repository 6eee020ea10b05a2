"""Triton kernels: parity with the PyTorch code, in Triton's interpreter where there is no GPU, and who decides which of both runs."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest, torch

from seats_analysis import select

pytest.importorskip("triton", reason="no Triton for this platform")
ROOT = Path(__file__).resolve().parents[1]

def test_parity_on_200_random_shapes():
    "In a process of its own; with other numbers for the kernels most cases differ (windows kept whole, or not at all, cannot)."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, ROOT/"tests"/"interpreted.py", "200"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["cases"] == 200 and found["wrong"] == dict(greedy=0, statistic=0), found["first"]
    assert found["spoiled"]["greedy"] > 3 and found["spoiled"]["statistic"] > 15

@pytest.mark.parametrize("setting, device, on", [(None, "cpu", False), ("0", "cpu", False), ("1", "cpu", True), (None, "cuda:0", True), ("0", "cuda", False)])
def test_when_kernels_run(monkeypatch, setting, device, on):
    "On CUDA unless switched off; on the CPU only when asked for, which is for tests."
    monkeypatch.delenv("SEATS_TRITON", raising=False)
    if setting is not None: monkeypatch.setenv("SEATS_TRITON", setting)
    assert (select._fused(device) is not None) is on

def test_without_triton_pytorch_does_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "seats_analysis.kernels", None) # an import of it fails
    monkeypatch.delattr("seats_analysis.kernels", raising=False)
    monkeypatch.setenv("SEATS_TRITON", "1")
    assert select._fused("cuda") is None
    assert select.select_in_clip(torch.randn(8, 4), None, (8,), (3,)).sum() == 3

def test_windows_too_large_for_the_kernel_are_taken_by_pytorch(monkeypatch):
    kernels = pytest.importorskip("seats_analysis.kernels")
    monkeypatch.setenv("SEATS_TRITON", "1")
    monkeypatch.setattr(kernels, "LARGEST", 7)
    assert not kernels.fits(8)
    assert select.select_in_clip(torch.randn(8, 4), None, (8,), (3,)).sum() == 3
