"""The branch method gives what the plain one gives for less: every layer, condition, family, kind
of question and limit of tokens."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from seats_analysis.storage.schemas import load_profile
from seats_analysis.probing import branches, run
from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import encode, encode_questions
from seats_analysis.schedules.cost import probe_flops
from seats_analysis.inputs.layout import Modality, chunk_ids
from seats_analysis.inputs.media import Clip
from seats_analysis.inputs.samples import Sample
from seats_analysis.probing.selectors import (
    View,
    all_but_sinks,
    check_removed,
    every_token,
    random_fraction,
    time_window,
)
from seats_analysis.probing.branches import Tail, Traversal, branch_scores, removal_scores
from seats_analysis.statistics.intervals import crossings, monotone_fit
from seats_analysis.probing.run import family_curves, next_layers, probe_dependency, within_memory

VISUAL, AUDIO, TEXT, IMAGE, PAD = Modality

LAYERS, NAMES = 4, ("visual", "audio", "both")
WORDS = ("red", "green circle", "blue", "upper-left red square")


def make_clip(seconds, seed, sound=True, sight=True):
    rng = np.random.default_rng(seed)
    wave = rng.standard_normal(int(16000 * seconds), "float32") * 0.1 if sound else None
    return Clip(
        f"clip{seed}",
        rng.integers(0, 255, (int(2 * seconds), 112, 112, 3), dtype="uint8") if sight else None,
        2.0,
        wave,
        16000,
    )


def randomise(thinker, std=1.0):
    "Weights that keep signals alive."
    torch.manual_seed(0)
    for p in thinker.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(
                p, std=std * (p.shape[-1] if p.dim() == 3 else p[0].numel()) ** -0.5
            )
    return thinker.eval()


def qwen25(attention="sdpa"):
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
    from seats_analysis.testbed.load import build_config

    return randomise(
        Thinker._from_config(build_config(layers=LAYERS, tower=32), attn_implementation=attention)
    )


@pytest.fixture(scope="module")
def model():
    return qwen25()


@pytest.fixture(scope="module")
def processor():
    return tiny.tight_processor()


@pytest.fixture(scope="module")
def samples():
    "Three questions on one clip that differ in length, letters and choices; silent, audio, text."
    clip = make_clip(3, 0)
    return [
        Sample("open", clip, "what colour is the circle ?", WORDS, 3, "a", "derive"),
        Sample("letters", clip, "what is it ?", WORDS[:3], 1, "a", "derive", lettered=True),
        Sample("where", clip, "where is the red object ?", WORDS[:2], 0, "b", "derive"),
        Sample(
            "silent",
            make_clip(2, 2, sound=False),
            "where is the red object ?",
            WORDS[:2],
            0,
            "b",
            "test",
        ),
        Sample(
            "heard", make_clip(2.5, 3, sight=False), "what is heard ?", WORDS[1:], 1, "b", "test"
        ),
        Sample(
            "text", None, "what day comes after monday ?", ("tuesday", "friday"), 0, "c", "test"
        ),
    ]


def scores_of(model, processor, samples, removed=NAMES, layers=None, most=4096):
    "(id, condition, layer) -> (answer log-probabilities, totals) by both methods."
    layers, branch, plain = list(range(LAYERS + 1)) if layers is None else layers, {}, {}
    for unit in run.units_of(samples, "branch", 8):
        part = [samples[i] for i in unit]
        for q in encode_questions(model, processor, part):
            found = branch_scores(model, q, removed, layers, most, bypass=True)
            for (name, layer), s in found.items():
                for i, sample in enumerate(q.samples):
                    branch[sample.id, name, layer] = s.answer[i], s.total[i, : len(sample.choices)]
        for sample in part:
            for (name, layer), s in removal_scores(
                model, encode(model, processor, [sample]), removed, layers, bypass=True
            ).items():
                plain[sample.id, name, layer] = s.answer[0], s.total[0, : len(sample.choices)]
    return branch, plain


def assert_same(branch, plain, layers=LAYERS, atol=1e-5):
    "Every plain result has its branch result; what a condition leaves alone is the full run's."
    assert branch.keys() <= plain.keys() and len(plain) > len(branch) / 2
    for (name, removed, layer), (answer, total) in plain.items():
        theirs = branch.get((name, removed, layer), branch[name, None, layers])
        np.testing.assert_allclose(
            theirs[0], answer, atol=atol, err_msg=f"{name} {removed} {layer}"
        )
        np.testing.assert_allclose(
            theirs[1], total, atol=3 * atol, err_msg=f"{name} {removed} {layer}"
        )


@pytest.mark.parametrize("most", [1, 260, 65_536])
def test_equals_plain_at_any_budget(model, processor, samples, most):
    "The whole vocabulary within 1e-5; and no removal without effect, or it would prove nothing."
    branch, plain = scores_of(model, processor, samples, most=most)
    assert_same(branch, plain)
    moved = [
        (plain["open", r, i][0] - plain["open", None, LAYERS][0]).abs().max()
        for r in (*NAMES, None)
        for i in range(LAYERS)
    ]
    assert min(moved) > 1e-3


def test_equals_plain_with_explicit_masks(processor, samples):
    assert_same(*scores_of(qwen25("eager"), processor, samples[:4]))


def test_front_is_shared_or_not(model, processor, samples, monkeypatch):
    "Whether the unaffected front is run again makes no difference."
    own = {}
    for share in (0.0, 2.0):
        monkeypatch.setattr(branches, "SHARE", share)
        assert_same(*scores_of(model, processor, samples[:3]))
        (q,) = encode_questions(model, processor, samples[:3])
        own[share] = [n for _, n in kept(walk_of(model, q))]
    assert all(a < b for a, b in zip(own[0.0], own[2.0]))


def test_some_layers_and_few_logits_at_once(model, processor, samples, monkeypatch):
    monkeypatch.setattr(branches, "LOGITS", 1)
    assert_same(*scores_of(model, processor, samples[:2], layers=[1, 3, LAYERS]))


@torch.no_grad()
def walk_of(model, q):
    return Traversal.of(model, q, check_removed(NAMES))


def kept(walk):
    "(run once, run for every layer) of the context in each condition."
    return [(c.front, len(c.own)) for c in walk.conditions]


@torch.no_grad()
def made_up(model, windows, visual, audio, text):
    "Random states: text, windows of visual and audio tokens side by side, text, a last token."
    from seats_analysis.models.decoder import Decoder

    weight, n = adapter_for(model).lm_head(model).weight, windows * (visual + audio) + 2 * text
    kind = torch.tensor(
        [TEXT] * text + ([VISUAL] * visual + [AUDIO] * audio) * windows + [TEXT] * text,
        dtype=torch.int8,
    )
    hidden = torch.randn(1, n + 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    positions = torch.arange(n + 1, device=weight.device).expand(3, 1, -1)
    decoder = Decoder(model)
    stream = branches.Stream(decoder, hidden, decoder.rotary_tables(hidden, positions))
    tail, runs = Tail.pack([(0,)], [[(1,), (2,)]], weight.device), chunk_ids(kind[None])[0]
    view = View(kind, runs, runs, "made up", adapter_for(model).num_layers(model))
    return stream, tail, {name: every_token((name,))(view) for name in NAMES}


@torch.no_grad()
def by_branch(model, states, most):
    walk = Traversal(*states)
    walk.run(set(range(len(walk.decoder.layers))), most)
    return walk.scores()


@torch.no_grad()
def one_plain_run(model, states, name, layer):
    "One complete run with removal before one layer: the answer's log-probabilities."
    (stream, _, marks), decoder = states, states[0].decoder
    keep = torch.cat([(~marks[name]).nonzero()[:, 0], torch.tensor([len(marks[name])])])
    keep = keep.to(stream.hidden.device)
    hidden = decoder.run_layers(stream.hidden, stream.rotary, None, 0, layer)[:, keep]
    rotary = tuple(t[:, keep] for t in stream.rotary)
    logits = decoder.logits(decoder.run_layers(hidden, rotary, None, layer)[:, -1:])
    return logits.float().log_softmax(-1)[0, 0]


@pytest.mark.parametrize("first, second", [((0,), (3,)), ((0, 3), (3, 0)), ((3, 0, 0), (0, 0))])
@torch.no_grad()
def test_token_0_is_a_token(model, first, second):
    "In front of a choice and inside of one; what a shorter choice lacks is none."
    from seats_analysis.models.decoder import Decoder

    decoder = Decoder(model)
    tail = Tail.pack([(5,), (5,)], [[first, second], [first]])
    logp = decoder.logits(hidden := torch.randn(1, len(tail.wanted), decoder.head.weight.shape[1]))
    logp, (found,) = logp.float().log_softmax(-1)[0].double(), tail.score(decoder, hidden)
    at = iter(range(len(logp)))  # behind the question, then behind every token but the last
    for q, choices in enumerate([[first, second], [first]]):
        answer = next(at)
        for c, ids in enumerate(choices):
            each = [logp[i, t].item() for i, t in zip([answer, *(next(at) for _ in ids[1:])], ids)]
            wanted = sum(each), sum(each) / len(ids), each[0]
            assert [x[q, c] for x in (found.total, found.mean, found.first)] == pytest.approx(
                wanted
            )
    assert np.isnan(found.total[1, 1])


def test_made_up_states(model):
    states = made_up(model, 2, 6, 4, 3)
    for (name, layer), scores in by_branch(model, states, 4096).items():
        if name:
            expected = one_plain_run(model, states, name, layer)
            torch.testing.assert_close(scores.answer[0], expected, atol=1e-5, rtol=0)


@pytest.mark.cuda
def test_seven_billion_at_a_minute_of_video():
    "28 layers, three conditions, 10,866 tokens: under 80 GB, at most 0.40 of the plain time."
    import time
    from transformers import (
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration as Thinker,
    )

    text = dict(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
    )
    with torch.device("cuda"):
        big = Thinker._from_config(
            Qwen2_5OmniThinkerConfig(text_config=text), dtype=torch.bfloat16
        ).eval()
    states = made_up(big, 30, 307, 50, 78)
    assert abs(states[0].hidden.shape[1] - 10_866) < 10

    def timed(work):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    by_branch(big, states, run.MAX_TOKENS)  # warm up
    torch.cuda.reset_peak_memory_stats()
    branch = timed(lambda: by_branch(big, states, run.MAX_TOKENS))
    plain = sum(
        timed(lambda: one_plain_run(big, states, name, layer))
        for name in NAMES
        for layer in range(28)
    )
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(
        f"branch {branch:.1f} s, plain {plain:.1f} s ({branch / plain:.2f}), at most {peak:.1f} GB"
    )
    assert peak < 80 and branch <= 0.40 * plain


def test_states_held_are_those_of_the_closed_form(model, processor, samples):
    "What the page for real checkpoints calculates memory from, up to what is never run apart."
    q = encode_questions(model, processor, samples[:1])[0]
    walk, depth = walk_of(model, q), LAYERS
    with torch.no_grad():
        walk.run(set(range(depth)), 4_096, bypass=True)
    held = sum(
        batch.context.shape[0] * batch.context.shape[1]
        for condition in [*walk.conditions, walk.bypassed]
        for batch in condition.batches
    )
    counts = q.encoded.layout.counts()
    media = int(counts["visual"] + counts["audio"])
    assert 0.7 * depth * 2 * media < held <= depth * (2 * media + 4 * (q.shared - media))


def test_selectors(model, processor, samples):
    asked = {
        "first": time_window(0),
        "late sound": time_window(1, ("audio",)),
        "half": random_fraction(0.5),
        "sinks": all_but_sinks(3),
        "sights": every_token(("visual",)),
        "mine": lambda view: view.media & (view.chunk == 0),
    }
    assert_same(*scores_of(model, processor, samples, asked))


def test_selectors_remove_what_they_say(model, processor, samples):
    (q,) = encode_questions(model, processor, samples[:1])
    encoded, layout, views = q.encoded, q.encoded.layout, []
    ids = torch.zeros(1, 0, dtype=torch.long)
    stream = branches.Stream.enter(
        model, encoded, encoded.shape[1], ids, encoded.position_ids[..., :0]
    )
    watch = lambda view: views.append(view) or view.media
    branches.marks_of(stream, encoded, {"watch": watch})
    view = views[0]
    gone = lambda s: view.mark(s).nonzero()[:, 0].tolist()
    where = lambda mask: mask[0].nonzero()[:, 0].tolist()
    assert gone(time_window(1)) == where(layout.window == 1) and gone(
        every_token(("audio",))
    ) == where(layout.audio)
    assert len(gone(random_fraction(0.25))) == round(0.25 * int(layout.visual.sum())) + round(
        0.25 * int(layout.audio.sum())
    )
    assert (
        gone(random_fraction(0.25))
        == gone(random_fraction(0.25))
        != gone(random_fraction(0.25, seed=1))
    )
    assert len(gone(all_but_sinks(3))) == int((layout.visual | layout.audio).sum()) - 3
    with torch.no_grad():
        norms = view.hidden(LAYERS // 2).norm(dim=-1)
        stock = stream.decoder.thinker(**encoded.inputs, output_hidden_states=True).hidden_states
        for layer in range(LAYERS):  # what goes into it
            expected = stock[layer][0, : len(view.kind)]
            torch.testing.assert_close(view.hidden(layer), expected, atol=1e-4, rtol=1e-4)
    kept = sorted(set(where(layout.visual | layout.audio)) - set(gone(all_but_sinks(3))))
    assert set(kept) == set(norms.masked_fill(~view.media, 0).topk(3).indices.tolist())


def test_chance_is_drawn_for_every_clip():
    "Clips of the same layout do not lose the same positions."
    kind = torch.tensor([VISUAL, AUDIO] * 20, dtype=torch.int8)
    one = View(kind, torch.zeros(40), torch.zeros(40), "a", LAYERS)
    gone = lambda view: view.mark(random_fraction(0.5)).nonzero()[:, 0].tolist()
    assert gone(one) == gone(replace(one)) != gone(replace(one, clip="b"))


def test_questions_share_clip_encoders_and_context(model, processor, samples, monkeypatch):
    "The towers run once, the context is as long as for one question, each tail is its own."
    runs, adapter = [], adapter_for(model)
    hooks = [
        m.register_forward_pre_hook(lambda module, args: runs.append(type(module).__name__))
        for m in (adapter.visual(model), adapter.audio_tower(model))
    ]
    (q,) = encode_questions(model, processor, samples[:3])
    branch_scores(model, q, NAMES, list(range(LAYERS + 1)))
    for h in hooks:
        h.remove()
    assert len(runs) == 2
    for sample, tail in zip(samples[:3], q.tails):
        one = encode(model, processor, [sample])
        assert one.inputs["input_ids"][0].tolist() == q.encoded.inputs["input_ids"][
            0, : q.shared
        ].tolist() + list(tail)
        assert torch.equal(one.position_ids[..., q.shared :], q.positions(torch.arange(len(tail))))


def test_prompts_that_do_not_begin_alike_stand_alone(model, processor, samples):
    "Then each question is encoded with its own media."
    early = replace_template(processor)
    found = encode_questions(model, early, samples[:3])
    assert len(found) == 3 and [q.samples[0].id for q in found] == ["open", "letters", "where"]
    assert_same(*scores_of(model, early, samples[:3], layers=[0, 2, LAYERS]))


def replace_template(processor):
    "A processor that writes the question before the media."
    import copy

    other = copy.copy(processor)
    other.apply_chat_template = lambda messages, **kw: (
        "<|im_start|> user "
        + messages[0]["content"][-1]["text"]
        + " <|vision_bos|><|VIDEO|><|vision_eos|> <|im_end|> <|im_start|> assistant"
    )
    return other


def test_profile_of_both_methods(model, processor, samples):
    "Same decisions, same dataset but for the attributes of the method."
    branch, plain = (
        probe_dependency(model, processor, samples, method=m, progress=False)
        for m in ("branch", "plain")
    )
    assert (branch.correct == plain.correct).all()
    for name in ("nll", "margin", "kl"):
        np.testing.assert_allclose(branch[name], plain[name], atol=3e-5)
    np.testing.assert_array_equal(branch.correct_letter, plain.correct_letter)
    assert branch.coords.equals(plain.coords)
    assert set(branch.attrs) ^ set(plain.attrs) == {"batch_size", "max_branch_tokens"}
    assert branch.n_choices.values.tolist() == [4, 3, 2, 2, 3, 2]


# what needs no answers, or long ones


def test_unlabelled_and_reference_answers(model, processor, samples):
    "Without choices only the divergence is there; with one, its likelihood too."
    whole = probe_dependency(model, processor, samples[:1], progress=False)
    bare = [
        replace(samples[0], id="none", choices=(), answer=-1),
        replace(samples[0], id="one", choices=(WORDS[3],), answer=0),
    ]
    for method in ("branch", "plain"):
        found = probe_dependency(model, processor, bare, method=method, progress=False)
        for i in range(2):
            np.testing.assert_allclose(found.kl[i], whole.kl[0], atol=1e-5)
        np.testing.assert_allclose(found.nll[1], whole.nll[0], atol=3e-5)
        assert (
            found.nll[0].isnull().all() and found.margin.isnull().all() and not found.correct.any()
        )
        assert found.n_choices.values.tolist() == [0, 1]


def test_families_are_kept_apart(model, processor, samples):
    found = probe_dependency(model, processor, samples, progress=False)
    curves = family_curves(found, "nll")
    assert curves.dims == ("family", "removed", "layer") and curves.n.values.tolist() == [2, 3, 1]
    np.testing.assert_allclose(curves.sel(family="a"), found.nll.values[:2].mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        family_curves(found, "nll", split="test").sel(family="b"),
        found.nll.values[3:5].mean(0),
        rtol=1e-6,
    )


# memory


def test_running_out_of_memory_halves_the_budget_and_goes_on(
    model, processor, samples, monkeypatch
):
    plain_run, tried = branches.Decoder.run_layer, []

    def tight(decoder, hidden, *args, **kw):
        tried.append(hidden.shape[0] * hidden.shape[1])
        if tried[-1] > 130:
            raise torch.OutOfMemoryError("CUDA out of memory. (made up)")
        return plain_run(decoder, hidden, *args, **kw)

    expected = probe_dependency(
        model, processor, samples[:3], max_branch_tokens=130, progress=False
    )
    monkeypatch.setattr(branches.Decoder, "run_layer", tight)
    found = probe_dependency(model, processor, samples[:3], max_branch_tokens=1040, progress=False)
    assert max(tried) > 130
    for name in expected.data_vars:
        np.testing.assert_array_equal(found[name], expected[name])
    monkeypatch.setattr(
        branches.Decoder, "run_layer", lambda *a, **kw: tight(a[0], torch.empty(1, 131))
    )
    with pytest.raises(MemoryError, match="a single stream of"):
        probe_dependency(model, processor, samples[:3], progress=False)


def test_other_errors_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="shape"):
        within_memory(lambda tokens: (_ for _ in ()).throw(RuntimeError("shape mismatch")), 8, 1)


def test_a_batch_holds_no_more_than_the_budget(model, processor, samples, monkeypatch):
    seen, plain = [], branches.Decoder.run_layer

    def watch(decoder, hidden, *args, **kw):
        seen.append(tuple(hidden.shape[:2]))
        return plain(decoder, hidden, *args, **kw)

    monkeypatch.setattr(branches.Decoder, "run_layer", watch)
    (q,) = encode_questions(model, processor, samples[:3])
    branch_scores(model, q, NAMES, list(range(LAYERS + 1)), 250)
    assert max(k * n for k, n in seen) <= 250 and max(k for k, n in seen) > 1


# cost


def flops(work):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def testbed():
    from seats_analysis.testbed.load import load_testbed, testbed_samples

    return *load_testbed(), testbed_samples(split="derive", limit=2)


def plain_form(model, one):
    "Closed form of the plain method: a context that is the whole prompt but its last token."
    after = 1 + sum(len(ids) - 1 for ids in one.choice_ids[0])
    dims, length = adapter_for(model).config(model), one.shared + len(one.tails[0]) - 1
    return probe_flops(dims, length, after, kept(walk_of(model, one)), "plain", after, "counter")


@torch.no_grad()
def test_cost_has_a_closed_form(model, processor, samples):
    layers, dims = list(range(LAYERS + 1)), adapter_for(model).config(model)
    (q,) = encode_questions(model, processor, samples[:3])
    (one,) = encode_questions(model, processor, samples[:1])
    single, walk = encode(model, processor, samples[:1]), walk_of(model, q)
    encoders, tail = flops(lambda: walk_of(model, q)), walk.tail
    form = probe_flops(
        dims, q.shared, len(tail.ids), kept(walk), "branch", len(tail.wanted), "counter"
    )
    branch = flops(lambda: branch_scores(model, q, NAMES, layers))
    assert form == pytest.approx(branch - encoders, rel=0.005)
    plain = flops(lambda: removal_scores(model, single, NAMES, layers))
    assert plain_form(model, one) == pytest.approx(plain - encoders, rel=0.005)


@torch.no_grad()
def test_cost_against_plain(testbed):
    "At most 0.35 of the FLOPs, encoders included; the second question costs less than the first."
    model, processor, samples = testbed
    layers = list(range(adapter_for(model).num_layers(model) + 1))
    (q,) = encode_questions(model, processor, samples)
    (one,) = encode_questions(model, processor, samples[:1])
    both, first = (flops(lambda: branch_scores(model, x, NAMES, layers)) for x in (q, one))
    plain = plain_form(model, one) + flops(lambda: walk_of(model, one))
    assert both <= 0.35 * 2 * plain and 0.55 * both < first <= 0.35 * plain


# coarse to fine


def planted(rises, layers):
    import xarray as xr

    at = np.array(layers)
    correct = np.stack(
        [np.clip((at - a + 1) / (b - a + 1), 0, 1) for a, b in rises]
    )  # 0 up to a, 1 from b on
    answers = np.arange(200)[:, None, None] / 200 < 0.25 + 0.75 * correct
    return xr.Dataset(
        {"correct": (("sample", "removed", "layer"), answers)},
        dict(
            removed=list(NAMES[: len(rises)]),
            layer=at,
            family=("sample", ["a"] * 200),
            split=("sample", [""] * 200),
        ),
    )


@pytest.mark.parametrize(
    "num_layers, rises",
    [
        (16, [(3, 9)]),
        (28, [(16, 23)]),
        (28, [(2, 4), (20, 27)]),
        (48, [(27, 39), (0, 1)]),
        (36, [(35, 36)]),
    ],
)
def test_auto_finds_planted_crossings(num_layers, rises):
    "The scanned layers have every crossing of the full curve, and are fewer than all."
    step = round(num_layers**0.5)
    layers = sorted({*range(0, num_layers, step), num_layers})
    while more := next_layers(planted(rises, layers)):
        layers = sorted({*layers, *more})
    full = planted(rises, range(num_layers + 1))
    found = lambda part, name: crossings(
        monotone_fit(part.correct.sel(removed=name).values.mean(0)), part.layer.values, 0.01, 0.1
    )
    for name in full.removed.values:
        assert found(planted(rises, layers), name) == found(full, name)
    assert len(layers) < num_layers + 1


def test_auto_looks_at_the_derive_split_where_there_is_one():
    "Curves of the test split say nothing about the layers that are scanned."
    import xarray as xr

    layers = [0, 7, 14, 21, 28]
    derive, test = (
        planted([rise], layers).assign_coords(split=("sample", [name] * 200))
        for name, rise in dict(derive=(3, 6), test=(22, 26)).items()
    )
    both = xr.concat([derive, test], "sample")
    assert next_layers(both) == next_layers(derive) != next_layers(test)
    whole = both.assign_coords(split=("sample", [""] * 400))
    assert next_layers(whole) != next_layers(both)


def test_auto_is_part_of_the_full_scan(model, processor, samples, tmp_path):
    "Whatever it scans has the numbers of the full scan; a checkpoint holds its passes apart."
    auto = probe_dependency(
        model, processor, samples, layers="auto", checkpoint=tmp_path / "j", progress=False
    )
    full = probe_dependency(model, processor, samples, progress=False).sel(layer=auto.layer)
    for name in ("nll", "margin", "kl"):
        np.testing.assert_allclose(auto[name], full[name], atol=3e-5)
    assert (
        auto.attrs["scan"] == "auto"
        and auto.layer.values[-1] == LAYERS
        and list(auto.layer.values) == sorted(auto.layer.values)
    )
    assert (tmp_path / "j" / "scan0" / "run.json").is_file()
    again = probe_dependency(
        model, processor, samples, layers="auto", checkpoint=tmp_path / "j", progress=False
    )
    assert auto.identical(again)


# Qwen3-Omni


@pytest.fixture(scope="module")
def qwen3():
    tiny = pytest.importorskip("tiny", reason="the small Qwen3-Omni of tests/tiny.py is not here")
    clip = tiny.clip(0)
    samples = [
        tiny.ask("one", clip),
        tiny.ask("two", clip, "where is the red object ?", lettered=True),
        tiny.ask("silent", tiny.clip(1, 3, sound=False)),
    ]
    return tiny.thinker("qwen3-omni"), tiny.processor("qwen3-omni"), samples


def stock_answer(model, encoded, removed, layer):
    "Answer of a stock forward whose layers, and DeepStack, see what stays from `layer` on."
    decoder, gone = adapter_for(model).decoder(model), torch.zeros_like(encoded.layout.visual)
    if removed in ("visual", "both"):
        gone |= encoded.layout.visual
    if removed in ("audio", "both"):
        gone |= encoded.layout.audio
    keep, stock = (~gone)[0].nonzero()[:, 0], decoder._deepstack_process

    def add(hidden, mask, embeds):
        short = hidden.shape[1] != mask.shape[1]
        rows = (~gone & mask)[mask] if short else slice(None)  # the embeddings of what stays
        return stock(hidden, mask[:, keep] if short else mask, embeds[rows])

    def before(i):
        def hook(module, args, kwargs):
            hidden = args[0][:, keep] if i == layer else args[0]
            return (hidden, *args[1:]), dict(
                kwargs,
                attention_mask=None,
                position_embeddings=tuple(t[:, keep] for t in kwargs["position_embeddings"]),
            )

        return hook

    hooks = [
        m.register_forward_pre_hook(before(i), with_kwargs=True)
        for i, m in enumerate(decoder.layers)
        if i >= layer
    ]
    decoder._deepstack_process = add
    try:
        return model(**encoded.inputs, use_cache=False).logits[0, -1].log_softmax(-1)
    finally:
        del decoder._deepstack_process
        for h in hooks:
            h.remove()


@torch.no_grad()
def test_qwen3_omni_equals_plain_and_stock(qwen3):
    "Removal before an early layer also cuts its DeepStack embeddings, in layers 0 to 3."
    model, processor, samples = qwen3
    L = adapter_for(model).num_layers(model)
    branch, plain = scores_of(model, processor, samples, layers=list(range(L + 1)))
    assert_same(branch, plain, L)
    encoded = encode(model, processor, samples[:1])
    for removed in NAMES:
        for layer in range(5):
            torch.testing.assert_close(
                branch["one", removed, layer][0],
                stock_answer(model, encoded, removed, layer),
                atol=2e-5,
                rtol=0,
            )


@torch.no_grad()
def test_qwen3_omni_deepstack_matters(qwen3, monkeypatch):
    "Without the embeddings the numbers are others, so the comparison above sees them."
    model, processor, samples = qwen3
    run = lambda: (
        branch_scores(
            model,
            encode_questions(model, processor, samples[:1])[0],
            ("audio",),
            [0, 2, adapter_for(model).num_layers(model)],
        )["audio", 2].answer
    )
    whole = run()
    monkeypatch.setattr(branches.Decoder, "deepstack_terms", lambda *seen: ())
    assert (run() - whole).abs().max() > 1e-3


@pytest.mark.parametrize("conditions", [NAMES, *[(name,) for name in NAMES]], ids="+".join)
def test_auto_gives_the_boundaries_of_the_full_scan(conditions):
    "On the stored profile, the layers that `auto` would have scanned give the same boundaries."
    import json
    from pathlib import Path
    from seats_analysis.boundaries.find import find_boundaries

    full = load_profile(
        Path(__file__).resolve().parents[1] / "data" / "profiles" / "testbed.nc"
    ).sel(removed=list(conditions))
    L, needs = int(full.layer[-1]), json.loads(full.attrs["needs"])
    layers = sorted({*range(0, L, round(L**0.5)), L})
    while more := next_layers(full.sel(layer=layers), needs):
        layers = sorted({*layers, *more})
    for removed in conditions:
        ours, theirs = (find_boundaries(p, removed) for p in (full.sel(layer=layers), full))
        assert (ours.shallow_end, ours.late_start) == (theirs.shallow_end, theirs.late_start), (
            removed
        )


@pytest.mark.nightly
def test_one_pass_takes_less_time_on_the_testbed():
    "At most 0.40 of the plain method's time, in seconds of CPU, which neighbours disturb less."
    import time
    from seats_analysis.testbed.load import load_testbed, testbed_samples

    (thinker, processor), took = load_testbed(), {}
    asked = testbed_samples(split="derive", limit=8)
    for method in ("branch", "plain"):
        probe_dependency(
            thinker, processor, asked[:2], method=method, layers=[0], progress=False
        )  # warm up
        start = time.process_time()
        probe_dependency(thinker, processor, asked, method=method, progress=False)
        took[method] = time.process_time() - start
    assert took["branch"] <= 0.40 * took["plain"], took
