"""A promise is kept as often as it says, searches go on, and no clip serves twice."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
from scipy.stats import binom
from test_cli import refused, seats

from seats_analysis.boundaries.find import Boundaries
from seats_analysis.testbed.task import ramp, synthetic_profile
from seats_analysis.cli import app as shared
from seats_analysis.tuning import tune
from seats_analysis.evaluation.prepared import Answering, PreparedBatch
from seats_analysis.tuning.tune import Tuning, better_half, chain_of, deal_clips
from seats_analysis.inputs.questions import read_samples
from seats_analysis.testbed.load import write_samples
from seats_analysis.tuning.certificate import Promise
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.tuning.tune import SearchSpace
from seats_analysis.storage.schemas import save_profile

EASY = Promise(0.6, 0.5)  # one clip is enough
SMALL = dict(seconds=1.0, size=(56, 56))
SPACE = SearchSpace.of(dict(both=Boundaries(tiny.LAYERS, 2, 5, shallow_end_ci=(1, 3))))


# ---------------------------------------------------------------- statistics


def test_clips_that_a_promise_takes():
    assert [Promise(a).clips() for a in (0.02, 0.01)] == [149, 299]
    assert Promise(0.05, 0.9).clips(0.01) == min(
        n for n in range(1, 500) if binom.cdf(np.ceil(0.01 * n), n, 0.05) <= 0.1
    )
    assert Promise(0.02).clips(0.03) is None


def test_a_chain_is_left_at_its_first_failure():
    zero, one = np.zeros(200), np.ones(200)
    assert Promise().certify(np.stack([zero, one, zero]), True) == 1
    assert Promise().certify(np.stack([one, zero]), True) == 0
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, not 95"):
        Promise(0.02, 95)


def test_halving_keeps_the_best_of_every_cost():
    costs, kl = np.repeat([0.1, 0.5], 32), np.tile(np.arange(32.0), 2)
    half = better_half(costs, kl, np.arange(64))
    assert len(half) == 32 and {0, 32} <= set(half.tolist())
    assert chain_of(costs, kl, half) == [0]  # the dear ones are no better
    assert chain_of(costs, kl - 100 * (costs > 0.2), half) == [32, 0]


# ---------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def samples():
    "Two questions on each of six short clips."
    words = "what colour is the circle ?", "where is the red object ?"
    return [
        tiny.ask(f"{k}-{i}", tiny.clip(k, **SMALL), word, family=f"f{i}")
        for k in range(6)
        for i, word in enumerate(words)
    ]


def small():
    return tiny.thinker("qwen2.5-omni"), tiny.processor("qwen2.5-omni")


def tuning(samples, folder=None):
    model, processor = small()
    return Tuning(
        model=model,
        processor=processor,
        promise=EASY,
        proposal=samples[:6],
        calibration=samples[6:],
        folder=folder,
        batch_size=2,
    )


@pytest.mark.usefixtures("no_grad")
def test_paired_kl_and_picks(samples):
    "What the search measures is what two plain runs give."
    t = tuning(samples)
    plan = tune.as_pruner(SPACE.draw(np.random.default_rng(1)))
    bare = [replace(s, choices=(), answer=-1) for s in samples[:2]]
    rows = t._asked(bare, [plan]).answer_all()
    batch = PreparedBatch.of(t.model, t.processor, bare, [plan])
    logp = []
    for p in (None, plan):
        with batch.prune(p) as (_, given):
            logp.append(t.model(**given.inputs).logits[:, -1].log_softmax(-1))
    kl = (logp[0].exp() * (logp[0] - logp[1])).sum(-1)
    assert [row[1]["kl"] for row in rows] == pytest.approx(kl.tolist(), abs=1e-5)
    full, own = (x.argmax(-1) for x in logp)
    assert [row[1]["pick"] for row in rows] == (full != own).int().tolist()
    assert [row[0]["tokens"] for row in rows] == full[:, None].tolist()
    assert rows[0][1]["kl"] > 1e-6 and "logp" not in rows[0][0]


def test_an_interrupted_search_goes_on_and_the_chain_was_fixed_before(
    samples, tmp_path, monkeypatch
):
    monkeypatch.setattr(tune, "FIRST_ROUND", 3)  # two rounds
    plan = SPACE.draw(np.random.default_rng(1))
    given = dict(draw=SPACE.draw, fixed=[plan, plan], budget=4)
    whole = tuning(samples).tune(**given)
    assert len(whole["chains"]["fixed"]["rows"]) == 1  # a chain, in which nothing stands twice
    real, calls = Answering.answer_unit, []

    def dies(self, *args):
        calls.append(self.title)
        if calls.count("calibration") == 2:
            chain = json.loads((tmp_path / "calibration" / "run.json").read_text())["runs"]
            assert len(chain) == 1 + sum(len(c["rows"]) for c in whole["chains"].values())
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Answering, "answer_unit", dies)
    with pytest.raises(KeyboardInterrupt):
        tuning(samples, tmp_path).tune(**given)
    searched = [c for c in calls if c != "calibration"]
    assert searched
    again = tuning(samples, tmp_path).tune(**given)
    assert [c for c in calls if c != "calibration"] == searched  # nothing is asked twice
    assert again == whole
    spent = sum(r["cost"] * r["questions"] for r in whole["search"]) / 6 + 1
    assert 3.5 < spent < 5.5  # as the budget says, roughly


def test_a_search_ends_at_its_most_schedules(samples, monkeypatch):
    monkeypatch.setattr(tune, "MAX_SCHEDULES", 20)
    with pytest.raises(ValueError, match="a budget of 900 pays for more than 20 schedules"):
        tuning(samples).search(SPACE.draw, (), 900)


def test_no_clip_serves_twice(samples, monkeypatch):
    profile = synthetic_profile({"both": ramp(tiny.LAYERS, 1, 4)})
    clips = np.repeat("c5", profile.sizes["sample"])
    monkeypatch.setattr(
        tune, "load_profile", lambda name: profile.assign_coords(clip=("sample", clips))
    )
    proposal, calibration = deal_clips(samples, EASY, profile="p.nc")
    sides = [{s.clip for s in side} for side in (proposal, calibration)]
    assert not sides[0] & sides[1] and "c5" in sides[0] and len(sides[0] | sides[1]) == 6
    named = [replace(s, split="derive" if s.clip < "c2" else "test") for s in samples]
    assert {s.split for s in deal_clips(named, EASY)[1]} == {"test"}
    with pytest.raises(ValueError, match=r"too few: .* takes 149 .* --max-change \d+"):
        deal_clips(samples, Promise())


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    "One question on each of ten small clips."
    folder = tmp_path_factory.mktemp("clips")
    out = []
    for k in range(10):
        path = folder / f"q{k}.mp4"
        tiny.clip(k, **SMALL).save(path)
        out.append(tiny.ask(f"{k}", str(path), family="colour"))
    return write_samples(out, folder / "questions.jsonl")


@pytest.fixture
def ask(questions, monkeypatch, tmp_path):
    "Options for a tiny random model, a profile with known blocks and questions."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "LADDER", (60,))
    monkeypatch.setattr(shared, "check_model_name", lambda name, revision: {})
    monkeypatch.setattr(shared, "load_model", lambda *args, given=small(), **options: given)
    profile = synthetic_profile({r: ramp(tiny.LAYERS, 1, 4) for r in ("visual", "audio", "both")})
    save_profile(profile, tmp_path / "p.nc")
    return "--model", "m", "--profile", tmp_path / "p.nc", "--data", questions


LOOSE = "--max-change", 90, "--confidence", 50


def test_tune_and_check(questions, ask, tmp_path):
    done = seats("tune", *ask, *LOOSE, "--budget", 3)
    assert done.exit_code == 0 and "at most 90 % of the answers change" in done.stdout, done.stderr
    home = tmp_path / "seats_out" / "questions"
    schedule, chain = home / "schedules" / "tuned_m.json", home / "results" / "tune_m.json"
    assert not list(home.glob("*/*.checkpoint"))
    evidence = Schedule.load(schedule).evidence
    proof = evidence["certificate"]
    assert proof["promise"] == dict(max_change=0.9, confidence=0.5) and proof["clips"] < 10
    assert evidence["kind"] == "tuned" and proof["mix"]["families"].keys() == {"colour"}
    assert "exists; --overwrite" in refused("tune", *ask, *LOOSE)

    def check(plan, data, *options):
        return seats("check", plan, "--model", "m", "--data", data, *options)

    def copied(name, **changes):
        "The same questions on clips that nobody knows."
        out = []
        for k, s in enumerate(read_samples(questions)):
            video = shutil.copy(s.video, questions.parent / f"other{k}.mp4")
            out.append(replace(s, video=str(video), **changes))
        return write_samples(out, questions.parent / f"{name}.jsonl")

    # clips that made it are refused; others are answered, and another mix is not the promise's
    done = check(schedule, questions)
    assert done.exit_code == 2 and "10 of the clips made this schedule" in done.stderr
    new = copied("new")
    done = check(schedule, new)
    assert "for questions like the 10 on 10 clips" in done.stdout, done.stderr
    moved = copied("moved", family="unheard of")
    done = check(schedule, moved, "--max-change", 1, "--confidence", 99)
    assert done.exit_code == 1 and "refused: other kinds of questions" in done.stdout
    done = check(chain, new)
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "seats_out/new/results/check_tune_m.json").read_text())
    given, stored = (
        {name: [len(r["losses"]) for r in c["rows"]] for name, c in file["chains"].items()}
        for file in (found, json.loads(chain.read_text()))
    )
    assert given == {name: [10] * len(rows) for name, rows in stored.items()}


def test_too_few_clips_are_refused_before_the_model_is_loaded(ask, no_model):
    said = refused("tune", *ask)
    assert "takes 149" in said and "--max-change" in said
    assert "--method 'nobody': one of seats" in refused("tune", *ask, "--method", "nobody")


def test_where_the_blocks_come_from(questions, ask, tmp_path):
    "A schedule bounds the search as a profile does; a profile of all clips leaves none to certify."
    plan = Schedule.from_trr(Boundaries(tiny.LAYERS, 2, 5), 30, 64, 5)
    plan.save(tmp_path / "plan.json")
    own = *ask[:2], *ask[4:], "--schedule", tmp_path / "plan.json"
    done = seats("tune", *own, *LOOSE, "--budget", 3, "--overwrite")
    assert done.exit_code == 0, done.stderr
    found = Schedule.load(tmp_path / "seats_out/questions/schedules/tuned_m.json")
    assert 3 <= found.late("visual") and "published" not in done.stderr
    stored = tune.load_profile(ask[3])
    n = stored.sizes["sample"]
    clips = [s.clip for s in read_samples(questions)]
    names = dict(clip=("sample", [clips[i % 10] for i in range(n)]), split=("sample", [""] * n))
    save_profile(stored.assign_coords(names), ask[3])
    said = refused("tune", *ask, *LOOSE, "--overwrite")
    assert "all clips made the profile" in said and '"split": "derive"' in said


def test_a_baseline_gets_the_same_search(ask, tmp_path):
    done = seats("tune", *ask, *LOOSE, "--budget", 3, "--method", "fastv+late")
    chain = tmp_path / "seats_out/questions/results/tune_m_fastv+late.json"
    stored = json.loads(chain.read_text())
    assert {r["method"] for r in stored["chains"]["tuned"]["rows"]} == {"fastv"}
    assert "tune_m_fastv+late.json" in done.stdout or done.exit_code == 1
    # and what it found takes part in the comparison
    compare = "eval", *ask, "--methods", "seats", "--trr", 30, "--tuned", chain
    done = seats(*compare, "--out", tmp_path / "eval.json")
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["questions_of_schedule"] == found["questions"]  # all of them made the chain
    rows = {r["label"]: r for r in found["rows"]}
    assert list(rows) == ["full", "seats", "fastv+late+tuned"], done.stderr
    tuned = rows["fastv+late+tuned"]
    costs = [r["flops_fraction_causal_with_selection"] for r in (tuned, rows["seats"])]
    assert tuned["equal_cost"] == (costs[0] / costs[1] - 1 <= 0.02)
    assert "another chain of fastv+late" in refused(*compare, "--tuned", chain, "--overwrite")
