"""One call for a newcomer: what it says of profiles whose truth is known, and every shorter form
beside the long one."""

import ast
import inspect
import json
import re

from conftest import ROOT
import numpy as np
import pytest
import torch
from test_cli import done, refused

import seats_analysis as sa
from seats_analysis.plots.analysis import Analysis
from seats_analysis.storage.schemas import save_profile
from seats_analysis.testbed.task import ramp, synthetic_profile

COUNTS = json.dumps(dict(visual=192, audio=40))


@pytest.fixture(scope="module")
def loaded():
    return sa.load_testbed("qwen2.5-omni")


@pytest.fixture(scope="module")
def questions():
    return sa.testbed_samples("test", 6)


def known(curves=None, clips=200, needs=True, control=True, **attrs):
    "A profile of planted blocks; the middle starts at layer 4 and the late block at 9, from 1."
    profile = synthetic_profile(curves or {"both": ramp(12, 3, 8)}, clips)
    profile.attrs |= dict(tokens=COUNTS, **attrs)
    if not needs:
        profile.attrs.pop("needs")
    if not control:
        profile = profile.isel(sample=profile["family"].values != "control")
    return profile


# ---------------------------------------------------------------- what is said, what is not known

FLAT = "nothing is lost even where the tokens never enter"
SAID = [  # profile, whether there is a schedule, what the advice says, and what it does not
    (known(), True, "late block begins at layer 9", "not known"),
    (known(), True, "200 control questions keep at least", "needs`"),
    (known(clips=2), False, "too few clips", "The late block"),
    (known({"both": ramp(12, 3, 12)}), True, "There is no late block", "The late block"),
    (known({"both": np.ones(13)}), False, FLAT, "The late block"),
    (known(control=False), True, "disturbance by the removal itself is not known", "control quest"),
    (known(needs=False), True, "needs was not said", "is not known"),
    (known().drop_attrs(), False, "how many visual and audio tokens", "The schedule keeps"),
]


@pytest.mark.parametrize("profile, planned, said, unsaid", SAID)
def test_advice(profile, planned, said, unsaid, tmp_path):
    found = Analysis.of(profile, trr=10)
    assert (found.schedule is not None) is planned
    assert said in found.advice and unsaid not in found.advice, found.advice
    assert len(repr(found).splitlines()) <= 6
    page = found.save(tmp_path / "page.html").read_text()
    for line in found.advice.splitlines():
        assert line.replace(">", "&gt;").replace("'", "&#x27;") in page
    assert page.count("data:image/png") == 1  # a figure, without files beside it
    if planned:
        assert abs(found.schedule.token_trr(192, 40) - 0.1) < 1e-9


def test_no_choices_leave_the_divergence():
    "Without choices nothing is right or wrong; the layer is that of the planted divergence."
    profile = known({"both": np.ones(13)})
    n = profile.sizes["sample"]
    kl = np.broadcast_to(np.repeat([0.5, 0], [8, 5]), (n, 1, 13))
    profile = profile.assign(kl=(profile["correct"].dims, kl))
    profile = profile.assign_coords(n_choices=("sample", np.zeros(n, int)))
    found = Analysis.of(profile)
    assert "before layer 9 or later" in found.advice and "no accuracy" in found.advice
    assert found.schedule is None and found.boundaries is None
    with pytest.raises(ValueError, match="No blocks with both removed"):
        found.figure()


def test_analyze_is_its_parts(loaded, questions, tmp_path):
    "The same profile, blocks and schedule as call by call; from a file of questions too."
    options = dict(layers=[0, 8, 12], progress=False)
    found = sa.analyze(*loaded, questions, trr=20, path=tmp_path / "p.nc", **options)
    profile = sa.probe_dependency(*loaded, questions, **options)
    assert np.array_equal(found.profile["kl"], profile["kl"])
    assert json.loads(profile.attrs["tokens"])["visual"] == 192
    assert found.by_condition.keys() == {"both", "visual", "audio"}
    assert found.boundaries == sa.find_boundaries(tmp_path / "p.nc") == found.by_condition["both"]
    rows = [
        dict(video=s.video, question=s.question, choices=list(s.choices), answer=s.answer, id=s.id)
        | dict(family=s.family, split=s.split, lettered=s.lettered)
        for s in questions
    ]
    again = sa.analyze(*loaded, rows, **options)
    assert np.array_equal(again.profile["nll"], profile["nll"])


def test_command(tmp_path, monkeypatch):
    "A profile that is there serves any TRR; its files are said, and none is replaced unasked."
    folder = tmp_path / "seats_out" / "testbed"
    (folder / "profiles").mkdir(parents=True)
    save_profile(known(), folder / "profiles" / "testbed.nc")

    monkeypatch.chdir(tmp_path)
    said = done("analyze --trr 20")
    assert "is there" in said.stderr and "late block begins at layer 9" in said.stdout
    files = [tmp_path / line for line in said.stdout.splitlines() if line.startswith("seats_out")]
    suffixes = [".nc", ".html", ".json", ".png", ".pdf"]
    assert [f.suffix for f in files] == suffixes and all(f.stat().st_size for f in files)
    assert abs(sa.Schedule.load(files[2]).token_trr(192, 40) - 0.2) < 1e-9
    assert "--overwrite" in refused("analyze --trr 20")
    assert "percent in (0, 100]" in refused("analyze --trr 0")


# ---------------------------------------------------------------- shorter forms


def test_prune_by_trr_and_by_name(loaded, questions):
    "All three keep what the shipped schedule keeps."
    model, processor = loaded
    batch = sa.encode(model, processor, questions[:1])
    seen = []
    for plan in (dict(trr=10), dict(plan="testbed/10"), dict(plan=sa.Schedule.load("testbed/10"))):
        with torch.no_grad(), sa.prune(model, **plan) as run:
            logits = model(**batch.inputs).logits
        seen.append((run.tokens_per_layer.tolist(), logits[0, -1]))
    assert all(tokens == seen[0][0] and torch.equal(x, seen[0][1]) for tokens, x in seen)
    assert seen[0][0][0][-1] == batch.layout.counts()["text"].item()
    said = repr(run)
    assert len(said.splitlines()) <= 6 and f"{100 * run.trr['visual'][0]:.3g} %" in said


def test_evaluate_by_name(loaded, questions):
    "A method by name is the method of the registry with the targets of SEATS."
    plan = sa.Schedule.load("testbed/10")
    by_hand = sa.METHODS["fastv"].for_trr(16, plan.trr["visual"], plan.trr["audio"], 192, 40)
    frames = [
        sa.evaluate(*loaded, questions, given)
        for given in ("fastv", by_hand, "testbed/10", "seats")
    ]
    assert [f.attrs["method"] for f in frames] == ["fastv", "fastv", "seats", "seats"]
    for a, b in ((0, 1), (2, 3)):
        assert frames[a].nll.equals(frames[b].nll)
    assert frames[3].nll.equals(sa.evaluate(*loaded, questions, trr=10).nll)
    with pytest.raises(ValueError, match="neither a file nor a shipped schedule"):
        sa.evaluate(*loaded, questions, "fastvv")


def test_short_names():
    assert sa.tune is sa.tune_schedule and sa.check is sa.check_schedule
    assert {"tune", "check", "analyze"} <= set(dir(sa)) & set(sa.__all__)


@pytest.mark.parametrize(
    "thing",
    [
        sa.Schedule.load("testbed/10"),
        sa.Schedule(4),
        sa.find_boundaries("testbed"),
        sa.Boundaries(28, 16, 23),
        sa.find_boundaries(known(clips=2)),
        Analysis.of(known()),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_shown_in_six_lines_with_a_picture(thing):
    assert len(repr(thing).splitlines()) <= 6
    html = thing._repr_html_()
    assert html.count("<svg") == html.count("</svg>") >= 1 and "<pre>" in html


# ---------------------------------------------------------------- help


def face():
    stub = ast.parse((ROOT / "seats_analysis" / "__init__.pyi").read_text())
    names = [a.name for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names]
    return [(n, getattr(sa, n)) for n in names]


@pytest.mark.parametrize("name", [n for n, x in face() if inspect.isfunction(x)])
def test_help_says_every_parameter(name):
    thing = getattr(sa, name)
    for p in inspect.signature(thing).parameters.values():
        assert re.search(rf"^\**{p.name}\b.*\n    \S", thing.__doc__, re.M), f"{name}: {p.name}"
        if p.kind is not p.VAR_KEYWORD:
            assert p.annotation is not p.empty, f"{name}: {p.name}"
    assert "Returns\n-------\n" in thing.__doc__ or name == "families"  # it takes nothing


@pytest.mark.parametrize("name", ["Sample", "Clip", "Schedule", "Boundaries"])
def test_help_says_every_field(name):
    thing = getattr(sa, name)
    for field in thing.__dataclass_fields__:
        assert re.search(rf"^{field} :.*\n    \S", thing.__doc__, re.M), f"{name}: {field}"
