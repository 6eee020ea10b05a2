"""The branch method gives what the plain one gives for less: every layer, condition, family, kind
of question and limit of tokens."""

from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from functools import partial

import kinds
import naive
import numpy as np
import pytest
import tiny
import torch

from seats_analysis import (
    adapter_for,
    all_but_sinks,
    encode,
    load_testbed,
    probe_dependency,
    probe_flops,
    random_fraction,
    testbed_samples as shipped_samples,
    time_window,
)
from seats_analysis.inputs.layout import Modality
from seats_analysis.models.encode import encode_questions
from seats_analysis.models.scoring import score_choices
from seats_analysis.probing import branches, run
from seats_analysis.probing.branches import Traversal, branch_scores
from seats_analysis.probing.selectors import View, check_removed, every_token

VISUAL, AUDIO, TEXT, *_ = Modality
LAYERS, NAMES, WORDS = 4, ("visual", "audio", "both"), tiny.WORDS


@pytest.fixture(scope="module")
def model():
    return tiny.thinker("qwen2.5-omni", LAYERS)


@pytest.fixture(scope="module")
def processor():
    return tiny.processor("qwen2.5-omni")


@pytest.fixture(scope="module")
def samples():
    return tiny.probed()


def scores_of(model, processor, samples, removed=NAMES, layers=None, most=4096):
    "(id, condition, layer) -> (answer log-probabilities, totals) by both methods."
    layers = list(range(LAYERS + 1)) if layers is None else layers
    found = {}, {}

    def note(into, some, scores):
        for (name, layer), s in scores.items():
            for i, sample in enumerate(some):
                values = s.answer[i], s.total[i, : len(sample.choices)]
                into[sample.id, name, layer] = values

    for unit in run.units_of(samples):
        part = [samples[i] for i in unit]
        for q in encode_questions(model, processor, part):
            asked = branch_scores(model, q, removed, layers, most, bypass=True)
            note(found[0], q.samples, asked)
        for sample in part:
            one = encode(model, processor, [sample])
            plain = naive.removal_scores(model, one, removed, layers, bypass=True)
            note(found[1], [sample], plain)
    return found


def assert_same(branch, plain, atol=1e-5):
    "Every plain result has its branch result; what a condition leaves alone is the full run's."
    assert branch.keys() <= plain.keys() and len(plain) > len(branch) / 2
    for key, expected in plain.items():
        found = branch.get(key, branch[key[0], None, LAYERS])
        for ours, theirs, tol in zip(found, expected, (atol, 3 * atol)):
            np.testing.assert_allclose(ours, theirs, atol=tol, err_msg=str(key))


@pytest.mark.parametrize(
    "family, attention, most",
    [
        *(("qwen2.5-omni", "sdpa", most) for most in (1, 260, 65_536)),
        ("qwen2.5-omni", "eager", 4096),  # explicit masks
        ("qwen3-omni", "sdpa", 4096),  # DeepStack
    ],
)
def test_equals_plain(samples, family, attention, most):
    "The whole vocabulary within 1e-5; and no removal without effect, or it would prove nothing."
    model, processor = tiny.thinker(family, LAYERS, attention), tiny.processor(family)
    branch, plain = scores_of(model, processor, samples, most=most)
    assert_same(branch, plain)
    full = plain["open", None, LAYERS][0]
    moved = [plain["open", r, i][0] - full for r in (*NAMES, None) for i in range(LAYERS)]
    assert min(x.abs().max() for x in moved) > 1e-3


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


@pytest.mark.parametrize("first, second", [((0,), (3,)), ((0, 3), (3, 0)), ((3, 0, 0), (0, 0))])
def test_token_0_is_a_token(model, processor, samples, first, second):
    "In front of a choice and inside of one; what a shorter choice lacks is none."
    some = [replace(samples[1], id=name) for name in "ab"]
    ids = (first, second), (first,)
    prompts = replace(encode(model, processor, some), choice_ids=ids)
    (questions,) = encode_questions(model, processor, some)
    questions = replace(questions, choice_ids=ids)
    found = branch_scores(model, questions, NAMES, [LAYERS])[None, LAYERS]
    expected = score_choices(model, prompts)
    for ours, theirs in (
        (found.total, expected.total),
        (found.mean, expected.mean),
        (found.first, expected.letters),
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.isnan(found.total).tolist() == [[False, False], [False, True]]


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


@torch.no_grad()
def test_selectors_see_the_prompt_and_its_states():
    "Without the keys that late layers share."
    model = kinds.model("gemma4")
    (q,) = encode_questions(model, kinds.processor("gemma4"), kinds.samples("gemma4")[:1])
    encoded, layout, views = q.encoded, q.encoded.layout, []
    ids = torch.zeros(1, 0, dtype=torch.long)
    stream = branches.Stream.enter(
        model, encoded, encoded.shape[1], ids, encoded.position_ids[..., :0]
    )
    watch = lambda view: views.append(view) or view.media
    marked = branches.marks_of(stream, encoded, {"watch": watch})["watch"]
    assert torch.equal(marked, (layout.visual | layout.audio)[0])
    (view,), end = views, int(marked.nonzero().max()) + 1
    for ours, theirs in ((view.kind, layout.modality), (view.window, layout.window)):
        assert torch.equal(ours, theirs[0, :end])
    stock = stream.decoder.thinker(**encoded.inputs, output_hidden_states=True).hidden_states
    for layer in range(LAYERS):  # what goes into it
        torch.testing.assert_close(view.hidden(layer), stock[layer][0, :end], atol=1e-4, rtol=1e-4)
    norms = view.hidden(2).norm(dim=-1).masked_fill(~view.media, 0)
    kept = view.media & ~view.mark(all_but_sinks(3, 2))
    assert kept.nonzero()[:, 0].tolist() == sorted(norms.topk(3).indices.tolist())


def test_chance_is_drawn_for_every_clip():
    "As much of each modality; clips of the same layout do not lose the same positions."
    kind = torch.tensor([VISUAL, AUDIO] * 20, dtype=torch.int8)
    one = View(kind, torch.zeros(40), torch.zeros(40), "a", LAYERS)
    gone = lambda view, seed=0: view.mark(random_fraction(0.25, seed=seed)).nonzero()[:, 0].tolist()
    assert gone(one) == gone(replace(one)) != gone(replace(one, clip="b"))
    assert gone(one) != gone(one, seed=1)
    assert kind[gone(one)].bincount().tolist() == [0, 5, 5]


def test_questions_share_the_encoders(model, processor, samples):
    "The towers run once for all of them."
    ran, adapter = [], adapter_for(model)
    with ExitStack() as stack:
        for tower in (adapter.visual(model), adapter.audio_tower(model)):
            hook = tower.register_forward_pre_hook(lambda module, args: ran.append(module))
            stack.callback(hook.remove)
        (q,) = encode_questions(model, processor, samples[:3])
        branch_scores(model, q, NAMES, list(range(LAYERS + 1)))
    assert len(ran) == 2 and len(q.tails) == 3


def test_prompts_that_do_not_begin_alike_stand_alone(model, processor, samples):
    "Then each question is encoded with its own media."
    early = copy(processor)  # writes the question before the media
    early.apply_chat_template = lambda messages, **kw: (
        f"<|im_start|> user {messages[0]['content'][-1]['text']} "
        "<|vision_bos|><|VIDEO|><|vision_eos|> <|im_end|> <|im_start|> assistant"
    )
    found = encode_questions(model, early, samples[:3])
    assert [[s.id for s in q.samples] for q in found] == [["open"], ["letters"], ["where"]]
    assert_same(*scores_of(model, early, samples[:3], layers=[0, 2, LAYERS]))


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

    def never(decoder, *args, **kw):
        tight(decoder, torch.empty(1, 131))

    ask = partial(probe_dependency, model, processor, samples[:3], progress=False)
    expected = ask(max_branch_tokens=130)
    monkeypatch.setattr(branches.Decoder, "run_layer", tight)
    found = ask(max_branch_tokens=1040)
    assert max(tried) > 130
    for name in expected.data_vars:
        np.testing.assert_array_equal(found[name], expected[name])
    monkeypatch.setattr(branches.Decoder, "run_layer", never)
    with pytest.raises(MemoryError, match="a single stream of"):
        ask()


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
    plain = flops(lambda: naive.removal_scores(model, single, NAMES, layers))
    assert plain_form(model, one) == pytest.approx(plain - encoders, rel=0.005)


@torch.no_grad()
def test_cost_against_plain():
    "At most 0.35 of the FLOPs, encoders included; the second question costs less than the first."
    (model, processor), samples = load_testbed(), shipped_samples(split="derive", limit=2)
    layers = list(range(adapter_for(model).num_layers(model) + 1))
    (q,) = encode_questions(model, processor, samples)
    (one,) = encode_questions(model, processor, samples[:1])
    both, first = (flops(lambda: branch_scores(model, x, NAMES, layers)) for x in (q, one))
    plain = plain_form(model, one) + flops(lambda: walk_of(model, one))
    assert both <= 0.35 * 2 * plain and 0.55 * both < first <= 0.35 * plain
