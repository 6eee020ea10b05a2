"""The closed form against torch's own counter, on the model that the project ships, full and pruned."""
from pathlib import Path
import pytest, torch
from torch.utils.flop_counter import FlopCounterMode
from seats_analysis.adapter import encode
from seats_analysis.baselines import make_method
from seats_analysis.cost import prefill_flops
from seats_analysis.prune import prune
from seats_analysis.schedule import Schedule
from seats_analysis.testbed import load_testbed, testbed_samples as shipped_samples

SCHEDULES = Path(__file__).parents[1]/'data'/'schedules'

@pytest.fixture(scope='module')
def shipped(): return load_testbed()

@pytest.fixture(scope='module')
def encoded(shipped): return encode(*shipped, shipped_samples(limit=1))

def counted(model, encoded):
    "FLOPs of every decoder layer's forward and of the logits of the last position."
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter: model(**encoded.inputs, logits_to_keep=1)
    counts = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}
    total = lambda name: sum(n for key, n in counts.items() if key.endswith(name))
    layers = [total(f'.language_model.layers.{i}') for i in range(model.config.text_config.num_hidden_layers)]
    assert all(layers)
    return layers, total('.lm_head')

def test_full(shipped, encoded):
    model, _ = shipped
    layers, head = counted(model, encoded)
    form = prefill_flops([encoded.layout.valid.sum().item()]*len(layers), model.config, convention='counter')
    assert sum(layers) + head == pytest.approx(form, rel=5e-3)

def scoring(config, tokens, drops):
    "FLOPs of stage II itself: keys of all tokens that arrive at a drop, one query, their products."
    c = config.text_config
    heads, keys = (n*c.hidden_size//c.num_attention_heads for n in (c.num_attention_heads, c.num_key_value_heads))
    return sum(2*tokens[d-1]*(c.hidden_size*keys + heads) + 2*c.hidden_size*heads for d in drops)

@pytest.mark.parametrize('trr', ['10', '35'])
@pytest.mark.parametrize('name', ['seats', 'random'])
def test_pruned(shipped, encoded, trr, name):
    model, _ = shipped
    schedule = Schedule.load(SCHEDULES/f'testbed_trr{trr}.json')
    with prune(model, make_method(name, schedule)) as run: layers, head = counted(model, encoded)
    tokens = run.tokens_per_layer[0]
    assert tokens[-1] < tokens[0] < len(encoded.layout.modality[0])
    form = prefill_flops(tokens, model.config, convention='counter')
    extra = scoring(model.config, tokens, schedule.drop_layers) if name == 'seats' else 0
    assert sum(layers) + head == pytest.approx(form + extra, rel=5e-3)
    assert extra < .02*form


@pytest.mark.parametrize('name', ['qwen2.5-omni-7b', 'qwen3-omni-30b-a3b'])
@pytest.mark.parametrize('trr', [None, 10])
def test_bench(name, trr):
    "The FLOPs that `bench` divides by, on a narrow model of the real depth: counted where it is dense, closed form without experts where it is not."
    from seats_analysis.bench import Request, bench_inputs, bench_processor, bench_schedule, build_model, request_facts
    model = build_model(name, 64)
    inputs, tokens = bench_inputs(model, bench_processor(name), Request(8, 4, 30))
    method = None if trr is None else make_method('seats', bench_schedule(name, trr, tokens['visual'], tokens['audio']))
    facts, counter = request_facts(model, inputs, method), FlopCounterMode(display=False)
    attention = []
    def note(module, args, kwargs, out): attention.append(out[0].shape[1])
    hooks = [layer.self_attn.register_forward_hook(note, with_kwargs=True) for layer in model.get_decoder().layers]
    try:
        with prune(model, method), torch.no_grad(), counter: model(**inputs, use_cache=True)
    finally:
        for hook in hooks: hook.remove()
    assert attention == [int(n) for n in facts['layer_tokens']]
    assert facts['flops']['counter'] == prefill_flops(attention, model.config, 'counter') and facts['flops']['causal'] < facts['flops']['counter']
    counts = {key: sum(by.values()) for key, by in counter.get_flop_counts().items()}
    layers = [next(n for key, n in counts.items() if key.endswith(f'.layers.{i}') and '.audio_tower.' not in key) for i in range(len(attention))]
    assert len(layers) == len(attention)
    if name == 'qwen2.5-omni-7b':
        extra = 0 if method is None else narrow_scoring(model.config, attention, method.schedule.drop_layers)
        head = prefill_flops([0]*len(attention), model.config, 'counter')
        assert sum(layers) + head == pytest.approx(facts['flops']['counter'] + extra, rel=5e-3)
