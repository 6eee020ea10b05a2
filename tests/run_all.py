"""Everything that `make test` runs, summed up in one closing line.

    python tests/run_all.py [--overlay FOLDER] [--nightly] [--only STEP ...]

format     ruff has nothing to change or to complain about, notebooks included
sync       nbdev_export and nbdev_clean would change nothing (tried on a copy of the working tree)
notebooks  every notebook from top to bottom, each in a process of its own (run_notebooks.py)
pytest     the core's tests on a copy of the package without its laboratory, then those of the
           laboratory and of the project as a whole; by several workers
oldest     models, files and statistics on the oldest supported versions (the overlay)

Standard library only, so that it can report a broken environment.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from itertools import chain
from pathlib import Path

import pins

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "test-results"
BUDGET, LIMIT = 20, 900  # seconds of CPU a notebook should take, on the clock it may take
STEPS = "format", "sync", "notebooks", "pytest", "oldest"
IMPORTS = """
    scipy.stats pandas xarray h5netcdf matplotlib.pyplot seaborn
    statsmodels.stats.multitest torch torch._dynamo av typer.testing fastcore.test nbdev.showdoc
    IPython.core.interactiveshell transformers.generation.utils
    transformers.models.qwen2_5_omni.modeling_qwen2_5_omni
    transformers.models.qwen2_5_omni.processing_qwen2_5_omni
    transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe
    seats_analysis.models.encode seats_analysis.testbed.load seats_analysis.plots.style
""".split()  # what most notebooks import, once for all of them
WORKERS = max(1, min(4, os.cpu_count() or 1))


def environment(**more):
    "Environment of the children: no network, one thread for each of several workers, no display."
    env = {
        k: v for k, v in os.environ.items() if k != "IN_TEST"
    }  # under IN_TEST an export does nothing
    defaults = dict(
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        MPLBACKEND="agg",
        TOKENIZERS_PARALLELISM="false",
    )
    return {**defaults, **env, **more}


def python(*args, **kwargs):
    "Run this interpreter with `args`."
    return subprocess.run([sys.executable, *map(str, args)], stdin=subprocess.DEVNULL, **kwargs)


def heading(text):
    print(f"\n== {text}", flush=True)


# ---------------------------------------------------------------- one formatter


def badly_formatted(root):
    "What ruff would change or complains about in notebooks, tests and setup.py."
    places = [p for p in ("nbs", "tests", "docs", "setup.py") if (root / p).exists()]
    out = ""
    for command in (("format", "--check"), ("check", "--output-format", "concise")):
        run = python("-m", "ruff", *command, *places, cwd=root, capture_output=True, text=True)
        out += run.stdout + run.stderr if run.returncode else ""
    return out


def run_format(args):
    heading("ruff")
    out = badly_formatted(ROOT)
    print(f"FAILED\n{out}" if out else "ok", flush=True)
    return (0, 1) if out else (1, 0)


# ---------------------------------------------------------------- export and clean change nothing


def hashes(root):
    "{relative path: digest} of everything an export or a clean may write."
    files = [
        p
        for folder in ("nbs", "seats_analysis")
        for p in (root / folder).rglob("*")
        if p.suffix in (".ipynb", ".py")
    ]
    files = [
        p
        for p in [*files, root / "pyproject.toml"]
        if p.is_file() and ".ipynb_checkpoints" not in p.parts
    ]
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def copy_sources(root, to):
    "Copy what nbdev reads and writes."
    for name in ("settings.ini", "pyproject.toml"):
        if (root / name).exists():
            shutil.copy(root / name, to / name)
    for folder in ("nbs", "seats_analysis"):
        shutil.copytree(
            root / folder,
            to / folder,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )


def changed_by(command, root):
    "Paths that a command of nbdev would change under `root`, tried on a copy; or its crash."
    with tempfile.TemporaryDirectory() as copy:
        copy_sources(root, Path(copy))
        before = hashes(Path(copy))
        run = python(
            "-c",
            f"from nbdev.cli import {command}; {command}()",
            cwd=copy,
            env=environment(),
            capture_output=True,
            text=True,
        )
        after = hashes(Path(copy))
    crash = (
        [f"{command} failed: {run.stderr.strip()[-2000:]}"]
        if run.returncode or "Failed to" in run.stderr
        else []
    )
    return crash + sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))


def run_sync(args):
    heading("nbdev_export and nbdev_clean change nothing")
    failed = 0
    for command in ("nbdev_export", "nbdev_clean"):
        changes = changed_by(command, ROOT)
        failed += bool(changes)
        print(
            f"{'FAILED' if changes else 'ok'}  {command}",
            *(f"        would change {p}" for p in changes),
            sep="\n",
            flush=True,
        )
    return 2 - failed, failed


# ---------------------------------------------------------------- notebooks


def notebooks(root):
    "Notebooks that are tested: not hidden, not private (_name), no .notest file beside them."
    found = sorted((root / "nbs").rglob("*.ipynb"))
    visible = [p for p in found if not any(part[0] in "_." for part in p.relative_to(root).parts)]
    return [p for p in visible if not (p.parent / ".notest").exists()]


def test_notebooks(paths, flags="", env=None, root=ROOT, limit=LIMIT, imports=IMPORTS):
    """Run notebooks side by side; yields (path, passed, seconds, seconds of CPU, output) of each.
    Those of which nothing is heard, because the process above them broke, have failed."""
    if not paths:
        return
    command = [sys.executable, Path(__file__).with_name("run_notebooks.py"), *paths]
    options = ["--workers", WORKERS, "--limit", limit, "--flags", *flags.split()]
    options += ["--imports", *imports]
    waiting = {str(Path(p).absolute()): p for p in paths}
    forked = dict(  # what starts threads or a driver cannot be forked
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        PYTORCH_NVML_BASED_CUDA_CHECK="1",
    )
    with subprocess.Popen(
        [str(x) for x in command + options],
        cwd=root,
        env=(env or environment()) | forked,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        for line in run.stdout:
            r = json.loads(line)
            yield waiting.pop(r["path"]), r["passed"], r["seconds"], r["cpu"], r["output"]
    reason = f"not run: the process of the notebooks ended with {run.returncode}"
    yield from ((path, False, 0, 0, reason) for path in waiting.values())


def run_notebooks(paths, flags="", env=None):
    "Run notebooks, print a line each and the output of failures: (passed, failed)."
    results = []
    # Triton reads this when it is imported, so nothing may have been.
    bare = [p for p in paths if "TRITON_INTERPRET" in p.read_text(encoding="utf-8")]
    # Tutorials and explanations, the longest, come last by name and are begun first.
    others = [p for p in reversed(paths) if p not in bare]
    for path, passed, seconds, cpu, output in chain(
        test_notebooks(others, flags, env), test_notebooks(bare, flags, env, imports=())
    ):
        slow = f", over the budget of {BUDGET} s" if cpu > BUDGET else ""
        times = f"{seconds:.0f} s, {cpu:.0f} s of CPU{slow}"
        print(f"{'ok' if passed else 'FAILED'}  {path.relative_to(ROOT)} ({times})", flush=True)
        if not passed:
            print(output.strip(), flush=True)
        results.append(passed)
    return sum(results), len(results) - sum(results)


def run_all_notebooks(args):
    paths = notebooks(ROOT)
    heading(f"{len(paths)} notebooks")
    return run_notebooks(paths, "slow" if args.nightly else "")


# ---------------------------------------------------------------- pytest


def junit_counts(path, returncode):
    "(passed, failed) from a JUnit file; a run that broke before its report is one failure."
    if not path.exists():
        return 0, 1
    suites = list(ET.parse(path).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped")
    )
    bad = failed + errors
    if returncode and not bad:
        bad = 1
    return max(total - failed - errors - skipped, 0), bad


def pytest(name, *args, env=None, cwd=ROOT):
    "Run pytest, show what it prints and count."
    report = RESULTS / f"{name}.xml"
    RESULTS.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    run = python(
        "-m",
        "pytest",
        "-q",
        "-rs",
        "--durations=5",
        f"--junitxml={report}",
        *args,
        cwd=cwd,
        env=env or environment(),
    )
    return junit_counts(report, run.returncode)


WHOLE = "lab", "test_repo.py", "test_readme.py", "test_wheel.py"  # these know the laboratory
NO_LAB = """# an editable installation would find the laboratory where it was before
import sys


class NoLab:
    def find_spec(self, name, path=None, target=None):
        if f"{name}.".startswith("seats_analysis.lab."):
            raise ModuleNotFoundError(f"{name} was deleted", name=name)


sys.meta_path.insert(0, NoLab())
"""


def without_lab(folder):
    "The project in a folder, its package without the laboratory."
    ignored = shutil.ignore_patterns("lab", "__pycache__")
    for path in ROOT.iterdir():
        if path.name in ("seats_analysis", "tests"):  # tests look for the project beside them
            shutil.copytree(path, folder / path.name, ignore=ignored)
        else:
            (folder / path.name).symlink_to(path)
    (folder / "sitecustomize.py").write_text(NO_LAB, encoding="utf-8")


def run_pytest(args):
    options = ["-n", WORKERS, "--dist", "worksteal", *(["--nightly"] if args.nightly else [])]
    core = [p.name for p in sorted(ROOT.glob("tests/test_*.py")) if p.name not in WHOLE]
    heading("pytest tests of the core, without the laboratory")
    with tempfile.TemporaryDirectory() as folder:
        without_lab(Path(folder))
        files = [f"tests/{name}" for name in core]
        env = environment(PYTHONPATH=folder)
        counts = [pytest("core", *files, *options, env=env, cwd=folder)]
    heading("pytest tests of the laboratory and of the project")
    counts.append(pytest("whole", *(f"tests/{name}" for name in WHOLE), *options))
    return tuple(map(sum, zip(*counts)))


# ---------------------------------------------------------------- oldest supported versions

FOUND = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"


def run_oldest(args):
    if args.overlay is None:
        return 0, 0
    paths = [str(args.overlay.absolute()), os.environ.get("PYTHONPATH")]
    env = environment(PYTHONPATH=os.pathsep.join(filter(None, paths)))
    wanted = pins.oldest()
    found = python("-c", FOUND, *wanted, env=env, capture_output=True, text=True).stdout.split()
    heading(f"models, files and statistics on the oldest {', '.join(wanted)}")
    alike = lambda a, b: a.split(".")[: len(b.split("."))] == b.split(".")  # 15.0.0 is 15
    if len(found) < len(wanted) or not all(map(alike, found, wanted.values())):
        print(f"FAILED  expected {wanted} in {args.overlay}, not {found}")
        return 0, 1
    tests = sorted(
        p
        for name in "golden families matrix any_media attack_storage boundaries schedule".split()
        for p in ROOT.glob(f"tests/test_{name}*.py")
    )
    workers = ("-n", WORKERS, "--dist", "worksteal")
    counts = [pytest("oldest", *tests, *workers, env=env)] if tests else []
    rooms = "models", "inputs", "statistics"
    paths = [p for p in notebooks(ROOT) if p.parent.name in rooms or p.name == "00_style.ipynb"]
    counts.append(run_notebooks(paths, env=env))
    return tuple(map(sum, zip(*counts)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--overlay", type=Path, help="folder that holds the oldest supported versions"
    )
    parser.add_argument("--nightly", action="store_true", help="the long versions too")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="steps to run")
    args = parser.parse_args()
    runners = dict(zip(STEPS, (run_format, run_sync, run_all_notebooks, run_pytest, run_oldest)))
    start, passed, failed = time.time(), 0, 0
    for step in args.only:
        good, bad = runners[step](args)
        passed, failed = passed + good, failed + bad
    heading(f"done in {time.time() - start:.0f} s")
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
