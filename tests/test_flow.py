"""Knockouts against the stock model with a mask of its own, planted flow, cost, and the files."""

from contextlib import ExitStack

import naive
import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

from seats_analysis import (
    adapter_for,
    boundary_table,
    encode,
    explain_flow,
    find_boundaries,
    flow_table,
    load_flow,
    load_profile,
    trace_flow,
)
from seats_analysis.boundaries.flow import flow_end
from seats_analysis.cli.main import app
from seats_analysis.inputs.layout import Modality
from seats_analysis.models.encode import encode_questions
from seats_analysis.probing import flow as flow_module
from seats_analysis.probing.flow import FLOW_METRICS, Knockouts
from seats_analysis.storage.schemas import save_flow

LAYERS = 4
FAMILIES = "qwen2.5-omni", "qwen3-omni"


@pytest.fixture(scope="module", params=FAMILIES)
def parts(request):
    return tiny.thinker(request.param, LAYERS), tiny.processor(request.param)


@pytest.fixture(scope="module")
def samples():
    return [s for s in tiny.probed() if s.id in ("open", "letters", "silent", "text")]


def sides(encoded):
    "Positions of a prompt's sides, without the package's own."
    kind = encoded.layout.modality[0]
    at = torch.arange(len(kind))
    media = (kind == Modality.VISUAL) | (kind == Modality.AUDIO)
    behind = at > int(media.nonzero().max())
    last = at == len(kind) - 1
    return dict(
        visual=kind == Modality.VISUAL,
        audio=kind == Modality.AUDIO,
        question=behind & ~last,
        last=last,
        text=behind,
    )


@torch.no_grad()
def stock(model, encoded, source, target, blocked, head=None):
    "Log-probabilities at the answer position of the stock forward with a mask in some layers."
    S = encoded.shape[1]
    seen = torch.ones(S, S, dtype=torch.bool).tril()
    less = seen & ~(target[:, None] & source[None]) | torch.eye(S, dtype=torch.bool)
    layers = adapter_for(model).decoder(model).layers
    heads = model.config.get_text_config().num_attention_heads
    masks = torch.stack([less if head in (None, h) else seen for h in range(heads)])[None]
    bias = torch.zeros(masks.shape).masked_fill(~masks, torch.finfo(torch.float32).min)

    def hide(module, args, kwargs):
        return args, {**kwargs, "attention_mask": bias}

    with ExitStack() as stack:
        for layer in blocked:
            hook = layers[layer].register_forward_pre_hook(hide, with_kwargs=True)
            stack.enter_context(hook)
        logits = model(**encoded.inputs, use_cache=False).logits
    return logits[0, -1].float().log_softmax(-1)


@pytest.mark.parametrize(
    "edge", ["visual->question", "audio->last", "question->last", "audio->text"]
)
@pytest.mark.parametrize("head", [None, 1])
def test_a_knockout_is_the_stock_model_with_a_mask(parts, samples, edge, head):
    model, processor = parts
    one = [s for s in samples if s.id == "open"]
    flow = trace_flow(model, processor, one, [edge], heads=head is not None, progress=False)
    if head is not None:
        flow = flow.sel(head=head)
    encoded = encode(model, processor, one)
    named = sides(encoded)
    source, target = (named[side] for side in edge.split("->"))
    full = stock(model, encoded, source, target, [])
    for layer in range(LAYERS):
        window = [i for i in range(LAYERS) if abs(i - layer) <= 1]
        found = stock(model, encoded, source, target, window, head)
        kl = (full.exp() * (full - found)).sum()
        np.testing.assert_allclose(flow["kl"].sel(edge=edge, layer=layer)[0], kl, atol=2e-5)
    assert float(flow["kl"].max()) > 1e-4  # something was blocked


@pytest.mark.parametrize("span", ["around", "from", "to"])
def test_the_pass_with_branches_gives_what_a_pass_for_each_gives(parts, samples, span, monkeypatch):
    model, processor = parts
    edges = ["visual->question", "both->text", "audio->visual", "visual@0->audio", "options->last"]
    edges += ["right->last", "first->text", "question->answer"]
    edges += ["visual->text", "visual->last", "first->question"]  # two share copies with another
    options = dict(edges=edges, span=span, media_every=2, progress=False)
    fast = trace_flow(model, processor, samples, **options)
    monkeypatch.setattr(Knockouts, "branch", naive.knockouts)
    slow = trace_flow(model, processor, samples, **options)
    for k in (*FLOW_METRICS, "lens"):
        np.testing.assert_allclose(fast[k], slow[k], atol=2e-4, rtol=1e-3, err_msg=k)
    change = fast["change"]
    assert change.sel(edge="audio->visual").isel(layer=[1, 3]).isnull().all()
    assert change.sel(edge="right->last", sample="open").isnull().all()  # no choices in the prompt
    assert change.sel(edge="right->last", sample="letters").notnull().all()
    assert change.sel(edge="both->text", sample="text").isnull().all()  # no media
    assert change.sel(edge="question->answer").notnull().any()


def test_sets_of_heads_are_blocked_together(parts, samples):
    model, processor = parts
    one = [s for s in samples if s.id == "open"]
    heads = model.config.get_text_config().num_attention_heads
    everywhere = [(layer, h) for layer in range(LAYERS) for h in range(heads)]
    options = dict(edges=["both->text"], progress=False)
    sets = trace_flow(model, processor, one, heads=dict(all=everywhere, one=[(1, 0)]), **options)
    whole = trace_flow(model, processor, one, span="from", layers=[0], **options)
    each = trace_flow(model, processor, one, window=1, heads=True, **options)
    np.testing.assert_allclose(sets["kl"].sel(heads="all"), whole["kl"][..., 0], atol=1e-5)
    np.testing.assert_allclose(
        sets["kl"].sel(heads="one"), each["kl"].sel(layer=1, head=0), atol=1e-6
    )


def test_planted_flow_is_found(samples):
    "With attention mute in all layers but two, one head each, the way goes through them only."
    model, processor = tiny.thinker("qwen2.5-omni", LAYERS), tiny.processor("qwen2.5-omni")
    size = adapter_for(model).decoder(model).layers[0].self_attn.head_dim
    speaks = {1: 2, 3: 0}  # layer -> head
    with torch.no_grad():
        for i, layer in enumerate(adapter_for(model).decoder(model).layers):
            weight = layer.self_attn.o_proj.weight
            mute = torch.ones(weight.shape[1], dtype=torch.bool)
            if i in speaks:
                mute[speaks[i] * size : (speaks[i] + 1) * size] = False
            weight[:, mute] = 0
    one = [s for s in samples if s.id == "open"]
    edges = ["visual->question", "audio->question", "question->last", "visual->last"]
    flow = trace_flow(model, processor, one, edges, window=1, heads=True, progress=False)
    moved = flow["kl"].isel(sample=0).max("edge") > 1e-7
    assert [(i, h) for i, h in np.argwhere(moved.values)] == [(1, 2), (3, 0)]
    into = (flow["kl"].isel(sample=0).max("head") > 1e-7).to_pandas()
    # what reaches the question in layer 3 comes too late to reach the answer
    assert into.loc["visual->question"].tolist() == [False, True, False, False]
    assert into.loc["question->last"].tolist() == [False, True, False, True]


def test_encoders_leave_no_graph_behind(parts, samples):
    model, processor = parts
    questions = encode_questions(model, processor, samples[:1])
    assert not Knockouts(model, processor, *questions).stream.hidden.requires_grad


def test_a_flow_is_stored_and_read(parts, samples, tmp_path):
    model, processor = parts
    flow = trace_flow(model, processor, samples, "time", progress=False)
    path = save_flow(flow, tmp_path / "flow.nc")
    again = load_flow(path)
    assert set(again.variables) == set(flow.variables)
    np.testing.assert_array_equal(again["change"], flow["change"])
    with pytest.raises(ValueError, match="is not a dependency profile"):
        load_profile(path)
    rows = flow_table(again)
    assert rows["questions"].max() == 3  # the text alone has no such edge


def test_a_checkpoint_is_shared_and_goes_on(parts, samples, tmp_path):
    model, processor = parts
    options = dict(edges=["both->text"], progress=False)
    whole = trace_flow(model, processor, samples, **options)
    options["checkpoint"] = tmp_path / "c"
    assert trace_flow(model, processor, samples, shard=(1, 2), **options) is None
    shared = trace_flow(model, processor, samples, shard=(0, 2), **options)
    for found in shared, trace_flow(model, processor, samples, **options):
        np.testing.assert_array_equal(whole["kl"], found["kl"])
    with pytest.raises(ValueError, match="cannot be continued"):
        trace_flow(model, processor, samples, window=1, **options)


def test_the_command_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "flow --edges time --limit 6 --out f.nc".split()
    seen = []
    rows = flow_module._rows

    def stop(walk, *args):
        seen.append(walk.questions.samples[0].clip)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return rows(walk, *args)

    monkeypatch.setattr(flow_module, "_rows", stop)
    first = CliRunner().invoke(app, words)
    assert first.exit_code and "same command" in first.stderr and not (tmp_path / "f.nc").exists()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.stderr
    assert len(set(seen)) == len(seen) - 1  # only the clip that was stopped in ran twice
    flow = load_flow("f.nc")
    assert dict(flow.sizes) | dict(sample=6, edge=8, layer=16) == dict(flow.sizes)
    heads = CliRunner().invoke(app, "flow --heads --edges audio->last --limit 2".split())
    assert heads.exit_code == 0 and "testbed_heads.nc: 2 questions" in heads.stdout


@pytest.mark.parametrize("name", ["testbed", "testbed-qwen3"])
def test_the_schedule_has_a_second_estimate(name):
    "Beside the probe's late start stands where the text's reading ends, from the table itself."
    flow = load_flow(name)
    profile = load_profile(name)
    modalities = "visual", "audio", "both"
    rows = boundary_table(profile, removed=modalities, flow=flow, n_boot=200)
    bounds = {m: find_boundaries(profile, m, n_boot=200) for m in modalities}
    said = explain_flow(flow, bounds)
    table = flow_table(flow)
    for m in modalities:
        counts = table.xs(f"{m}->text", level="edge").query("p_holm < 0.05 and abs(change) > 0.01")
        end = int(counts.index.max()) + 1 - int(flow.window) // 2
        assert flow_end(flow, m) == rows.loc[(m, "all"), "late_by_flow"] == end
        low, high = bounds[m].late_start_ci
        verdict = "they agree" if low <= end <= high else "they disagree"
        assert f"{m}: by its flow no layer from {end + 1} on" in said
        assert verdict in next(line for line in said.splitlines() if line.startswith(f"{m}: by"))
    assert "late_by_flow" not in boundary_table(profile, removed=["both"], n_boot=200)
