"""The closed form against torch's own counter, on the model that the project ships, full and
pruned."""

from pathlib import Path
import pytest, torch
from torch.utils.flop_counter import FlopCounterMode
from seats_analysis import (
    METHODS,
    Schedule,
    encode,
    load_testbed,
    prefill_flops,
    prune,
    testbed_samples as shipped_samples,
)
from seats_analysis.pruning import timing


# ---------------------------------------------------------------- the timings


class Mark:
    "An event: over once so many marks have been made after it, or when it is waited for."

    made, lag, waits = 0, 0, 0

    def __init__(self):
        self.at, Mark.made = Mark.made, Mark.made + 1

    def query(self):
        return Mark.made - self.at > Mark.lag

    def synchronize(self):
        Mark.waits += 1

    def elapsed_time(self, end):
        return float(end.at - self.at)


@pytest.mark.parametrize(
    "device, lag", [("cpu", 0), ("cuda:1", 0), ("cuda:1", 50), ("cuda:0", 10**9)]
)
def test_a_long_answer_does_not_grow_the_timings(monkeypatch, device, lag):
    """Spans that are over are added up without waiting; what is not over stays, also where the
    device is far behind, and all are there in the end."""
    if device != "cpu":
        monkeypatch.setattr(timing, "_mark", lambda device: Mark())
    monkeypatch.setattr(Mark, "lag", lag), monkeypatch.setattr(Mark, "waits", 0)
    timings, most = timing.Timings(device), 0
    for _ in range(3000):
        with timings.time("decode"):
            pass
        most = max(most, len(timings._spans))
    assert timing._HELD <= most <= timing._HELD + lag + 1 and Mark.waits == 0
    total = timings.ms["decode"]
    assert total == 3000 if device != "cpu" else total > 0
    assert timings.calls["decode"] == 3000 and not timings._spans
    assert lag < 3000 or Mark.waits == 3000


def test_marks_lie_in_the_stream_of_the_timings_device(monkeypatch):
    "Which need not be the current device."
    seen = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            seen.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    with timing.Timings("cuda:1").time("prefill"):
        pass
    assert seen == ["stream of cuda:1"] * 2


# ---------------------------------------------------------------- the closed form

SCHEDULES = Path(__file__).parents[1] / "data" / "schedules"


@pytest.mark.parametrize("tokens", [(1, 1), (2, 1), (7, 7), (8, 5), (5, 0)])
def test_a_causal_query_meets_its_own_prefix(tokens):
    "Counted row by row; a layer with fewer tokens has shorter rows."
    D, H, K, d, V, I = 8, 2, 1, 4, 11, 5
    sizes = dict(hidden_size=D, num_attention_heads=H, num_key_value_heads=K, head_dim=d)
    dims = dict(sizes, vocab_size=V, intermediate_size=I, num_hidden_layers=len(tokens))
    products = 0  # a multiply-add counts 2
    for n in tokens:
        for query in range(n):
            products += D * H * d + 2 * D * K * d + H * d * D + 3 * D * I
            for _ in range(query + 1):
                products += 2 * H * d  # with its key, and its share of the value
    assert prefill_flops(tokens, dims, "causal") == 2 * (products + D * V)


@pytest.fixture(scope="module")
def shipped():
    return load_testbed()


@pytest.fixture(scope="module")
def encoded(shipped):
    return encode(*shipped, shipped_samples(limit=1))


def counted(model, encoded):
    "FLOPs of every decoder layer's forward and of the logits of the last position."
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**encoded.inputs, logits_to_keep=1)
    counts = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}
    total = lambda name: sum(n for key, n in counts.items() if key.endswith(name))
    layers = [
        total(f".language_model.layers.{i}")
        for i in range(model.config.text_config.num_hidden_layers)
    ]
    assert all(layers)
    return layers, total(".lm_head")


def scoring(config, tokens, drops):
    "FLOPs of stage II itself: keys of all tokens that arrive at a drop, one query, their products."
    c = config.text_config
    heads, keys = (
        n * c.hidden_size // c.num_attention_heads
        for n in (c.num_attention_heads, c.num_key_value_heads)
    )
    return sum(
        2 * tokens[d - 1] * (c.hidden_size * keys + heads) + 2 * c.hidden_size * heads
        for d in drops
    )


@pytest.mark.parametrize("trr", ["10", "35"])
@pytest.mark.parametrize("name", ["seats", "random"])
def test_pruned(shipped, encoded, trr, name):
    model, _ = shipped
    schedule = Schedule.load(SCHEDULES / f"testbed_trr{trr}.json")
    with prune(model, METHODS[name](schedule)) as run:
        layers, head = counted(model, encoded)
    tokens = run.tokens_per_layer[0]
    assert tokens[-1] < tokens[0] < len(encoded.layout.modality[0])
    form = prefill_flops(tokens, model.config, convention="counter")
    extra = scoring(model.config, tokens, schedule.drop_layers) if name == "seats" else 0
    assert sum(layers) + head == pytest.approx(form + extra, rel=5e-3)
    assert extra < 0.02 * form
