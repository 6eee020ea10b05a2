"""A promise is kept as often as it says, searches go on, and no clip serves twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
from scipy.stats import beta, binom
from test_cli import refused, seats

import seats_analysis as sa
from seats_analysis import Boundaries, Promise, Schedule, SearchSpace, read_samples
from seats_analysis.cli import app as shared
from seats_analysis.evaluation.prepared import Answering, DataShape, PreparedBatch
from seats_analysis.schedules.schedule import ScheduleWarning
from seats_analysis.storage.schemas import save_profile
from seats_analysis.testbed.load import write_samples
from seats_analysis.testbed.task import ramp, synthetic_profile
from seats_analysis.tuning import tune, space
from seats_analysis.tuning.space import deal_clips
from seats_analysis.tuning.tune import Tuning

EASY = Promise(0.6, 0.5)  # one clip is enough
SMALL = dict(seconds=1.0, size=(56, 56))
SPACE = SearchSpace.of(dict(both=Boundaries(tiny.LAYERS, 2, 5, shallow_end_ci=(1, 3))))


# ---------------------------------------------------------------- statistics


def test_the_chain_is_what_the_rule_says():
    "A naive loop over candidates and draws; both outcomes occur."
    few = [k for k in range(30) if binom.cdf(k, 600, 0.02) <= 0.05]
    chosen = []
    for seed in range(12):
        random = np.random.default_rng(seed)
        costs = random.permutation(np.linspace(0.1, 0.9, 8))
        kl = random.uniform(0.5, 1.5, 8) / costs
        rates = random.choice([0.001, 0.01, 0.05], 8) if seed % 2 else np.full(8, 0.006)
        changed = (random.random((300, 8)) < rates).astype(float)
        alive = np.arange(1, 8)

        def front(losses):
            key = {i: (losses[:, i].sum(), kl[i]) for i in alive}
            stays = [
                i
                for i in alive
                if all(costs[j] > costs[i] or key[j] > key[i] for j in alive if j != i)
            ]
            return sorted(stays, key=lambda i: -costs[i])

        def mean_cost(chain, losses):
            draws = np.random.default_rng(0).multinomial(600, np.full(150, 1 / 150), 200)
            found = []
            for weights in draws:
                found.append(1.0)
                for i in chain:
                    if weights @ losses[:, i] not in few:
                        break
                    found[-1] = costs[i]
            return np.mean(found)

        sequence = front(np.zeros((1, 8)))  # nothing changed: the KL decides
        halves = changed[:150], changed[150:]
        means = np.zeros(2)
        for made, asked in (halves, halves[::-1]):
            means += mean_cost(sequence, asked), mean_cost(front(made), asked)
        pareto = bool(means[1] < means[0])
        found, how = Promise().choose_chain(costs, kl, changed, alive, 600)
        assert found == (front(changed) if pareto else sequence)
        assert how.startswith("Pareto") == pareto
        assert f"{means[0] / 2:.3f} of the FLOPs along the KL" in how
        chosen.append(pareto)
    assert set(chosen) == {True, False}


def test_a_chain_chosen_on_other_clips_breaks_its_promise_as_seldom_as_it_says():
    "Every schedule changes a little more than was promised: any that is certified is a breach."
    random = np.random.default_rng(0)
    costs, kl = np.linspace(0.9, 0.1, 9), np.linspace(0.1, 0.9, 9)
    breaches = 0
    for _ in range(400):
        searched, drawn = random.random((2, 300, 9)) < 0.0201
        chain, _ = Promise().choose_chain(costs, kl, searched.astype(float), np.arange(9), 300)
        breaches += Promise().certify(drawn.T[chain], exact=True) > 0
    assert breaches <= binom.ppf(0.999, 400, 0.05)


def test_families_have_the_intervals_of_clopper_and_pearson():
    changed = np.repeat([0.0, 0.5, 1.0, 0.0], [20, 1, 3, 7])
    families = ["a"] * 24 + ["b"] * 7
    found = Promise.by_family(changed, families)
    assert {f: (x["changed"], x["questions"]) for f, x in found.items()} == dict(
        a=(4, 24), b=(0, 7)
    )
    ends = beta.ppf([0.025, 0.975], [4, 5], [21, 20])
    assert [found["a"]["low"], found["a"]["high"]] == pytest.approx(ends)
    assert (found["b"]["low"], found["b"]["high"]) == (0, pytest.approx(1 - 0.025 ** (1 / 7)))


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
    assert [r["fixed"] for r in whole["search"][:3]] == [True, True, False]
    real, calls = Answering.answer_unit, []
    opens = Mock(wraps=DataShape.of)
    monkeypatch.setattr(DataShape, "of", opens)

    def dies(self, *args):
        calls.append(self.title)
        if calls.count("calibration") == 2:
            assert opens.call_count == 2  # no clip is opened when another process may be done
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


def test_what_saves_more_in_the_encoders_than_is_left_has_no_cost(samples, monkeypatch):
    costs = iter([-0.1] + [0.5] * 99)
    monkeypatch.setattr(DataShape, "cost", lambda *given: next(costs))
    _, found, known = tuning(samples)._candidates(
        SPACE.draw, [SPACE.draw(np.random.default_rng(0))], 3
    )
    assert not known and {*found} == {0.5}


def test_no_clip_serves_twice(samples, monkeypatch):
    profile = synthetic_profile({"both": ramp(tiny.LAYERS, 1, 4)})
    clips = np.repeat("c5", profile.sizes["sample"])
    known = {"captions/testbed": profile.assign_coords(clip=("sample", clips))}
    monkeypatch.setattr(space, "load_profile", known.get)
    whole = replace(EASY, of="text")
    sides = [{s.clip for s in side} for side in deal_clips(samples, whole, "testbed")]
    assert not sides[0] & sides[1] and "c5" in sides[0] and len(sides[0] | sides[1]) == 6
    named = [replace(s, split="derive" if s.clip < "c2" else "test") for s in samples]
    assert {s.split for s in deal_clips(named, EASY)[1]} == {"test"}
    with pytest.raises(ValueError, match=r"too few: .* takes 149 .* --max-change \d+"):
        deal_clips(samples, Promise())
    known["p"] = profile.assign_coords(removed=["own"])
    with pytest.raises(ValueError, match="no question needs .* among .'own'"):
        space.measured_space("m", "p")


# ---------------------------------------------------------------- schedules by kind

FACTS = dict(
    promise=dict(max_change=0.6, confidence=0.5),
    answers="token",
    one_question_a_clip=True,
    clips=1,
    questions=1,
    mix=dict(families=dict(f0=1), tokens=dict(visual=1.0, audio=1.0, text=1.0)),
    data="",
    known_clips=["0" * 12],
    cost=0.5,
    changed=0.0,
    p=0.0,
)
PLANS = [SPACE.draw(np.random.default_rng(k)) for k in (1, 2)]


def by_kind():
    "The first schedule for the mix, the second for the family f1."
    kinds = dict(by="family", plans=dict(f1=PLANS[1].to_dict()))
    plan = replace(PLANS[0], evidence=PLANS[0].evidence | dict(kinds=kinds))
    return plan.certified(**FACTS)


def test_a_file_holds_the_schedules_of_its_kinds(samples, tmp_path):
    plan = by_kind()
    plan.save(tmp_path / "p.json")
    found = Schedule.load(tmp_path / "p.json")
    assert found == plan
    assert found.of(samples[0]) is found and found.of(samples[1]) == PLANS[1]
    assert found.of(replace(samples[0], family="unheard of")) is found
    with pytest.warns(ScheduleWarning, match="was for another plan and is gone"):
        assert not found.times(0.5).kinds
    edited = json.loads((tmp_path / "p.json").read_text())
    edited["evidence"]["kinds"]["plans"]["f1"]["temperature"] = 9.0
    (tmp_path / "p.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="is that of another plan"):
        Schedule.load(tmp_path / "p.json")


@pytest.mark.usefixtures("no_grad")
def test_each_question_is_answered_with_the_schedule_of_its_kind(samples):
    "Two plain runs, one for each schedule, put together by hand."
    t = tuning(samples)
    asked = [replace(s, choices=("red", "blue"), answer=0) for s in samples]
    apart = [sa.evaluate(t.model, t.processor, asked, p, batch_size=4) for p in PLANS]
    second = apart[0].family == "f1"
    wanted = apart[0].nll.where(~second, apart[1].nll)
    assert (abs(apart[0].nll - apart[1].nll) > 1e-4)[second].all()
    for plan in by_kind(), lambda s: PLANS[s.family == "f1"]:
        found = sa.evaluate(t.model, t.processor, asked, plan, batch_size=4)
        assert found.id.tolist() == [s.id for s in samples]
        assert found.nll.tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
        with pytest.raises(ValueError, match="different schedules"):
            with sa.prune(t.model, plan, samples=asked[:2]):
                pass
    # the prepared questions of `seats eval`, `tune` and `check`
    rows = t._asked(samples, [tune.as_pruner(p) for p in (*PLANS, by_kind())]).answer_all()
    for s, row in zip(samples, rows):
        own = row[2 if s.family == "f1" else 1]
        assert row[3]["kl"] == pytest.approx(own["kl"], abs=1e-5)
        assert row[3]["flops_causal"] == own["flops_causal"]


def test_schedules_by_kind_are_tested_together(samples):
    "Losses put together from plain answers; nothing dearer than the model is tried."
    t = replace(tuning(samples), by="family")
    found = t.tune(SPACE.draw, PLANS, budget=6)
    assert max(r["cost"] for r in found["search"]) <= 1
    chain = found["chains"]["tuned"]
    links = [Schedule.from_dict(row["schedule"]) for row in chain["rows"]]
    assert all({*link.kinds} == {"f0", "f1"} for link in links) and len(links) > 1
    assert any(link.kinds["f0"] != link.kinds["f1"] for link in links)
    plans = [tune.as_pruner(link.of(s)) for link in links for s in samples[:2]]
    asked = t._asked(samples[6:], plans, "likelihood").answer_all()
    clips = [s.clip for s in samples[6:]]
    shapes = {
        f: DataShape.of(t.model, t.processor, [s for s in samples[6:] if s.family == f])
        for f in ("f0", "f1")
    }
    for k, row in enumerate(chain["rows"]):
        losses = dict.fromkeys(clips, 0.0)
        for s, cells in zip(samples[6:], asked):
            own = cells[1 + 2 * k + (s.family == "f1")]
            losses[s.clip] += (own["pick"] != cells[0]["pick"]) / 2
        assert row["losses"] == [losses[c] for c in sorted(losses)]
        costs = [shapes[f].cost(plans[2 * k + i]) for i, f in enumerate(shapes)]
        assert row["cost"] == pytest.approx(np.mean(costs))
    p = EASY.p_values([r["losses"] for r in chain["rows"]], exact=False)
    assert chain["held"] == [*(p <= 0.5), False].index(False)


def test_questions_that_need_no_clip_are_left_out(samples):
    mixed = [replace(s, family="control" if s.id == "0-0" else s.family) for s in samples]
    both = deal_clips(mixed, EASY)
    assert sorted(s.id for half in both for s in half) == sorted(s.id for s in samples[1:])
    with pytest.raises(ValueError):
        deal_clips([replace(s, family="control") for s in samples], EASY)


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
    shown = ramp(tiny.LAYERS, 1, 4)
    profile = synthetic_profile(dict(visual=shown, audio=shown**0, both=shown))  # nothing is heard
    save_profile(profile, tmp_path / "p.nc")
    return "--model", "m", "--profile", tmp_path / "p.nc", "--data", questions


def test_published_shapes_are_tried_whole_and_in_parts():
    config = {"num_hidden_layers": 16}
    plans = tune.fixed_shapes(("testbed", None, config), (96, 40))
    for whole, flat, plain in zip(plans[::3], plans[1::3], plans[2::3], strict=True):
        assert whole.drop_layers and not flat.drop_layers and not flat.cache
        assert whole.trr == pytest.approx(dict(flat.trr)) and flat.late_start == whole.late_start
        assert whole.weighted and flat.weighted and not plain.weighted
        levels = np.mean(flat.levels("visual"))
        assert levels == pytest.approx(flat.trr["visual"])
    assert len({p.plan_sha256 for p in plans}) == 3 * len(tune.LADDER)
    assert len(tune.fixed_shapes(("testbed-qwen3", None, config), (96, 40))) < len(plans)
    shape = Schedule.from_boundaries(Boundaries(41, 2, 14), 0.1, 0.2)
    found = tune.fixed_shapes(("m", shape, {}), (96, 40))
    assert max(p.entering["audio"] for p in found) == 1  # where 14 / 41 * 41 / 14 is more


LOOSE = "--max-change", 90, "--confidence", 50


def test_tune_and_check(questions, ask, tmp_path):
    done = seats("tune", *ask, *LOOSE, "--budget", 3, "--by", "family")
    assert done.exit_code == 0 and "at most 90 % of the answers change" in done.stdout, done.stderr
    assert "for this mix of questions only" in done.stdout
    home = tmp_path / "seats_out" / "questions"
    schedule, chain = home / "schedules" / "tuned_m.json", home / "results" / "tune_m.json"
    assert not list(home.glob("*/*.checkpoint"))
    evidence = Schedule.load(schedule).evidence
    proof = evidence["certificate"]
    assert proof["promise"] == dict(max_change=0.9, confidence=0.5) and proof["clips"] < 10
    assert evidence["kind"] == "tuned" and proof["mix"]["families"].keys() == {"colour"}
    changed = proof["families"]["colour"]
    assert changed["changed"] == round(proof["changed"] * proof["clips"])
    assert evidence["kinds"]["by"] == "family" and {*evidence["kinds"]["plans"]} == {"colour"}
    seats("eval", *ask, "--methods", "seats", "--schedule", schedule, "--out", tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["questions_of_schedule"] == 10
    assert "exists; --overwrite" in refused("tune", *ask, *LOOSE)
    done = seats("tune", *ask[:2], *ask[4:], "--schedule", schedule, *LOOSE, "--overwrite")
    assert "of the clips made this schedule" in done.stderr

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
    files = tmp_path / "seats_out/new/results/check_tune_m.json", chain
    given, stored = (json.loads(f.read_text())["chains"]["tuned"]["rows"] for f in files)
    assert [len(r["losses"]) for r in given] == [10] * len(stored)


def test_a_check_is_named_after_the_shipped_schedule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("seats_out/testbed/results/check_testbed_10.json").mkdir(parents=True)
    assert "check_testbed_10" in refused("check", "testbed/10", "--limit", 1)


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
    stored = space.load_profile(ask[3])
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
    apart = "tune", *ask, *LOOSE, "--method", "fastv", "--by", "family", "--overwrite"
    done = seats(*apart)
    assert done.exit_code == 2 and "not for settings of fastv" in done.stderr
    assert "another chain of fastv+late" in refused(*compare, "--tuned", chain, "--overwrite")
