"""Comparison of methods: encoded once is as good as every time, costs match, runs go on after an interruption, differences are paired."""
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from seats_analysis import compare
from seats_analysis.adapter import adapter_for, encode, score_choices
from seats_analysis.baselines import ABLATIONS, METHODS
from seats_analysis.compare import (TOLERANCE, DataShape, Entrant, answer_all, clip_units, comparison_rows, compare_methods, data_shape, line_up, match_cost, mcnemar,
                                    method_names, paired_difference, parse_answer, pruning_ready, ready_batch, ready_questions)
from seats_analysis.evaluate import evaluate
from seats_analysis.prune import prune
from seats_analysis.schedule import Schedule

ROOT = Path(__file__).resolve().parents[1]
L = tiny.LAYERS
PLAN = Schedule(L, drop_layers=(1, 3), late_start=5, entering=dict(visual=.3, audio=.5), keep_ratios=dict(visual=(.8, .6), audio=(.8, .6)))


@pytest.fixture(scope='module', params=tiny.FAMILIES)
def family(request): return request.param


@pytest.fixture(scope='module')
def model(family): return tiny.thinker(family)


@pytest.fixture(scope='module')
def processor(family): return tiny.processor(family)


@pytest.fixture(scope='module')
def samples():
    "Two questions on each of four clips, one of them silent and one only heard, and one without any."
    clips = [tiny.clip(0), tiny.clip(1, 3, sound=False), tiny.clip(2, 2.7, sight=False), tiny.clip(3, 3.), None]
    out = [tiny.ask(f'{k}-{q}', c, ('what colour is the circle ?', 'where is the red object ?')[q], lettered=k == 2, family=f'f{q}')
           for k, c in enumerate(clips) for q in range(2)]
    return out[:-1]


# ---------------------------------------------------------------- encoded once

def by_clip(samples):
    found = {}
    for s in samples: found.setdefault(s.clip, []).append(s)
    return list(found.values())


def test_inputs_are_those_of_encode(model, processor, samples):
    rows = [r for group in by_clip(samples) for r in ready_questions(model, processor, group)]
    ours, theirs = ready_batch(model, processor, rows), encode(model, processor, samples)
    for key in ('input_ids', 'attention_mask', 'position_ids', 'video_grid_thw', 'feature_attention_mask'):
        assert torch.equal(ours.inputs[key], theirs.inputs[key].to(ours.inputs[key].dtype)), key
    for key in ('modality', 'window', 'run'): assert torch.equal(getattr(ours.layout, key), getattr(theirs.layout, key)), key
    assert ours.choice_ids == theirs.choice_ids
    assert not {'pixel_values_videos', 'input_features'} & set(ours.inputs)


@pytest.mark.parametrize('name', ['full', *METHODS, *ABLATIONS])
def test_answers_are_those_of_the_uncached_run(model, processor, samples, name):
    "Every method, both families: DeepStack, merging, keys and windows of a method's own among them."
    samples = [s for s in samples if s.clip in ('c0', 'c3')]  # some methods need both modalities
    cls = (METHODS | ABLATIONS).get(name)
    own = dict(like=PLAN) if cls and issubclass(cls, METHODS['seats']) else {}
    method = None if cls is None else METHODS['seats'](PLAN) if name == 'seats' else cls.for_trr(L, .4, .5, 24, 40, **own)
    others = [METHODS['seats'](PLAN), METHODS['visionzip-om'].for_trr(L, .4, .5, 24, 40)]  # with windows of other sizes
    rows = [r for group in by_clip(samples) for r in ready_questions(model, processor, group, [method, *others])]
    with pruning_ready(model, method, ready_batch(model, processor, rows), rows) as (run, given): cached = score_choices(model, given)
    with prune(model, method) as plain: fresh = score_choices(model, encode(model, processor, samples))
    torch.testing.assert_close(cached.total, fresh.total, atol=2e-5, rtol=0, equal_nan=True)
    assert (run.tokens_per_layer == plain.tokens_per_layer).all()
    assert {k: [p.tolist() for p in v] for k, v in run.kept.items()} == {k: [p.tolist() for p in v] for k, v in plain.kept.items()}
    assert run.ledger.calls['encoders'] == 0 < plain.ledger.calls['encoders']
    if name != 'full' and min(cls.for_trr(L, .4, .5, 24, 40, **own).schedule.entering.values()) < 1: assert run.kept


def test_towers_run_once_per_clip(model, processor, samples):
    "However many entrants and questions."
    entrants = line_up(('seats', 'random', 'uniform'), {30: PLAN}, data_shape(model, processor, samples))
    calls = []
    handles = [part(model).register_forward_hook(lambda m, a, out, n=name: calls.append(n))
               for name, part in (('visual', adapter_for(model).visual), ('audio', adapter_for(model).audio_tower))]
    try: answer_all(model, processor, samples, entrants, batch_size=2)
    finally: [h.remove() for h in handles]
    assert sorted(calls) == ['audio']*3 + ['visual']*3


def test_frame_limit_holds_for_files(small):
    "Counts and answers are those of `encode` under the same limit."
    from seats_analysis.testbed import testbed_samples
    some, limit = testbed_samples(split='test', limit=4), dict(max_frames=4)
    batch = encode(*small, some, **limit)
    every, few = (data_shape(*small, some, **kw) for kw in ({}, limit))
    assert few.mean('visual') == batch.layout.counts()['visual'].double().mean() < every.mean('visual')
    found = answer_all(*small, some, [Entrant('full', 'full', 100, (None,))], **limit)
    scores = score_choices(small[0], batch)
    np.testing.assert_allclose([row[0]['nll'] for row in found], [-scores.total[i, s.answer].item() for i, s in enumerate(some)], atol=2e-5)


def test_outcomes_are_those_of_evaluate(model, processor, samples):
    entrants = [Entrant('full', 'full', 100, (None,)), Entrant('seats', 'seats', 30, (METHODS['seats'](PLAN),)),
                Entrant('random', 'random', 30, (METHODS['random'].for_trr(L, .4, .5, 24, 40, seed=3),))]
    found = answer_all(model, processor, samples, entrants, batch_size=3)
    for k, e in enumerate(entrants):
        frame = evaluate(model, processor, samples, e.plans[0], batch_size=len(samples))
        assert [row[k]['correct'] for row in found] == frame.correct.tolist()
        np.testing.assert_allclose([row[k]['nll'] for row in found], frame.nll, atol=2e-5)
        np.testing.assert_allclose([row[k]['margin'] for row in found], frame.margin, atol=2e-5)


# ---------------------------------------------------------------- the same cost

@pytest.fixture(scope='module')
def shape():
    "Counts of the testbed: 128 visual, 80 audio and 15 or 16 text tokens, 20 layers."
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration
    from seats_analysis.testbed import build_config, build_processor, fresh_samples
    model = Qwen2_5OmniThinkerForConditionalGeneration(build_config(layers=20)).eval()
    return data_shape(model, build_processor(), fresh_samples(8, seed=4, per_clip=2))


PLANS = {t: Schedule.load(ROOT/'data'/'schedules'/f'testbed_trr{t}.json') for t in (35, 25, 15, 10)}


@pytest.fixture(scope='module')
def entrants(shape): return line_up(method_names('all,ablations'), PLANS, shape)


def test_costs_match_or_are_floors(shape, entrants):
    target = {e.trr: e.mean(shape.cost) for e in entrants if e.label == 'seats'}
    assert len(entrants) == 1 + 4*len(METHODS | ABLATIONS)
    for e in entrants[1:]:
        cost = e.mean(shape.cost)
        if e.setting == 'matched': assert abs(cost/target[e.trr] - 1) <= TOLERANCE, (e.label, e.trr)
        elif e.setting == 'own minimum': assert cost > target[e.trr]*(1 + TOLERANCE), (e.label, e.trr)
        else: assert e.setting == 'own maximum' and cost < target[e.trr]*(1 - TOLERANCE), (e.label, e.trr)


def test_fastv_has_a_floor(entrants):
    "Its first two layers see everything, which is more than SEATS spends at 10 %."
    settings = {e.trr: e.setting for e in entrants if e.label == 'fastv-om'}
    assert settings[10] == 'own minimum' and settings[35] == 'matched'


@pytest.mark.parametrize('share', [0., .1, 1/3, .5, .77, 1.])
def test_shares_are_even(share):
    e = Entrant('x', 'x', 10, ('a', 'b'), share=share)
    drawn = [e.plan_for(i) == 'b' for i in range(200)]
    assert max(abs(sum(drawn[:n]) - share*n) for n in range(1, 201)) <= .5 + 1e-9


def test_matching_against_a_plain_search():
    "On random staircases: within the tolerance whatever the steps, and an honest floor."
    rng = np.random.default_rng(0)
    for i in range(50):
        edges, costs = np.sort(rng.random(8)), np.sort(rng.random(9))
        stairs, target = (lambda k: float(costs[np.searchsorted(edges, k)])), rng.random()
        if i % 5 == 0: target = stairs(1e-4)*rng.uniform(1 - TOLERANCE, 1 - TOLERANCE/2) # floors a little too dear, and tops a little too cheap
        if i % 5 == 1: target = stairs(1.)*rng.uniform(1 + TOLERANCE/2, 1 + TOLERANCE)
        found = match_cost(stairs, lambda x: x, target, 1.)
        assert 0 <= found.get('share', 0) <= 1
        cost = found['plans'][0] if len(found['plans']) == 1 else (1 - found['share'])*found['plans'][0] + found['share']*found['plans'][1]
        setting = found.get('setting', 'matched')
        floor, top = stairs(1e-4), costs[8] if edges[-1] < 1 else costs[7]
        expected = 'own minimum' if floor > target*(1 + TOLERANCE) else 'own maximum' if top < target*(1 - TOLERANCE) else 'matched'
        assert setting == expected
        if expected == 'matched': assert abs(cost/target - 1) <= TOLERANCE


@pytest.mark.parametrize('options', [dict(seconds=.5), dict(grids=2), dict(grids=2, seconds=.5)])
def test_windows_of_a_method_s_own(model, processor, samples, options):
    "Beside the same method with other windows: encoded once, each finds what it asked for, and runs as planned."
    some = [s for s in samples if s.clip == 'c0'][:1]
    other, method = (METHODS['visionzip-om'].for_trr(L, .4, .5, 24, 40, **o) for o in ({}, options))
    for order in ([other, method], [method, other]):
        rows = ready_questions(model, processor, some, order)
        with pruning_ready(model, method, ready_batch(model, processor, rows), rows) as (run, given): model(**given.inputs)
        with prune(model, method) as plain: model(**encode(model, processor, some).inputs)
        assert run.kept['stage1'][0].tolist() == plain.kept['stage1'][0].tolist()
        assert sum(DataShape.of(model, rows).plans(method)[0].values()).tolist() == plain.tokens_per_layer[0].tolist()


def test_a_modality_that_no_layer_sees(shape):
    "SEATS may withdraw one modality at once; the others are matched to what that costs."
    plan = Schedule(20, late_start=dict(visual=0, audio=16), entering=dict(visual=1., audio=.5))
    found = line_up(method_names('all,ablations'), {10: plan}, shape)
    assert len(found) == 1 + len(METHODS | ABLATIONS) and any(e.setting == 'matched' for e in found[2:])


def test_plans_are_what_runs(model, processor, samples):
    "Planned counts of every method are the tokens that layers then process."
    some = [s for s in samples if s.clip == 'c0']
    shape = data_shape(model, processor, some)
    for name, cls in METHODS.items():
        method = METHODS['seats'](PLAN) if name == 'seats' else cls.for_trr(L, .4, .5, 24, 40)
        with prune(model, method) as run, torch.no_grad(): model(**encode(model, processor, some[:1]).inputs)
        assert sum(shape.plans(method)[0].values()).tolist() == run.tokens_per_layer[0].tolist(), name


# ---------------------------------------------------------------- interrupted, shared

ENTRANTS = ('seats', 'random')


@pytest.fixture(scope='module')
def small():
    from seats_analysis.testbed import build_processor
    return tiny.thinker('qwen2.5-omni', layers=L), build_processor()


def comparable(result):
    "All but the times."
    return json.dumps([{k: v for k, v in r.items() if not k.startswith('ms')} for r in result['rows']], sort_keys=True)


def test_interrupted_runs_go_on(small, samples, tmp_path, monkeypatch):
    whole = compare_methods(*small, samples, {30: PLAN}, ENTRANTS, tmp_path/'whole.json', n_boot=50, batch_size=2)
    path, asked, real = tmp_path/'cut.json', [], compare.answer_unit
    for most in (1, 3):
        def limited(model, processor, rows, number, first, entrants, *args, **kw):
            if len(entrants) > 2:
                if len(asked) >= most: raise KeyboardInterrupt
                asked.append([r.sample.id for r in rows])
            return real(model, processor, rows, number, first, entrants, *args, **kw)
        monkeypatch.setattr(compare, 'answer_unit', limited)
        with pytest.raises(KeyboardInterrupt): compare_methods(*small, samples, {30: PLAN}, ENTRANTS, path, n_boot=50, batch_size=2)
        assert not path.exists() and len(list(Path(f'{path}.journal').glob('[0-9]*.json'))) == sum(map(len, asked))
    monkeypatch.setattr(compare, 'answer_unit', real)
    again = compare_methods(*small, samples, {30: PLAN}, ENTRANTS, path, n_boot=50, batch_size=2)
    assert comparable(again) == comparable(whole) and not Path(f'{path}.journal').exists()
    assert len({i for ids in asked for i in ids}) == sum(map(len, asked))  # nothing twice


def test_a_process_without_questions_leaves_nothing(small, samples, tmp_path):
    entrants = [Entrant('full', 'full', 100, (None,))]
    assert answer_all(*small, samples[:2], entrants, batch_size=2, journal=tmp_path/'j', shard=(3, 4)) is None and not (tmp_path/'j').exists()


def test_journal_of_another_run_is_refused(small, samples, tmp_path):
    def begin(plan, names=ENTRANTS, **kw):
        entrants = line_up(names, {30: plan}, data_shape(*small, samples))
        return answer_all(*small, samples, entrants, batch_size=2, journal=tmp_path/'j', **kw)
    begin(PLAN)
    begin(PLAN)
    for other in (dict(plan=replace(PLAN, temperature=.3)), dict(plan=PLAN, names=('seats', 'uniform')), dict(plan=PLAN, answers='generate'),
                  dict(plan=PLAN, about=dict(code_sha256='other'))):
        with pytest.raises(ValueError, match='cannot be continued'): begin(**other)


def test_processes_share(small, samples, tmp_path):
    entrants = line_up(ENTRANTS, {30: PLAN}, data_shape(*small, samples))
    alone = answer_all(*small, samples, entrants, batch_size=2)
    assert answer_all(*small, samples, entrants, batch_size=2, journal=tmp_path/'j', shard=(1, 2)) is None
    assert 0 < len(list((tmp_path/'j').glob('[0-9]*.json'))) < len(samples)
    shared = answer_all(*small, samples, entrants, batch_size=2, journal=tmp_path/'j', shard=(0, 2))
    strip = lambda rows: [[{k: v for k, v in o.items() if k != 'ms'} for o in row] for row in rows]
    assert strip(shared) == strip(alone)


def test_units_keep_clips_together(samples):
    units = clip_units(samples[::-1] + [replace(samples[0], id='late')], 3)
    assert sorted(i for u in units for i in u) == list(range(len(samples) + 1))
    where = {}
    order = samples[::-1] + [samples[0]]
    for k, u in enumerate(units):
        for i in u: where.setdefault(order[i].clip, set()).add(k)
    assert all(len(k) == 1 for k in where.values())


# ---------------------------------------------------------------- statistics and answers

def test_mcnemar_counts_coins():
    rng = np.random.default_rng(0)
    for n in range(12):
        a, b = rng.random((2, 20)) < .5
        wins, losses = int((a & ~b).sum()), int((b & ~a).sum())
        d, k = wins + losses, min(wins, losses)
        tail = sum(math.comb(d, i) for i in range(k + 1))/2**d if d else .5
        assert mcnemar(a, b) == pytest.approx(min(1., 2*tail))


def test_clips_widen_the_interval():
    "Six alike answers per clip say no more than one."
    a, b = np.repeat(np.arange(30) % 3 > 0, 6), np.repeat(np.arange(30) % 5 > 0, 6)
    clustered, loose = (paired_difference(a, b, c) for c in (np.repeat(np.arange(30), 6), np.arange(180)))
    assert clustered['diff'] == loose['diff'] and clustered['high'] - clustered['low'] > 2*(loose['high'] - loose['low'])


def test_pairing_narrows_the_interval():
    from seats_analysis.evaluate import accuracy_interval
    rng = np.random.default_rng(0)
    base = rng.random(400) < .7
    other, clips = base & (rng.random(400) < .97), np.arange(400)//2
    width = lambda i: i[1] - i[0]
    found = paired_difference(other, base, clips)
    assert found['high'] - found['low'] < width(accuracy_interval(base, clips)) and found['high'] < 0


def test_parsing_never_guesses():
    "Text that names no choice, or two, is unparsable; only what names one is taken."
    choices = ('red', 'green circle', 'blue')
    words = ('red', 'green circle', 'blue', 'A', 'B.', '(C)', 'D', 'or', 'not')
    for n in (1, 2, 3):
        for said in itertools.product(words, repeat=n):
            text = ' '.join(said)
            for lettered in (False, True):
                named = {choices.index(w) for w in said if w in choices} | ({'ABC'.index(w.strip('(.)')) for w in said if w.strip('(.)') in 'ABC'} if lettered else set())
                pick = parse_answer(text, choices, lettered)
                assert pick is None or named == {pick}, (text, pick)


def test_columns_say_what_happened(shape):
    "Four questions, one of them a control: SEATS is right where the other one is wrong."
    plan = Schedule(20, drop_layers=(10,), late_start=18, entering=dict(visual=.25, audio=.5), keep_ratios=dict(visual=(.5,), audio=(.5,)))
    seats, other = METHODS['seats'](plan), METHODS['random'].for_trr(20, .5, .4, 128, 80)
    entrants = [Entrant('full', 'full', 100, (None,), setting='full'), Entrant('seats', 'seats', 25, (seats,), knob=(1.,)), Entrant('random', 'random', 25, (other,), knob=(1.,))]
    asked = [tiny.ask(str(i), tiny.clip(i), family=f) for i, f in enumerate(('where', 'where', 'what', 'control'))]
    right = [(1, 1, 0), (1, 1, 0), (1, 0, 1), (0, 1, 0)]  # full, SEATS, random
    answers = [[dict(pick=0, correct=bool(c), ms=[1., 2., 3.], counter=f, causal=f) for c, f in zip(row, (100., 30., 30.))] for row in right]
    full, ours, theirs = comparison_rows(answers, asked, entrants, shape, n_boot=50)
    assert [(r['n'], r['clips'], r['accuracy']) for r in (full, ours, theirs)] == [(3, 3, 1), (3, 3, pytest.approx(2/3)), (3, 3, pytest.approx(1/3))]
    assert theirs['diff_seats'] == pytest.approx(-1/3) and theirs['diff_full'] == pytest.approx(-2/3) and ours['diff_full'] == pytest.approx(-1/3)
    assert theirs['families']['where']['diff_seats'] == -1 and theirs['families']['what']['diff_seats'] == 1 and theirs['families']['control']['full_accuracy'] == 0
    assert full['diff_seats'] is None and ours['diff_seats'] == 0 and [r['flops_fraction'] for r in (ours, theirs)] == [.3, .3]
    # 4 windows of 32 and of 20 tokens: 32 + 40 enter, half of them stay from layer 10 to 18; 64 + 32 drawn once
    assert ours['retention_entry'] == pytest.approx(72/208) and theirs['retention_entry'] == theirs['retention_layers'] == pytest.approx(96/208)
    assert ours['retention_layers'] == pytest.approx((10*72 + 8*36)/20/208)
    assert [ours['retention_visual'], ours['retention_audio']] == pytest.approx([(10*32 + 8*16)/20/128, (10*40 + 8*20)/20/80])


def test_unparsable_is_wrong_and_counted(small, samples, monkeypatch):
    says, real = iter(['red', 'hm', 'blue or red', 'blue']*100), compare.write_answers
    monkeypatch.setattr(compare, 'write_answers', lambda *args: [next(says) for _ in real(*args)])
    some = [replace(s, lettered=False) for s in samples[:4]]
    shape, entrants = data_shape(*small, some), [Entrant('full', 'full', 100, (None,), setting='full')]
    found = answer_all(*small, some, entrants, batch_size=8, answers='generate')
    row, = comparison_rows(found, some, entrants, shape, n_boot=20)
    picks = [r[0]['pick'] for r in found]
    assert row['unparsable'] == picks.count(None) == 2
    assert row['accuracy'] == np.mean([p == s.answer for p, s in zip(picks, some)])


def test_code_hash_covers_what_is_imported():
    "Every module of ours behind `compare`, those imported inside functions too."
    import ast
    folder = Path(compare.__file__).parent
    ours = {p.stem for p in folder.glob('[a-z]*.py')}
    def imported(name):
        found = [n for n in ast.walk(ast.parse((folder/f'{name}.py').read_text())) if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('seats_analysis'))]
        return {part for n in found for part in [*(n.module or '').split('.'), *(a.name for a in n.names)]} & ours
    seen, left = set(), ['compare']
    while left:
        if (name := left.pop()) not in seen: seen.add(name); left += imported(name)
    assert {'kernels', 'encoders'} < seen and seen == {*compare._CODE, *compare._APART} and not set(compare._CODE) & set(compare._APART)


# ---------------------------------------------------------------- the stored result

STORED = ROOT/'data'/'results'/'eval_testbed.json'


@pytest.mark.skipif(not STORED.is_file(), reason='no stored comparison; `seats eval` makes one')
def test_stored_comparison():
    "It is what its command would make again, and SEATS is never significantly below chance or stride."
    found = json.loads(STORED.read_text())
    from seats_analysis.probe import hash_weights
    from seats_analysis.testbed import load_testbed
    assert found['schema'] == compare.SCHEMA and found['weights_sha256'] == hash_weights(load_testbed()[0])
    assert found['questions'] >= 1000 and {r['method'] for r in found['rows']} >= {'full', *METHODS}
    for r in found['rows']:
        if r['ranked']: assert abs(r['flops_fraction']/r['flops_target'] - 1) <= TOLERANCE
        if r['ranked'] and r['method'] in ('random', 'uniform'): assert r['diff_seats_low'] <= 0, (r['label'], r['trr'])
        if r['ranked'] and r['trr'] == 10 and r['method'] in METHODS: assert r['diff_seats_low'] <= 0, r['label']
