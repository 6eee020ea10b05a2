"""The branch method gives what the plain one gives: every layer, condition, family, kind of question and budget, for less."""
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from seats_analysis import probe
from seats_analysis.adapter import adapter_for, encode, encode_questions
from seats_analysis.cost import probe_flops
from seats_analysis.media import Clip, Sample
from seats_analysis.probe import (AUTO, Budget, all_but_sinks, branch_scores, every_token, family_curves, next_layers, pack_questions,
                                  plan_removals, probe_dependency, random_fraction, removal_scores, time_window)

LAYERS, NAMES = 4, ('visual', 'audio', 'both')
WORDS = ('red', 'green circle', 'blue', 'upper-left red square')


def make_clip(seconds, seed, sound=True, sight=True):
    rng = np.random.default_rng(seed)
    wave = rng.standard_normal(int(16000*seconds), 'float32')*.1 if sound else None
    return Clip(f'clip{seed}', rng.integers(0, 255, (int(2*seconds), 112, 112, 3), dtype='uint8') if sight else None, 2., wave, 16000)


def randomise(thinker, std=1.):
    "Weights that keep signals alive."
    torch.manual_seed(0)
    for p in thinker.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=std*(p.shape[-1] if p.dim() == 3 else p[0].numel())**-.5)
    return thinker.eval()


def qwen25(attention='sdpa'):
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
    from seats_analysis.testbed import build_config
    return randomise(Thinker._from_config(build_config(layers=LAYERS, tower=32), attn_implementation=attention))


@pytest.fixture(scope='module')
def model(): return qwen25()


@pytest.fixture(scope='module')
def processor(): return tiny.tight_processor()


@pytest.fixture(scope='module')
def samples():
    "Three questions on one clip that differ in length, letters and choices; silent, sound only, text only."
    clip = make_clip(3, 0)
    return [Sample('open', clip, 'what colour is the circle ?', WORDS, 3, 'a', 'derive'),
            Sample('letters', clip, 'what is it ?', WORDS[:3], 1, 'a', 'derive', lettered=True),
            Sample('where', clip, 'where is the red object ?', WORDS[:2], 0, 'b', 'derive'),
            Sample('silent', make_clip(2, 2, sound=False), 'where is the red object ?', WORDS[:2], 0, 'b', 'test'),
            Sample('heard', make_clip(2.5, 3, sight=False), 'what is heard ?', WORDS[1:], 1, 'b', 'test'),
            Sample('text', None, 'what day comes after monday ?', ('tuesday', 'friday'), 0, 'c', 'test')]


def scores_of(model, processor, samples, removed=NAMES, layers=None, most=4096):
    "(id, condition, layer) -> (answer log-probabilities, totals) by both methods."
    layers, branch, plain = list(range(LAYERS + 1)) if layers is None else layers, {}, {}
    for unit in probe._clips_of(samples):
        part = [samples[i] for i in unit]
        for q in encode_questions(model, processor, part):
            found = branch_scores(model, q, removed, layers, most)
            for (name, layer), s in found.items():
                for i, sample in enumerate(q.samples): branch[sample.id, name, layer] = s.answer[i], s.total[i, :len(sample.choices)]
        for sample in part:
            for (name, layer), s in removal_scores(model, encode(model, processor, [sample]), removed, layers).items():
                plain[sample.id, name, layer] = s.answer[0], s.total[0, :len(sample.choices)]
    return branch, plain


def assert_same(branch, plain, layers=LAYERS, atol=1e-5):
    "Every plain result has its branch result; what a condition leaves alone has that of the full run."
    assert branch.keys() <= plain.keys() and len(plain) > len(branch)/2
    for (name, removed, layer), (answer, total) in plain.items():
        theirs = branch.get((name, removed, layer), branch[name, None, layers])
        np.testing.assert_allclose(theirs[0], answer, atol=atol, err_msg=f'{name} {removed} {layer}')
        np.testing.assert_allclose(theirs[1], total, atol=3*atol, err_msg=f'{name} {removed} {layer}')


@pytest.mark.parametrize('most', [1, 260, 65_536])
def test_equals_plain_at_any_budget(model, processor, samples, most):
    "Log-probabilities of the whole vocabulary within 1e-5, and no removal without effect, or the comparison would prove nothing."
    branch, plain = scores_of(model, processor, samples, most=most)
    assert_same(branch, plain)
    moved = [(plain['open', r, i][0] - plain['open', None, LAYERS][0]).abs().max() for r in NAMES for i in range(LAYERS)]
    assert min(moved) > 1e-3


def test_equals_plain_with_explicit_masks(processor, samples): assert_same(*scores_of(qwen25('eager'), processor, samples[:4]))


def test_front_is_shared_or_not(model, processor, samples, monkeypatch):
    "Whether the unaffected front is run again makes no difference."
    own = {}
    for share in (0., 2.):
        monkeypatch.setattr(probe, 'SHARE', share)
        assert_same(*scores_of(model, processor, samples[:3]))
        q, = encode_questions(model, processor, samples[:3])
        own[share] = [len(r.own) for r in plan_removals(model, pack_questions(model, q), probe._check_removed(NAMES))[0]]
    assert all(a < b for a, b in zip(own[0.], own[2.]))


def test_some_layers_and_few_logits_at_once(model, processor, samples, monkeypatch):
    monkeypatch.setattr(probe, 'LOGITS', 1)
    assert_same(*scores_of(model, processor, samples[:2], layers=[1, 3, LAYERS]))


@torch.no_grad()
def made_up_pack(model, windows, visual, audio, text):
    "A pack of random states: text, windows of visual and audio tokens side by side, text, and one token that answers."
    from seats_analysis.adapter import rotary_tables
    from seats_analysis.layout import AUDIO, TEXT, VISUAL, run_ids
    weight, n = adapter_for(model).lm_head(model).weight, windows*(visual + audio) + 2*text
    kind = torch.tensor([TEXT]*text + ([VISUAL]*visual + [AUDIO]*audio)*windows + [TEXT]*text, dtype=torch.int8)
    hidden = torch.randn(1, n + 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    rotary = rotary_tables(model, hidden, torch.arange(n + 1, device=weight.device).expand(3, 1, -1))
    tail = probe.pack_tail([(0,)], [[(1,), (2,)]])
    tail = probe.Tail(**{k: v.to(weight.device) for k, v in vars(tail).items()})
    runs = run_ids(kind[None])[0]
    view = probe.View(kind, runs, runs, 'made up', adapter_for(model).num_layers(model))
    return probe.Pack(hidden[:, :n], tuple(t[:, :n] for t in rotary), (), view, tail, hidden[:, n:], tuple(t[:, n:] for t in rotary))


@torch.no_grad()
def by_branch(model, pack, most):
    removals, _ = plan_removals(model, pack, probe._check_removed(NAMES))
    full, grown = probe.traverse(model, pack, removals, set(range(adapter_for(model).num_layers(model))), most)
    return [probe.score_tail(model, b.tail, pack.tail) for blocks in grown for b in blocks]


@torch.no_grad()
def one_plain_run(model, pack, name, layer):
    "One complete run with removal before one layer: the answer's log-probabilities."
    from seats_analysis.adapter import final_logits, run_layers
    hidden, rotary = torch.cat([pack.hidden, pack.tail_hidden], 1), tuple(torch.cat(t, 1) for t in zip(pack.rotary, pack.tail_rotary))
    gone = every_token((name,))(pack.view)
    keep = torch.cat([(~gone).nonzero()[:, 0], torch.tensor([len(gone)])]).to(hidden.device)
    hidden = run_layers(model, hidden, rotary, None, 0, layer)[:, keep]
    return final_logits(model, run_layers(model, hidden, tuple(t[:, keep] for t in rotary), None, layer)[:, -1:]).float().log_softmax(-1)[0, 0]


def test_made_up_states(model):
    pack, found = made_up_pack(model, 2, 6, 4, 3), {}
    for name, scores in zip(NAMES, by_branch(model, pack, 4096)): found |= {(name, layer): s.answer[0] for layer, s in enumerate(scores)}
    for (name, layer), answer in found.items(): torch.testing.assert_close(answer, one_plain_run(model, pack, name, layer), atol=1e-5, rtol=0)


@pytest.mark.cuda
def test_seven_billion_at_a_minute_of_video():
    "28 layers, three conditions, 10,866 tokens, bfloat16, random weights: under 80 GB, and at most 0.40 of the plain time."
    import time
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration as Thinker
    text = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, vocab_size=152064)
    with torch.device('cuda'): big = Thinker._from_config(Qwen2_5OmniThinkerConfig(text_config=text), dtype=torch.bfloat16).eval()
    pack = made_up_pack(big, 30, 307, 50, 78)
    assert abs(pack.hidden.shape[1] + 1 - 10_866) < 10
    def timed(run):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    by_branch(big, pack, probe.MOST_TOKENS)  # warm up
    torch.cuda.reset_peak_memory_stats()
    branch = timed(lambda: by_branch(big, pack, probe.MOST_TOKENS))
    plain = sum(timed(lambda: one_plain_run(big, pack, name, layer)) for name in NAMES for layer in range(28))
    peak = torch.cuda.max_memory_allocated()/1e9
    print(f'branch {branch:.1f} s, plain {plain:.1f} s ({branch/plain:.2f}), at most {peak:.1f} GB')
    assert peak < 80 and branch <= .40*plain


def test_selectors(model, processor, samples):
    asked = {'first': time_window(0), 'late sound': time_window(1, ('audio',)), 'half': random_fraction(.5), 'sinks': all_but_sinks(3),
             'sights': every_token(('visual',)), 'mine': lambda view: view.media & (view.run == 0)}
    assert_same(*scores_of(model, processor, samples, asked))


def test_selectors_remove_what_they_say(model, processor, samples):
    q, = encode_questions(model, processor, samples[:1])
    view, layout = pack_questions(model, q).view, q.encoded.layout
    gone = lambda s: probe._mark(s, view).nonzero()[:, 0].tolist()
    where = lambda mask: mask[0].nonzero()[:, 0].tolist()
    assert gone(time_window(1)) == where(layout.window == 1) and gone(every_token(('audio',))) == where(layout.audio)
    assert len(gone(random_fraction(.25))) == round(.25*int(layout.visual.sum())) + round(.25*int(layout.audio.sum()))
    assert gone(random_fraction(.25)) == gone(random_fraction(.25)) != gone(random_fraction(.25, seed=1))
    assert len(gone(all_but_sinks(3))) == int((layout.visual | layout.audio).sum()) - 3
    with torch.no_grad(): norms = view.hidden(LAYERS//2).norm(dim=-1)
    kept = sorted(set(where(layout.visual | layout.audio)) - set(gone(all_but_sinks(3))))
    assert set(kept) == set(norms.masked_fill(~view.media, 0).topk(3).indices.tolist())


def test_questions_share_clip_encoders_and_context(model, processor, samples, monkeypatch):
    "Three questions on one clip: the towers run once, the context is as long as for one question, and each tail is its own."
    runs, adapter = [], adapter_for(model)
    hooks = [m.register_forward_pre_hook(lambda module, args: runs.append(type(module).__name__)) for m in (adapter.visual(model), adapter.audio_tower(model))]
    q, = encode_questions(model, processor, samples[:3])
    branch_scores(model, q, NAMES, list(range(LAYERS + 1)))
    for h in hooks: h.remove()
    assert len(runs) == 2
    for sample, tail in zip(samples[:3], q.tails):
        one = encode(model, processor, [sample])
        assert one.inputs['input_ids'][0].tolist() == q.encoded.inputs['input_ids'][0, :q.shared].tolist() + list(tail)
        assert torch.equal(one.position_ids[..., q.shared:], q.positions(torch.arange(len(tail))))


def test_prompts_that_do_not_begin_alike_stand_alone(model, processor, samples):
    "Then each question is encoded with its own media."
    early = replace_template(processor)
    found = encode_questions(model, early, samples[:3])
    assert len(found) == 3 and [q.samples[0].id for q in found] == ['open', 'letters', 'where']
    assert_same(*scores_of(model, early, samples[:3], layers=[0, 2, LAYERS]))


def replace_template(processor):
    "A processor that writes the question before the media."
    import copy
    other = copy.copy(processor)
    other.apply_chat_template = lambda messages, **kw: ('<|im_start|> user ' + messages[0]['content'][-1]['text']
                                                        + ' <|vision_bos|><|VIDEO|><|vision_eos|> <|im_end|> <|im_start|> assistant')
    return other


def test_profile_of_both_methods(model, processor, samples):
    "Same decisions, same dataset but for the attributes of the method."
    branch, plain = (probe_dependency(model, processor, samples, method=m, progress=False) for m in ('branch', 'plain'))
    assert (branch.correct == plain.correct).all()
    for name in ('nll', 'margin', 'kl'): np.testing.assert_allclose(branch[name], plain[name], atol=3e-5)
    np.testing.assert_array_equal(branch.correct_letter, plain.correct_letter)
    assert branch.coords.equals(plain.coords)
    assert set(branch.attrs) ^ set(plain.attrs) == {'batch_size', 'max_branch_tokens'}
    assert branch.n_choices.values.tolist() == [4, 3, 2, 2, 3, 2]


# what needs no answers, or long ones

def test_unlabelled_and_reference_answers(model, processor, samples):
    "Without choices only the divergence is there; with one, its likelihood too; both as for the labelled question."
    whole = probe_dependency(model, processor, samples[:1], progress=False)
    bare = [replace(samples[0], id='none', choices=(), answer=-1), replace(samples[0], id='one', choices=(WORDS[3],), answer=0)]
    for method in ('branch', 'plain'):
        found = probe_dependency(model, processor, bare, method=method, progress=False)
        for i in range(2): np.testing.assert_allclose(found.kl[i], whole.kl[0], atol=1e-5)
        np.testing.assert_allclose(found.nll[1], whole.nll[0], atol=3e-5)
        assert found.nll[0].isnull().all() and found.margin.isnull().all() and not found.correct.any()
        assert found.n_choices.values.tolist() == [0, 1]


def test_families_are_kept_apart(model, processor, samples):
    found = probe_dependency(model, processor, samples, progress=False)
    curves = family_curves(found, 'nll')
    assert curves.dims == ('family', 'removed', 'layer') and curves.n.values.tolist() == [2, 3, 1]
    np.testing.assert_allclose(curves.sel(family='a'), found.nll.values[:2].mean(0), rtol=1e-6)
    np.testing.assert_allclose(family_curves(found, 'nll', split='test').sel(family='b'), found.nll.values[3:5].mean(0), rtol=1e-6)


# memory

def test_running_out_of_memory_halves_the_budget_and_goes_on(model, processor, samples, monkeypatch):
    plain_run, tried = probe.run_layer, []
    def tight(model, hidden, *args, **kw):
        tried.append(hidden.shape[0]*hidden.shape[1])
        if tried[-1] > 130: raise torch.OutOfMemoryError('out of memory (made up)')
        return plain_run(model, hidden, *args, **kw)
    expected = probe_dependency(model, processor, samples[:3], max_branch_tokens=130, progress=False)
    monkeypatch.setattr(probe, 'run_layer', tight)
    found = probe_dependency(model, processor, samples[:3], max_branch_tokens=1040, progress=False)
    assert max(tried) > 130
    for name in expected.data_vars: np.testing.assert_array_equal(found[name], expected[name])
    monkeypatch.setattr(probe, 'run_layer', lambda *a, **kw: tight(a[0], torch.empty(1, 131)))
    with pytest.raises(MemoryError, match='a single stream of'): probe_dependency(model, processor, samples[:3], progress=False)


def test_other_errors_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match='shape'): Budget(8)(lambda tokens: (_ for _ in ()).throw(RuntimeError('shape mismatch')), 1)


def test_a_batch_holds_no_more_than_the_budget(model, processor, samples, monkeypatch):
    seen, run = [], probe.run_layer
    def watch(model, hidden, *args, **kw):
        seen.append(tuple(hidden.shape[:2]))
        return run(model, hidden, *args, **kw)
    monkeypatch.setattr(probe, 'run_layer', watch)
    q, = encode_questions(model, processor, samples[:3])
    branch_scores(model, q, NAMES, list(range(LAYERS + 1)), 250)
    assert max(k*n for k, n in seen) <= 250 and max(k for k, n in seen) > 1


# cost

def flops(run):
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter: run()
    return counter.get_total_flops()


@pytest.fixture(scope='module')
def testbed():
    from seats_analysis.testbed import load_testbed, testbed_samples
    return *load_testbed(), testbed_samples(split='derive', limit=2)


@torch.no_grad()
def test_cost_against_plain(testbed):
    "All layers and three conditions on a clip of the testbed: at most 0.35 of the FLOPs, encoders included, and the closed form says the same."
    model, processor, samples = testbed
    L, dims = adapter_for(model).num_layers(model), adapter_for(model).config(model)
    q, = encode_questions(model, processor, samples)
    single, layers = encode(model, processor, samples[:1]), list(range(L + 1))
    branch = flops(lambda: branch_scores(model, q, NAMES, layers))
    plain = 2*flops(lambda: removal_scores(model, single, NAMES, layers))  # counting is slow: the other question differs by a token or two
    assert branch <= .35*plain
    one, = encode_questions(model, processor, samples[:1])
    assert .55*branch < flops(lambda: branch_scores(model, one, NAMES, layers)) <= .35*plain/2  # the second question costs less than the first
    encoders = flops(lambda: pack_questions(model, q))
    pack = pack_questions(model, q)
    kept = [(r.front, len(r.own)) for r in plan_removals(model, pack, probe._check_removed(NAMES))[0]]
    form = probe_flops(dims, q.shared, len(pack.tail.ids), kept, logits=len(pack.tail.wanted))
    assert form == pytest.approx(branch - encoders, rel=.005)
    extra = probe.pack_branches(single.choice_ids).ids.shape[1]
    form = probe_flops(dims, single.shape[1] - 1, 1 + extra, kept_of_one(model, one), 'plain', logits=1 + extra)
    assert form == pytest.approx(plain/2 - encoders, rel=.005)


def kept_of_one(model, one):
    "What stays of a context that is the whole prompt but its last token."
    return [(r.front, len(r.own)) for r in plan_removals(model, pack_questions(model, one), probe._check_removed(NAMES))[0]]


# coarse to fine

def planted(rises, layers):
    import xarray as xr
    at = np.array(layers)
    correct = np.stack([np.clip((at - a + 1)/(b - a + 1), 0, 1) for a, b in rises])  # 0 up to a, 1 from b on
    answers = np.arange(200)[:, None, None]/200 < .25 + .75*correct
    return xr.Dataset({'correct': (('sample', 'removed', 'layer'), answers)},
                      dict(removed=list(NAMES[:len(rises)]), layer=at, family=('sample', ['a']*200), split=('sample', ['']*200)))


@pytest.mark.parametrize('num_layers, rises', [(16, [(3, 9)]), (28, [(16, 23)]), (28, [(2, 4), (20, 27)]), (48, [(27, 39), (0, 1)]), (36, [(35, 36)])])
def test_auto_finds_planted_crossings(num_layers, rises):
    "The scanned layers contain every crossing of the full curve with its neighbours, and are fewer than all."
    step = round(num_layers**.5)
    layers = sorted({*range(0, num_layers, step), num_layers})
    while (more := next_layers(planted(rises, layers))): layers = sorted({*layers, *more})
    full, all_layers = planted(rises, range(num_layers + 1)), list(range(num_layers + 1))
    for i, name in enumerate(full.removed.values):
        for part in (full, planted(rises, layers)):
            curve = part.correct.sel(removed=name).values.mean(0)
            crossing = probe._crossings(curve, part.layer.values.tolist(), AUTO['tolerance'], AUTO['rise'])
            expected = probe._crossings(full.correct.sel(removed=name).values.mean(0), all_layers, AUTO['tolerance'], AUTO['rise'])
            assert crossing == expected
    assert len(layers) < num_layers + 1


def test_auto_is_part_of_the_full_scan(model, processor, samples, tmp_path):
    "Whatever it scans has the numbers of the full scan; a journal holds its passes apart."
    auto = probe_dependency(model, processor, samples, layers='auto', journal=tmp_path/'j', progress=False)
    full = probe_dependency(model, processor, samples, progress=False).sel(layer=auto.layer)
    for name in ('nll', 'margin', 'kl'): np.testing.assert_allclose(auto[name], full[name], atol=3e-5)
    assert auto.attrs['scan'] == 'auto' and auto.layer.values[-1] == LAYERS and list(auto.layer.values) == sorted(auto.layer.values)
    assert (tmp_path/'j'/'scan0'/'run.json').is_file()
    again = probe_dependency(model, processor, samples, layers='auto', journal=tmp_path/'j', progress=False)
    assert auto.identical(again)


# Qwen3-Omni

@pytest.fixture(scope='module')
def qwen3():
    tiny = pytest.importorskip('tiny', reason='the small Qwen3-Omni of tests/tiny.py is not here')
    clip = tiny.clip(0)
    samples = [tiny.ask('one', clip), tiny.ask('two', clip, 'where is the red object ?', lettered=True), tiny.ask('silent', tiny.clip(1, 3, sound=False))]
    return tiny.thinker('qwen3-omni'), tiny.processor('qwen3-omni'), samples


def stock_answer(model, encoded, removed, layer):
    "Log-probabilities at the answer position of a stock forward whose layers, and DeepStack, see only what stays from `layer` on."
    decoder, gone = adapter_for(model).decoder(model), torch.zeros_like(encoded.layout.visual)
    if removed in ('visual', 'both'): gone |= encoded.layout.visual
    if removed in ('audio', 'both'): gone |= encoded.layout.audio
    keep, stock = (~gone)[0].nonzero()[:, 0], decoder._deepstack_process
    def add(hidden, mask, embeds):
        short = hidden.shape[1] != mask.shape[1]
        rows = (~gone & mask)[mask] if short else slice(None)  # the embeddings of what stays
        return stock(hidden, mask[:, keep] if short else mask, embeds[rows])
    def before(i):
        def hook(module, args, kwargs):
            hidden = args[0][:, keep] if i == layer else args[0]
            return (hidden, *args[1:]), dict(kwargs, attention_mask=None, position_embeddings=tuple(t[:, keep] for t in kwargs['position_embeddings']))
        return hook
    hooks = [m.register_forward_pre_hook(before(i), with_kwargs=True) for i, m in enumerate(decoder.layers) if i >= layer]
    decoder._deepstack_process = add
    try: return model(**encoded.inputs, use_cache=False).logits[0, -1].log_softmax(-1)
    finally:
        del decoder._deepstack_process
        for h in hooks: h.remove()


@torch.no_grad()
def test_qwen3_omni_equals_plain_and_stock(qwen3):
    "Removal before an early layer also cuts its DeepStack embeddings: layers 0 to 3 are among those compared."
    model, processor, samples = qwen3
    L = adapter_for(model).num_layers(model)
    branch, plain = scores_of(model, processor, samples, layers=list(range(L + 1)))
    assert_same(branch, plain, L)
    encoded = encode(model, processor, samples[:1])
    for removed in NAMES:
        for layer in range(5):
            torch.testing.assert_close(branch['one', removed, layer][0], stock_answer(model, encoded, removed, layer), atol=2e-5, rtol=0)


@torch.no_grad()
def test_qwen3_omni_deepstack_matters(qwen3, monkeypatch):
    "Without the embeddings the numbers are others, so the comparison above sees them."
    model, processor, samples = qwen3
    run = lambda: branch_scores(model, encode_questions(model, processor, samples[:1])[0], ('audio',), [0, 2, adapter_for(model).num_layers(model)])['audio', 2].answer
    whole = run()
    monkeypatch.setattr(probe, 'deepstack_inputs', lambda seen: ())
    assert (run() - whole).abs().max() > 1e-3


@pytest.mark.parametrize('conditions', [NAMES, *[(name,) for name in NAMES]], ids='+'.join)
def test_auto_gives_the_boundaries_of_the_full_scan(conditions):
    "On the testbed's stored profile: the layers that `auto` would have scanned, for all conditions or for one, lead to the same boundaries as all of them."
    import json
    from pathlib import Path
    from seats_analysis.boundaries import find_boundaries
    full = probe.load_profile(Path(__file__).resolve().parents[1]/'data'/'profiles'/'testbed.nc').sel(removed=list(conditions))
    L, needs = int(full.layer[-1]), json.loads(full.attrs['needs'])
    layers = sorted({*range(0, L, round(L**.5)), L})
    while (more := next_layers(full.sel(layer=layers), needs)): layers = sorted({*layers, *more})
    for removed in conditions:
        ours, theirs = (find_boundaries(p, removed) for p in (full.sel(layer=layers), full))
        assert (ours.shallow_end, ours.late_start) == (theirs.shallow_end, theirs.late_start), removed


@pytest.mark.nightly
def test_one_pass_takes_less_time_on_the_testbed():
    "All layers and three conditions, questions that share clips: at most 0.40 of the plain method's time, in seconds of CPU, which neighbours disturb less."
    import time
    from seats_analysis.testbed import load_testbed, testbed_samples
    (thinker, processor), took = load_testbed(), {}
    asked = testbed_samples(split='derive', limit=8)
    for method in ('branch', 'plain'):
        probe_dependency(thinker, processor, asked[:2], method=method, layers=[0], progress=False)  # warm up
        start = time.process_time()
        probe_dependency(thinker, processor, asked, method=method, progress=False)
        took[method] = time.process_time() - start
    assert took['branch'] <= .40*took['plain'], took
