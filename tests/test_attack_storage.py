"""Files under attack: rows of other runs, kills, full disks, damaged profiles, outputs in the way.

Nothing that was there is lost, nothing is silently wrong, and every refusal is one line."""

import errno
import fcntl
import json
import os
import random
import resource
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import more_at_night
from launch import FORK, ended, launch
from test_cli import done, refused

from seats_analysis import Clip, Sample, load_profile
from seats_analysis.cli import app as shared
from seats_analysis.storage.files import (
    Checkpoint,
    CheckpointWarning,
    atomic_write,
    new_neighbour,
    processes,
)
from seats_analysis.storage.schemas import SCHEMAS, ProfileWarning, save_json, save_profile
from seats_analysis.testbed.load import build_model, build_processor, write_samples
from seats_analysis.testbed.task import synthetic_profile

pytestmark = pytest.mark.usefixtures("one_thread")
UNITS = [[0, 1], [2], [3]]


def about(**changed):
    samples = [[f"q{i}", i] for i in range(4)]
    return dict(weights_sha256="a" * 64, seed=0, samples=samples) | changed


def run(folder, identity, shard=(0, 1), say="row", units=UNITS, **options):
    def work(k, unit):
        return [dict(nll=[0.25, i], text=say) for i in unit]

    kept = Checkpoint(folder, identity, shard)
    return kept.run(units, work, desc="", disable=True, **options)


def forked(work, *args):
    "A started child; an exception in it shows as exit code 1."
    child = FORK.Process(target=work, args=args)
    child.start()
    return child


def begun(work, *args):
    "A child that has come to a point of `work`, where it sets its last argument."
    here = FORK.Event()
    child = forked(work, *args, here)
    assert here.wait(20)
    return child


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


# rows and their run


def test_rows_of_another_run_do_not_count(tmp_path):
    "As two processes without a lock left them: rows of other weights under our header."
    run(tmp_path / "theirs", about(weights_sha256="b" * 64), say="theirs")
    ours = Checkpoint(tmp_path / "ours", about())
    ours.open()
    for i in (1, 2):
        name = f"{i:06d}.json"
        (tmp_path / "ours" / name).write_bytes((tmp_path / "theirs" / name).read_bytes())
    with pytest.warns(CheckpointWarning, match="2 of its samples are damaged or of another run"):
        rows = run(tmp_path / "ours", about())
    assert [r["text"] for r in rows] == ["row"] * 4
    (tmp_path / "theirs" / "run.json").unlink()
    before = contents(tmp_path / "theirs")
    with pytest.raises(ValueError, match="has 000000.json but no run.json; remove"):
        run(tmp_path / "theirs", about())
    assert contents(tmp_path / "theirs") == before


def without(key):
    def change(text):
        data = json.loads(text)
        del data[key]
        return json.dumps(data)

    return change


DAMAGE = dict(
    null=lambda text: "null",
    list=lambda text: "[1]",
    empty=lambda text: "",
    half=lambda text: text[: len(text) // 2],
    brackets=lambda text: "[" * 100_000,
    unsigned=without("sha256"),
)


@pytest.mark.parametrize("damage", [*DAMAGE, "number", "row", "moved"])
def test_a_damaged_row_is_run_again(tmp_path, damage):
    whole = run(tmp_path, about())
    file = tmp_path / "000002.json"
    more = dict(
        number=lambda text: text.replace("0.25", "0.26"),
        row=without("row"),
        moved=lambda text: (tmp_path / "000001.json").read_text(),
    )
    text = (DAMAGE | more)[damage](file.read_text())
    assert text != file.read_text()
    file.write_text(text)
    with pytest.warns(CheckpointWarning, match="1 of its samples"):
        assert run(tmp_path, about()) == whole


@pytest.mark.parametrize("damage", [*DAMAGE, "number", "seed"])
def test_a_damaged_header_is_refused(tmp_path, damage):
    run(tmp_path, about())
    header, more = tmp_path / "run.json", dict(number=lambda t: t.replace("3", "4"))
    header.write_text((DAMAGE | more | dict(seed=without("seed")))[damage](header.read_text()))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="run.json is damaged; remove"):
        run(tmp_path, about())
    assert contents(tmp_path) == before


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="has thesis.txt but no run.json"):
        run(tmp_path, about())
    assert names(tmp_path) == ["thesis.txt"]


# one run in a folder


def hold(folder, held):
    with Checkpoint.hold(folder):
        held.set()
        time.sleep(60)


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    out = tmp_path / "r.json"
    folder = Checkpoint.folder_of(out)
    child = begun(hold, folder)
    with pytest.raises(ValueError, match="is in use: another run"):
        run(folder, about())
    assert "is in use: another run writes to this output" in refused(f"eval --out {out}")
    child.kill()
    child.join()
    assert len(run(folder, about())) == 4
    Checkpoint.remove(folder)
    assert names(tmp_path) == []


def share(folder, work=run, everyone=False):
    "What each process of a launch does: its share of one run."

    def process(rank):
        rows = work(folder, about(), processes(), everyone=everyone)
        assert (rows is None) == (rank > 0 and not everyone)
        assert everyone or rank or [r["nll"][1] for r in rows] == [0, 1, 2, 3]
        if not rank:
            Checkpoint.remove(folder)

    return process


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("of", [3, 5])  # with five, two have no share
def test_processes_of_one_launch_share(tmp_path, of, everyone):
    assert ended(launch(share(tmp_path / "j", everyone=everyone), of)) == [0] * of
    assert names(tmp_path) == []


@pytest.mark.parametrize("ends", [lambda: 1 / 0, lambda: os.kill(os.getpid(), signal.SIGKILL)])
def test_a_process_that_ends_early_is_told_of(tmp_path, ends):
    "Nobody waits for it, and the same command goes on with what is there."

    def process(rank):
        processes()  # before they have met, the launcher itself ends the others
        if rank:
            ends()
        with pytest.raises(ValueError, match="another process has ended.*the same command goes on"):
            run(tmp_path / "j", about(), processes())

    assert ended(launch(process))[0] == 0
    assert names(tmp_path / "j") == ["000000.json", "000001.json", "000003.json", "run.json"]
    assert ended(launch(share(tmp_path / "j"))) == [0, 0]


def test_shares_by_hand_and_no_launcher(tmp_path):
    "The other shares first; and nothing of torch.distributed begins."
    with pytest.raises(ValueError, match="1 samples of .* are missing: removed, damaged, or the "):
        run(tmp_path, about(), (0, 2))
    assert run(tmp_path, about(), (1, 2)) is None
    assert len(run(tmp_path, about(), (0, 2))) == 4
    assert processes() == (0, 1) and not torch.distributed.is_initialized()


# temporaries


def half_written(path, started):
    with atomic_write(path) as part:
        part.write_text("half of it")
        started.set()
        time.sleep(60)


def without_locks(monkeypatch):
    "As some NFS and FUSE."

    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_writer_that_is_stopped_costs_nothing(tmp_path, stop):
    "The old file is whole; Ctrl-C leaves nothing beside it, a kill at most what is hidden."
    path = tmp_path / "a.txt"
    path.write_text("old")
    child = begun(half_written, path)
    os.kill(child.pid, stop)
    child.join(20)
    assert child.exitcode and path.read_text() == "old"
    left = set(names(tmp_path)) - {"a.txt"}
    assert all(name.startswith(".") for name in left) and not (left and stop == signal.SIGINT)


def test_one_line_says_that_locks_do_not_work(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    with pytest.warns(CheckpointWarning) as said, Checkpoint.hold(tmp_path / "j"):
        rows = run(tmp_path / "j" / "part", about())
    assert len(rows) == 4 and [str(w.message) for w in said] == [
        f"locks do not work in {tmp_path} (ENOLCK): make sure that no second run writes there"
    ]


def test_modes_stay_and_links_are_followed(tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("old")
    secret.chmod(0o640)
    save_json(secret, {})
    assert secret.stat().st_mode & 0o777 == 0o640
    (tmp_path / "link.json").symlink_to(secret)
    save_json(tmp_path / "link.json", dict(a=1))
    assert json.loads(secret.read_text()) == dict(a=1) and (tmp_path / "link.json").is_symlink()
    Checkpoint.folder_of(tmp_path / "p.nc").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="is a link, expected a folder"):
        run(Checkpoint.folder_of(tmp_path / "p.nc"), about())
    assert json.loads(secret.read_text()) == dict(a=1)
    mask = os.umask(0o027)
    assert save_json(tmp_path / "new.json", {}).stat().st_mode & 0o777 == 0o640
    os.umask(mask)


# full disks


@pytest.fixture(scope="module")
def profile():
    made = synthetic_profile(clips=24)
    rng, dims = np.random.default_rng(0), ("sample", "removed", "layer")
    numbers = rng.standard_normal(made["correct"].shape).astype("float32")
    made = made.assign(nll=(dims, numbers))
    return made.assign_attrs(tokens='{"visual": 128, "audio": 80}')


def encoded(path):
    noise = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)
    Clip("c", noise).save(path)


WRITERS = dict(
    bytes=lambda path: save_bytes(path, bytes(20_000)),
    clip=encoded,
    questions=lambda path: write_samples([Sample(None, "x" * 20_000, ("a", "b"), 0, id="s")], path),
)


def save_bytes(path, data):
    with atomic_write(path) as part:
        part.write_bytes(data)


def full_disk(write, path, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(OSError, match="File too large") as found:
        write(path)
    assert write in WRITERS.values() or found.value.filename == str(path)


@pytest.mark.parametrize("size", [0, 4096, 30_000, *WRITERS])
def test_full_disk_costs_nothing(profile, tmp_path, size):
    "HDF5 itself ends the process here."
    path = tmp_path / "p.nc"
    before = save_profile(profile.isel(layer=[0, -1]), path).read_bytes()
    write = WRITERS.get(size, lambda path: save_profile(profile, path))
    child = forked(full_disk, write, path, 4096 if size in WRITERS else size)
    child.join(60)
    assert child.exitcode == 0
    assert names(tmp_path) == ["p.nc"] and path.read_bytes() == before
    if size in WRITERS:  # the same with room
        write(path)
        assert path.stat().st_size > 4096


# damaged profiles


def mutate(data, draw):
    "One of the ways in which files are damaged."
    data, n = bytearray(data), len(data)
    a, b = sorted(draw.randrange(n) for _ in range(2))
    kind = draw.choice(["bits", "bits", "bits", "zeros", "cut", "more", "gap", "noise", "tail"])
    if kind == "bits":
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(n)] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        data[a : b + 1] = bytes(b + 1 - a)
    elif kind == "cut":
        del data[a:]
    elif kind == "more":
        data += draw.randbytes(draw.randrange(1, 200))
    elif kind == "gap":
        del data[a : b + 1]
    elif kind == "noise":
        data[a : a + 64] = draw.randbytes(len(data[a : a + 64]))
    else:  # the checksum, and perhaps what is before it
        data[n - draw.randrange(1, 400) :] = b""
    return bytes(data)


@more_at_night(25, 200)
def test_damaged_profiles_are_refused(profile, tmp_path, n):
    path, draw = tmp_path / "p.nc", random.Random(0)
    whole = save_profile(profile, path).read_bytes()
    for _ in range(n):
        path.write_bytes(mutate(whole, draw))
        began = time.monotonic()
        try:
            assert load_profile(path).identical(profile)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        assert time.monotonic() - began < 20


def test_profiles_without_a_checksum_load(profile, tmp_path):
    "Older ones, and what other programs write; and they read ours."
    import xarray as xr

    profile.to_netcdf(tmp_path / "plain.nc", engine="h5netcdf")
    with pytest.warns(ProfileWarning, match="plain.nc has no checksum: it was not written by"):
        assert load_profile(tmp_path / "plain.nc").identical(profile)
    ours = xr.load_dataset(save_profile(profile, tmp_path / "ours.nc"))
    assert ours.identical(profile)
    changed = ours.assign(nll=ours.nll + (ours.layer == 3) * 0.1)
    changed.to_netcdf(tmp_path / "changed.nc", engine="h5netcdf")
    with pytest.warns(ProfileWarning, match="changed.nc has no checksum: .* or changed since"):
        assert load_profile(tmp_path / "changed.nc").identical(changed)
    before = ours.assign_attrs(content_sha256="0" * 64)  # as earlier versions wrote
    assert load_profile(save_profile(before, tmp_path / "before.nc")).identical(profile)


ODD = dict(
    no_samples=lambda p: p.isel(sample=[]),
    no_conditions=lambda p: p.isel(removed=[]),
    no_layers=lambda p: p.isel(layer=[]),
    layers_twice=lambda p: p.isel(layer=[0, 0, -1]),
    layers_between=lambda p: p.assign_coords(layer=p.layer / 2),
    one_clip=lambda p: p.drop_vars("clip").assign_coords(clip="a"),
    one_count=lambda p: p.assign_coords(n_choices=4),
    flat=lambda p: p.assign(correct=p.correct.isel(layer=0, drop=True)),
    scalar=lambda p: p.assign(correct=True),
    text=lambda p: p.assign(correct=p.correct.astype(str)),
    tokens=lambda p: p.assign_attrs(tokens='{"visual": 1}'),
    needs=lambda p: p.assign_attrs(needs='{"colour": 3}'),
    schema=lambda p: p.assign_attrs(schema=[1, 2]),
)


@pytest.mark.parametrize("odd", ODD)
def test_odd_profiles_are_refused_in_one_line(profile, tmp_path, odd):
    ODD[odd](profile).to_netcdf(tmp_path / "odd.nc", engine="h5netcdf")
    said = refused(f"boundaries {tmp_path}/odd.nc").replace("it has no", "its")
    assert "odd.nc is not a dependency profile: its" in said


# outputs in the way


@pytest.fixture
def stored(profile, tmp_path):
    return save_profile(profile, tmp_path / "p.nc")


def test_outputs_do_not_replace_inputs(stored, tmp_path, monkeypatch):
    "Nor anything else of another kind."
    monkeypatch.chdir(tmp_path)
    Path("q.jsonl").write_text('{"video": "a.mp4"}\n')
    save_json("plan.json", dict(schema=SCHEMAS["schedule"].id))
    before = contents(tmp_path)
    for line in (
        "probe --data q.jsonl --out q.jsonl",
        "probe --out plan.json",
        "schedule p.nc --trr 10 --out p.nc",
        "eval --profile p.nc --out p.nc",
        "eval --data q.jsonl --out q.jsonl",
    ):
        assert "exists and is not a" in refused(line), line
    assert contents(tmp_path) == before
    assert "exists and is not" in refused("eval --out /dev/null")


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


NO_FILES = dict(
    pipe=os.mkfifo,
    loop=lambda path: os.symlink(path, path),
    socket=listening,
    device=lambda path: os.symlink("/dev/null", path),
    folder=os.mkdir,
)


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_neither_written_nor_read(stored, tmp_path, monkeypatch, kind):
    "Nor waited for."
    monkeypatch.chdir(tmp_path)
    NO_FILES[kind]("odd")
    before = names(tmp_path)
    old = signal.signal(signal.SIGALRM, lambda *args: 1 / 0)
    signal.alarm(60)
    for line in (
        "eval --out odd",
        "schedule p.nc --trr 10 --out odd",
        "probe --out odd",
        "boundaries odd",
        "eval --tuned odd",
        "eval --profile odd",
        "probe --data odd",
        "check odd",
        "run a.mp4 --question ? --schedule odd",
    ):
        assert "odd" in refused(line) or "a.mp4" in line, line
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
    assert names(tmp_path) == before


def test_links_to_nothing_are_followed_and_what_cannot_be_read_stays(tmp_path, monkeypatch):
    (tmp_path / "link.json").symlink_to(tmp_path / "new" / "plan.json")
    save_json(tmp_path / "link.json", dict(a=1))
    assert json.loads((tmp_path / "new" / "plan.json").read_text()) == dict(a=1)

    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", closed)
    assert "Permission denied" in refused(f"eval --out {tmp_path}/link.json")


def test_names_that_are_too_long_are_refused_first(tmp_path):
    for n in (245, 256, 300):
        assert "name" in refused(f"eval --out {tmp_path}/{'x' * (n - 5)}.json")
        assert names(tmp_path) == []
    save_json(tmp_path / f"{'x' * 250}.json", {})
    save_json(tmp_path / f"{chr(252) * 125}.json", {})


def test_a_figure_does_not_replace_another_ones_pdf(stored, tmp_path):
    (tmp_path / "paper.pdf").write_text("mine")
    said = refused(f"boundaries {stored} --figure {tmp_path}/paper.png")
    assert "paper.pdf exists; --overwrite replaces it" in said and len(names(tmp_path)) == 2


# seats eval


def test_what_a_killed_eval_left_goes_with_its_folder(tmp_path, monkeypatch):
    "With a random model, and questions on fresh clips."
    model = build_model().eval(), build_processor()
    monkeypatch.setattr(shared, "load_model", lambda *args, **options: model)
    monkeypatch.setattr("seats_analysis.testbed.load.testbed_samples", lambda split: [])
    out, kept = tmp_path / "r.json", Checkpoint.folder_of(tmp_path / "r.json")
    own = ("scratch-0/scene7.mp4", "process-0.lock", new_neighbour(kept / "run.json").name)
    for path in (kept / name for name in own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
    thesis = tmp_path / "r.json.seats-done"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("years")
    done(f"eval --methods random --trr 35 --limit 4 --out {out}")
    assert names(tmp_path) == ["r.json", thesis.name] and names(thesis) == ["thesis.txt"]
