"""One row per family: what works on the stock model with random weights, against the stock model
with keys hidden by masks, a prompt without the tokens, a loop over tokens, and torch's counter."""

from dataclasses import replace
from inspect import signature
from types import SimpleNamespace

import kinds, kinds_gemma, naive, numpy as np, pytest, tiny, torch, transformers
from torch.utils.flop_counter import FlopCounterMode

from seats_analysis.boundaries.find import find_boundaries
from seats_analysis.evaluation.load import load_model
from seats_analysis.models.decoder import Decoder
from seats_analysis.models.encode import encode, encode_questions
from seats_analysis.models.families import FAMILIES, adapter_for, families
from seats_analysis.models.scoring import last_logits_only, score_choices
from seats_analysis.probing.branches import Stream
from seats_analysis.probing.flow import trace_flow
from seats_analysis.probing.run import probe_dependency
from seats_analysis.pruning.cache import follow_up
from seats_analysis.pruning.session import prune
from seats_analysis.schedules.cost import prefill_flops
from seats_analysis.schedules.schedule import Schedule

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore::seats_analysis.schedules.schedule.ScheduleWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
L = tiny.LAYERS
PLAN = tiny.schedule()
LATER = tiny.schedule(
    drop_layers=(3, 4, 5),
    late_start=None,
    keep_ratios=tiny.ratios((0.8, 0.6, 0.3), (0.9, 0.6, 0.3)),
)
THIRD = Schedule(L, late_start=3)


def model_of(family, **options):
    if family not in tiny.FAMILIES:
        return kinds.model(family, **options)
    made = tiny.thinker(family, **options)
    made.config.get_text_config()._experts_implementation = "eager"  # what torch's counter counts
    return made


class Case:
    def __init__(self, family, model=None):
        self.family = family
        self.omni = family in tiny.FAMILIES
        self.model = model or model_of(family)
        self.processor = (tiny if self.omni else kinds).processor(family)
        self.samples = kinds.samples(family)
        self.adapter = adapter_for(self.model)
        self.batch = self.encode(self.samples)
        self.single = self.encode(self.samples[:1])
        self.media = self.single.layout.visual | self.single.layout.audio

    def encode(self, samples):
        return encode(self.model, self.processor, samples)

    def stream(self, model):  # of the prompt alone
        encoded = self.single
        none = torch.zeros(1, 0, dtype=torch.long)
        positions = encoded.position_ids[..., :0]
        stream = Stream.enter(model, encoded, encoded.shape[1], none, positions)
        causal = torch.ones(1, 1, *2 * encoded.shape[1:], dtype=torch.bool).tril()
        return replace(stream, mask=stream.decoder.mask(causal, stream.hidden.dtype))

    def logits(self, encoded, plan=None, kv="retain"):
        with prune(self.model, plan, kv), last_logits_only(self.model):
            return self.model(**encoded.inputs).logits[:, -1]


@pytest.fixture(scope="module", params=[*tiny.FAMILIES, *kinds.ROWS])
def case(request):
    name = (tiny.CLASSES | {k: row[0] for k, row in kinds.ROWS.items()})[request.param]
    if not hasattr(transformers, name + "Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return Case(request.param)


@pytest.fixture(params=["retain", "evict"])
def kv(case, request):
    "What the model bears: a recurrent layer cannot forget."
    if not Decoder(case.model).recurrent or request.param == "retain":
        return request.param
    cached = replace(THIRD, cache=tiny.ratios((0, 3), (0, 3)))
    asked = case.model, case.processor, case.samples[:1]
    forgetting = [
        lambda: case.logits(case.single, THIRD, "evict"),
        lambda: case.logits(case.single, cached),
        lambda: probe_dependency(*asked, answers="text"),
        lambda: trace_flow(*asked, progress=False),
    ]
    for call in forgetting:
        with pytest.raises(ValueError, match="recurrent layers do not forget") as refusal:
            call()
        assert "\n" not in str(refusal.value)
    pytest.skip("refused: a recurrent layer cannot forget")


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def test_every_row_of_the_table_is_proven_here_or_as_an_omni_family():
    assert set(FAMILIES) == set(kinds.ROWS) | set(tiny.FAMILIES)
    assert [row["family"] for row in families()] == list(FAMILIES)


def test_a_class_that_is_not_in_the_table_goes_by_the_generic_row(monkeypatch):
    known = kinds.model("llava-onevision")

    class Stranger(type(known)):
        pass

    monkeypatch.delitem(FAMILIES, "llava-onevision")
    model = Stranger._from_config(known.config)
    model.load_state_dict(known.state_dict())
    assert adapter_for(model.eval()).modalities(model) == ("visual",)
    case = Case("llava-onevision", model)
    test_the_branch_probe_equals_the_plain_one(case)
    test_removal_in_the_middle_equals_keys_hidden_by_a_mask(case, 3)
    test_scores_of_stage_two_are_those_of_the_stock_attention(case)
    test_generate_equals_a_loop_over_tokens(case, "retain", PLAN)


def test_what_has_no_placeholders_or_layers_that_forget_is_refused():
    text = transformers.Qwen2Config(**{**kinds.TEXT, "layer_types": None})
    with pytest.raises(ValueError, match="no token that stands for"):
        adapter_for(transformers.Qwen2ForCausalLM(text))
    chunked = kinds.model("qwen2-audio")
    chunked.config.text_config.layer_types = ["chunked_attention"] * L
    with pytest.raises(ValueError, match="chunked attention are not supported"):
        with prune(chunked, THIRD):
            pass


def test_windows_of_a_family_whose_text_model_makes_its_masks_itself():
    known = kinds.model("qwen2-audio")
    text = known.config.text_config
    text.layer_types = ["sliding_attention", "full_attention"] * (L // 2)
    text.sliding_window = 16
    model = type(known)._from_config(known.config)
    model.load_state_dict(known.state_dict())
    case = Case("qwen2-audio", model.eval())
    test_the_branch_probe_equals_the_plain_one(case)
    test_removal_in_the_middle_equals_keys_hidden_by_a_mask(case, 3)
    test_answers_behind_removed_media_equal_keys_hidden_by_a_mask(case, 3, "retain")


def test_from_one_modality_to_boundaries_and_schedule(case):
    best = score_choices(case.model, case.batch).best.tolist()
    right = [replace(s, answer=i) for s, i in zip(case.samples, best)]
    profile = probe_dependency(case.model, case.processor, right, progress=False)
    kinds_of = case.adapter.modalities(case.model)
    removed = profile["removed"].values.tolist()
    assert removed[: len(kinds_of)] == list(kinds_of) and len(removed) == 2 * len(kinds_of) - 1
    bounds = find_boundaries(profile, n_boot=50)
    assert bounds.removed == removed[-1]


def test_the_family_is_found_by_its_class(case):
    assert case.adapter.family == case.family
    kinds_of = ("visual", "audio") if case.omni else kinds.modalities(case.family)
    assert case.adapter.modalities(case.model) == kinds_of


def test_a_checkpoint_whose_parts_do_not_all_have_sdpa_is_loaded(tmp_path):
    case = Case("gemma4")
    case.model.save_pretrained(tmp_path)
    case.processor.save_pretrained(tmp_path)
    model, processor = load_model(str(tmp_path), "cpu")
    if transformers.__version__ < "5.18":
        pytest.skip("towers of 5.17 give other numbers by sdpa than by eager attention")
    with prune(model, THIRD), last_logits_only(model):
        found = model(**encode(model, processor, case.samples[:1]).inputs).logits[:, -1]
    close(found, case.logits(case.single, THIRD))


def test_what_cannot_be_exact_is_refused_in_one_line():
    case = Case("gemma4")
    with pytest.raises(ValueError, match='from layer 5 on, layers share keys.*"last"'):
        with prune(case.model, replace(LATER, query="text")):
            pass
    flash = kinds.model("gemma4")
    flash.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no mask"):
        with prune(flash, THIRD):
            pass
    with prune(case.model, THIRD):
        cache = case.model(**case.single.inputs).past_key_values
        with pytest.raises(ValueError, match="cannot go behind a pruned prompt where layers have"):
            case.model(**case.single.inputs, past_key_values=cache)


def test_keeping_everything_changes_no_bit_and_leaves_nothing_behind(case):
    with last_logits_only(case.model):
        stock = case.model(**case.single.inputs).logits[:, -1]
    hooks = [dict(m._forward_pre_hooks) for m in case.model.modules()]
    keep = Schedule(L, drop_layers=(2,), keep_ratios=tiny.ratios((1.0,), (1.0,)))
    assert torch.equal(stock, case.logits(case.single, keep))
    case.logits(case.single, PLAN)
    assert hooks == [dict(m._forward_pre_hooks) for m in case.model.modules()]
    with last_logits_only(case.model):
        assert torch.equal(stock, case.model(**case.single.inputs).logits[:, -1])


def test_questions_on_one_clip_are_their_prompts(case):
    asked = [replace(s, video=case.samples[0].video) for s in case.samples]
    for group in encode_questions(case.model, case.processor, asked):
        begin = group.encoded.inputs["input_ids"][0, : group.shared].tolist()
        for sample, tail in zip(group.samples, group.tails):
            alone = case.encode([sample]).inputs["input_ids"][0].tolist()
            assert begin + list(tail) == alone


def test_positions_are_those_that_the_stock_model_gives_itself(case):
    inputs = {k: v for k, v in case.single.inputs.items() if k != "position_ids"}
    if case.omni:
        inputs["use_audio_in_video"] = True
    with last_logits_only(case.model):
        stock = case.model(**inputs).logits[:, -1]
    close(stock, case.logits(case.single))


def test_removal_before_layer_0_equals_the_prompt_without_these_tokens(case):
    decoder = Decoder(case.model)
    given = decoder.inputs(case.single.inputs)
    stays = (~case.media)[0].nonzero()[:, 0]
    mask = given["attention_mask"]
    if decoder.window and not isinstance(mask, dict):  # the text model makes its masks itself
        causal = torch.ones(1, 1, *2 * mask.shape[1:], dtype=torch.bool).tril()
        mask = dict(full_attention=causal, sliding_attention=causal.triu(1 - decoder.window))

    def cut(m):  # the windows are those of the whole prompt
        return m if m is None else m[:, :, stays][..., stays]

    if isinstance(mask, dict):
        mask = {k: cut(m) for k, m in mask.items()}
    else:
        mask = cut(mask) if mask.ndim == 4 else mask[:, stays]
    more = {}
    if given.get("visual_pos_masks") is not None:
        more = dict(visual_pos_masks=None, deepstack_visual_embeds=None)
    if given.get("per_layer_inputs") is not None:
        more = dict(per_layer_inputs=given["per_layer_inputs"][:, stays])
    out = decoder.module(
        inputs_embeds=given["inputs_embeds"][:, stays],
        position_ids=case.single.position_ids[..., stays],
        attention_mask=mask,
        use_cache=False,
        **more,
    )
    decoder.module = SimpleNamespace(norm=lambda x: x)  # which the text model has done
    alone = decoder.logits(out.last_hidden_state[:, -1])
    close(alone, case.logits(case.single, Schedule(L, late_start=0)))


def longer(case, ids):  # (1, n) that begin with the prompt's
    "Inputs of a prompt and what follows it."
    inputs = case.single.inputs
    n = ids.shape[1] - case.single.shape[1]
    places = inputs["position_ids"][..., -1:] + torch.arange(1, n + 1)
    given = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.cat([inputs["position_ids"], places], -1),
    )
    types = {k: x for k, x in inputs.items() if k.endswith("token_type_ids")}
    return inputs | given | {k: torch.nn.functional.pad(x, (0, n)) for k, x in types.items()}


def token_by_token(case, inputs, start):
    "Stock layers and cache: a media token is read by the layers before `start` and no other."
    decoder = Decoder(case.model)
    hidden = decoder.thinker.get_input_embeddings()(inputs["input_ids"])
    given = decoder.inputs(case.single.inputs)["inputs_embeds"]
    hidden = decoder.states(torch.cat([given, hidden[:, given.shape[1] :]], 1))
    tables = decoder.rotary_tables(hidden, inputs["position_ids"])
    cache = transformers.DynamicCache(config=decoder.config)
    media = torch.nn.functional.pad(case.media[0], (0, hidden.shape[1] - given.shape[1]))
    read = []
    for t, gone in enumerate(media):
        h = hidden[:, t : t + 1]
        for layer in decoder.layers[: start if gone else L]:
            at = tuple(x[:, t : t + 1] for x in tables)
            h = layer(h, position_embeddings=at, attention_mask=None, past_key_values=cache)
        read.append(decoder.head(decoder.module.norm(h)))
    return torch.cat(read, 1)


def masked(case, inputs, start, evict=False):
    "Logits where media are hidden by masks from layer `start` on, `evict`: from answers in all."
    if Decoder(case.model).recurrent:
        return token_by_token(case, inputs, start)
    S = inputs["input_ids"].shape[1]
    media = torch.nn.functional.pad(case.media, (0, S - case.media.shape[1]))
    answer = torch.arange(S)[:, None] >= case.media.shape[1]
    me = torch.eye(S, dtype=torch.bool)
    handles = []
    for i, layer in enumerate(case.adapter.layers(case.model)):

        def hide(module, args, kwargs, i=i):
            mask = kwargs["attention_mask"]  # of the stock model, with its windows
            seen = torch.ones(1, 1, S, S, dtype=torch.bool).tril() if mask is None else mask
            seen = seen if seen.dtype == torch.bool else seen == 0
            rows = answer if i < start else torch.ones_like(answer)
            if evict or i >= start:
                seen = seen & ~(media & rows) | me
            mask = torch.zeros(1, 1, S, S).masked_fill(~seen, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": mask}

        handles.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        return case.model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("start", [1, 3, 5])
def test_removal_in_the_middle_equals_keys_hidden_by_a_mask(case, start):
    late = Schedule(L, late_start=start)
    close(masked(case, case.single.inputs, start)[:, -1], case.logits(case.single, late))


@pytest.mark.parametrize("start", [3, 5])
def test_answers_behind_removed_media_equal_keys_hidden_by_a_mask(case, start, kv):
    "Which sees where a window ends: by position, also in the cache of an answer."
    inputs = case.single.inputs
    S = case.single.shape[1]
    with prune(case.model, Schedule(L, late_start=start), kv):
        out = case.model.generate(
            **inputs,
            max_new_tokens=6,
            suppress_tokens=list(case.adapter.token_ids(case.model).values()),
            min_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    inputs = longer(case, out.sequences)
    expected = masked(case, inputs, start, kv == "evict")[0, S - 1 : -1]
    # token by token a state is summed up in another order
    close(expected, torch.cat(out.logits), 1e-4 if Decoder(case.model).recurrent else 2e-5)


@pytest.mark.parametrize("plan", [PLAN, THIRD], ids=["all stages", "stage III"])
def test_a_padded_batch_equals_its_samples_alone(case, plan, kv):
    with prune(case.model, plan, kv), last_logits_only(case.model):
        together = score_choices(case.model, case.batch).total
        alone = [score_choices(case.model, case.encode([s])).total for s in case.samples]
    close(together, torch.cat(alone), atol=1e-4)


@pytest.mark.parametrize("plan", [PLAN, LATER], ids=["all stages", "drops in late layers"])
def test_generate_equals_a_loop_over_tokens(case, kv, plan):
    with prune(case.model, plan, kv):
        stock = case.model.generate(
            **case.batch.inputs, max_new_tokens=5, do_sample=False, eos_token_id=-1
        )
    inputs = case.batch.inputs
    S = case.batch.shape[1]
    ids = []
    with prune(case.model, plan, kv):
        out = case.model(**inputs)
        mask = inputs["attention_mask"]
        for _ in range(5):  # positions are left to the cache
            ids.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = case.model(
                input_ids=ids[-1], attention_mask=mask, past_key_values=out.past_key_values
            )
    assert stock[:, S:].tolist() == torch.cat(ids, 1).tolist()


def test_a_further_turn_at_once_equals_token_by_token(case):
    inputs = case.batch.inputs
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -4:]], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    with prune(case.model, PLAN):
        cache = case.model(**inputs, use_cache=True).past_key_values
        slow = Decoder.copy_cache(cache)
        at_once = case.model(**follow_up(cache, ids, mask)).logits[:, -1]
        for n in range(ids.shape[1] - 3, ids.shape[1] + 1):
            one = case.model(**follow_up(slow, ids[:, :n], mask[:, :n])).logits[:, -1]
    close(at_once, one)


def test_choices_behind_a_cache_equal_answers_in_the_prompt(case):
    choice = torch.tensor([case.single.choice_ids[0][1]])
    ids = torch.cat([case.single.inputs["input_ids"], choice], 1)
    logp = case.model(**longer(case, ids)).logits[0, -choice.shape[1] - 1 : -1].log_softmax(-1)
    total = logp.gather(1, choice.T).sum()
    close(score_choices(case.model, case.single).total[0, 1], total)


def test_counts_are_as_planned_and_windows_follow_the_prompt(case):
    layout = case.batch.layout
    for here in (layout.visual, layout.audio):
        for row, mask in zip(layout.window, here):
            steps = row[mask].diff()
            assert not mask.any() or (steps.min() >= 0 and steps.max() == 1)
    with prune(case.model, PLAN) as run:
        case.model(**case.single.inputs)
    counts = {m: int(n) for m, n in case.single.layout.counts().items()}
    entering = 0
    for kind in case.adapter.modalities(case.model):
        windows = case.single.layout.window[0][getattr(case.single.layout, kind)[0]].bincount()
        entering += sum(max(1, round(PLAN.entering[kind] * int(n))) for n in windows)
    tokens = run.tokens_per_layer[0]
    assert tokens[0] == counts["text"] + counts["image"] + entering
    assert tokens[-1] == counts["text"] + counts["image"]
    assert (np.diff(tokens) <= 0).all()


def test_the_branch_probe_equals_the_plain_one(case):
    names = case.adapter.modalities(case.model)
    options = dict(removed=names, layers=[0, 1], progress=False)
    profile = probe_dependency(case.model, case.processor, case.samples, **options)
    for i, sample in enumerate(case.samples):
        one = encode(case.model, case.processor, [sample])
        plain = naive.removal_scores(case.model, one, names, [0, 1, L])
        for (name, layer), scores in plain.items():
            found = profile.isel(sample=i).sel(removed=name or names[0], layer=layer)
            expected = scores.metrics([sample], plain[None, L])
            for k in ("nll", "kl"):
                np.testing.assert_allclose(found[k], expected[k][0], atol=5e-5)
    assert (profile["kl"].isel(layer=0) > 1e-4).any()
    if len(names) == 1:
        with prune(case.model, Schedule(L, late_start=1)):
            right = score_choices(case.model, case.batch).total.diagonal()
        np.testing.assert_allclose(profile["nll"].sel(layer=1).values[:, 0], -right, atol=1e-4)


def test_scores_of_stage_two_are_those_of_the_stock_attention(case):
    eager = model_of(case.family, attention="eager")
    stream = case.stream(eager)
    decoder, hidden, tables = stream.decoder, stream.hidden, stream.rotary
    weights = []
    first = decoder.attentive(0)
    attn = decoder.layers[first].self_attn
    handle = attn.register_forward_hook(lambda m, a, out: weights.append(out[1]))
    stream.through(first, first + 1)
    handle.remove()
    q = decoder.query(first, hidden[:, -1:], *(t[:, -1:] for t in tables))
    k = decoder.key(first, hidden, *tables)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    ours = (q @ k.mT / q.shape[-1] ** 0.5)[:, :, 0]
    stock = weights[0][:, :, -1]
    close(ours.masked_fill(stock == 0, -torch.inf).softmax(-1), stock)


def test_flops_in_closed_form_are_those_that_torch_counts(case):
    decoder = Decoder(case.model)
    given = dict(decoder.inputs(case.single.inputs), use_cache=False)
    given.pop("logits_to_keep", None)
    S = case.single.shape[1]
    sliced = "logits_to_keep" in signature(decoder.module.forward).parameters
    with FlopCounterMode(display=False) as rotary:  # a product in the oldest versions
        decoder.rotary_tables(given["inputs_embeds"], case.single.position_ids)
    late = case.family in kinds_gemma.ROWS  # their late layers run the last position only
    if late and not sliced:
        pytest.skip("these transformers run all positions through layers that share keys")
    with FlopCounterMode(display=False) as counter:
        last = decoder.module(**given, **(dict(logits_to_keep=1) if late else {}))
        decoder.head(last.last_hidden_state[:, -1:])
    total = counter.get_total_flops() - rotary.get_total_flops()
    assert total == prefill_flops([S] * L, decoder.config, "counter")
