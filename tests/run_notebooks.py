"""Runs notebooks for run_all.py: imports once what they all import, then forks a process for each.

    python tests/run_notebooks.py NOTEBOOK ... --workers 2 --limit 900 --flags slow --imports torch

Standard output is one JSON object a line for each notebook that ended: path, passed, seconds on the
clock, seconds of CPU, output. A notebook has passed only where its process ends with the status
PASSED, so one that leaves by os._exit(0), is killed or runs too long has failed. What a notebook
changes in its process, a fork keeps from all others.
"""

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

PASSED = 77  # an exit status that no ordinary way out of Python has


def preload(names):
    "Import what most notebooks import. What cannot be imported here fails where it is needed."
    for name in ("nbdev.test", *names):
        try:
            importlib.import_module(name)
        except Exception:
            pass
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def run_one(path, flags, output, scratch):
    "In the child: run the notebook, leave by the status."
    os.setsid()  # a group of its own, so that what it started is stopped with it
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    from nbdev.config import get_config
    from nbdev.test import test_nb

    config = get_config()
    os.chdir(config.nbs_path)
    passed, _ = test_nb(path, config.tst_flags.split(), flags, basepath=config.config_path)
    return PASSED if passed else 1


def start(path, flags, folder):
    "Fork a process for a notebook: (its id, file with its output)."
    output = tempfile.NamedTemporaryFile(dir=folder, suffix=".log", delete=False)
    scratch = tempfile.mkdtemp(dir=folder)
    if pid := os.fork():
        return pid, output
    status = 1
    try:
        status = run_one(path, flags, output.fileno(), scratch)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the parent's is cleaned up by a child


def stop(pid):
    "Kill a child with all that it started."
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def run(paths, workers, limit, flags, folder):
    "Yield (path, passed, seconds, seconds of CPU, output) of each notebook as it ends."
    waiting, running = list(paths)[::-1], {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                path = waiting.pop()
                pid, output = start(path, flags, folder)
                running[pid] = path, time.time(), output
            for pid, (path, began, output) in list(running.items()):
                seconds = time.time() - began
                late = seconds > limit
                if late:
                    stop(pid)
                ended, status, used = os.wait4(pid, 0 if late else os.WNOHANG)
                if not ended:
                    continue
                stop(pid)  # what it left behind
                del running[pid]
                text = Path(output.name).read_text(errors="replace")
                text += f"\nstopped after {limit:.0f} s" if late else ""
                code = os.waitstatus_to_exitcode(status)
                if code != PASSED and not text.strip():
                    text = f"left with status {code}"
                yield path, code == PASSED, seconds, used.ru_utime + used.ru_stime, text
            time.sleep(0.02)
    finally:
        for pid in running:
            stop(pid)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, default=900)
    parser.add_argument("--flags", nargs="*", default=[])
    parser.add_argument("--imports", nargs="*", default=[])
    args = parser.parse_args()
    preload(args.imports)
    with tempfile.TemporaryDirectory() as folder:
        paths = [p.absolute() for p in args.notebooks]
        for path, *rest in run(paths, args.workers, args.limit, args.flags, folder):
            passed, seconds, cpu, output = rest
            line = dict(path=str(path), passed=passed, seconds=seconds, cpu=cpu, output=output)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
