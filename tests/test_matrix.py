"""One row per family: what works on the stock model with random weights, against the stock model
with keys hidden by masks, a prompt without the tokens, a loop over tokens, and torch's counter."""

from dataclasses import replace

import kinds, numpy as np, pytest, tiny, torch, transformers
from torch.utils.flop_counter import FlopCounterMode

from seats_analysis.boundaries.find import find_boundaries
from seats_analysis.models.decoder import Decoder, last_logits_only
from seats_analysis.models.encode import encode
from seats_analysis.models.families import FAMILIES, adapter_for, families
from seats_analysis.models.scoring import score_choices
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
THIRD = Schedule(L, late_start=3)


class Case:
    def __init__(self, family, model=None):
        self.family = family
        self.model = model or kinds.model(family)
        self.processor = kinds.processor(family)
        self.samples = kinds.samples(family)
        self.adapter = adapter_for(self.model)
        self.batch = self.encode(self.samples)
        self.single = self.encode(self.samples[:1])
        self.media = self.single.layout.visual | self.single.layout.audio

    def encode(self, samples):
        return encode(self.model, self.processor, samples)

    def logits(self, encoded, plan=None, kv="retain"):
        with prune(self.model, plan, kv), last_logits_only(self.model):
            return self.model(**encoded.inputs).logits[:, -1]


@pytest.fixture(scope="module", params=kinds.ROWS)
def case(request):
    name = kinds.ROWS[request.param][0]
    if not hasattr(transformers, name + "ForConditionalGeneration"):
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
    test_removal_in_the_middle_equals_keys_hidden_by_a_mask(case)
    test_scores_of_stage_two_are_those_of_the_stock_attention(case)
    test_generate_equals_a_loop_over_tokens(case, "retain")


def test_what_has_no_placeholders_or_layers_that_forget_is_refused():
    text = transformers.Qwen2Config(**{**kinds.TEXT, "layer_types": None})
    with pytest.raises(ValueError, match="no token that stands for"):
        adapter_for(transformers.Qwen2ForCausalLM(text))
    sliding = kinds.model("qwen2-audio")
    sliding.config.text_config.layer_types = ["sliding_attention"] * L
    with pytest.raises(ValueError, match="sliding attention are not supported"):
        with prune(sliding, THIRD):
            pass


def test_from_one_modality_to_boundaries_and_schedule(case):
    best = score_choices(case.model, case.batch).best.tolist()
    right = [replace(s, answer=i) for s, i in zip(case.samples, best)]
    profile = probe_dependency(case.model, case.processor, right, progress=False)
    (kind,) = case.adapter.modalities(case.model)
    assert profile["removed"].values.tolist() == [kind]
    bounds = find_boundaries(profile, n_boot=50)
    assert bounds.removed == kind


def test_the_family_is_found_by_its_class(case):
    assert case.adapter.family == case.family
    assert case.adapter.modalities(case.model) == (
        ("audio",) if kinds.heard(case.family) else ("visual",)
    )


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


def test_positions_are_those_that_the_stock_model_gives_itself(case):
    inputs = {k: v for k, v in case.single.inputs.items() if k != "position_ids"}
    with last_logits_only(case.model):
        stock = case.model(**inputs).logits[:, -1]
    close(stock, case.logits(case.single))


def test_removal_before_layer_0_equals_the_prompt_without_these_tokens(case):
    decoder = Decoder(case.model)
    given = decoder.inputs(case.single.inputs)
    stays = (~case.media)[0].nonzero()[:, 0]
    deep = given.get("visual_pos_masks") is not None
    out = decoder.module(
        inputs_embeds=given["inputs_embeds"][:, stays],
        position_ids=case.single.position_ids[..., stays],
        attention_mask=torch.ones(1, len(stays), dtype=torch.long),
        use_cache=False,
        **(dict(visual_pos_masks=None, deepstack_visual_embeds=None) if deep else {}),
    )
    alone = decoder.head(out.last_hidden_state[:, -1:])[:, -1]
    scale = getattr(decoder.config, "logits_scaling", 1)
    alone = alone * scale if "hyperclovax" in case.family else alone / scale
    close(alone, case.logits(case.single, Schedule(L, late_start=0)))


def token_by_token(case, decoder):
    "Stock layers and cache: a media token is read by the first three layers and no other."
    given = decoder.inputs(case.single.inputs)
    hidden = decoder.states(given["inputs_embeds"])
    tables = decoder.rotary_tables(hidden, case.single.position_ids)
    cache = transformers.DynamicCache(config=decoder.config)
    for t, gone in enumerate(case.media[0]):
        h = hidden[:, t : t + 1]
        for layer in decoder.layers[: 3 if gone else L]:
            at = tuple(x[:, t : t + 1] for x in tables)
            h = layer(h, position_embeddings=at, attention_mask=None, past_key_values=cache)
    return decoder.head(decoder.module.norm(h))[:, 0]


def test_removal_in_the_middle_equals_keys_hidden_by_a_mask(case):
    decoder = Decoder(case.model)
    if decoder.recurrent:
        close(token_by_token(case, decoder), case.logits(case.single, THIRD))
        return
    S = case.single.shape[1]
    seen = torch.ones(S, S, dtype=torch.bool).tril()
    hidden = seen & ~case.media | torch.eye(S, dtype=torch.bool)
    handles = []
    for i, layer in enumerate(decoder.layers):
        mask = torch.zeros(1, 1, S, S)
        mask.masked_fill_(~(hidden if i >= 3 else seen), torch.finfo(torch.float32).min)

        def hide(module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        handles.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        with last_logits_only(case.model):
            masked = case.model(**case.single.inputs).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    close(masked, case.logits(case.single, THIRD))


@pytest.mark.parametrize("plan", [PLAN, THIRD], ids=["all stages", "stage III"])
def test_a_padded_batch_equals_its_samples_alone(case, plan, kv):
    with prune(case.model, plan, kv), last_logits_only(case.model):
        together = score_choices(case.model, case.batch).total
        alone = [score_choices(case.model, case.encode([s])).total for s in case.samples]
    close(together, torch.cat(alone), atol=1e-4)


def test_generate_equals_a_loop_over_tokens(case, kv):
    with prune(case.model, PLAN, kv):
        stock = case.model.generate(
            **case.batch.inputs, max_new_tokens=5, do_sample=False, eos_token_id=-1
        )
    inputs = case.batch.inputs
    S = case.batch.shape[1]
    ids = []
    with prune(case.model, PLAN, kv):
        out = case.model(**inputs, use_cache=True)
        mask = inputs["attention_mask"]
        for t in range(5):
            ids.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = case.model(
                input_ids=ids[-1],
                attention_mask=mask,
                position_ids=inputs["position_ids"][..., -1:] + 1 + t,
                past_key_values=out.past_key_values,
                use_cache=True,
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
    said = case.samples[0].answer_texts[1]
    whole = encode(case.model, case.processor, case.samples[:1], answers=[said])
    ((start, end),) = whole.answer_spans
    logp = case.model(**whole.inputs).logits[0, start - 1 : end - 1].log_softmax(-1)
    total = logp.gather(1, whole.inputs["input_ids"][0, start:end, None]).sum()
    close(score_choices(case.model, case.single).total[0, 1], total)


def test_counts_are_as_planned_and_windows_follow_the_prompt(case):
    layout = case.batch.layout
    here = layout.visual | layout.audio
    for row, mask in zip(layout.window, here):
        steps = row[mask].diff()
        assert steps.min() >= 0 and steps.max() == 1
    with prune(case.model, PLAN) as run:
        case.model(**case.single.inputs)
    counts = {m: int(n) for m, n in case.single.layout.counts().items()}
    windows = torch.bincount(case.single.layout.window[0][case.media[0]])
    (kind,) = case.adapter.modalities(case.model)
    entering = sum(max(1, round(PLAN.entering[kind] * int(n))) for n in windows)
    tokens = run.tokens_per_layer[0]
    assert tokens[0] == counts["text"] + counts["image"] + entering
    assert tokens[-1] == counts["text"] + counts["image"]
    assert (np.diff(tokens) <= 0).all()


def test_the_branch_probe_equals_the_plain_one(case):
    common = dict(removed=case.adapter.modalities(case.model), progress=False)
    asked = [case.model, case.processor, case.samples]
    branch, plain = (probe_dependency(*asked, **common, method=m) for m in ("branch", "plain"))
    for name in ("nll", "kl"):
        np.testing.assert_allclose(branch[name], plain[name], atol=5e-5)
    assert (branch["kl"].isel(layer=0) > 1e-4).any()
    with prune(case.model, THIRD):
        right = score_choices(case.model, case.batch).total.diagonal()
    np.testing.assert_allclose(branch["nll"].sel(layer=3).values[:, 0], -right, atol=1e-4)


def test_scores_of_stage_two_are_those_of_the_stock_attention(case):
    eager = kinds.model(case.family, "eager")
    decoder = Decoder(eager)
    given = decoder.inputs(case.single.inputs)
    hidden = decoder.states(given["inputs_embeds"])
    tables = decoder.rotary_tables(hidden, case.single.position_ids)
    weights = []
    first = decoder.attentive(0)
    attn = decoder.layers[first].self_attn
    handle = attn.register_forward_hook(lambda m, a, out: weights.append(out[1]))
    decoder.run_layers(
        hidden,
        tables,
        decoder.mask(torch.ones(1, 1, *hidden.shape[1:2] * 2).tril().bool(), hidden.dtype),
        first,
        first + 1,
    )
    handle.remove()
    q = decoder.query(first, hidden[:, -1:], *(t[:, -1:] for t in tables))
    k = decoder.key(first, hidden, *tables)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    ours = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    close(ours[:, :, 0], weights[0][:, :, -1])


def test_flops_in_closed_form_are_those_that_torch_counts(case):
    decoder = Decoder(case.model)
    given = decoder.inputs(case.single.inputs)
    hidden = decoder.states(given["inputs_embeds"])
    tables = decoder.rotary_tables(hidden, case.single.position_ids)
    with FlopCounterMode(display=False) as counter:
        decoder.logits(decoder.run_layers(hidden, tables, None)[:, -1:])
    tokens = [case.single.shape[1]] * L
    assert counter.get_total_flops() == prefill_flops(tokens, decoder.config, "counter")
