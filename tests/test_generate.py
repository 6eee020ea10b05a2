"""Generation in a pruned block: every way of decoding, both kv policies, further questions. Run
with the oldest supported transformers too."""

import copy
import inspect
import pickle

import naive
import pytest
import tiny
import torch
from test_undo import state
from tiny import PLANS, close
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from seats_analysis import adapter_for, encode, follow_up, prune
from seats_analysis.models.encode import Prompt
from seats_analysis.pruning.cache import Slots

pytestmark = pytest.mark.usefixtures("no_grad")
PLAN, NEW = PLANS["together"], 5
# no placeholders or other special tokens, and nothing ends by chance
WORDS = dict(suppress_tokens=list(range(10)))
GREEDY = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
BEAMS = dict(GREEDY, num_beams=3, num_return_sequences=2)
MORE = dict(return_dict_in_generate=True, output_logits=True)
KV = ("evict", "retain")
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
    tiny.ask("odd", tiny.clip(7, 4.7)),
]
TEXT = 1


@pytest.fixture(scope="module")
def both():
    "family -> a thinker, PROMPTS in one batch, and each alone."
    found = {}
    for family in tiny.FAMILIES:
        model, processor = tiny.thinker(family), tiny.processor(family)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        singles = [encode(model, processor, [p]) for p in PROMPTS]
        found[family] = model, encode(model, processor, PROMPTS), singles
    return found


@pytest.fixture(params=tiny.FAMILIES)
def each(both, request):
    return both[request.param]


@pytest.fixture
def one_family(both):
    return both["qwen2.5-omni"]


@pytest.fixture
def model(one_family):
    return one_family[0]


@pytest.fixture
def batch(one_family):
    return one_family[1]


@pytest.fixture
def singles(one_family):
    return one_family[2]


@pytest.fixture(scope="module")
def turn():
    text = (
        "<|im_end|> <|im_start|> user what pitch is heard first ? <|im_end|> <|im_start|> assistant"
    )
    return tiny.processor("qwen2.5-omni").tokenizer(text, return_tensors="pt").input_ids


def new_tokens(model, encoded, **options):
    return model.generate(**encoded.inputs, **options)[:, encoded.shape[1] :]


def prefilled(model, encoded):
    return model(**encoded.inputs, use_cache=True).past_key_values


def continued(model, encoded, answer):
    "The cache behind a prompt and all of its answer (1, n) but the last token."
    cache = prefilled(model, encoded)
    for token in answer[0, :-1]:
        model(input_ids=token.view(1, 1), past_key_values=cache)
    return cache


def lists(kept):
    return {stage: [row.tolist() for row in rows] for stage, rows in kept.items()}


# ---------------------------------------------------------------- ways of decoding


@pytest.mark.parametrize(
    "plan, kv, images, options",
    [
        ("together", "evict", "keep", BEAMS),
        ("together", "retain", "keep", GREEDY),
        ("apart", "retain", "prune", BEAMS),
        (None, "evict", "keep", BEAMS),
    ],
)
def test_batch_equals_singles(each, plan, kv, images, options):
    """Every sequence has the media of its own sample, however many, and what was noted about their
    encoding."""
    model, batch, singles = each
    n = options.get("num_return_sequences", 1)
    rows = options.get("num_beams", 1)
    with prune(model, PLANS.get(plan), kv=kv, images=images) as run:
        together = new_tokens(model, batch, **options, **WORDS)
        kept = lists(run.kept)
        for i, one in enumerate(singles):
            alone = new_tokens(model, one, **options, **WORDS)
            assert torch.equal(together[i * n : (i + 1) * n], alone), i
            for stage, row in lists(run.kept).items():
                assert kept[stage][i * rows : (i + 1) * rows] == row
        assert run.samples == 2 * len(singles)


@pytest.mark.parametrize("kv", KV)
def test_beams_know_their_scores(model, batch, singles, kv):
    """The log-probability that beam search reports is that of the sequence it returns, recomputed
    without a cache."""
    options = dict(MORE, num_beams=3, num_return_sequences=3, length_penalty=0.0)
    with prune(model, PLANS["apart"], kv=kv):
        out = model.generate(**batch.inputs, **GREEDY | options, output_scores=True)
    best = out.sequences_scores.view(len(batch), 3)
    assert (best.diff() <= 0).all() and len({tuple(r) for r in out.sequences[:3].tolist()}) == 3
    for i, one in enumerate(singles):
        sets = naive.prefill(model, one, PLANS["apart"])[1]
        for b in range(3):
            tokens = out.sequences[3 * i + b, batch.shape[1] :].tolist()
            logp = naive.continued(model, one, sets, tokens[:-1], kv).log_softmax(-1)
            close(logp[range(NEW), tokens].sum(), best[i, b])


def test_stopping(model, batch, singles):
    "Rows end on a token at their own time, as they do alone; or all by a rule."

    class AfterTwo(StoppingCriteria):
        def __call__(self, ids, scores, **kw):
            return torch.full((len(ids),), ids.shape[1] >= batch.shape[1] + 2, dtype=torch.bool)

    with prune(model, PLAN):
        want = new_tokens(model, batch, **GREEDY)
        options = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        ends = options | dict(eos_token_id=want[0, 2].item())
        together = new_tokens(model, batch, **ends)
        for i, one in enumerate(singles):
            alone = new_tokens(model, one, **ends)[0].tolist()
            assert alone == want[i, : len(alone)].tolist()
            assert together[i].tolist() == alone + [0] * (together.shape[1] - len(alone))
        assert want[0, 2] == together[0, 2] and not together[0, 3:].any()
        rule = StoppingCriteriaList([AfterTwo()])
        assert torch.equal(new_tokens(model, batch, **options, stopping_criteria=rule), want[:, :2])


def as_processed(one):
    "Inputs as the processor makes them, without positions of ours."
    return {k: v for k, v in one.inputs.items() if k != "position_ids"} | dict(
        use_audio_in_video=True
    )


@pytest.mark.parametrize("name, stock", [("together", True), ("apart", False)])
def test_speculative_equals_greedy(each, name, stock):
    """Guesses by prompt lookup and by assistants, good ones and bad ones, from the first pass on,
    which reads the prompt by the plan for it alone; the next turn, too. Wrong ones are taken back,
    which the cache bears; the model is then as before."""
    model, _, _ = each
    family = next(f for f in tiny.FAMILIES if tiny.CLASSES[f] in type(model).__name__)
    before = state(model)
    # its last token has been there before, so lookup has a guess for the first pass
    asked = "assistant what colour is what colour is what ?"
    one = encode(model, tiny.processor(family), [tiny.ask("x", tiny.clip(4, 3), asked)])
    turn = one.inputs["input_ids"][:, -6:]
    options = dict(max_new_tokens=7, min_new_tokens=7, do_sample=False, **WORDS)
    assistants = copy.deepcopy(model), tiny.thinker(family, layers=2)
    for assistant in assistants:
        assistant.generation_config.num_assistant_tokens = 2
    ways = dict(prompt_lookup_num_tokens=3), *(dict(assistant_model=m) for m in assistants)
    passes = []
    layer = adapter_for(model).layers(model)[0]
    handle = layer.register_forward_pre_hook(lambda m, args: passes.append(args[0].shape[1]))
    found = []
    for how in ({}, *ways):
        passes.clear()
        with prune(model, PLANS[name]) as run:
            inputs = as_processed(one) if stock else one.inputs
            out = model.generate(**inputs, **options, **how, return_dict_in_generate=True)
            assert passes[0] == run.tokens_per_layer[0, 0] and (max(passes[1:]) > 1) == bool(how)
            kept = lists(run.kept)
            whole = torch.cat([out.sequences, turn], 1)
            again = model.generate(**follow_up(out.past_key_values, whole), **options, **how)
        found.append((kept, out.sequences.tolist(), again.tolist()))
        assert found[-1] == found[0] and run.samples == 1
    handle.remove()
    assert state(model) == before


def test_speculation_that_no_plan_can_serve(model, singles):
    "`evict` has no media left; test_own_code.py has what an assistant is refused."
    again = torch.full((1, 4), 20)
    with prune(model, PLAN, kv="evict"), pytest.raises(ValueError, match="guessed several at once"):
        cache = prefilled(model, singles[2])
        model(input_ids=again, past_key_values=cache)


# ---------------------------------------------------------------- further questions


def first_answer(model, encoded):
    out = model.generate(**encoded.inputs, **GREEDY, **WORDS, return_dict_in_generate=True)
    return out.sequences, out.past_key_values


@pytest.mark.parametrize("name, i", [("together", 0), ("apart", 4), ("together", 3)])
def test_a_chat_of_several_turns(each, turn, name, i):
    """`generate` returns the conversation so far, on which the next turn stands: what the layers
    kept for the first question, the answers, and itself. The logits of every answer are those of a
    plain loop over all of it."""
    model, _, singles = each
    one = singles[i]
    found = []
    with prune(model, PLANS[name], kv="retain") as run:
        talk, cache = first_answer(model, one)
        for _ in range(3):
            asked = torch.cat([talk, turn], 1)
            out = model.generate(**follow_up(cache, asked), **GREEDY, **MORE)
            talk = out.sequences
            assert torch.equal(talk[:, : asked.shape[1]], asked)
            found.append((asked.shape[1] - one.shape[1], torch.cat(out.logits)))
        assert run.samples == 1  # nothing was prefilled again
    after = talk[0, one.shape[1] : -1].tolist()
    sets = naive.prefill(model, one, PLANS[name])[1]
    want = naive.continued(model, one, sets, after, "retain")
    for start, logits in found:
        close(logits, want[start : start + NEW], 2e-5)
    assert cache.get_seq_length() == one.shape[1] + len(after)
    slots = Slots.of(cache)
    free = [0 if v is None else int((~v).sum()) for v in slots.valid]
    held = [cache.get_seq_length(l) - n for l, n in enumerate(free)]
    assert held == [len(s) + len(after) for s in sets]


def test_follow_up_in_a_batch(model, batch, singles, turn):
    """Rows whose answers ended early are padded in the middle; their next turn neither sees the
    padding nor is moved by it."""
    S, lengths = batch.shape[1], [1, 5, 3, 2, 4]  # where the answers end
    with prune(model, PLAN, kv="retain"):
        sequences, cache = first_answer(model, batch)
        answered = torch.arange(NEW) < torch.tensor(lengths)[:, None]
        asked = torch.ones(len(batch), turn.shape[1], dtype=torch.long)
        mask = torch.cat([batch.inputs["attention_mask"], answered.long(), asked], 1)
        whole = torch.cat([sequences, turn.expand(len(batch), -1)], 1)
        together = model.generate(**follow_up(cache, whole, mask), **GREEDY, **MORE)
        for i, one in enumerate(singles):
            if i == TEXT:
                continue  # nothing is pruned when it is alone
            answer = sequences[i : i + 1, S : S + lengths[i]]
            cache = continued(model, one, answer)
            alone = follow_up(cache, torch.cat([one.inputs["input_ids"], answer, turn], 1))
            out = model.generate(**alone, **GREEDY, **MORE)
            close(torch.stack([l[i] for l in together.logits]), torch.cat(out.logits))


@pytest.mark.parametrize("i", [2, 4])
def test_follow_up_the_stock_way(model, singles, turn, i):
    """With inputs as the processor makes them, `generate` finds its way on a pruned cache by
    itself; after another prompt it would not, and is stopped."""

    def first():
        out = model.generate(**as_processed(singles[i]), **GREEDY, return_dict_in_generate=True)
        return torch.cat([out.sequences, turn], 1), out.past_key_values

    def ours(whole, cache):
        return model.generate(**follow_up(cache, whole), **GREEDY)[:, -NEW:]

    def theirs(whole, cache):
        ones = torch.ones_like(whole)
        out = model.generate(input_ids=whole, attention_mask=ones, past_key_values=cache, **GREEDY)
        return out[:, -NEW:]

    with prune(model, PLAN, kv="retain"):
        want = ours(*first())
        assert torch.equal(theirs(*first()), want)
        given = first()
        # another prompt leaves its deltas on the model
        model.generate(**as_processed(singles[0]), max_new_tokens=1)
        with pytest.raises(ValueError, match="do not follow the pruned prompt"):
            theirs(*given)
        assert torch.equal(ours(*given), want)


@pytest.mark.parametrize(
    "name, gone",
    [
        ("together", "no visual and no audio"),
        ("apart", "no visual and no audio"),
        ("stage3", "no visual"),
        ("no_late", None),
    ],
)
def test_evict_refuses_a_further_question(model, singles, turn, name, gone):
    "Where media are lost; the answer itself may go on."
    longer = dict(max_new_tokens=2 * NEW, min_new_tokens=2 * NEW, do_sample=False)
    with prune(model, PLANS[name], kv="evict"):
        sequences, cache = first_answer(model, singles[2])
        whole = torch.cat([sequences, turn], 1)
        if gone is None:
            model.generate(**follow_up(cache, whole), **GREEDY)
            return
        given = dict(attention_mask=torch.ones_like(whole), past_key_values=cache)
        for question in (
            lambda: follow_up(cache, whole),
            lambda: model(input_ids=turn, past_key_values=cache),
            lambda: model.generate(input_ids=whole, **given, **GREEDY),
        ):
            with pytest.raises(ValueError, match=gone) as error:
                question()
            message = str(error.value)
            assert "\n" not in message and "prompt_lookup_num_tokens" in message
            assert 'kv="retain"' in message
        goes_on = model.generate(**follow_up(cache, sequences), **GREEDY, **WORDS)[:, -NEW:]
        assert torch.equal(goes_on, new_tokens(model, singles[2], **longer, **WORDS)[:, NEW:])
        # a prompt without media loses nothing, and nothing is pruned from it
        cache = first_answer(model, singles[TEXT])[1]
        assert Slots.of(cache) is None
        model(input_ids=turn, past_key_values=cache)


def with_media(one, cache, sequences):
    "Inputs of a turn with media of its own behind a pruned cache."
    whole = torch.cat([sequences, one.inputs["input_ids"]], 1)
    return one.inputs | follow_up(cache, whole, position_ids=one.position_ids)


@pytest.mark.parametrize(
    "name, first, second",
    [("together", 2, 4), ("apart", 4, 0), ("together", 0, 3), ("no_late", 3, 2), ("stage3", 2, 2)],
)
def test_a_clip_in_a_later_turn(each, name, first, second):
    """A turn with media is a prefill behind the filled cache, with a plan of its own; what the
    first turn kept stays as it is."""
    model, _, singles = each
    plan = PLANS[name]
    with prune(model, plan, kv="retain") as run:
        sequences, cache = first_answer(model, singles[first])
        given = with_media(singles[second], cache, sequences)
        out = model.generate(**given, **GREEDY, **MORE)
        answer = sequences[0, singles[first].shape[1] :].tolist()
        tokens = out.sequences[0, -NEW:].tolist()
        told = run.kept, run.tokens_per_layer[0].tolist()
        assert run.samples == 2
        more = follow_up(cache, torch.zeros(1, cache.get_seq_length() + 3, dtype=torch.long))
        third = model(**more).logits[0]
    sets = naive.prefill(model, singles[first], plan)[1]
    turns = [(singles[first], sets, answer)]
    kept, seen, last = naive.prefill(
        model, singles[second], plan, earlier=naive.Conversation(model, turns)
    )
    assert [n - 1 for n in told[1]] == [len(s) for s in seen]  # and the answer's last token
    assert {k: [p - 1 for p in v[0].tolist()[1:]] for k, v in told[0].items()} == kept
    close(out.logits[0], last, 2e-5)
    turns.append((singles[second], seen, tokens[:-1] + [0, 0, 0]))
    want = naive.Conversation(model, turns).logits()
    close(torch.cat(out.logits), want[:NEW], 2e-5)
    close(third, want[-3:], 2e-5)


@pytest.mark.parametrize("kv", KV)
def test_clips_in_later_turns_of_a_batch(each, kv):
    "As the samples do alone; also where no layer keeps what it processed longer than the last."
    model, batch, singles = each
    plan = PLANS["no_late"]
    with prune(model, plan, kv=kv):
        sequences, cache = first_answer(model, batch)
        mask = torch.cat([batch.inputs["attention_mask"], torch.ones(len(batch), NEW)], 1).long()
        whole = torch.cat([sequences, batch.inputs["input_ids"]], 1)
        mask = torch.cat([mask, batch.inputs["attention_mask"]], 1)
        more = follow_up(cache, whole, mask, batch.position_ids)
        together = model.generate(**batch.inputs | more, **GREEDY, **MORE)
        for i, one in enumerate(singles):
            if i == TEXT:
                continue  # nothing is pruned when it is alone
            answer = sequences[i : i + 1, batch.shape[1] :]
            cache = continued(model, one, answer)
            given = with_media(one, cache, torch.cat([one.inputs["input_ids"], answer], 1))
            out = model.generate(**given, **GREEDY, **MORE)
            close(torch.stack([l[i] for l in together.logits]), torch.cat(out.logits))


def test_bad_later_turns(model, singles):
    "Positions of text, of another place, of too many columns; and a block without a plan."
    with prune(model, PLAN, kv="retain"):
        sequences, cache = first_answer(model, singles[0])
        one = singles[2]
        whole = torch.cat([sequences, one.inputs["input_ids"]], 1)
        right = one.inputs | follow_up(cache, whole, position_ids=one.position_ids)
        known = cache.get_seq_length()
        moved = right["position_ids"] + (torch.arange(whole.shape[1]) >= known)
        alone = right | dict(input_ids=whole[:, known:], position_ids=None)
        for given in (
            one.inputs | follow_up(cache, whole),
            right | dict(position_ids=moved),
            alone,
        ):
            with pytest.raises(ValueError, match="needs its positions behind"):
                model(**given)
        with pytest.raises(ValueError, match="last t columns"):
            follow_up(cache, whole, position_ids=torch.zeros(3, 1, 2 * one.shape[1]).long())
    given = with_media(one, cache, sequences)
    with prune(model, None), pytest.raises(ValueError, match="nothing is pruned"):
        model(**given)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "medium, prompt",
    [
        ("video", tiny.clip(2, 3, sound=False)),
        ("audio", tiny.clip(2, 3, sight=False)),
        ("image", tiny.image(0)),
    ],
)
def test_media_after_the_first_column(both, family, medium, prompt):
    """On a cache that holds the prompt's beginning they would not be pruned: refused, unless
    nothing would be pruned anyway."""
    model = both[family][0]
    prompt = Prompt("x", ("red blue green where ?", prompt, "what colour is the circle ?"))
    one = encode(model, tiny.processor(family), [prompt])
    placed = ("input_ids", "attention_mask", "position_ids")

    def begin():
        given = {n: one.inputs[n][..., :3] for n in placed}
        return model(**given, past_key_values=DynamicCache()).past_key_values

    rest = one.inputs | {n: one.inputs[n][..., 3:] for n in ("input_ids", "position_ids")}
    calls = [
        lambda: model(**rest, past_key_values=begin()).logits[:, -1],
        lambda: model.generate(**one.inputs, **GREEDY, past_key_values=begin()),
    ]
    # stock chunks have no sound, and in 5.17 no media
    if medium != "audio" and "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        calls.append(lambda: model.generate(**one.inputs, **GREEDY, prefill_chunk_size=3))
    stock = [call() for call in calls]
    with prune(model, PLAN, images="prune" if medium == "image" else "keep"):
        for call in calls:
            with pytest.raises(ValueError, match=f"holds . columns before {medium}") as error:
                call()
            assert "\n" not in str(error.value)
        assert Slots.of(prefilled(model, one)) is not None  # goes on working
    for plan in (None, *([PLAN] if medium == "image" else [])):
        with prune(model, plan):
            assert all(torch.equal(call(), want) for call, want in zip(calls, stock))


# ---------------------------------------------------------------- the cache


def test_a_cache_and_its_copies(model, singles):
    """Shallow and deep copies and a pickled cache go on as the first would; rows can be repeated
    and selected."""
    one, token = singles[2], torch.tensor([[20]])

    def step(cache):
        ids = token.expand(len(Slots.of(cache).position), 1)
        return model(input_ids=ids, past_key_values=cache).logits

    with prune(model, PLAN, kv="retain"):
        cache = prefilled(model, one)
        shallow = copy.copy(cache)
        shallow.layers = [copy.copy(layer) for layer in cache.layers]
        others = [shallow, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        many = copy.deepcopy(cache)
        many.batch_repeat_interleave(3)
        want = step(cache)
        for other in others:
            assert other.get_seq_length() == one.shape[1]
            assert other.get_seq_length(5) == Slots.of(other).lengths[5]
            assert torch.equal(step(other), want)
        close(step(many), want.expand(3, -1, -1))
        many.batch_select_indices(torch.tensor([0]))
        want = step(cache)
        assert len(Slots.of(many).position) == 1
        close(step(many), want)
        cache.crop(-1)
        close(step(cache), want)
    with pytest.raises(ValueError, match="only 2 came after"):
        cache.crop(-3)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_cache_goes_on_in_a_block_only(model, batch, singles, kv, attention):
    """With the stock mask its free slots would be seen: it says so and stays as it is. One without
    free slots needs no mask."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    for encoded in (batch, singles[2]):
        mask = torch.nn.functional.pad(encoded.inputs["attention_mask"], (0, 1), value=1)
        after = dict(attention_mask=mask, position_ids=encoded.position_ids[..., -1:] + 1)

        def step(cache, **after):
            ids = torch.full((len(encoded), 1), 20)
            return model(input_ids=ids, past_key_values=cache, **after).logits

        with prune(model, PLAN, kv=kv):
            cache = prefilled(model, encoded)
            outside, within, broken = (copy.deepcopy(cache) for _ in range(3))
            want = step(cache, **after)
        if encoded is batch:
            for more in ({}, dict(position_ids=after["position_ids"]), after):
                with pytest.raises(ValueError, match="free slots"):
                    step(outside, **more)
            assert outside.get_seq_length() == encoded.shape[1]
            within = outside
        elif attention == "sdpa":
            assert torch.equal(step(outside, **after), want)
        with prune(model, None):
            assert torch.equal(step(within, **after), want)
        # nor does a step that fails leave the cache open
        layer = adapter_for(model).layers(model)[3]
        handle = layer.register_forward_pre_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError), prune(model, PLAN, kv=kv):
            step(broken, **after)
        handle.remove()
        if encoded is batch:
            with pytest.raises(ValueError, match="free slots"):
                broken.update(torch.zeros(0), torch.zeros(0), 0)
