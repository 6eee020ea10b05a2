"""A newcomer's walk: the wheel in an environment of its own, used from an empty folder.

`make test` builds and installs it and tries what is cheap; `make nightly` goes through every
command, README's lines and clips of one's own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from conftest import ROOT
import numpy as np
import pins
import pytest
import typer.main
from clips import blocks, patch, write_clip
from packaging.requirements import Requirement

from seats_analysis.cli import main as cli
from test_readme import code
from test_repo import tracked

BUILD = """
import sys, tarfile
from pathlib import Path
from setuptools import build_meta
folder = Path(sys.argv[1])
name = build_meta.build_sdist(str(folder))
with tarfile.open(folder / name) as tar:
    tar.extractall(folder, filter="data")
print(folder / name.removesuffix(".tar.gz"))
"""
WHEEL = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def checked(*command, **options):
    options = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL) | options
    done = subprocess.run([str(word) for word in command], **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def bare():
    "This environment's variables without the ones that lead back to the checkout."
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder of an environment with the wheel; other packages are those of this environment.

    The wheel is made from a source archive of the tracked files, as `python -m build` does: what
    neither MANIFEST.in nor setup.py names is missing."""
    pytest.importorskip("setuptools", minversion="64")
    work = tmp_path_factory.mktemp("wheel")
    source, env = work / "source", work / "env"
    for path in tracked(ROOT):
        if path.relative_to(ROOT).parts[0] not in ("nbs", "tests", "figures", "docs"):
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    last = lambda done: done.stdout.split()[-1]
    unpacked = last(checked(sys.executable, "-c", BUILD, work, cwd=source, env=bare()))
    wheel = last(checked(sys.executable, "-c", WHEEL, work, cwd=unpacked, env=bare()))
    checked(sys.executable, "-m", "venv", "--without-pip", env)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(checked(env / "bin" / "python", "-c", ask, env=bare()).stdout.strip())
    # as a path only: .pth files in there, of an editable installation, are not followed
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", env / "bin" / "python", "install", "-q")
    checked(*pip, "--no-deps", "--no-index", "--no-compile", work / wheel, env=bare())
    return env


@pytest.fixture
def shell(installed, tmp_path):
    "Run a line in an empty folder with the environment's commands first on the path."
    path = f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = bare() | dict(PATH=path, TQDM_DISABLE="1")

    def run(line, refused=""):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        said = f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == (2 if refused else 0), said
        assert refused in done.stderr, said
        return done.stdout

    return run


SHIPPED = """
import seats_analysis as sa
from pathlib import Path
from seats_analysis.storage.files import shipped_folder
home = Path(sa.__file__).parent
for name in ("testbed", "profiles", "flows", "schedules", "reported", "tasks"):
    folder = shipped_folder(name)
    assert folder.parent == home, folder
    print(*(f"{name}/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*") if p.is_file()))
"""


def test_everything_shipped_is_in_the_wheel(shell):
    folders = "testbed", "profiles", "flows", "schedules", "reported", "tasks"
    names = [path.relative_to(ROOT).as_posix() for path in tracked(ROOT)]
    prefixes = tuple(f"data/{folder}/" for folder in folders)
    wanted = {name.removeprefix("data/") for name in names if name.startswith(prefixes)}
    assert wanted - set(shell(f"python -c {shlex.quote(SHIPPED)}").split()) == set()


def test_bounds_are_in_the_wheel_and_pins_in_the_source(installed, shell):
    asked = "import importlib.metadata as m; print(*m.requires('seats_analysis'), sep='\\n')"
    lines = [r for r in shell(f"python -c {shlex.quote(asked)}").splitlines() if ";" not in r]
    needed = pins.requirements("requirements").items()
    assert {str(Requirement(r)) for r in lines} == {str(Requirement(n + b)) for n, b in needed}
    (shipped,) = installed.parent.glob("seats_analysis-*/constraints.txt")
    assert shipped.read_text() == (ROOT / "constraints.txt").read_text()


def test_outputs_have_one_place_and_are_not_replaced(shell, tmp_path):
    line = "seats schedule testbed --trr 10"
    shell(line)
    (made,) = (p for p in tmp_path.rglob("*") if p.is_file())
    assert made == tmp_path / "seats_out" / "testbed" / "schedules" / "testbed_trr10.json"
    before = made.read_bytes()
    shell(f"{line} --late certified", refused="--overwrite replaces it")
    assert made.read_bytes() == before


# the whole walk

MINE = """
from pathlib import Path
from seats_analysis.testbed.load import write_samples
from seats_analysis.testbed.load import fresh_samples
write_samples(fresh_samples(8, per_clip=2, folder="clips"), "clips/mine.jsonl")
"""
TINY = dict(
    text_steps=1, steps=2, short_until=2, layers=1, eval_every=1, eval_clips=2, batch=2,
    text_batch=2, decay=0.5, threads=1,
)  # fmt: skip
ASKED = "--question 'what colour is seen with the low sound ?'"
WALK = f"""
seats probe --limit 24
seats boundaries seats_out/testbed/profiles/testbed.nc --families --figure blocks
seats schedule seats_out/testbed/profiles/testbed.nc --trr 10
seats analyze --trr 20
seats flow --limit 2
seats flow-study --limit 8
seats run "$CLIP" {ASKED} --trr 10
seats run "$CLIP" {ASKED} --schedule testbed/10
seats run "$CLIP" {ASKED} --schedule seats_out/testbed/schedules/testbed_trr10.json
seats simulate --trials 1 --sizes 25
seats sample-size --trials 2 --sizes 25,50
seats transfer --limit 4
seats turns --limit 2
seats eval --methods seats,random,vtw --trr 10 --limit 4
seats tune --max-change 90 --confidence 50 --limit 8 --budget 3
seats check testbed/10 --max-change 90 --confidence 50 --limit 8
seats figures
seats probe --data clips/mine.jsonl --layers 0:17:4
seats eval --methods seats,random --trr 10 --data clips/mine.jsonl --profile testbed
seats figures --data clips/mine.jsonl
seats figures --data seats_out/mine/profiles/testbed.nc --out drawn
seats bench --config testbed --frames 8 --seconds 4 --methods seats --trr 10 --repeats 1
seats train-testbed --config tiny.json
seats demo --limit 6
"""
AGAIN = "run", "bench", "train-testbed"  # write nothing, add to what is there, go on


def test_the_walk_has_every_command():
    commands = typer.main.get_command(cli.app).commands
    named = {name for name, command in commands.items() if not command.hidden}
    assert set(re.findall(r"^seats ([\w-]+)", WALK, re.M)) == named


@pytest.mark.nightly
def test_every_command_from_an_empty_folder(shell, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    shell(f"python -c {shlex.quote(MINE)}")
    clip = "import seats_analysis as sa; print(sa.testbed_samples('test')[0].video)"
    clip = shell(f'python -c "{clip}"').strip()
    for line in WALK.split("\n")[1:-1]:
        out = shell(f"CLIP={shlex.quote(clip)}; {line}")
        if line.startswith("seats demo"):
            assert "nothing to compare with" in out
    named = {"tiny.json", "clips", "blocks.png", "blocks.pdf", "drawn"}
    assert {p.name for p in tmp_path.iterdir()} == named | {"seats_out"}
    of = lambda name: {p.name for p in (tmp_path / "seats_out" / name).rglob("*") if p.is_file()}
    homes = {p.name for p in (tmp_path / "seats_out").iterdir()}
    assert homes == {"testbed", "mine", "bench", "trained-testbed", "demo"}
    assert {"testbed_dependency.png", "eval_testbed_comparison.png", "eval_testbed.tex"} <= of(
        "mine"
    )
    made = "boundary_coverage.json questions_needed.json task_sensitivity.json testbed_trr10.json"
    assert {*made.split(), "eval_testbed.csv", "testbed_overview.pdf"} <= of("testbed")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for line in WALK.split("\n")[1:-1]:
        if not line.startswith(tuple(f"seats {name}" for name in AGAIN)):
            shell(f"CLIP={shlex.quote(clip)}; {line}", refused="exists; --overwrite")
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


OWN = """
import json
from pathlib import Path
import numpy as np
from seats_analysis.inputs.media import Clip
from seats_analysis.testbed.load import build_model, build_processor
for part in build_model(layers=6), build_processor():
    part.save_pretrained("my sft")
names = ["plain", "half a second", "s\u00edlent", "portrait", "[b]", "dot.", "q'uote", "UPPER"]
names += ["thirty", "ninety", "wide", "-dash"]
lengths = {"half a second": 0.5, "thirty": 30, "ninety": 90}
rows = []
for i, name in enumerate(names):
    size = dict(portrait=(112, 56), wide=(28, 140)).get(name, (56, 84))
    seconds = lengths.get(name, 2)
    frames = np.random.default_rng(i).integers(0, 255, (int(2 * seconds), *size, 3), dtype="uint8")
    wave = None if i == 2 else np.sin(np.arange(int(16000 * seconds)) / 9).astype("float32") / 3
    Clip(name, frames, 2.0, wave, 16000).save(f"{name}.mp4")
for i, path in enumerate(sorted([*Path().glob("*.mp4"), *Path().glob("*.webm")])):
    asked = dict(question="What moves?", choices=["red", "blue"], answer=i % 2)
    rows.append(dict(asked, video=str(path), family="moves"))
assert len(rows) == 15, rows
Path("mine.jsonl").write_text("\\n".join(map(json.dumps, rows)))
"""
PLAN = "seats_out/mine/schedules/my sft_trr30.json"
OF = "--model 'my sft' --data mine.jsonl"
LOOSE = "--max-change 99 --confidence 50"
OWN_WALK = f"""
seats probe {OF} --layers 0:7:3 --removed both
seats boundaries 'seats_out/mine/profiles/my sft.nc'
seats schedule 'seats_out/mine/profiles/my sft.nc' --trr 30 --blocks 3,5
seats run "q'uote.mp4" --question 'What?' --model 'my sft' --schedule '{PLAN}'
seats eval {OF} --methods random --schedule '{PLAN}'
seats tune {OF} --schedule '{PLAN}' {LOOSE} --budget 3
seats check '{PLAN}' {OF} --max-change 99 --confidence 50
seats figures --data mine.jsonl
seats analyze {OF} --limit 6 --trr 30 --out analyzed
"""


@pytest.mark.nightly
def test_ones_own_clips_and_checkpoint_from_an_empty_folder(shell, tmp_path):
    "No dead end with fifteen clips: what is refused names the command that helps."
    wave = np.sin(np.arange(32000) / 9).astype("float32") / 3
    kinds = ("webm.webm", "libvpx-vp9", "libopus", "mono"), ("six.mp4", "libx264", "aac", "5.1")
    for name, codec, voice, layout in (*kinds, ("turned.mp4", "libx264", "aac", "stereo")):
        channels = dict(mono=1, stereo=2).get(layout, 6)
        sound = blocks(np.tile(wave, (channels, 1)))
        options = dict(codec=codec, voice=voice, layout=layout, sound=sound, hz=48000)
        write_clip(tmp_path / name, list(range(0, 200, 10)), **options)
    a_quarter = 0, 1 << 16, 0, -(1 << 16) % (1 << 32), 0, 0, 0, 0, 1 << 30
    patch(tmp_path / "turned.mp4", b"tkhd", 44, *a_quarter)  # the matrix of a phone held upright
    shell(f"python -c {shlex.quote(OWN)}")
    asked = "--question 'What moves?' --trr 30 --model"
    shell(f"seats run plain.mp4 {asked} testbed", refused="does not know the words What, moves?")
    shell(f"seats run plain.mp4 {asked} 'my sft'", refused="`seats probe --model 'my sft' --data")
    for line in OWN_WALK.split("\n")[1:-1]:
        shell(line)
        if " probe " in line:
            shell(f"seats run plain.mp4 {asked} 'my sft'", refused="seats schedule --blocks")
    found = {p.name for p in (tmp_path / "seats_out/mine/figures").iterdir()}
    assert {"my sft_dependency.png", "eval_my sft_comparison.png", "tune_my sft.png"} <= found


@pytest.mark.nightly
def test_readme_and_the_explorer_from_an_empty_folder(shell, tmp_path):
    assert shell(f"python -c {shlex.quote(code('python'))}").strip() == code("").strip()
    shell(code("sh"))
    shell("python -c 'import seats_analysis as sa; sa.explore(n_boot=50)'")
    assert {p.name for p in tmp_path.iterdir()} == {"profile.nc", "schedule.json"}
