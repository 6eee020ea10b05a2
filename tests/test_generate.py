"""Generation in a pruned block: every way of decoding, both kv policies, further questions. Run
with the oldest supported transformers too."""

import copy
import inspect
import pickle
from threading import Thread

import numpy as np
import pytest
import tiny
import torch

from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import Prompt, encode
from seats_analysis.models.decoder import Decoder
from seats_analysis.baselines.registry import METHODS
from seats_analysis.schedules.cost import kv_bytes
from seats_analysis.inputs.media import Clip
from seats_analysis.inputs.samples import Sample
from seats_analysis.pruning.cache import Slots, follow_up, slots_of
from seats_analysis.pruning.generate import pick_media, repeat_order
from seats_analysis.pruning.session import prune
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.testbed.load import build_processor, build_model

LAYERS, NEW = 6, 5
GREEDY = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
WORDS = list(range(10))  # placeholders and other special tokens, where they would disturb
KV = ("evict", "retain")


def schedule(**changes):
    return Schedule(
        **dict(
            num_layers=LAYERS,
            drop_layers=(2, 3),
            late_start=5,
            entering=dict(visual=0.3, audio=0.5),
            keep_ratios=dict(visual=(0.8, 0.5), audio=(0.9, 0.6)),
        )
        | changes
    )


PLANS = dict(
    all_stages=schedule(),
    visual_leaves_first=schedule(late_start=dict(visual=4, audio=5)),
    stage1=Schedule(num_layers=LAYERS, entering=dict(visual=0.2, audio=0.4)),
    no_late=schedule(late_start=None),
    stage3=Schedule(num_layers=LAYERS, late_start=3),
    at_once=Schedule(num_layers=LAYERS, late_start=0),
)

POLICIES = [*((name, "evict") for name in PLANS), ("all_stages", "retain")]
POLICIES += [("visual_leaves_first", "retain"), ("at_once", "retain")]


def clip(seed, seconds=4, sight=True, sound=True):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 255, (int(2 * seconds), 56, 84, 3), dtype="uint8") if sight else None
    wave = (rng.standard_normal(int(16000 * seconds)) * 0.1).astype("float32") if sound else None
    return Clip(id=f"c{seed}", frames=frames, fps=2.0, waveform=wave, sample_rate=16000)


def ask(name, video, question="what colour is the circle ?"):
    return Sample(id=name, video=video, question=question, choices=("red", "blue"), answer=1)


SAMPLES = [
    ask("both", clip(0)),
    ask("silent", clip(2, 5, sound=False), "where is the red object ?"),
    ask("heard", clip(3, 6, sight=False), "what pitch is heard first ?"),
    ask("text", None),
    ask("odd", clip(4, 4.7)),
]


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def make_model(attention="sdpa"):

    thinker = build_model(layers=LAYERS, seed=0)
    thinker.set_attn_implementation(attention)
    thinker.generation_config.eos_token_id = None  # nothing ends by chance
    thinker.generation_config.pad_token_id = 0
    return thinker.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def batch(model, processor):
    return encode(model, processor, SAMPLES)


@pytest.fixture(scope="module")
def singles(model, processor):
    return [encode(model, processor, [s]) for s in SAMPLES]


@pytest.fixture(scope="module")
def turn(processor):
    text = (
        "<|im_end|> <|im_start|> user what pitch is heard first ? <|im_end|> <|im_start|> assistant"
    )
    return processor.tokenizer(text, return_tensors="pt").input_ids


pytestmark = pytest.mark.usefixtures("no_grad")


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=0)


def new_tokens(model, encoded, **options):
    return model.generate(**encoded.inputs, **options)[:, encoded.shape[1] :]


# ---------------------------------------------------------------- the same numbers, without a cache


def sets_of(run, sample=0):
    "Kept positions in every layer of one sample, from what the run says about its stages."
    layer_of = lambda name: (
        0 if name == "stage1" else int(name.removeprefix("drop").removeprefix("late"))
    )
    here = list(range(int(run.layout.valid[sample].sum())))
    stages = [(layer_of(name), rows[sample].tolist()) for name, rows in run.kept.items()]
    return [next((kept for at, kept in reversed(stages) if at <= l), here) for l in range(LAYERS)]


def recompute(model, encoded, sets, tokens, kv):
    """Logits of the prompt's last position and after each token: one pass over everything, masks
    instead of slices and caches."""
    S, n, decoder = encoded.shape[1], len(tokens), Decoder(model)
    embeds = decoder.inputs(encoded.inputs)["inputs_embeds"]
    h = torch.cat(
        [embeds, model.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))], 1
    )
    positions = torch.cat(
        [encoded.position_ids, encoded.position_ids.max() + torch.arange(1, n + 1).expand(3, 1, n)],
        -1,
    )
    rotary, causal = decoder.rotary_tables(h, positions), torch.ones(S + n, S + n).tril().bool()
    for layer, kept in enumerate(sets):
        seen = torch.zeros(S + n, S + n, dtype=torch.bool)
        seen[:, S:] = seen[:S, kept] = True  # new tokens, and what this layer processed
        seen[S:, kept if kv == "retain" else sets[-1]] = True
        allowed = causal & seen | torch.eye(S + n).bool()
        mask = decoder.mask(allowed[None, None], h.dtype)
        h = decoder.run_layers(h, rotary, mask, layer, layer + 1)
    return decoder.logits(h[0, S - 1 :])


@pytest.mark.parametrize("name, kv", POLICIES)
def test_decoding_with_the_cache_equals_recomputing(model, batch, singles, name, kv):
    "A batch with all kinds of media, decoded token by token from bare forward calls."
    with prune(model, PLANS[name], kv=kv) as run:
        out = model(**batch.inputs, use_cache=True)
        logits, tokens, sets = [out.logits[:, -1]], [], [sets_of(run, i) for i in range(len(batch))]
        for _ in range(3):
            tokens.append(logits[-1].argmax(-1))
            logits.append(
                model(input_ids=tokens[-1][:, None], past_key_values=out.past_key_values).logits[
                    :, -1
                ]
            )
    for i, one in enumerate(singles):
        close(
            torch.stack([l[i] for l in logits]),
            recompute(model, one, sets[i], [t[i].item() for t in tokens], kv),
        )


@pytest.mark.parametrize("name, kv", POLICIES)
def test_cache_lengths(model, singles, name, kv):
    """`retain`: what each layer processed; `evict`: what the last one did. By shape, by count and
    in bytes."""
    for one in singles[:2]:
        with prune(model, PLANS[name], kv=kv) as run:
            cache = model(**one.inputs, use_cache=True).past_key_values
        sets, layers = sets_of(run), cache.layers
        slots = slots_of(cache)
        for l in range(LAYERS):
            real = slots.lengths[l] if slots.valid[l] is None else int(slots.valid[l].sum())
            assert (
                real
                == len(sets[l if kv == "retain" else -1])
                <= layers[l].keys.shape[-2]
                == layers[l].values.shape[-2]
                == cache.get_seq_length(l)
            )
        if all(v is None for v in slots.valid):  # no slot is left free
            assert sum(
                x.nbytes for layer in layers for x in (layer.keys, layer.values)
            ) == kv_bytes([len(s) for s in sets], model.config, kv, 4)


def test_evict_holds_text_only_after_a_late_block(model, singles):
    one = singles[0]
    with prune(model, PLANS["all_stages"], kv="evict"):
        cache = model(**one.inputs, use_cache=True).past_key_values
    assert {layer.keys.shape[-2] for layer in cache.layers} == {
        int(one.layout.text.sum())
    } and slots_of(cache).removed == ("visual", "audio")
    with prune(model, PLANS["visual_leaves_first"], kv="retain"):
        cache = model(**one.inputs, use_cache=True).past_key_values
    text, lengths = int(one.layout.text.sum()), [layer.keys.shape[-2] for layer in cache.layers]
    assert min(lengths[:5]) > lengths[5] == text and slots_of(cache).removed == ()


# ---------------------------------------------------------------- ways of decoding


@pytest.mark.parametrize("kv", KV)
def test_batch_equals_singles(model, batch, singles, kv):
    beams = dict(GREEDY, num_beams=3, num_return_sequences=2)
    for options, rows in ((GREEDY, 1), (beams, 2)):
        with prune(model, PLANS["all_stages"], kv=kv):
            together = new_tokens(model, batch, **options)
            assert together.shape == (rows * len(batch), NEW)
            for i, one in enumerate(singles):
                assert torch.equal(
                    together[i * rows : (i + 1) * rows], new_tokens(model, one, **options)
                ), SAMPLES[i].id


@pytest.mark.parametrize("kv", KV)
def test_beams_know_their_scores(model, batch, singles, kv):
    """The log-probability that beam search reports is that of the sequence it returns, recomputed
    without a cache."""
    with prune(model, PLANS["visual_leaves_first"], kv=kv) as run:
        out = model.generate(
            **batch.inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            num_beams=3,
            num_return_sequences=3,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    assert run.samples == len(batch) and len(run.kept["stage1"]) == 3 * len(batch)
    best = out.sequences_scores.view(len(batch), 3)
    assert (best.diff() <= 0).all() and len({tuple(r) for r in out.sequences[:3].tolist()}) == 3
    for i, one in enumerate(singles):
        for b in range(3):
            tokens = out.sequences[3 * i + b, batch.shape[1] :].tolist()
            logp = recompute(model, one, sets_of(run, 3 * i + b), tokens[:-1], kv).log_softmax(-1)
            close(logp[range(4), tokens].sum(), best[i, b])


def test_sampling(model, batch, singles):
    draw = dict(
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=True,
        num_return_sequences=3,
        temperature=3.0,
    )
    with prune(model, PLANS["all_stages"]):
        greedy = new_tokens(model, batch, **GREEDY)
        assert torch.equal(
            new_tokens(model, batch, **draw, top_k=1), greedy.repeat_interleave(3, 0)
        )  # copies of the right sample
        seeded = lambda: torch.manual_seed(0) and new_tokens(model, batch, **draw, top_k=0)
        drawn = seeded()
        assert torch.equal(drawn, seeded()) and any(
            len({tuple(r) for r in rows.tolist()}) > 1 for rows in drawn.split(3)
        )
        sampled_beams = new_tokens(model, batch, max_new_tokens=NEW, num_beams=2, do_sample=True)
    assert sampled_beams.shape == (len(batch), NEW)


def test_random_draws_once_for_all_copies(model, batch):
    method = METHODS["random"](PLANS["all_stages"], seed=2)
    with prune(model, method) as run:
        _once, kept = new_tokens(model, batch, **GREEDY), run.kept
    with prune(model, method) as run:
        new_tokens(model, batch, **GREEDY, num_beams=2, num_return_sequences=2)
    for stage, rows in run.kept.items():
        for i, row in enumerate(rows):
            assert row.tolist() == kept[stage][i // 2].tolist()
    assert run.samples == len(batch)


def test_keeping_all_is_stock(model, singles):
    for options in (
        GREEDY,
        dict(GREEDY, num_beams=3, num_return_sequences=3),
        dict(max_new_tokens=NEW, do_sample=True, num_return_sequences=2),
    ):
        for one in (singles[0], singles[3]):
            torch.manual_seed(0)
            stock = new_tokens(model, one, **options)
            torch.manual_seed(0)
            with prune(model, Schedule(num_layers=LAYERS)):
                assert torch.equal(new_tokens(model, one, **options), stock)


def test_streaming(model, singles, processor):
    from transformers import TextIteratorStreamer
    from transformers.generation.streamers import BaseStreamer

    class Tokens(BaseStreamer):
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    one, seen = singles[0], Tokens()
    with prune(model, PLANS["all_stages"]):
        want = new_tokens(model, one, **GREEDY)[0].tolist()
        model.generate(**one.inputs, **GREEDY, streamer=seen)
        assert (
            sum(seen.got[1:], []) == want
            and seen.ended
            and seen.got[0] == one.inputs["input_ids"][0].tolist()
        )
        text = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
        thread = Thread(
            target=model.generate, kwargs=dict(one.inputs, **GREEDY, streamer=text)
        )  # as chat front ends do
        thread.start()
        parts = "".join(text)
        thread.join()
    assert parts.split() == processor.tokenizer.decode(want).split()


def test_stopping(model, batch, singles):
    from transformers import StoppingCriteria, StoppingCriteriaList

    class AfterTwo(StoppingCriteria):
        def __call__(self, ids, scores, **kw):
            return torch.full((len(ids),), ids.shape[1] >= start + 2, dtype=torch.bool)

    with prune(model, PLANS["all_stages"]):
        want = new_tokens(model, batch, **GREEDY)
        ends = want[0, 2].item()  # some rows end on it, at their own time
        options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=ends, pad_token_id=0)
        together = new_tokens(model, batch, **options)
        assert together[0].tolist() == want[0, :3].tolist() + [0] * (together.shape[1] - 3)
        for i, one in enumerate(singles):
            alone = new_tokens(model, one, **options)[0].tolist()
            assert (
                together[i].tolist() == alone + [0] * (together.shape[1] - len(alone))
                and alone == want[i, : len(alone)].tolist()
            )
        start = batch.shape[1]
        assert torch.equal(
            new_tokens(
                model,
                batch,
                **GREEDY | dict(min_new_tokens=0),
                stopping_criteria=StoppingCriteriaList([AfterTwo()]),
            ),
            want[:, :2],
        )


def test_prompt_lookup(model, singles):
    """Guessed tokens are checked several at a time and taken back where wrong: the cache can be
    cropped."""
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with prune(model, PLANS["all_stages"], kv="retain"):
        assert torch.equal(
            new_tokens(model, singles[0], **options, prompt_lookup_num_tokens=3),
            new_tokens(model, singles[0], **options),
        )


# ---------------------------------------------------------------- media of several sequences

PROMPTS = [
    Prompt(
        "mixed",
        (
            tiny.clip(1, 2),
            "or",
            tiny.clip(2, 1.3, sight=False),
            tiny.image(0),
            tiny.clip(3, 1, sound=False, size=(56, 56)),
            "what ?",
        ),
    ),
    tiny.ask("text", None),
    tiny.ask("clip", tiny.clip(4, 3)),
    Prompt(
        "sounds",
        (tiny.clip(5, 2, sight=False), "then", tiny.clip(6, 1.5, sight=False), "what is heard ?"),
    ),
]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def other(request):
    "A thinker of each family, with prompts of several clips, sounds and images, and of none."
    thinker, processor = tiny.thinker(request.param), tiny.processor(request.param)
    return (
        thinker,
        encode(thinker, processor, PROMPTS),
        [encode(thinker, processor, [p]) for p in PROMPTS],
    )


@pytest.mark.parametrize(
    "plan, images", [("all_stages", "keep"), ("visual_leaves_first", "prune"), (None, "keep")]
)
def test_beams_over_several_media(other, plan, images):
    """Every beam has the media of its own sample, however many, and what was noted about their
    encoding."""
    thinker, batch, singles = other
    options = dict(GREEDY, num_beams=2, num_return_sequences=2, suppress_tokens=WORDS)
    with prune(thinker, PLANS.get(plan), images=images) as run:
        together, kept = new_tokens(thinker, batch, **options), run.kept
        for i, one in enumerate(singles):
            assert torch.equal(together[2 * i : 2 * i + 2], new_tokens(thinker, one, **options)), (
                PROMPTS[i].id
            )
            for stage in run.kept:
                assert [r.tolist() for r in kept[stage][2 * i : 2 * i + 2]] == [
                    r.tolist() for r in run.kept[stage]
                ]


def test_follow_up_in_both_families(other, turn):
    "A retained batch takes the next turn as its samples do alone; with beams too."
    thinker, batch, singles = other
    beams = dict(GREEDY, num_beams=2, suppress_tokens=WORDS)
    with prune(thinker, PLANS["all_stages"], kv="retain"):
        sequences, cache = first_answer(thinker, batch, suppress_tokens=WORDS)
        whole = follow_up(cache, torch.cat([sequences, turn.expand(len(batch), -1)], 1))
        together = thinker.generate(**whole, **beams)[:, -NEW:]
        for i in (0, 2, 3):
            sequences, cache = first_answer(thinker, singles[i], suppress_tokens=WORDS)
            assert torch.equal(
                together[i : i + 1],
                thinker.generate(**follow_up(cache, torch.cat([sequences, turn], 1)), **beams)[
                    :, -NEW:
                ],
            ), PROMPTS[i].id


def test_pick_media():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = [
            [int(n) for n in rng.integers(1, 4, rng.integers(0, 4))]
            for _ in range(rng.integers(1, 4))
        ]
        sizes, times = sum(rows, []), int(rng.integers(1, 4))
        names = [f"{i}.{j}" for i, r in enumerate(rows) for j in range(len(r))]
        order = repeat_order([sum(r) for r in rows], sizes, times)
        want = [f"{i}.{j}" for i, r in enumerate(rows) for _ in range(times) for j in range(len(r))]
        assert pick_media(names, order, sizes) == want
        if not sizes:
            continue
        flat = torch.tensor([[i, k] for i, n in enumerate(sizes) for k in range(2 * n)])
        assert pick_media(flat, order, sizes).tolist() == [
            [i, k] for i in order for k in range(2 * sizes[i])
        ]


# ---------------------------------------------------------------- further questions


def first_answer(model, encoded, **options):
    out = model.generate(**encoded.inputs, **GREEDY | options, return_dict_in_generate=True)
    return out.sequences, out.past_key_values


def test_follow_up_equals_recomputing(model, singles, turn):
    "The next turn sees what the layers kept for the first question, the answer, and itself."
    for name, i in (("all_stages", 0), ("visual_leaves_first", 4), ("all_stages", 2)):
        one = singles[i]
        with prune(model, PLANS[name], kv="retain") as run:
            sequences, cache = first_answer(model, one)
            sets, inputs = sets_of(run), follow_up(cache, torch.cat([sequences, turn], 1))
            out = model.generate(
                **inputs, **GREEDY, return_dict_in_generate=True, output_logits=True
            )
            assert run.samples == 1  # nothing was prefilled again
        tokens = [
            *sequences[0, one.shape[1] :].tolist(),
            *turn[0].tolist(),
            *out.sequences[0, -NEW:].tolist(),
        ]
        close(torch.cat(out.logits), recompute(model, one, sets, tokens[:-1], "retain")[-NEW:])
        assert cache.get_seq_length() == one.shape[1] + len(tokens) - 1
        slots = slots_of(cache)
        held = [
            cache.get_seq_length(l)
            - (0 if slots.valid[l] is None else int((~slots.valid[l]).sum()))
            for l in range(LAYERS)
        ]
        assert held == [len(s) + len(tokens) - 1 for s in sets]


def test_follow_up_in_a_batch(model, batch, singles, turn):
    """Rows whose answers ended early are padded in the middle; their next turn neither sees the
    padding nor is moved by it."""
    with prune(model, PLANS["all_stages"], kv="retain"):
        sequences, cache = first_answer(model, batch)
        S, lengths = batch.shape[1], [1, 5, 3, 2, 4]  # where the answers end
        answered = torch.arange(NEW) < torch.tensor(lengths)[:, None]
        mask = torch.cat(
            [
                batch.inputs["attention_mask"],
                answered.long(),
                torch.ones(len(batch), turn.shape[1], dtype=torch.long),
            ],
            1,
        )
        inputs = follow_up(cache, torch.cat([sequences, turn.expand(len(batch), -1)], 1), mask)
        together = model.generate(
            **inputs, **GREEDY, return_dict_in_generate=True, output_logits=True
        )
        for i, one in enumerate(singles):
            if i == 3:
                continue  # text only: nothing is pruned when it is alone
            cache = model(**one.inputs, use_cache=True).past_key_values
            for t in sequences[i, S : S + lengths[i] - 1]:
                model(input_ids=t.view(1, 1), past_key_values=cache)
            alone = follow_up(
                cache,
                torch.cat(
                    [one.inputs["input_ids"], sequences[i : i + 1, S : S + lengths[i]], turn], 1
                ),
            )
            out = model.generate(
                **alone, **GREEDY, return_dict_in_generate=True, output_logits=True
            )
            close(torch.stack([l[i] for l in together.logits]), torch.cat(out.logits))


def test_follow_up_with_beams(model, batch, singles, turn):
    options = dict(GREEDY, num_beams=2, num_return_sequences=2)
    with prune(model, PLANS["all_stages"], kv="retain"):
        sequences, cache = first_answer(model, batch)
        before = cache.get_seq_length()
        together = model.generate(
            **follow_up(cache, torch.cat([sequences, turn.expand(len(batch), -1)], 1)), **options
        )[:, -NEW:]
        assert cache.get_seq_length() == before  # the beams had a cache of their own
        for i, one in enumerate(singles):
            if i == 3:
                continue  # text only: nothing is pruned when it is alone
            sequences, cache = first_answer(model, one)
            alone = model.generate(**follow_up(cache, torch.cat([sequences, turn], 1)), **options)[
                :, -NEW:
            ]
            assert torch.equal(together[2 * i : 2 * i + 2], alone)


def stock_inputs(one):
    return {
        **{k: v for k, v in one.inputs.items() if k != "position_ids"},
        "use_audio_in_video": True,
    }


def test_follow_up_the_stock_way(model, singles, turn):
    """With inputs as the processor makes them, `generate` finds its way on a pruned cache by
    itself; after another prompt it would not, and is stopped."""
    for i in (0, 4):
        with prune(model, PLANS["all_stages"], kv="retain"):
            first = lambda: model.generate(
                **stock_inputs(singles[i]), **GREEDY, return_dict_in_generate=True
            )
            out = first()
            whole = torch.cat([out.sequences, turn], 1)
            want = model.generate(**follow_up(out.past_key_values, whole), **GREEDY)[:, -NEW:]
            out = first()
            got = model.generate(
                input_ids=whole,
                attention_mask=torch.ones_like(whole),
                past_key_values=out.past_key_values,
                **GREEDY,
            )
            assert torch.equal(got[:, -NEW:], want)
            out = first()
            model.generate(
                **stock_inputs(singles[2]), max_new_tokens=1
            )  # another prompt leaves its deltas on the model
            with pytest.raises(ValueError, match="do not follow the pruned prompt"):
                model.generate(
                    input_ids=whole,
                    attention_mask=torch.ones_like(whole),
                    past_key_values=out.past_key_values,
                    **GREEDY,
                )
            assert torch.equal(
                model.generate(**follow_up(out.past_key_values, whole), **GREEDY)[:, -NEW:], want
            )


def test_evict_refuses_a_further_question(model, singles, turn):
    for name, gone in (
        ("all_stages", "no visual and no audio"),
        ("visual_leaves_first", "no visual and no audio"),
        ("stage3", "no visual"),
    ):
        with prune(model, PLANS[name], kv="evict"):
            sequences, cache = first_answer(model, singles[0])
            whole = torch.cat([sequences, turn], 1)
            for question in (
                lambda: follow_up(cache, whole),
                lambda: model(input_ids=turn, past_key_values=cache),
                lambda: model.generate(
                    input_ids=whole,
                    attention_mask=torch.ones_like(whole),
                    past_key_values=cache,
                    **GREEDY,
                ),
            ):
                with pytest.raises(ValueError, match=gone) as error:
                    question()
                assert all(
                    w in str(error.value) for w in ('kv="retain"', "prompt_lookup_num_tokens")
                ) and "\n" not in str(error.value)
            goes_on = model.generate(**follow_up(cache, sequences), **GREEDY)[
                :, -NEW:
            ]  # the answer itself may go on
            assert torch.equal(
                goes_on,
                new_tokens(
                    model,
                    singles[0],
                    max_new_tokens=2 * NEW,
                    min_new_tokens=2 * NEW,
                    do_sample=False,
                )[:, NEW:],
            )
    with prune(model, PLANS["no_late"], kv="evict"):  # without a late block media are left
        sequences, cache = first_answer(model, singles[0])
        model.generate(**follow_up(cache, torch.cat([sequences, turn], 1)), **GREEDY)
    with prune(
        model, PLANS["all_stages"], kv="evict"
    ):  # a prompt without media loses nothing, and nothing is pruned from it
        sequences, cache = first_answer(model, singles[3])
        assert slots_of(cache) is None
        model(input_ids=turn, past_key_values=cache)


def test_bad_follow_ups(model, singles, turn):
    from transformers import DynamicCache

    with prune(model, PLANS["all_stages"], kv="retain"):
        sequences, cache = first_answer(model, singles[0])
    whole = torch.cat([sequences, turn], 1)
    for args, word in (
        ((DynamicCache(), whole), "nothing was pruned"),
        ((None, whole), "nothing was pruned"),
        ((cache, turn), "whole conversation"),
        ((cache, whole, torch.ones(1, 3)), "attention_mask"),
    ):
        with pytest.raises(ValueError, match=word):
            follow_up(*args)


def test_a_cache_and_its_copies(model, singles):
    """Shallow and deep copies and a pickled cache go on as the first would; rows can be repeated
    and selected."""
    one, token = singles[0], torch.tensor([[20]])
    with prune(model, PLANS["all_stages"], kv="retain"):
        cache = model(**one.inputs, use_cache=True).past_key_values
        shallow = copy.copy(cache)
        shallow.layers = [copy.copy(layer) for layer in cache.layers]
        others = [shallow, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        many = copy.deepcopy(cache)
        many.batch_repeat_interleave(3)
        want = model(input_ids=token, past_key_values=cache).logits
        for other in others:
            assert (
                other.get_seq_length() == one.shape[1]
                and other.get_seq_length(5) == slots_of(other).lengths[5]
            )
            assert torch.equal(model(input_ids=token, past_key_values=other).logits, want)
        close(
            model(input_ids=token.expand(3, 1), past_key_values=many).logits, want.expand(3, -1, -1)
        )
        many.batch_select_indices(torch.tensor([0]))
        assert len(slots_of(many).position) == 1
        step = model(input_ids=token, past_key_values=cache).logits
        close(model(input_ids=token, past_key_values=many).logits, step)
        cache.crop(-1)
        close(model(input_ids=token, past_key_values=cache).logits, step)
    with pytest.raises(ValueError, match="only 2 came after"):
        cache.crop(-3)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_cache_goes_on_in_a_block_only(batch, singles, kv, attention):
    """With the stock mask its free slots would be seen: it says so and stays as it is. One without
    free slots needs no mask."""
    model = make_model(attention)
    for encoded in (batch, singles[0]):
        token, after = (
            torch.full((len(encoded), 1), 20),
            dict(
                attention_mask=torch.nn.functional.pad(
                    encoded.inputs["attention_mask"], (0, 1), value=1
                ),
                position_ids=encoded.position_ids[..., -1:] + 1,
            ),
        )
        with prune(model, PLANS["all_stages"], kv=kv):
            cache = model(**encoded.inputs, use_cache=True).past_key_values
            others = [copy.deepcopy(cache) for _ in range(3)]
            want = model(input_ids=token, past_key_values=cache, **after).logits
        if encoded is batch:
            lengths = [others[0].get_seq_length(i) for i in range(LAYERS)]
            for more in ({}, dict(position_ids=after["position_ids"]), after):
                with pytest.raises(ValueError, match="free slots"):
                    model(input_ids=token, past_key_values=others[0], **more)
            assert [others[0].get_seq_length(i) for i in range(LAYERS)] == lengths
        elif attention == "sdpa":
            assert torch.equal(
                model(input_ids=token, past_key_values=others[1], **after).logits, want
            )
        with prune(model, None):
            assert torch.equal(
                model(input_ids=token, past_key_values=others[0], **after).logits, want
            )
        with (
            prune(model, PLANS["all_stages"], kv=kv),
            pytest.raises(ZeroDivisionError),
        ):  # nor does a step that fails leave the cache open
            handle = adapter_for(model).layers(model)[3].register_forward_pre_hook(lambda *a: 1 / 0)
            try:
                model(input_ids=token, past_key_values=others[2], **after)
            finally:
                handle.remove()
        if encoded is batch:
            with pytest.raises(ValueError, match="free slots"):
                others[2].update(torch.zeros(0), torch.zeros(0), 0)


def test_steps_with_positions_compute_none(model, batch, monkeypatch):
    "Every step of `generate` has positions; ours are made only where they are used."
    calls, whole = [], Slots.next_positions
    monkeypatch.setattr(Slots, "next_positions", lambda *a: calls.append(a) or whole(*a))
    with prune(model, PLANS["all_stages"]):
        new_tokens(model, batch, **GREEDY)
        assert not calls
        model(
            input_ids=torch.full((len(batch), 1), 20),
            past_key_values=model(**batch.inputs, use_cache=True).past_key_values,
        )
        assert len(calls) == 1


def test_rows_keep_their_own_slots(model, batch, singles):
    "Rows of a padded batch in another order: slots and positions go with them."
    order = torch.tensor([4, 1, 1, 0, 2])
    with prune(model, PLANS["all_stages"], kv="retain"):
        cache, moved = (model(**batch.inputs, use_cache=True).past_key_values for _ in range(2))
        moved.reorder_cache(order)
        tokens = torch.arange(20, 25)[:, None]
        close(
            model(input_ids=tokens[order], past_key_values=moved).logits,
            model(input_ids=tokens, past_key_values=cache).logits[order],
        )


# ---------------------------------------------------------------- refused


def test_refused(model, singles):
    from transformers import DynamicCache

    one = singles[1]
    with prune(model, PLANS["all_stages"]):
        with pytest.raises(ValueError):
            model.generate(**one.inputs, **GREEDY, prefill_chunk_size=64)
        offloaded = DynamicCache()
        offloaded.offloading = True
        with pytest.raises(ValueError, match="offloaded.*dynamic cache"):
            model(**one.inputs, past_key_values=offloaded)
        with pytest.raises(ValueError, match="placeholders"):  # a video too few for the prompts
            twice = {
                k: torch.cat([v, v], 1 if k == "position_ids" else 0)
                if k in ("input_ids", "attention_mask", "position_ids")
                else v
                for k, v in one.inputs.items()
            }
            model.generate(**twice, **GREEDY, num_beams=2)
        assert torch.equal(
            *(new_tokens(model, one, **GREEDY) for _ in range(2))
        )  # and goes on working


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "medium, prompt",
    [
        ("video", tiny.clip(2, 3, sound=False)),
        ("audio", tiny.clip(2, 3, sight=False)),
        ("image", tiny.image(0)),
    ],
)
def test_media_after_the_first_column(family, medium, prompt):
    """On a cache that holds the prompt's beginning they would not be pruned: refused, unless
    nothing would be pruned anyway."""
    from transformers import DynamicCache

    model = tiny.thinker(family)
    one = encode(
        model,
        tiny.processor(family),
        [Prompt("x", ("red blue green where ?", prompt, "what colour is the circle ?"))],
    )
    ids, placed, k = one.inputs["input_ids"], ("attention_mask", "position_ids"), 3

    def begin():
        cache = DynamicCache()
        model(
            input_ids=ids[:, :k],
            **{n: one.inputs[n][..., :k] for n in placed},
            past_key_values=cache,
        )
        return cache

    rest = one.inputs | dict(input_ids=ids[:, k:], position_ids=one.position_ids[..., k:])
    calls = [
        lambda: model(**rest, past_key_values=begin()).logits[:, -1],
        lambda: model.generate(**one.inputs, **GREEDY, past_key_values=begin()),
    ]
    if (
        medium != "audio" and "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    ):  # stock chunks have no sound, and in 5.17 no media
        calls.append(lambda: model.generate(**one.inputs, **GREEDY, prefill_chunk_size=3))
    stock = [call() for call in calls]
    images = "prune" if medium == "image" else "keep"
    with prune(model, PLANS["all_stages"], images=images):
        for call in calls:
            with pytest.raises(ValueError, match=f"holds . columns before {medium}") as error:
                call()
            assert "\n" not in str(error.value)
        assert (
            slots_of(model(**one.inputs, use_cache=True).past_key_values) is not None
        )  # goes on working
    for plan in (None, *([PLANS["all_stages"]] if medium == "image" else [])):
        with prune(model, plan):
            for call, want in zip(calls, stock):
                assert torch.equal(call(), want)


def test_a_further_question_is_text_only(other):
    "A new clip on a pruned cache would be read at the positions of text."
    thinker, batch, singles = other
    with prune(thinker, PLANS["all_stages"], kv="retain"):
        for i in (0, 2, 3):
            sequences, cache = first_answer(thinker, singles[0], suppress_tokens=WORDS)
            more = follow_up(cache, torch.cat([sequences, singles[i].inputs["input_ids"]], 1))
            media = {k: v for k, v in singles[i].inputs.items() if k not in more}
            for call in (
                lambda: thinker(**more, **media),
                lambda: thinker.generate(**more, **media, **GREEDY),
            ):
                with pytest.raises(ValueError, match="text only"):
                    call()
