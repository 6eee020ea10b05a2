"""README followed literally, from an empty folder: its Python in one process, its shell lines
one after another, its printed output compared."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import typer.main

from seats_analysis.cli import main as cli
from seats_analysis.storage.schemas import load_profile, save_profile

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"(?P<apart><!-- not run [^>]*-->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
BLOCKS = [(m["kind"], m["text"], bool(m["apart"])) for m in BLOCK.finditer(README)]


def code(kind, apart=False):
    return "".join(text for k, text, a in BLOCKS if (k, a) == (kind, apart))


def follow(command, folder):
    """Run it as a new user would: an empty folder, the environment's commands on the path,
    nothing of this checkout."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", PYTHONUNBUFFERED="1"
    )
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_every_block_is_known():
    assert {kind for kind, _, _ in BLOCKS} == {"python", "sh", ""} and README.count(
        "```"
    ) == 2 * len(BLOCKS)
    assert code("python") and code("sh") and code("sh", apart=True)


def test_python_reaches_the_late_block_and_prints_what_is_shown(tmp_path):
    done = follow([sys.executable, "-c", code("python")], tmp_path)
    assert done.stdout.strip() == code("").strip()
    levels = list(map(int, re.findall(r"\d+", done.stdout)))
    assert (
        levels[0] > levels[-2] == levels[-1]
        and len(set(levels)) >= 3
        and levels == sorted(levels, reverse=True)
    )  # three stages
    assert "ScheduleWarning: late block: layer" in done.stderr and "certified: none" in done.stderr


PROBE = re.compile(r"^seats probe --model testbed --limit (\d+) --out profile.nc$", re.M)


@pytest.mark.parametrize("measured", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_shell_lines(tmp_path, measured):
    """One after another. `make test` takes what the first command would measure from the committed
    profile: README's Python measures the same."""
    (limit,) = PROBE.findall(code("sh"))
    assert f"limit={limit})" in code("python")
    lines = code("sh")
    if not measured:
        profile = load_profile(ROOT / "data" / "profiles" / "testbed.nc")
        derive = profile["split"].values.astype(str) == "derive"
        first = profile.isel(sample=derive.nonzero()[0][: int(limit)])
        save_profile(first, tmp_path / "profile.nc")
        lines = PROBE.sub("", lines)
    done = follow(["bash", "-euo", "pipefail", "-c", lines], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["profile.nc", "schedule.json"]
    per_layer = next(
        line for line in done.stdout.splitlines() if line.startswith("per layer")
    ).split()[2:]
    assert len(set(per_layer)) >= 3 and per_layer[-1] == re.search(r"(\d+) text", done.stdout)[1]
    assert "note: late block: layer" in done.stderr


COMMANDS = [
    shlex.split(line, comments=True)
    for line in code("sh", apart=True).splitlines()
    if re.search(r"(^|\s)seats ", line)
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_lines_that_take_more_are_at_least_commands(words):
    "Those that need a checkpoint, a GPU or half an hour: their options exist."
    _, *words = words[words.index("seats") :]
    command = typer.main.get_command(cli.app).commands[words[0]]
    command.make_context(words[0], words[1:])


WALK = (ROOT / "nbs" / "explanations" / "walk_tune.ipynb").read_text(encoding="utf-8")


def test_places_of_the_walks_exist():
    "Each walk has at most 25 places, and every one is a module with such a qualified name."
    walks = WALK.split("## `seats ")[1:]
    assert [walk[:4] for walk in walks] == ["eval", "tune"]
    for walk in walks:
        places = re.findall(r"\| `(\w+\.\w+)\.([\w.]+)` \|", walk)
        assert 15 < len(places) <= 25
        assert f"{len(places)} places in {len({m for m, _ in places})} files" in walk
        for module, name in places:
            attrgetter(name)(importlib.import_module(f"seats_analysis.{module}"))
