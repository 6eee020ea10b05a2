"""Forty small wrong changes of the package, and which of them the tests find.

    python tests/mutations.py [--only N ...] [--tests FILE ...]

Each is (module, text that occurs there exactly once, text in its place). It is made in a copy of
the project, which tests import there, also in processes of their own. Number 0 is the package as it
is, where nothing may fail. Tests of the source and of the wheel do not count.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_CORE = {"test_repo.py", "test_wheel.py"}
SETTINGS = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg")
SECONDS = 1800  # after which a mutant is taken to hang

MUTATIONS = (
    (
        "storage.files",  # a replaced file loses its mode
        "part.chmod(mode)",
        "part.chmod(0o600)",
    ),
    (
        "storage.files",  # rows of another run are taken for this one's
        'dict(run=self.digest, id=self.identity["samples"][i][0], row=row)',
        'dict(id=self.identity["samples"][i][0], row=row)',
    ),
    (
        "storage.schemas",  # a profile that was changed in its file is read
        "if said and said != digest(body).encode():",
        "if not body:",
    ),
    (
        "inputs.layout",  # a second medium begins in the last window of the first
        "ids[-1] + 1 if ids else 0",
        "ids[-1] if ids else 0",
    ),
    (
        "inputs.media",  # audio is laid without the time at which playing starts
        'round((time - spans["start"]) * sample_rate)',
        "round(time * sample_rate)",
    ),
    (
        "inputs.questions",  # media above the folder of the questions are read
        'if elsewhere or ".." in inner.parts:',
        "if elsewhere:",
    ),
    (
        "inputs.samples",  # a thinned video with separate audio has the rate that was asked for
        "[replace(clips[0], waveform=audio.waveform, sample_rate=sample_rate)]",
        "[replace(clips[0], waveform=audio.waveform, sample_rate=sample_rate, fps=audio.fps)]",
    ),
    (
        "models.encode",  # what follows a medium begins one position too early
        "positions[-1][..., -1].max() + 1",
        "positions[-1][..., -1].max()",
    ),
    (
        "models.attention",  # first instead of last layer of the audio tower
        "self.tower.layers[-1].self_attn",
        "self.tower.layers[0].self_attn",
    ),
    (
        "models.scoring",  # choices are compared without regard to their length
        "return self.total / self.tokens",
        "return self.total",
    ),
    (
        "probing.branches",  # a layer is bypassed before it has run for the others
        "if bypass and layer in layers:",
        "if bypass and layer + 1 in layers:",
    ),
    (
        "probing.branches",  # a choice sees those before it
        "(self.choice < 0) | (self.choice[:, None] == self.choice)",
        "(self.choice < 0) | (self.choice[:, None] >= self.choice)",
    ),
    (
        "probing.branches",  # the last media token stays
        "end = int(media[-1]) + 1 if len(media) else 0",
        "end = int(media[-1]) if len(media) else 0",
    ),
    (
        "probing.branches",  # a bypassed layer takes its DeepStack term with it
        "context = self.tables.inject(context, layer)",
        "context = +context",
    ),
    (
        "probing.branches",  # a tie counts as right
        "correct=margin > 0,",
        "correct=margin >= 0,",
    ),
    (
        "probing.selectors",  # every clip loses the same draw of tokens
        'digest(f"{self.seed} {view.clip}".encode())',
        'digest(f"{self.seed}".encode())',
    ),
    (
        "boundaries.find",  # critical value below the normal quantile
        "return max(normal, float(np.quantile(worst, confidence)))",
        "return float(np.quantile(worst, confidence))",
    ),
    (
        "boundaries.find",  # upper end of an interval is rounded inwards
        'np.quantile(replicates, 1 - tail, method="higher")',
        'np.quantile(replicates, 1 - tail, method="lower")',
    ),
    (
        "boundaries.retention",  # chance of mixed numbers of choices
        '(1 / asked["n_choices"].values).mean()',
        '1 / asked["n_choices"].values.mean()',
    ),
    (
        "schedules.solve",  # a drop where the late block begins counts
        "if d < self.late_start]",
        "if d <= self.late_start]",
    ),
    (
        "schedules.schedule",  # the shallow block of the other modality
        "max(b.shallow_end for b in pair.values())",
        "min(b.shallow_end for b in pair.values())",
    ),
    (
        "schedules.file",  # a certificate that was changed by hand is read
        "if sealed(facts) != proof:",
        "if not proof:",
    ),
    (
        "tuning.certificate",  # tests after a failed one of the sequence count
        "np.logical_and.accumulate(passed).sum(0)",
        "passed.sum(0)",
    ),
    (
        "schedules.cost",  # the last layer is priced like all others
        "    last = d.layers - 1\n\n    def whole",
        "    last = d.layers\n\n    def whole",
    ),
    (
        "pruning.base",  # free slots of shorter samples pass for tokens
        ".masked_fill(~take(keep, index), Modality.PAD)",
        "",
    ),
    (
        "pruning.select",  # missing tokens go to the last windows first
        "torch.where(few, -index,",
        "torch.where(few, index,",
    ),
    (
        "pruning.select",  # a text query does not see itself
        ".triu(S - t + 1)",
        ".triu(S - t)",
    ),
    (
        "pruning.received",  # the first thread to leave takes full precision from all
        "while self.found and not self.inside:",
        "while self.found:",
    ),
    (
        "pruning.prefill",  # scores from the projections of the wrong layer
        "self.decoder.attentive(step.layer - 1)",
        "self.decoder.attentive(step.layer)",
    ),
    (
        "pruning.cache",  # a padded further turn is one position late
        ".cumsum(1)[:, done:] - 1)",
        ".cumsum(1)[:, done:])",
    ),
    (
        "pruning.session",  # a patched method stays after the block
        "stack.enter_context(patch.object(self.thinker, name, ours))",
        "setattr(self.thinker, name, ours)",
    ),
    (
        "pruning.encoders",  # windows of audio rows are as many rows as tokens
        "window = group * int(rates.positions_per_second",
        "window = int(rates.positions_per_second",
    ),
    (
        "baselines.base",  # all samples get the same random drop
        "random_numbers(tokens.prompt, seed, n, key)",
        "random_numbers(tokens.prompt, seed, 0, key)",
    ),
    (
        "baselines.attention",  # withdrawal at once where it never was harmless
        "small.any() else -1",
        "small.any() else 0",
    ),
    (
        "baselines.merging",  # the third frame is compared with the wrong one
        "(0, 1, 2, 1)[role]",
        "(0, 1, 1, 1)[role]",
    ),
    (
        "baselines.registry",  # the knob for audio does nothing
        'min(1.0, knob * audio * plan.trr["audio"])',
        'min(1.0, knob * plan.trr["audio"])',
    ),
    (
        "evaluation.prepared",  # every unit of questions draws the same random tokens
        "run.samples = first",
        "run.samples = 0",
    ),
    (
        "evaluation.evaluate",  # wrong end of the interval where nothing differs
        "_alike(0.0, clips)[1]",
        "_alike(0.0, clips)[0]",
    ),
    (
        "tuning.space",  # a clip may be both for the search and for calibration
        "calibration = [s for s in samples if s.clip not in first]",
        "calibration = list(samples)",
    ),
    (
        "serving.lmms",  # families are not averaged
        "groupby(0)[1].mean().",
        "groupby(0)[1].sum().",
    ),
)


def source(root, module):
    return root.joinpath("seats_analysis", *module.split(".")).with_suffix(".py")


def missing(root):
    "Mutations whose text is not there exactly once."
    return [m for m in MUTATIONS if source(root, m[0]).read_text(encoding="utf-8").count(m[1]) != 1]


def copied(folder, number):
    "The project in a folder, with one mutation."
    for path in ROOT.iterdir():
        if path.name in ("seats_analysis", "tests"):  # tests look for the project beside them
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / path.name).symlink_to(path)
    if number:
        module, old, new = MUTATIONS[number - 1]
        path = source(folder, module)
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def core_tests(module):
    "Test files; those whose text mentions a module come first."
    room, _, name = module.partition(".")
    here = re.compile(rf"{room}\.{name}\b|seats_analysis\.{room} import .*\b{name}\b")
    files = [p for p in sorted(ROOT.glob("tests/test_*.py")) if p.name not in NOT_CORE]
    return [f"tests/{p.name}" for p in sorted(files, key=lambda p: not here.search(p.read_text()))]


def verdict(number, tests):
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder), number)
        env = os.environ | SETTINGS | dict(PYTHONPATH=folder)
        run = lambda *args: subprocess.run(
            [sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
        place = run("-P", "-c", "import seats_analysis as s; print(s.__file__)").stdout
        if not place.startswith(folder):
            raise SystemExit(f"the tests would import {place}")
        try:
            done = run("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests)
        except subprocess.TimeoutExpired:
            return f"killed by {SECONDS} seconds without an end"
    if found := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.M):
        return f"killed by {found[1]}"
    if done.returncode not in (0, 5):  # 5: all were skipped
        raise SystemExit(done.stdout + done.stderr)
    return "SURVIVED"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", type=int, default=range(1, len(MUTATIONS) + 1))
    parser.add_argument("--tests", nargs="+", help="files, relative to the project")
    given = parser.parse_args()
    if gone := missing(ROOT):
        raise SystemExit("\n".join(f"{module}: not there once: {old}" for module, old, _ in gone))
    for number in given.only:
        module = MUTATIONS[number - 1][0] if number else "as.it.is"
        said = verdict(number, given.tests or core_tests(module))
        print(f"{number:2} {module}: {said}", flush=True)
