"""Pruning by hooks: equal to a plain loop without them, alone and in any batch; what is left alone,
what is refused. What a block leaves behind is in test_undo.py."""

from dataclasses import dataclass, replace
from functools import cache

import naive
import pytest
import tiny
import torch
from tiny import PLANS, close
from transformers import StaticCache

from seats_analysis import Schedule, encode, prune
from seats_analysis.inputs.layout import Modality
from seats_analysis.models.encode import layout_of
from seats_analysis.models.scoring import score_choices
from seats_analysis.pruning import encoders
from seats_analysis.pruning.cache import Slots
from seats_analysis.pruning.seats import Seats
from seats_analysis.schedules.cost import kv_bytes

pytestmark = pytest.mark.usefixtures("no_grad")
PLAN, KEEP_ALL = PLANS["together"], Schedule(tiny.LAYERS)
BOTH, SILENT, TEXT = 0, 2, 4  # of `tiny.medley`
THREE = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)


@pytest.fixture(scope="module")
def models():
    return {a: tiny.thinker("qwen2.5-omni", attention=a) for a in ("sdpa", "eager")}


@pytest.fixture(scope="module")
def model(models):
    return models["sdpa"]


@pytest.fixture(scope="module")
def processor():
    return tiny.processor("qwen2.5-omni")


@pytest.fixture(scope="module")
def batch(model, processor):
    return encode(model, processor, tiny.medley())


@pytest.fixture(scope="module")
def singles(model, processor):
    return [encode(model, processor, [s]) for s in tiny.medley()]


@pytest.fixture(scope="module")
def expected(model, singles):
    "Kept positions by stage and by layer, and the last logits, of one sample by a plain loop."
    return cache(lambda name, i: naive.prefill(model, singles[i], PLANS[name]))


def last(model, encoded):
    return model(**encoded.inputs).logits[:, -1]


def prefilled(model, encoded):
    return model(**encoded.inputs, use_cache=True).past_key_values


# ---------------------------------------------------------------- what is computed


def check_cache(cache, one, sets, kv, config):
    "`retain`: what each layer processed; `evict`: what the last one did. Count, shape and bytes."
    slots = Slots.of(cache)
    for l, layer in enumerate(cache.layers):
        held = slots.lengths[l] if slots.valid[l] is None else int(slots.valid[l].sum())
        shapes = {x.shape[-2] for x in (layer.keys, layer.values)}
        assert held == len(sets[l if kv == "retain" else -1]) <= cache.get_seq_length(l)
        assert shapes == {cache.get_seq_length(l)}
    if all(v is None for v in slots.valid):  # no slot is left free
        held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        assert held == kv_bytes([len(s) for s in sets], config, kv, 4)
    kind = one.layout.modality[0]
    gone = [
        m
        for m, c in Modality.CODES.items()
        if (kind == c).any() and not (kind[sets[-1]] == c).any()
    ]
    assert list(slots.removed) == (gone if kv == "evict" else [])


POLICIES = [
    *((name, "evict", "sdpa") for name in PLANS),
    *((name, "retain", "sdpa") for name in ("together", "apart", "from_the_start")),
    *((name, "evict", "eager") for name in ("together", "apart")),
]


@pytest.mark.parametrize("name, kv, attention", POLICIES)
def test_equals_a_plain_loop(models, batch, singles, expected, name, kv, attention):
    "Every sample alone; and in a padded batch, which goes on for three tokens on its cache."
    model = models[attention]
    with prune(model, PLANS[name], kv=kv) as run:
        out = model(**batch.inputs, use_cache=True)
        logits = [out.logits[:, -1]]
        tokens = []
        for _ in range(3):
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            step = model(input_ids=tokens[-1], past_key_values=out.past_key_values)
            logits.append(step.logits[:, -1])
        logits = torch.stack(logits, 1)
        tokens = torch.cat(tokens, 1).tolist()
    kept, counts = run.kept, run.tokens_per_layer.tolist()
    for i, one in enumerate(singles):
        with prune(model, PLANS[name], kv=kv) as run:
            alone = model(**one.inputs, use_cache=True)
        want, sets, logits_alone = expected(name, i)
        close(alone.logits[:, -1], logits_alone)
        for rows, row in (kept, i), (run.kept, 0):
            for stage in rows:
                assert rows[stage][row].tolist() == want[stage], stage
        assert counts[i] == run.tokens_per_layer[0].tolist() == [len(s) for s in sets]
        close(logits[i], naive.continued(model, one, sets, tokens[i], kv))
        if run.kept:
            check_cache(alone.past_key_values, one, sets, kv, model.config)


CACHES = dict(
    some=dict(visual=(2, 4), audio=(1, 5)),
    only_sound=dict(visual=(0, 0), audio=(0, 6)),
    none=dict(visual=(0, 0), audio=(0, 0)),
)


@pytest.mark.parametrize("name", ["together", "apart", "stage1", "all"])
@pytest.mark.parametrize("ranges", CACHES)
def test_layers_that_keep_no_media_for_the_answer(model, batch, singles, name, ranges):
    "As a plain loop with masks, alone and in a padded batch; every slot of a lone sample is real."
    bare = PLANS.get(name, KEEP_ALL)
    plan = replace(bare, cache=CACHES[ranges])
    tokens = [[5, 9, 3]] * len(singles)

    def run(encoded):
        out = model(**encoded.inputs, use_cache=True)
        logits = [out.logits[:, -1]]
        for t in tokens[0]:
            new = torch.full((len(encoded.samples), 1), t)
            logits.append(model(input_ids=new, past_key_values=out.past_key_values).logits[:, -1])
        return torch.stack(logits, 1), out.past_key_values

    with prune(model, plan):
        together, _ = run(batch)
    for i, one in enumerate(singles):
        with prune(model, plan) as ran:
            alone, cache = run(one)
        sets = naive.prefill(model, one, bare)[1] if bare.stages else [range(one.shape[1])] * 6
        want = naive.continued(model, one, sets, tokens[i], "retain", plan.cache)
        close(alone[0], want)
        close(together[i], want)
        kind = one.layout.modality[0]
        slots = Slots.of(cache)
        for layer, processed in enumerate(sets):
            away = [Modality.CODES[m] for m, (a, b) in plan.cache.items() if not a <= layer < b]
            left = sum(kind[p].item() not in away for p in processed)
            held = slots.valid[layer]
            assert left == (slots.lengths[layer] if held is None else held.sum())
        assert ran.tokens_per_layer[0].tolist() == [len(s) for s in sets]


def test_padding_on_the_right(model, batch, singles):
    "The same logits and positions; a cut sequence ends with the last token of every row."
    S = batch.shape[1]
    inputs = dict(batch.inputs)
    for name, value, dim in (("input_ids", 0, 0), ("attention_mask", 0, 0), ("position_ids", 1, 1)):
        rows = [
            torch.nn.functional.pad(one.inputs[name], (0, S - one.shape[1]), value=value)
            for one in singles
        ]
        inputs[name] = torch.cat(rows, dim)
    for name in ("together", "stage2", "apart"):
        with prune(model, PLANS[name]) as run:
            together = model(**inputs).logits[:, -1]
            kept = run.kept
            for i, one in enumerate(singles):
                close(together[i : i + 1], last(model, one))
                for stage in run.kept:
                    assert kept[stage][i].tolist() == run.kept[stage][0].tolist()


def test_choices_are_scored_from_the_pruned_cache(model, batch, singles, expected):
    "The prompt is pruned once; every answer continues it."
    with prune(model, PLAN, kv="retain"):
        together = score_choices(model, batch).mean
    for i, one in enumerate(singles):
        for c, ids in enumerate(one.choice_ids[0]):
            ids = list(ids)
            logits = naive.continued(model, one, expected("together", i)[1], ids, "retain")
            of_each = logits.log_softmax(-1)[range(len(ids)), ids]
            close(together[i, c], of_each.mean())


@pytest.mark.parametrize("seconds", [1.0, 2.0, 4.0])
def test_audio_windows_follow_the_schedule(model, singles, monkeypatch, seconds):
    "For the choice and for the statistic; 2 s are what the model's own rates say."
    asked, whole = [], encoders.attention_received

    def received(q, k, sizes):
        asked.append(sizes)
        return whole(q, k, sizes)

    monkeypatch.setattr(encoders, "attention_received", received)
    with prune(model, tiny.schedule(windows=dict(visual_grids=2, seconds=seconds))) as run:
        last(model, singles[BOTH])
    windows = [int(5 * seconds)] * int(4 / seconds)
    heard = run.layout.window[0][run.layout.modality[0] == Modality.AUDIO]
    assert heard.bincount().tolist() == windows
    assert [2 * n for n in windows] in asked  # rows of the tower: two for each token
    usual = layout_of(model, singles[BOTH].inputs, "keep").window
    assert torch.equal(run.layout.window, usual) == (seconds == 2.0)


# ---------------------------------------------------------------- where nothing is cut


def static(model):
    return StaticCache(config=model.config.get_text_config(), max_cache_len=400)


def everything(model, encoded):
    "A cache of fixed length, labels, and hidden states: any call will do."
    out = model(
        **encoded.inputs,
        past_key_values=static(model),
        labels=encoded.inputs["input_ids"],
        output_hidden_states=True,
    )
    return [out.logits, out.loss, *out.hidden_states]


def generating(**options):
    def call(model, encoded):
        out = model.generate(
            **encoded.inputs, **THREE | options, return_dict_in_generate=True, output_logits=True
        )
        return [out.sequences, *out.logits]

    return call


CALLS = dict(
    forward=lambda model, encoded: [last(model, encoded)],
    everything=everything,
    greedy=generating(),
    beams=generating(num_beams=3, num_return_sequences=3),
    sampling=generating(do_sample=True, num_return_sequences=2),
    static=generating(cache_implementation="static", disable_compile=True),
)


@pytest.mark.parametrize("how", CALLS)
def test_no_bit_changes_where_nothing_is_cut(model, batch, singles, how):
    for plan, kv, encoded in (
        (None, "evict", batch),
        (KEEP_ALL, "evict", batch),
        (KEEP_ALL, "retain", batch),
        (PLAN, "evict", singles[TEXT]),
    ):
        torch.manual_seed(0)
        stock = CALLS[how](model, encoded)
        torch.manual_seed(0)
        with prune(model, plan, kv=kv) as run:
            ours = CALLS[how](model, encoded)
            assert Slots.of(prefilled(model, encoded)) is None
        assert len(ours) == len(stock) and all(map(torch.equal, ours, stock))
        assert run.kept == {} and torch.equal(run.layout.modality, encoded.layout.modality)
        assert (run.tokens_per_layer == encoded.layout.valid.sum(1).numpy()[:, None]).all()
        assert run.timings.ms["prefill"] > 0 and (
            encoded is not batch or run.timings.ms["encoders"] > 0
        )


# ---------------------------------------------------------------- refused


@dataclass(frozen=True)
class Careless(Seats):
    "Keeps another number of tokens than planned, at one stage, of the last sample."

    stage: int = 1
    more: int = 1
    name = "careless"

    def change(self, keep):
        index = (keep if self.more < 0 else ~keep).nonzero()[-1]
        return keep.index_fill(0, index, self.more > 0)

    def select(self, inputs):
        keep = super().select(inputs)
        return self.change(keep) if self.stage == 1 else keep

    def drop(self, tokens, scores, step, windows):
        keep = super().drop(tokens, scores, step, windows)
        if self.stage == 2:
            media = (tokens.is_("visual") | tokens.is_("audio"))[-1].nonzero()[:, 0]
            keep[-1, media] = self.change(keep[-1, media])
        return keep


@pytest.mark.parametrize("more", [1, -1])
@pytest.mark.parametrize(
    "stage, place", [(1, "stage I, before layer 0"), (2, "stage II, before layer 2")]
)
def test_a_method_that_miscounts_is_named(model, batch, singles, stage, place, more):
    """Too many would push out the first tokens of the prompt, too few would let dropped ones in;
    nothing would tell."""
    for encoded in (batch, singles[BOTH]):
        line = f"{place}: method 'careless', sample {len(encoded) - 1}, kept"
        with prune(model, Careless(PLAN, stage, more)) as run:
            with pytest.raises(ValueError, match=line) as error:
                last(model, encoded)
        assert "\n" not in str(error.value) and run.kept == {}


def twice(model, one):
    "Two prompts, and the video of one."
    given = {
        name: torch.cat([one.inputs[name]] * 2, dim)
        for name, dim in (("input_ids", 0), ("attention_mask", 0), ("position_ids", 1))
    }
    model.generate(**one.inputs | given, **THREE, num_beams=2)


def short_mask(model, one):
    token = torch.ones(1, 1, dtype=torch.long)
    cache = prefilled(model, one)
    model(input_ids=token, attention_mask=torch.ones(1, 5), past_key_values=cache)


REFUSED = {  # a part of the message -> the call
    "fewer logits than `labels`": lambda m, one: m(**one.inputs, labels=one.inputs["input_ids"]),
    "`attention_mask` covers the prompt": short_mask,
    "row 1 has placeholders": twice,
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_calls(model, singles, line):
    "With one line; the block goes on. More of them are in test_own_code.py."
    one = singles[SILENT]
    with prune(model, PLAN):
        want = last(model, one)
        with pytest.raises(ValueError, match=line):
            REFUSED[line](model, one)
        assert torch.equal(last(model, one), want)


# ---------------------------------------------------------------- going on


def test_padded_follow_up_on_a_retained_cache(model, singles):
    "A second turn that is left-padded in the batch: its padding is not seen, then or later."
    one = singles[BOTH]
    mask = one.inputs["attention_mask"]
    at = one.position_ids[..., -1:]
    logits = []
    for turn, seen, steps in (([20, 21], [1, 1], [1, 2]), ([5, 20, 21], [0, 1, 1], [0, 1, 2])):
        seen = torch.cat([mask, torch.tensor([seen])], 1)
        with prune(model, PLAN, kv="retain"):
            cache = prefilled(model, one)
            turn = model(
                input_ids=torch.tensor([turn]),
                attention_mask=seen,
                position_ids=torch.cat([at + n for n in steps], -1),
                past_key_values=cache,
            )
            after = model(
                input_ids=torch.tensor([[22]]),
                attention_mask=torch.nn.functional.pad(seen, (0, 1), value=1),
                position_ids=at + 3,
                past_key_values=cache,
            )
        logits.append(torch.stack([turn.logits[:, -1], after.logits[:, -1]]))
    close(*logits)


def test_several_prompts_in_one_block(model, singles):
    "Generations follow one another, and caches of two prompts are continued in turn."
    prompts = singles[BOTH], singles[SILENT]

    def step(cache):
        return model(input_ids=torch.tensor([[20]]), past_key_values=cache).logits

    with prune(model, PLAN, kv="retain") as run:
        alone = [step(prefilled(model, one)) for one in prompts]
        caches = [prefilled(model, one) for one in prompts]
        assert all(map(torch.equal, map(step, caches), alone))
        assert run.samples == 4
