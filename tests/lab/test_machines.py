"""One machine plays others: what results say is the same on all of them, the last bits are not.

Instruction sets and thread counts are set from outside, so each machine is a process of its own
that runs the command a user runs.
"""

import os
import subprocess
import sys

from conftest import ROOT
import pytest

from seats_analysis import load_profile
from seats_analysis.lab.agreement import TOLERANCE, compare_profiles

QUESTIONS = 4
MACHINES = {
    "one-thread": dict(OMP_NUM_THREADS="1"),
    "two-threads": dict(OMP_NUM_THREADS="2"),
    "four-threads": dict(OMP_NUM_THREADS="4"),
    "avx2": dict(
        OMP_NUM_THREADS="1",
        ATEN_CPU_CAPABILITY="avx2",
        ONEDNN_MAX_CPU_ISA="AVX2",
        MKL_ENABLE_INSTRUCTIONS="AVX2",
    ),
    "sse": dict(
        OMP_NUM_THREADS="2",
        ATEN_CPU_CAPABILITY="default",
        ONEDNN_MAX_CPU_ISA="SSE41",
        MKL_ENABLE_INSTRUCTIONS="SSE4_2",
    ),
}


@pytest.fixture(scope="module")
def committed():
    return load_profile(ROOT / "data" / "profiles" / "testbed.nc")


def measured(name, layers, folder):
    "The profile that a machine makes of some questions."
    out = folder / f"{name}.nc"
    code = 'import sys; from seats_analysis.cli.main import main; sys.argv[0] = "seats"; main()'
    clean = {k: v for k, v in os.environ.items() if k not in set().union(*MACHINES.values())}
    clean["OMP_WAIT_POLICY"] = "passive"  # threads that wait do not keep a busy machine busier
    done = subprocess.run(
        [sys.executable, "-c", code, "probe", "--limit", str(QUESTIONS), *layers, "--out", out],
        env=clean | MACHINES[name],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return load_profile(out)


@pytest.mark.parametrize(
    "name, layers",
    [  # two threads and the oldest instructions: what differs most from other machines
        ("sse", ("--layers", "0:20:4")),
        *(pytest.param(m, (), marks=pytest.mark.nightly) for m in MACHINES),
    ],
)
def test_every_machine_says_the_same(name, layers, committed, tmp_path):
    ours = measured(name, layers, tmp_path)
    checks = compare_profiles(ours, committed)
    assert [(claim, holds) for claim, holds, _ in checks] == [
        ("decisions", True),
        ("numbers", True),
    ], checks
    if name == "sse":  # a comparison of bits would call this one different
        assert not ours[["nll", "margin", "kl"]].equals(
            committed.sel(sample=ours["sample"], layer=ours["layer"])[["nll", "margin", "kl"]]
        )


def test_the_tolerance_lies_below_every_committed_decision(committed):
    "Floats that agree within it cannot decide otherwise."
    assert float(abs(committed["margin"]).min()) > 2 * TOLERANCE
