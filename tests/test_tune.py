"""A promise is kept as often as it says, searches go on, and no clip serves twice."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import binom
from test_cli import refused, seats

from seats_analysis.boundaries.find import Boundaries
from seats_analysis.boundaries.retention import ramp, synthetic_profile
from seats_analysis.cli import app as shared
from seats_analysis.tuning import tune
from seats_analysis.evaluation.prepared import Answering, PreparedBatch
from seats_analysis.tuning.tune import Tuning, better_half, chain_of, deal_clips
from seats_analysis.inputs.samples import read_samples, write_samples
from seats_analysis.tuning.certificate import Promise, draw_certificates
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.tuning.tune import SearchSpace
from seats_analysis.storage.schemas import save_profile

EASY = Promise(0.6, 0.5)  # one clip is enough
SPACE = SearchSpace.of(dict(both=Boundaries(tiny.LAYERS, 2, 5, shallow_end_ci=(1, 3))))


# ---------------------------------------------------------------- statistics


def test_clips_that_a_promise_takes():
    assert [Promise(a).clips() for a in (0.02, 0.01)] == [149, 299]
    assert Promise(0.05, 0.9).clips(0.01) == min(
        n for n in range(1, 500) if binom.cdf(np.ceil(0.01 * n), n, 0.05) <= 0.1
    )
    assert Promise(0.02).clips(0.03) is None


@pytest.mark.parametrize("questions", [1, 3])
@pytest.mark.parametrize("risk", [0.0201, 0.03])
def test_a_schedule_over_the_bound_comes_out_in_at_most_five_percent(questions, risk):
    "The hardest chain: one schedule that is just too bad, behind one that is fine."
    world = np.random.default_rng(5).random((2, 200_000, questions)) < [[[0.001]], [[risk]]]
    rows = draw_certificates(Promise(0.02), world.mean(-1), [0.5, 0.2], questions == 1, draws=2000)
    assert max(r["low"] for r in rows) <= 0.05
    assert [r["none"] for r in rows][0] == 1  # 100 clips can show nothing
    if questions == 1 and risk == 0.0201:
        assert max(r["broken"] for r in rows) > 0.02  # the test is not empty


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
    clips = [tiny.clip(k, 1.0, size=(56, 56)) for k in range(6)]
    return [
        tiny.ask(f"{k}-{i}", c, words[i], family=f"f{i}")
        for k, c in enumerate(clips)
        for i in (0, 1)
    ]


@pytest.fixture
def family():
    return "qwen2.5-omni"


def tuning(samples, folder=None):
    return Tuning(
        model=tiny.thinker("qwen2.5-omni"),
        processor=tiny.processor("qwen2.5-omni"),
        promise=EASY,
        proposal=samples[:6],
        calibration=samples[6:],
        folder=folder,
        batch_size=2,
    )


@pytest.mark.usefixtures("no_grad")
def test_paired_kl_and_picks(samples):
    "What the search measures is what two plain runs give."
    t, plan = tuning(samples), SPACE.draw(np.random.default_rng(1))
    bare = [replace(s, choices=(), answer=-1) for s in samples[:2]]
    rows = t._asked(bare, [tune.as_pruner(plan)]).answer_all()
    batch = PreparedBatch.of(t.model, t.processor, bare, [tune.as_pruner(plan)])
    logp = []
    for p in (None, plan):
        with batch.prune(p) as (_, given):
            logp.append(t.model(**given.inputs).logits[:, -1].log_softmax(-1))
    kl = (logp[0].exp() * (logp[0] - logp[1])).sum(-1)
    assert [row[1]["kl"] for row in rows] == pytest.approx(kl.tolist(), abs=1e-5)
    assert [[c["pick"] for c in row] for row in rows] == torch.stack(logp, 1).argmax(-1).tolist()
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


def test_no_clip_serves_twice(samples, monkeypatch):
    with pytest.raises(ValueError, match="both for the search and for calibration"):
        tuning([*samples[:5], samples[0], *samples[:6]])
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
    from seats_analysis.inputs.media import encode_clip

    folder, out = tmp_path_factory.mktemp("clips"), []
    for k in range(10):
        path = folder / f"q{k}.mp4"
        encode_clip(tiny.clip(k, 1.0, size=(56, 56)), path)
        out.append(tiny.ask(f"{k}", str(path), family="colour"))
    return write_samples(out, folder / "questions.jsonl")


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    "A tiny random model and a profile with known blocks, in the current folder."
    given = tiny.thinker("qwen2.5-omni"), tiny.processor("qwen2.5-omni")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "LADDER", (60,))
    monkeypatch.setattr(shared, "check_model_name", lambda name, revision: None)
    monkeypatch.setattr(shared, "load_model", lambda *args, **options: given)
    profile = synthetic_profile({r: ramp(tiny.LAYERS, 1, 4) for r in ("visual", "audio", "both")})
    save_profile(profile, tmp_path / "p.nc")
    return ["--model", "m", "--profile", tmp_path / "p.nc"]


def test_tune_and_check(questions, stubbed, tmp_path):
    easy = "--max-change", 90, "--confidence", 50
    done = seats("tune", *stubbed, "--data", questions, *easy, "--budget", 3)
    assert done.exit_code == 0 and "at most 90 % of the answers change" in done.stdout, done.stderr
    home = tmp_path / "seats_out" / "questions"
    assert not list(home.glob("*/*.checkpoint"))
    plan = Schedule.load(home / "schedules" / "tuned_m.json")
    proof = plan.evidence["certificate"]
    assert proof["promise"] == dict(max_change=0.9, confidence=0.5) and proof["clips"] < 10
    assert plan.evidence["kind"] == "tuned" and proof["mix"]["families"].keys() == {"colour"}
    assert "exists; --overwrite" in refused("tune", *stubbed, "--data", questions, *easy)
    # clips that made it are refused; others are answered, and another mix is not the promise's
    check = "check", home / "schedules" / "tuned_m.json", "--model", "m", "--data"
    done = seats(*check, questions)
    assert done.exit_code == 2 and "10 of the clips made this schedule" in done.stderr
    others = read_samples(questions)
    for k, s in enumerate(others):
        copy = questions.parent / f"other{k}.mp4"
        copy.write_bytes(open(s.video, "rb").read())
        others[k] = replace(s, video=str(copy))
    new = write_samples(others, questions.parent / "new.jsonl")
    strict = "--max-change", 1, "--confidence", 99
    done = seats(*check, new)
    assert "for questions like the 10 on 10 clips" in done.stdout, done.stderr
    moved = [replace(s, family="unheard of") for s in others]
    moved = write_samples(moved, questions.parent / "moved.jsonl")
    done = seats(*check, moved, *strict)
    assert done.exit_code == 1 and "refused: other kinds of questions" in done.stdout
    chain = home / "results" / "tune_m.json"
    done = seats("check", chain, "--model", "m", "--data", new)
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "seats_out/new/results/check_tune_m.json").read_text())["chains"]
    stored = json.loads(chain.read_text())["chains"]
    assert {k: len(c["rows"]) for k, c in found.items()} == {
        k: len(c["rows"]) for k, c in stored.items()
    }
    assert {len(r["losses"]) for c in found.values() for r in c["rows"]} == {10}


def test_too_few_clips_are_refused_before_the_model_is_loaded(questions, stubbed, monkeypatch):
    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(shared, "load_model", load)
    said = refused("tune", *stubbed, "--data", questions)
    assert "takes 149" in said and "--max-change" in said
    said = refused("tune", *stubbed, "--data", questions, "--method", "nobody")
    assert "--method 'nobody': one of seats" in said


def test_a_baseline_gets_the_same_search(questions, stubbed, tmp_path):
    easy = "--max-change", 90, "--confidence", 50, "--budget", 3
    done = seats("tune", *stubbed, "--data", questions, *easy, "--method", "fastv+late")
    chain = tmp_path / "seats_out/questions/results/tune_m_fastv+late.json"
    stored = json.loads(chain.read_text())
    assert {r["method"] for r in stored["chains"]["tuned"]["rows"]} == {"fastv"}
    assert "tune_m_fastv+late.json" in done.stdout or done.exit_code == 1
    # and what it found takes part in the comparison
    ask = "eval", *stubbed, "--data", questions, "--methods", "seats", "--trr", 30
    done = seats(*ask, "--tuned", chain, "--out", tmp_path / "eval.json")
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["questions_of_schedule"] == found["questions"]  # all of them made the chain
    rows = {r["label"]: r for r in found["rows"]}
    assert list(rows) == ["full", "seats", "fastv+late+tuned"], done.stderr
    key = "flops_fraction_causal_with_selection"
    more = rows["fastv+late+tuned"][key] / rows["seats"][key] - 1
    assert rows["fastv+late+tuned"]["equal_cost"] == (more <= 0.02)
    assert "another chain of fastv+late" in refused(
        *ask, "--tuned", chain, "--tuned", chain, "--overwrite"
    )
