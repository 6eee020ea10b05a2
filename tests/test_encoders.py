"""Options for the towers: the same tokens as without, measured where they can be seen to work, and
undone."""

import pytest, torch
import tiny
from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import encode
from seats_analysis.models.attention import TowerAttention
from seats_analysis.pruning.encoders import ENCODERS, SideStream
from seats_analysis.inputs.media import Clip
from seats_analysis.pruning.session import prune
from seats_analysis.schedules.schedule import Schedule
from test_undo import state

LAYERS = tiny.LAYERS
PLAN = Schedule(
    num_layers=LAYERS,
    drop_layers=(2, 3),
    late_start=5,
    keep_ratios=dict(visual=(0.8, 0.5), audio=(0.9, 0.6)),
    entering=dict(visual=0.3, audio=0.5),
)
SETS = [(o,) for o in ENCODERS] + [ENCODERS]


@pytest.fixture(scope="module")
def batch(model):
    "Two clips; of the first one's 8 temporal grids 3 are new, of the second one's all."
    moving = tiny.clip(1)
    frames = tiny.clip(0, 8.0).frames
    slides = Clip(
        "slides", frames[[0] * 8 + [5] * 4 + [0] * 4], 2.0, tiny.clip(0, 8.0).waveform, 16000
    )
    return encode(
        model,
        tiny.processor(adapter_for(model).family),
        [tiny.ask("slides", slides), tiny.ask("moving", moving, "where is it ?")],
    )


pytestmark = pytest.mark.usefixtures("no_grad")


def seen(module, model, batch, **options):
    "Logits, what was kept, and the number of rows that a module was given, call by call."
    rows = []
    handle = module.register_forward_pre_hook(
        lambda m, a, k: rows.append(len(a[0] if a else k["hidden_states"])), with_kwargs=True
    )
    try:
        with prune(model, PLAN, **options) as run:
            logits = model(**batch.inputs).logits
    finally:
        handle.remove()
    return logits, run, rows


@pytest.mark.parametrize("options", SETS, ids="+".join)
def test_tokens_are_the_same(model, batch, options):
    attn = TowerAttention(model, "visual").module
    (want, before, all_rows), (logits, run, rows) = (
        seen(attn, model, batch, encoders=o) for o in ((), options)
    )
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)
    for name, kept in before.kept.items():
        assert all(torch.equal(a, b) for a, b in zip(kept, run.kept[name]))
    share = (3 + 4) / (8 + 4) if "repeats" in options else 1
    assert rows == [all_rows[0] * share]


@pytest.mark.parametrize("options", SETS, ids="+".join)
def test_generating_is_the_same(model, batch, options):
    go = dict(
        max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=2, num_return_sequences=2
    )
    with prune(model, PLAN):
        want = model.generate(**batch.inputs, **go)
    with prune(model, PLAN, encoders=options):
        assert torch.equal(model.generate(**batch.inputs, **go), want)
    with prune(model, None):
        want = model.generate(**batch.inputs, **go)
    with prune(model, None, encoders=options):
        assert torch.equal(model.generate(**batch.inputs, **go), want)


def order_of(model, batch, monkeypatch, call, **options):
    "What runs in which order, and where the streams join."
    seen, adapter, handles = [], adapter_for(model), []
    for name, part in (
        ("video", adapter.visual(model)),
        ("sound", adapter.audio_tower(model)),
        ("decoder", adapter.decoder(model)),
    ):
        handles.append(part.register_forward_hook(lambda m, a, out, name=name: seen.append(name)))
    with monkeypatch.context() as patch:
        whole = SideStream.join
        patch.setattr(SideStream, "join", lambda self: seen.append("join") or whole(self))
        try:
            with prune(model, PLAN, **options) as run:
                call(batch)
            assert run.timings.ms["encoders"] > 0 and not run.timings._open
        finally:
            for h in handles:
                h.remove()
    return seen


def test_order_of_the_towers(model, batch, monkeypatch):
    """`overlap` launches the video first, where the thinker takes encoded video, and the two join
    behind the sound, before anything is made of them."""
    import inspect

    takes = (
        "mm_encoder_outputs"
        in inspect.signature(adapter_for(model).thinker(model).forward).parameters
    )
    once = dict(max_new_tokens=1, min_new_tokens=1, do_sample=False)
    direct, generate, beams = (
        lambda b: model(**b.inputs),
        lambda b: model.generate(**b.inputs, **once),
        lambda b: model.generate(**b.inputs, **once, num_beams=2),
    )
    look = lambda call, **options: order_of(model, batch, monkeypatch, call, **options)
    assert look(direct) == ["sound", "video", "decoder"]
    if not takes:
        assert (
            look(direct, encoders="overlap")
            == look(generate, encoders="overlap")
            == ["sound", "video", "decoder"]
        )
    if takes:
        for call in (direct, generate):
            assert look(call, encoders="overlap") == ["video", "sound", "join", "decoder"]
        assert look(beams, encoders="overlap") == [
            "video",
            "join",
            "sound",
            "decoder",
        ]  # what is repeated must be there
        assert look(generate) == ["video", "sound", "decoder"]


@pytest.mark.cuda
def test_overlap_on_a_gpu(model, batch):
    "Many times over, with other work in between: a race would show in some pass."
    import copy

    there, inputs = copy.deepcopy(model).cuda(), batch.to("cuda").inputs
    with prune(there, PLAN):
        want = there(**inputs).logits
    with prune(there, PLAN, encoders=ENCODERS):
        for _ in range(50):
            junk = torch.randn(2**22, device="cuda")
            torch.testing.assert_close(there(**inputs).logits, want, atol=1e-3, rtol=0)
            del junk


def test_windows_are_one_call_per_size(model, batch, monkeypatch):
    calls, whole = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *a, **k: calls.append(len(q)) or whole(q, *a, **k),
    )
    counts = []
    for options in ((), "batch"):
        calls.clear()
        with prune(model, None, encoders=options):
            adapter_for(model).visual(model)(
                batch.inputs["pixel_values_videos"], grid_thw=batch.inputs["video_grid_thw"]
            )
        counts.append(len(calls))
    assert counts[1] < counts[0] / 3


@pytest.mark.parametrize("where", ["nowhere", "vision", "sound", "decoder"])
def test_undone(model, batch, where):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    adapter, before, names = adapter_for(model), state(model), set(ALL_ATTENTION_FUNCTIONS.keys())
    part = dict(
        vision=adapter.visual(model).blocks[0],
        sound=adapter.audio_tower(model).layers[0],
        decoder=adapter.layers(model)[2].mlp,
    ).get(where)

    def broken(*_):
        raise RuntimeError("planted")

    with prune(model, PLAN):
        want = model(**batch.inputs).logits
    with prune(model, PLAN, encoders=ENCODERS):
        assert state(model) != before
        if part is not None:
            handle = part.register_forward_hook(broken)
            with pytest.raises(RuntimeError, match="planted"):
                model(**batch.inputs)
            handle.remove()
        torch.testing.assert_close(
            model(**batch.inputs).logits, want, atol=1e-4, rtol=0
        )  # and the next pass is fine
    assert state(model) == before and set(ALL_ATTENTION_FUNCTIONS.keys()) == names
    with prune(model, PLAN):
        assert torch.equal(model(**batch.inputs).logits, want)


def test_another_model_of_the_same_configuration_is_left_alone():
    config = tiny.config("qwen2.5-omni")
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

    one, other = Thinker(config), Thinker(config)
    one.set_attn_implementation("sdpa")
    with prune(one, None, encoders="batch"):
        assert (
            "flash" in TowerAttention(one, "visual").module.config._attn_implementation
            and "flash" not in TowerAttention(other, "visual").module.config._attn_implementation
        )


def test_unknown_option(model):
    with pytest.raises(
        ValueError, match="`encoders` must be one of 'batch', 'repeats', 'overlap', not 'fast'"
    ):
        with prune(model, PLAN, encoders=("batch", "fast")):
            pass
