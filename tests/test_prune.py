"""Pruning by hooks: equal to a plain forward written without them, to itself in any batch. What is
left behind is in test_undo.py."""

from dataclasses import dataclass
import numpy as np, pytest, tiny, torch
from torch.utils._python_dispatch import TorchDispatchMode
from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import encode, layout_of
from seats_analysis.models.decoder import Decoder
from seats_analysis.models.scoring import score_choices
from seats_analysis.baselines.registry import METHODS
from seats_analysis.inputs.layout import AUDIO, PAD, VISUAL
from seats_analysis.inputs.media import Clip
from seats_analysis.inputs.samples import Sample
from seats_analysis.pruning.seats import Seats
from seats_analysis.pruning.cache import slots_of
from seats_analysis.pruning.session import prune
from seats_analysis.schedules.schedule import Schedule
from plain import stage2
from seats_analysis.testbed.load import build_processor, build_model

LAYERS, schedule = tiny.LAYERS, tiny.schedule
CODE = dict(visual=VISUAL, audio=AUDIO)


def none_kept(**changes):  # no drops, no stage I
    return Schedule(num_layers=LAYERS, **changes)


PLANS = dict(
    all_stages=schedule(),
    stage1=none_kept(entering=dict(visual=0.2, audio=0.4)),
    stage1_visual=none_kept(entering=dict(visual=0.2, audio=1.0)),
    stage2=none_kept(drop_layers=(1, 4), keep_ratios=dict(visual=(0.3, 0.5), audio=(0.6, 0.4))),
    stage3=none_kept(late_start=3),
    stage3_at_once=none_kept(late_start=0),
    visual_leaves_first=schedule(late_start=dict(visual=4, audio=5)),
    audio_leaves_first=schedule(late_start=dict(visual=6, audio=3)),
    drop_after_one_left=schedule(
        drop_layers=(2, 4),
        late_start=dict(visual=3, audio=5),
        keep_ratios=dict(visual=(0.8, 1.0), audio=(0.9, 0.6)),
    ),
    drop_and_late_together=schedule(drop_layers=(2, 5), late_start=5),
)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def make_model(seed=0, layers=LAYERS, attention="sdpa"):

    model = build_model(layers=layers, seed=seed)
    model.set_attn_implementation(attention)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def clip(seed, seconds=4, sight=True, sound=True):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 255, (int(2 * seconds), 56, 84, 3), dtype="uint8") if sight else None
    wave = (rng.standard_normal(int(16000 * seconds)) * 0.1).astype("float32") if sound else None
    return Clip(id=f"c{seed}", frames=frames, fps=2.0, waveform=wave, sample_rate=16000)


def ask(name, video, question="what colour is the circle ?", **kw):
    return Sample(
        id=name,
        video=video,
        question=question,
        choices=("red", "blue", "green", "white"),
        answer=1,
        **kw,
    )


SAMPLES = [
    ask("both", clip(0)),
    ask("lettered", clip(1, 3), lettered=True),
    ask("silent", clip(2, 5, sound=False), "where is the red object ?"),
    ask("heard", clip(3, 6, sight=False), "what pitch is heard first ?"),
    ask("text", None),
    ask("odd", clip(4, 4.7)),
]


@pytest.fixture(scope="module")
def batch(model, processor):
    return encode(model, processor, SAMPLES)


@pytest.fixture(scope="module")
def singles(model, processor):
    return [encode(model, processor, [s]) for s in SAMPLES]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=0)


def last(model, encoded, **kw):
    return model(**encoded.inputs, **kw).logits[:, -1]


# ---------------------------------------------------------------- a forward without hooks


def softmax_received(q, k, width):
    "Attention received, window by window and head by head."
    out = torch.zeros(len(q))
    for start in range(0, len(q), width):
        w = slice(start, start + width)
        for h in range(q.shape[1]):
            out[w] += (
                torch.softmax(q[w, h].double() @ k[w, h].double().T / q.shape[-1] ** 0.5, -1)
                .sum(0)
                .float()
                / q.shape[1]
            )
    return out


def naive_greedy(x, a, n):
    "Greedy max-min choice in one window, in float64."
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    d = (1 - x @ x.T) * a.double()
    if n >= len(x):
        return list(range(len(x)))
    chosen = [int(d.sort(0).values[min(1, len(x) - 1)].argmax())]
    while len(chosen) < n:
        gain = d[chosen].amin(0)
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
    return sorted(chosen)


def tower_statistics(model, encoded):
    "Attention received by each visual and audio token, from the towers' own queries and keys."
    seen, handles = {}, []
    visual, audio = adapter_for(model).visual(model), adapter_for(model).audio_tower(model)
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as stock

    def keep(name):
        return lambda m, args, kwargs: seen.update({name: (args, kwargs)})

    handles += [
        visual.blocks[-1].attn.register_forward_pre_hook(keep("v"), with_kwargs=True),
        audio.layers[-1].self_attn.register_forward_pre_hook(keep("a"), with_kwargs=True),
    ]
    inputs = Decoder(model).inputs(encoded.inputs)
    for h in handles:
        h.remove()
    out = {}
    if "v" in seen:
        args, kwargs = seen["v"]
        x, attn = (args[0] if args else kwargs["hidden_states"]), visual.blocks[-1].attn
        q, k = (p(x).view(len(x), attn.num_heads, -1) for p in (attn.q, attn.k))
        q, k = stock.apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
        t, h, w = encoded.inputs["video_grid_thw"][0].tolist()
        # window_size is one merged token here and windows never mix temporal grids: natural order
        out["visual"] = softmax_received(q, k, 2 * h * w).view(-1, 4).mean(1)
    if "a" in seen:
        args, kwargs = seen["a"]
        x, attn = (args[0] if args else kwargs["hidden_states"]), audio.layers[-1].self_attn
        q, k = (p(x).view(len(x), attn.num_heads, -1) for p in (attn.q_proj, attn.k_proj))
        out["audio"] = softmax_received(q, k, 40)[: len(x) // 2 * 2].view(-1, 2).mean(1)
    return inputs, out


def kept_of(n, ratio):
    return min(n, max(1, round(n * ratio))) if n else 0


def naive_prefill(model, encoded, plan):
    """Plain loop over the decoder layers with plain slicing, one sample; kept positions per stage
    and per layer, last logits."""
    assert len(encoded) == 1
    ad, layout = adapter_for(model), encoded.layout
    inputs, stat = tower_statistics(model, encoded)
    h, positions, kind = inputs["inputs_embeds"], encoded.position_ids, layout.modality[0]
    here, aim, kept, sets = list(range(len(kind))), {}, {}, []
    chosen = [i for i in here if kind[i] not in (VISUAL, AUDIO)]
    for name, code in CODE.items():
        mine, windows = [i for i in here if kind[i] == code], layout.window[0]
        aim[name] = 0
        for w in sorted({int(windows[i]) for i in mine}):
            group = [i for i in mine if windows[i] == w]
            n = kept_of(len(group), plan.entering[name])
            first = mine.index(group[0])
            pick = naive_greedy(h[0, group], stat[name][first : first + len(group)], n)
            chosen += [group[j] for j in pick]
            aim[name] += n
    if plan.entering != dict(visual=1, audio=1):
        here = kept["stage1"] = sorted(chosen)
    h, layers = h[:, here], ad.layers(model)
    cos, sin = ad.decoder(model).rotary_emb(h, positions)
    for l, layer in enumerate(layers):
        at = lambda t: t[:, here]
        if l in plan.drop_layers:
            i = plan.drop_layers.index(l)
            aim = {m: kept_of(aim[m], plan.keep_ratios[m][i]) for m in aim}
            scores = naive_scores(
                layers[l - 1],
                h,
                at(cos),
                at(sin),
                [j for j, p in enumerate(here) if kind[p] not in (VISUAL, AUDIO)][-1],
            )
            keep = stage2(
                scores,
                kind[None, here],
                layout.chunk[:, here],
                int(layout.chunk.max()) + 1,
                [aim["visual"]],
                [aim["audio"]],
                plan.temperature,
                ratio=plan.keep_ratios["visual"][i],
            )[0].tolist()
            h, here = h[:, keep], [p for p, k in zip(here, keep) if k]
            kept[f"drop{l}"] = here
        gone = [c for m, c in CODE.items() if plan.late(m) == l]
        if gone:
            aim = {m: 0 if c in gone else aim[m] for m, c in CODE.items()}
            keep = [kind[p] not in gone for p in here]
            h, here = h[:, keep], [p for p, k in zip(here, keep) if k]
            kept[f"late{l}"] = here
        sets.append(here)
        h = run_layer(
            layer, h, cos[:, here], sin[:, here], torch.ones(len(here), len(here)).tril().bool()
        )
    return kept, sets, ad.lm_head(model)(ad.decoder(model).norm(h))[:, -1]


def run_layer(layer, h, cos, sin, mask):
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
    return layer(h, attention_mask=bias, position_embeddings=(cos, sin))


def naive_scores(layer, h, cos, sin, query):
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb

    x, a = layer.input_layernorm(h), layer.self_attn
    q, k = (p(x).view(1, h.shape[1], -1, a.head_dim).transpose(1, 2) for p in (a.q_proj, a.k_proj))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.softmax(
        torch.einsum("bhd,bhsd->bhs", q[:, :, query], k) / a.head_dim**0.5, -1
    ).mean(1)


def naive_continue(model, encoded, sets, tokens, kv):
    "Logits after the prompt and `tokens`, recomputed from nothing, on given kept sets."
    ad, S = adapter_for(model), encoded.shape[1]
    n = len(tokens)
    h = torch.cat(
        [
            Decoder(model).inputs(encoded.inputs)["inputs_embeds"],
            model.get_input_embeddings()(torch.tensor([tokens])),
        ],
        1,
    )
    positions = torch.cat(
        [encoded.position_ids, encoded.position_ids[..., -1:] + torch.arange(1, n + 1)], -1
    )
    cos, sin = ad.decoder(model).rotary_emb(h, positions)
    before = list(range(S + n))
    for layer, here in zip(ad.layers(model), sets):
        here = list(here) + list(range(S, S + n))
        h = h[:, [before.index(p) for p in here]]
        mask = torch.ones(len(here), len(here)).tril().bool()
        if kv == "evict":  # new tokens see only what the last layer kept
            lost = torch.tensor([p < S and p not in sets[-1] for p in here])
            mask[-n:, lost] = False
        h, before = run_layer(layer, h, cos[:, here], sin[:, here], mask), here
    return ad.lm_head(model)(ad.decoder(model).norm(h))[0, -n - 1 :]


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("name", PLANS)
def test_equals_plain_slicing(model, singles, name):
    for encoded in (singles[0], singles[2], singles[5]):
        kept, sets, logits = naive_prefill(model, encoded, PLANS[name])
        with prune(model, PLANS[name]) as run:
            close(last(model, encoded), logits)
        for stage in run.kept:
            assert run.kept[stage][0].tolist() == kept[stage], stage
        assert run.tokens_per_layer[0].tolist() == [len(s) for s in sets]


BOTH = [*((name, "evict") for name in PLANS), ("all_stages", "retain")]


@pytest.mark.parametrize("name, kv", BOTH)
def test_batch_equals_singles(model, batch, singles, name, kv):
    with prune(model, PLANS[name], kv=kv) as run:
        together, kept, counts = last(model, batch), run.kept, run.tokens_per_layer
        for i, one in enumerate(singles):
            close(together[i : i + 1], last(model, one))
            assert counts[i].tolist() == run.tokens_per_layer[0].tolist()
            for stage in run.kept:
                assert kept[stage][i].tolist() == run.kept[stage][0].tolist()


def test_eager_equals_sdpa(model, batch):
    eager = make_model(attention="eager")
    for plan in (PLANS["all_stages"], PLANS["visual_leaves_first"]):
        with prune(model, plan), prune(eager, plan):
            close(last(model, batch), last(eager, batch))


def test_kept_counts_are_those_of_the_schedule(model, singles):
    with prune(model, PLANS["all_stages"]) as run:
        last(model, singles[0])
    kind, plan = singles[0].layout.modality[0], PLANS["all_stages"]
    n = {
        m: sum(
            kept_of(s, plan.entering[m])
            for s in np.bincount(singles[0].layout.window[0][kind == c])
        )
        for m, c in CODE.items()
    }
    text = int((kind == 0).sum())
    for stage, i in (("stage1", None), ("drop2", 0), ("drop3", 1)):
        if i is not None:
            n = {m: kept_of(n[m], plan.keep_ratios[m][i]) for m in n}
        assert len(run.kept[stage][0]) == text + sum(n.values())
    assert run.kept["late5"][0].tolist() == (kind == 0).nonzero()[:, 0].tolist()


def test_text_and_special_tokens_stay(model, batch):
    pads = (batch.layout.modality == PAD).sum(1)
    with prune(model, PLANS["all_stages"]) as run:
        last(model, batch)
    for stage, rows in run.kept.items():
        for i, row in enumerate(rows):
            text = (batch.layout.modality[i] == 0).nonzero()[:, 0] - pads[i]
            assert set(text.tolist()) <= set(row.tolist()) and (row.diff() > 0).all()


# ---------------------------------------------------------------- keeping everything


def test_keeping_all_is_bit_identical(model, batch):
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    logits, tokens = last(model, batch), model.generate(**batch.inputs, **options)
    for kv in ("evict", "retain"):
        with prune(model, none_kept(), kv=kv) as run:
            assert torch.equal(last(model, batch), logits)
            cache = model(**batch.inputs, use_cache=True).past_key_values
            assert slots_of(cache) is None and run.kept == {}
            assert (run.tokens_per_layer == batch.layout.valid.sum(1).numpy()[:, None]).all()
            assert torch.equal(model.generate(**batch.inputs, **options), tokens)


def test_text_only_is_left_alone(model, singles):
    logits = last(model, singles[4])
    with prune(model, PLANS["all_stages"]) as run:
        assert torch.equal(last(model, singles[4]), logits) and run.kept == {}


def test_no_plan_only_measures(model, batch):
    logits = last(model, batch)
    with prune(model, None) as run:
        assert torch.equal(last(model, batch), logits)
    assert run.timings.ms["prefill"] > 0 and run.timings.ms["encoders"] > 0


def test_no_plan_takes_any_call(model, singles):
    "Where nothing is cut any cache will do, and any output."
    from transformers import StaticCache

    static = lambda: StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    call = lambda one: model(
        **one.inputs,
        past_key_values=static(),
        labels=one.inputs["input_ids"],
        output_hidden_states=True,
    )
    for plan, one in (
        (None, singles[0]),
        (PLANS["all_stages"], singles[4]),
        (none_kept(), singles[0]),
    ):
        stock = call(one)
        with prune(model, plan):
            ours = call(one)
        assert torch.equal(ours.logits, stock.logits) and ours.loss == stock.loss
    with (
        prune(model, PLANS["all_stages"]),
        pytest.raises(ValueError, match="StaticCache.*dynamic cache"),
    ):
        call(singles[0])


def test_no_plan_measures_static_generation(model, batch):
    "Where `generate` makes its masks beforehand, for a cache of fixed length."
    options = dict(
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
    )
    stock = model.generate(**batch.inputs, **options)
    with prune(model, None) as run:
        assert torch.equal(model.generate(**batch.inputs, **options), stock)
    assert torch.equal(run.layout.modality, batch.layout.modality)


def test_labels_are_refused(model, batch):
    with (
        prune(model, PLANS["all_stages"]),
        pytest.raises(ValueError, match="fewer logits than `labels`"),
    ):
        model(**batch.inputs, labels=batch.inputs["input_ids"])


def test_a_run_before_its_first_prefill(model):
    with prune(model, PLANS["all_stages"]) as run:
        assert run.kept == {}
        with pytest.raises(ValueError, match="no prompt was read"):
            run.tokens_per_layer


def test_padding_on_the_right(model, batch, singles):
    "The same logits and positions as without padding."
    S, inputs = batch.shape[1], dict(batch.inputs)
    for name, value, dim in (("input_ids", 0, 0), ("attention_mask", 0, 0), ("position_ids", 1, 1)):
        inputs[name] = torch.cat(
            [
                torch.nn.functional.pad(one.inputs[name], (0, S - one.shape[1]), value=value)
                for one in singles
            ],
            dim,
        )
    for name in ("all_stages", "stage2", "visual_leaves_first"):
        with prune(model, PLANS[name]) as run:
            together, kept = (
                model(**inputs).logits[:, -1],
                run.kept,
            )  # a cut sequence ends with the last token of every row
            for i, one in enumerate(singles):
                close(together[i : i + 1], last(model, one))
                for stage in run.kept:
                    assert kept[stage][i].tolist() == run.kept[stage][0].tolist()


# ---------------------------------------------------------------- caches and decoding


def test_bare_decode_steps_need_no_positions(model, batch):
    tokens = torch.tensor([[11]] * len(batch))
    mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, 1), value=1)
    with prune(model, PLANS["all_stages"], kv="retain"):
        prefill = lambda: model(**batch.inputs, use_cache=True).past_key_values
        given = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=batch.position_ids[..., -1:] + 1,
            past_key_values=prefill(),
        ).logits
        close(model(input_ids=tokens, attention_mask=mask, past_key_values=prefill()).logits, given)
        close(model(input_ids=tokens, past_key_values=prefill()).logits, given)


def test_several_tokens_at_once_equal_one_by_one(model, batch):
    tokens = torch.randint(12, 40, (len(batch), 3), generator=torch.Generator().manual_seed(0))
    pad = lambda n: torch.nn.functional.pad(batch.inputs["attention_mask"], (0, n), value=1)
    for kv, name in (
        ("evict", "stage2"),
        ("retain", "all_stages"),
    ):  # after a late block `evict` has no media left to ask about
        with prune(model, PLANS[name], kv=kv):
            cache = model(**batch.inputs, use_cache=True).past_key_values
            one_by_one = [
                model(
                    input_ids=tokens[:, i : i + 1], attention_mask=pad(i + 1), past_key_values=cache
                ).logits
                for i in range(3)
            ]
            cache = model(**batch.inputs, use_cache=True).past_key_values
            close(
                model(input_ids=tokens, attention_mask=pad(3), past_key_values=cache).logits,
                torch.cat(one_by_one, 1),
            )


def test_padded_follow_up_on_a_retained_cache(model, singles):
    "A second turn that is left-padded in the batch: its padding is not seen."
    one = singles[0]
    with prune(model, PLANS["all_stages"], kv="retain"):
        prefill = lambda: model(**one.inputs, use_cache=True).past_key_values
        mask, at = one.inputs["attention_mask"], one.position_ids[..., -1:]
        clean = model(
            input_ids=torch.tensor([[20, 21]]),
            attention_mask=torch.nn.functional.pad(mask, (0, 2), value=1),
            position_ids=torch.cat([at + 1, at + 2], -1),
            past_key_values=prefill(),
        ).logits[:, -1]
        cache, padded = prefill(), torch.cat([mask, torch.tensor([[0, 1, 1]])], 1)
        dirty = model(
            input_ids=torch.tensor([[5, 20, 21]]),
            attention_mask=padded,
            position_ids=torch.cat([at, at + 1, at + 2], -1),
            past_key_values=cache,
        )
        close(dirty.logits[:, -1], clean)
        after = model(
            input_ids=torch.tensor([[22]]),
            attention_mask=torch.nn.functional.pad(padded, (0, 1), value=1),
            position_ids=at + 3,
            past_key_values=cache,
        )
        cache = prefill()
        for ids, n in ((torch.tensor([[20, 21]]), 2), (torch.tensor([[22]]), 3)):
            want = model(
                input_ids=ids,
                attention_mask=torch.nn.functional.pad(mask, (0, n), value=1),
                past_key_values=cache,
            ).logits[:, -1]
        close(after.logits[:, -1], want)


def test_choices_are_scored_from_the_pruned_cache(model, batch, singles):
    """The prompt is pruned once; every answer continues it. Independent of the batch, and equal to
    recomputing."""
    with prune(model, PLANS["all_stages"], kv="retain"):
        together = score_choices(model, batch).mean
        for i, one in enumerate(singles):
            close(together[i : i + 1], score_choices(model, one).mean)
    kept, sets, _ = naive_prefill(model, singles[0], PLANS["all_stages"])
    for c, ids in enumerate(singles[0].choice_ids[0]):
        logp = naive_continue(model, singles[0], sets, list(ids), "retain").log_softmax(-1)
        close(together[0, c], logp[torch.arange(len(ids)), list(ids)].mean())


def test_generate_without_a_cache(model, singles):
    "Every step is a prefill of its own; the video is encoded once."
    with prune(model, PLANS["stage1"]):
        options = dict(
            max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=list(range(10))
        )  # no placeholders of media
        out, with_cache = (
            model.generate(**singles[0].inputs, **options, use_cache=c) for c in (False, True)
        )
    assert torch.equal(out, with_cache)  # stage I does not look at the text


def test_stock_positions(model, singles):
    "Inputs as the processor makes them, without positions of ours."
    for one in (singles[0], singles[5]):
        stock = {
            **{k: v for k, v in one.inputs.items() if k != "position_ids"},
            "use_audio_in_video": True,
        }
        with prune(model, PLANS["all_stages"]):
            close(model(**stock).logits[:, -1], last(model, one))
            options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
            assert torch.equal(
                model.generate(**stock, **options), model.generate(**one.inputs, **options)
            )


def test_several_prompts_in_one_block(model, singles):
    "Generations follow one another, and caches of two prompts are continued in turn."
    step = lambda one, cache: model(input_ids=torch.tensor([[20]]), past_key_values=cache).logits
    with prune(model, PLANS["all_stages"], kv="retain") as run:
        alone = [
            step(one, model(**one.inputs, use_cache=True).past_key_values)
            for one in (singles[0], singles[2])
        ]
        caches = [
            model(**one.inputs, use_cache=True).past_key_values for one in (singles[0], singles[2])
        ]
        for i in (0, 1):
            assert torch.equal(step(singles[2 * i], caches[i]), alone[i])
        assert run.samples == 4


# ---------------------------------------------------------------- methods


def test_random_has_the_counts_of_seats(model, batch):
    for name in ("all_stages", "stage1", "stage2", "visual_leaves_first"):
        with prune(model, PLANS[name]) as seats:
            last(model, batch)
        with prune(model, METHODS["random"](PLANS[name], seed=1)) as run:
            a = last(model, batch)
        if name != "visual_leaves_first":
            assert (run.tokens_per_layer == seats.tokens_per_layer).all()
        assert any(
            (x.shape != y.shape) or (x != y).any()
            for s in run.kept
            for x, y in zip(run.kept[s], seats.kept[s])
        )
        with prune(model, METHODS["random"](PLANS[name], seed=1)):
            assert torch.equal(last(model, batch), a)


def test_random_does_not_depend_on_the_batch(model, batch, singles):
    with prune(model, METHODS["random"](PLANS["all_stages"])) as run:
        together, kept = last(model, batch), run.kept
    with prune(model, METHODS["random"](PLANS["all_stages"])) as run:
        for i, one in enumerate(singles):
            close(together[i : i + 1], last(model, one))
            for s in run.kept:
                assert run.kept[s][0].tolist() == kept[s][i].tolist()


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
    for encoded in (batch, singles[0]):
        with prune(model, Careless(PLANS["all_stages"], stage, more)) as run:
            with pytest.raises(
                ValueError, match=f"{place}: method 'careless', sample {len(encoded) - 1}, kept"
            ) as error:
                last(model, encoded)
            assert "\n" not in str(error.value) and run.kept == {}
        with prune(model, PLANS["all_stages"]):
            last(model, encoded)


def test_audio_windows_follow_the_schedule(model, singles, monkeypatch):
    "For the choice and for the statistic; 2 s are what the model's own rates say."
    from seats_analysis.pruning import encoders

    asked, whole, layouts = [], encoders.attention_received, {}
    monkeypatch.setattr(
        encoders,
        "attention_received",
        lambda q, k, sizes: asked.append(sizes) or whole(q, k, sizes),
    )
    for seconds in (1.0, 2.0, 4.0):
        asked.clear()
        with prune(model, schedule(windows=dict(visual_grids=2, seconds=seconds))) as run:
            last(model, singles[0])
        heard = run.layout.window[0][run.layout.modality[0] == AUDIO]
        windows = [int(5 * seconds)] * int(4 / seconds)
        assert heard.bincount().tolist() == windows
        assert [2 * n for n in windows] in asked  # rows of the tower: two for each token
        layouts[seconds] = run.layout
    assert torch.equal(layouts[2.0].window, layout_of(model, singles[0].inputs, "keep").window)


class Broken(Exception):
    pass


# ---------------------------------------------------------------- refusals


def test_bad_arguments(model, batch, singles):
    for bad, word in ((dict(kv="drop"), "evict"), (dict(images="crop"), "keep")):
        with pytest.raises(ValueError, match=word):
            with prune(model, PLANS["all_stages"], **bad):
                pass
    with pytest.raises(ValueError, match="28 layers"):
        with prune(model, Schedule.published("qwen2.5-omni-7b")):
            pass
    with pytest.raises(TypeError, match="Schedule"):
        with prune(model, 0.1):
            pass
    with pytest.raises(ValueError, match="known om-LLM"):
        with prune(torch.nn.Linear(1, 1), PLANS["all_stages"]):
            pass
    with prune(model, PLANS["all_stages"]):
        with pytest.raises(ValueError, match="input_ids"):
            model(inputs_embeds=torch.zeros(1, 4, 128))
        with pytest.raises(ValueError, match="dynamic cache"):
            model.generate(**singles[0].inputs, cache_implementation="static", max_new_tokens=2)
        cache = model(**singles[0].inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="attention_mask"):
            model(
                input_ids=torch.ones(1, 1, dtype=torch.long),
                attention_mask=torch.ones(1, 5),
                past_key_values=cache,
            )


# ---------------------------------------------------------------- no waiting for the device


class NoSync(TorchDispatchMode):
    "While `on`, refuses what would need a value of the device, or a shape that depends on one."

    on = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.on and name in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "is_nonzero",
            "equal",
            "_unique2",
            "unique_dim",
        ):
            raise Broken(name)
        if (
            self.on
            and name in ("index", "index_put", "index_put_")
            and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            raise Broken("mask")
        return func(*args, **(kwargs or {}))


def test_no_sync_between_first_and_last_layer(model, batch):
    layers, mode, steps = adapter_for(model).layers(model), NoSync(), []

    def turn(on):
        return lambda *_: setattr(mode, "on", on) or steps.append(on)

    handles = [
        layers[0].register_forward_pre_hook(turn(True))
    ]  # registered first, so ours runs inside
    try:
        with prune(model, PLANS["visual_leaves_first"]) as run, mode:
            handles.append(layers[-1].register_forward_hook(turn(False)))
            model.generate(**batch.inputs, max_new_tokens=3, min_new_tokens=3)
            assert len(run.kept) == 5 and steps == [True, False] * 3
            mode.on = True
            for bad in (
                lambda: torch.ones(3)[torch.ones(3) > 0],
                lambda: torch.ones(3).sum().item(),
            ):  # the guard does bite
                with pytest.raises(Broken):
                    bad()
    finally:
        for h in handles:
            h.remove()
