"""Parity with the recorded baselines (the folder `baselines` beside the other recordings): Random,
FastV and VisionZip, and FLOPs. `test_golden.py` runs these tests.

As there, what is set apart is decided by the fields of an entry, never by its name, and something
else is tested instead.
"""

import golden
import numpy as np
import pytest
import torch
from golden import FILE_NAME, GOLDEN, Flag, close, e2e_cases, near, part, read_json
from seats_analysis import METHODS, Schedule, adapter_for
from seats_analysis.baselines.attention import equal_ratio
from seats_analysis.baselines.base import at_least_one, keep_audio, random_count
from seats_analysis.baselines.merging import VisionZipOm, select_visionzip, visionzip_counts
from seats_analysis.baselines.registry import method_at
from seats_analysis.models.encode import layout_of
from seats_analysis.pruning.base import Tokens, plan_steps
from seats_analysis.pruning.encoders import window_sizes
from seats_analysis.schedules.cost import text_dims

FOLDER, MODALITY = "baselines", {1: "visual", 2: "audio"}
BF16_EMBEDDING, BF16_TIE = 2e-2, 2**-9  # a similarity gap below this vanishes in bfloat16


def index(name, key="cases"):
    return read_json(f"{FOLDER}/{name}")[key]


def tensors(case, file=None):
    return part(f"{FOLDER}/{file or case['file']}", case["prefix"])


def our_name(name):
    return name.strip().lower().replace("_omni", "-om")


def cases(name, key="cases"):
    return [
        pytest.param(c, id=str(c.get("prefix", c.get("name", i))))
        for i, c in enumerate(index(name, key))
    ]


# ---------------------------------------------------------------- what is set apart


def _flag(file, entry, field, value, reason, ours):
    return Flag(f"{FOLDER}/{file}", str(entry), field, value, reason, ours)


def _flagged_ratios():
    for i, c in enumerate(index("audio_intact_reallocate.json")):
        given, got = c["inputs"], c.get("outputs")
        flag = lambda *rest: _flag("audio_intact_reallocate.json", i, *rest)
        if got is None:
            yield flag(
                "exception",
                c["exception"],
                "audio without video is refused",
                "the pair as it is: there is nothing to exchange",
            )
        elif max(given["video_ratio"], given["audio_ratio"]) > 1:
            yield flag(
                "video_ratio", given["video_ratio"], "ratios above 1 are accepted", "refused"
            )
        elif got["audio_ratio"] <= 0:
            yield flag(
                "audio_ratio",
                got["audio_ratio"],
                "fewer than 5 % of the visual tokens in all, and a negative audio ratio",
                "one audio token, the rest visual: the same total",
            )
    for i, c in enumerate(index("fastv_setting_ratio.json")):
        for m in ("video", "audio"):
            if c.get(f"infeasible_{m}"):
                yield _flag(
                    "fastv_setting_ratio.json",
                    i,
                    f"infeasible_{m}",
                    True,
                    "the average is below what the first layers cost; ends as one token, silently",
                    "the same ratio; `for_trr` keeps one token and its schedule says what "
                    "that averages",
                )


def _flagged_choices():
    for c in index("fastv_drop_index.json"):
        flag = lambda *rest: _flag("fastv_drop_index.json", c["prefix"], *rest)
        if our_name(c["method"]) not in METHODS:
            yield flag(
                "method",
                c["method"],
                "an unknown name prunes visual tokens only",
                "refused with the known names",
            )
        elif c["audio_random"]:
            yield flag(
                "audio_random",
                True,
                "audio is chosen by the global generator",
                "the count; ours is a function of seed, sample and layer",
            )
        elif not c["tie_order_defined"]:
            yield flag(
                "tie_order_defined",
                False,
                "equal scores",
                "counts, and the multiset of kept scores",
            )
    for c in index("visionzip_units_index.json"):
        gap = c["diagnostics"]["min_similarity_gap_best_vs_second"]
        if c["dtype"] == "bfloat16" and gap is not None and gap < BF16_TIE:
            yield _flag(
                "visionzip_units_index.json",
                c["prefix"],
                "min_similarity_gap_best_vs_second",
                gap,
                "decided by bfloat16 rounding",
                "the mask; at most one token joins another anchor",
            )
    for c in index("visionzip_units_index.json", "odd_inputs"):
        if "exception" in c:
            yield _flag(
                "visionzip_units_index.json",
                c["name"],
                "exception",
                c["exception"],
                c["message"],
                "see `test_visionzip_odd_inputs`",
            )
    for c in index("random_counts.json", "exceptions"):
        yield _flag(
            "random_counts.json",
            f"T={c['T']}, ratio={c['ratio']}",
            "exception",
            c["exception"],
            c["message"],
            "works" if 0 <= c["ratio"] <= 1 else "refused",
        )
    for c in index("cost_metrics.json"):
        if any(i >= c["inputs"]["num_layers"] for i, _ in c["inputs"]["drop_events"] or ()):
            yield _flag(
                "cost_metrics.json",
                c["name"],
                "drop_events",
                c["inputs"]["drop_events"],
                "an event behind the last layer counts layers that do not exist",
                "the layers there are",
            )


def quirk_rule(c):
    "How ours takes an odd end-to-end setting: kind, reason; from its fields."
    visual, audio, k = (*c["settings"], 0, 0)[:3]
    name, layers = c["method"], read_json("e2e_config.json")["text_config"]["num_hidden_layers"]
    if name.startswith("fastv") and not 0 < k < layers:
        return "refused", "K = 0 or beyond the last layer never fires; K = L drops after it"
    if name.startswith("visionzip") and min(visual, audio) <= 0:
        return "refused", "ratio 0 removes a modality"
    if name.startswith("visionzip") and (visual == 1) != (audio == 1):
        return "works", "a ratio of 1 still merges; ours leaves that modality alone"
    if "exception" in c:
        return "works", f"{c['exception']}: {c['message']}"
    if (c.get("audio_ratio_used") or 0) < 0 and name == "fastv":
        return (
            "works",
            "a negative audio ratio ends as one token, and video gets 5 %; ours gives "
            "vision the rest of the total",
        )
    return "same", ""


def flagged_baselines():
    "Every recorded entry that is not simply compared."
    odd = [(c, *quirk_rule(c)) for c in index("e2e_quirks.json")]
    return [
        *_flagged_ratios(),
        *_flagged_choices(),
        *(
            _flag("e2e_quirks.json", c["name"], "settings", c["settings"], why, kind)
            for c, kind, why in odd
            if kind != "same"
        ),
    ]


FLAGGED = {(f.file.removeprefix(f"{FOLDER}/"), f.entry): f for f in flagged_baselines()}


def flag_of(file, entry):
    return FLAGGED.get((file, str(entry)))


# ---------------------------------------------------------------- ratios and counts


@pytest.mark.parametrize("case", cases("fastv_setting_ratio.json"))
def test_fastv_ratio(case):
    given = case["inputs"]

    for m in FILE_NAME.values():
        args = given[f"avg_{m}_ratio"], given["num_layers"], (given["fastv_k"],)
        if "exception" in case:
            with pytest.raises(ValueError):
                equal_ratio(*args)
        else:
            assert equal_ratio(*args) == case["outputs"][f"setting_{m}_ratio"]
            assert (equal_ratio(*args) < 0) == case[f"infeasible_{m}"]


def test_audio_intact_reallocation():
    "All entries, to the last bit."
    compared = 0
    for i, case in enumerate(index("audio_intact_reallocate.json")):
        given = case["inputs"]
        names = "video_ratio audio_ratio video_token_num audio_token_num video_ratio_min".split()
        args = [given[name] for name in names if name in given]
        flag = flag_of("audio_intact_reallocate.json", i)
        if flag is None:
            recorded = case["outputs"]["video_ratio"], case["outputs"]["audio_ratio"]
            assert keep_audio(*args) == recorded, case
            compared += 1
        elif flag.ours == "refused":
            with pytest.raises(ValueError, match="exceed 1"):
                keep_audio(*args)
        elif flag.field == "exception":
            assert list(keep_audio(*args)) == args[:2]
        else:
            pair = keep_audio(*args)
            assert 0 < min(pair) <= max(pair) <= 1
            total = np.dot(pair, args[2:4])
            assert total == pytest.approx(max(case["total_tokens_kept"], 2))
    assert compared > len(index("audio_intact_reallocate.json")) / 2


def test_random_counts():
    for case in index("random_counts.json"):
        assert random_count(case["T"], case["ratio"]) == case["kept"]
    for case in index("random_counts.json", "exceptions"):
        n, ratio = case["T"], case["ratio"]
        if 0 <= ratio <= 1:  # no global state that could be missing
            assert random_count(n, ratio) == max(1, int(n * ratio))
        else:
            with pytest.raises(ValueError):
                random_count(n, ratio)


def dims_of(given, **others):
    return dict(
        hidden_size=given["hidden_size"],
        num_attention_heads=given["num_heads"],
        num_key_value_heads=given["num_kv_heads"],
        intermediate_size=given["intermediate_size"],
        **others,
    )


def reference_flops(tokens, config, logits):
    "A multiply-add counts 1, all pairs are compared; logits of so many positions."
    d = text_dims(config)
    values = d.kv_heads * (d.hidden / d.heads)
    total = logits * d.hidden * d.vocab
    for s, width in zip(tokens, d.active):
        total += s * (2 * d.hidden**2 + 2 * d.hidden * values + 3 * d.hidden * width)
        total += 2 * s * s * d.hidden
    return total


@pytest.mark.parametrize("case", cases("cost_metrics.json"))
def test_reference_flops(case):
    g = case["inputs"]
    layers, final = g["num_layers"], g["initial_seq_len"]
    dims = dims_of(g, vocab_size=g["vocab_size"], num_hidden_layers=layers)
    tokens = [final] * layers
    for i, final in sorted(g["drop_events"] or [], key=lambda e: e[0]):
        start = max(i + 1, 0)
        tokens[start:] = [final] * len(tokens[start:])
    flops = g["batch_size"] * reference_flops(tokens, dims, final)
    if flag_of("cost_metrics.json", case["name"]):
        assert 0 < flops < case["flops"]
    else:
        assert flops == pytest.approx(case["flops"], rel=1e-12)


def test_reference_flops_of_one_layer():
    for case in index("cost_metrics.json", "single_layer"):
        g = case["inputs"]
        flops = 0
        if min(g["seq_len"], g["hidden_size"]) > 0:
            dims = dims_of(g, vocab_size=1, num_hidden_layers=1)
            flops = reference_flops([g["seq_len"]], dims, 0)
        assert flops == pytest.approx(case["flops"], rel=1e-12)


# -------------------- choices for given scores and statistics


@pytest.mark.parametrize("case", cases("fastv_drop_index.json"))
def test_fastv_drop(case):
    t = tensors(case)
    kind, scores, golden = (t[name] for name in ("token_type", "scores", "keep_mask"))
    flag = flag_of("fastv_drop_index.json", case["prefix"])
    apart = flag.field if flag else ""
    n = {m: case[f"n_{f}"] for m, f in FILE_NAME.items()}
    keep = {m: (at_least_one(case[f"{f}_ratio"], n[m]),) for m, f in FILE_NAME.items()}
    plan = Schedule(4, drop_layers=(2,), keep_ratios=keep)
    if apart == "method":
        with pytest.raises(ValueError, match="known"):
            method_at(our_name(case["method"]), plan, tuple(n.values()))
        return
    method = METHODS[our_name(case["method"])](plan)
    text = int((kind == 0).sum())
    cuts = plan_steps([text], [n], [n], method.drops, method.late)
    everything = torch.arange(len(kind))[None]
    tokens = Tokens(everything, kind[None].to(torch.int8), None, None, len(kind), (0,), False)
    keep = torch.ones_like(kind, dtype=torch.bool)
    if cuts:
        keep = method.drop(tokens, scores[None], cuts[0], 1)[0]
    assert keep[kind == 0].all()
    counts = [int(keep[kind == k].sum()) for k in MODALITY]
    assert counts == [case["kept_video"], case["kept_audio"]]
    if apart == "tie_order_defined":
        assert scores[keep].sort().values.tolist() == scores[golden].sort().values.tolist()
    elif apart == "audio_random":
        assert torch.equal(keep[kind != 2], golden[kind != 2])
    else:
        assert torch.equal(keep, golden)


@pytest.mark.parametrize("case", cases("visionzip_units_index.json"))
def test_visionzip(case):
    t = tensors(case)
    flag = flag_of("visionzip_units_index.json", case["prefix"])
    ids = index("visionzip_units_index.json", "token_ids")
    here = t["input_ids"][0] == ids[case["kind"]]
    features = t["inputs_embeds"][0][here]
    keys = t["attn_key"].float()
    keys = keys.mean(0) if keys.ndim == 3 else keys
    sizes = window_sizes(len(features), case["window_tokens"])
    counts = [visionzip_counts(n, case["ratio"], case["contextual_ratio"]) for n in sizes]
    assert [(w["len"], w["dominant"], w["contextual"]) for w in case["windows"]] == [
        (n, *c) for n, c in zip(sizes, counts)
    ]
    keep, merged = select_visionzip(features, t["attn_mean"].flatten(), keys, sizes, counts)
    assert torch.equal(keep, t["global_keep_mask"][here]) and t["global_keep_mask"][~here].all()
    assert len(t.get("contextual_positions", ())) in (0, sum(c for _, c in counts))
    off = (merged.to(features.dtype) - t["out_inputs_embeds"][0][here]).float().abs().amax(1)
    wrong = off[keep] > (1e-6 if case["dtype"] == "float32" else BF16_EMBEDDING)
    assert int(wrong.sum()) <= (2 if flag else 0)


@pytest.mark.parametrize("case", cases("visionzip_units_index.json", "odd_inputs"))
def test_visionzip_odd_inputs(case):
    """Ratios outside (0, 1] never become a schedule; windows and shares that cannot be are refused;
    everything else works."""
    said = case["name"]
    if "ratio" in said and "exception" in case:
        with pytest.raises(ValueError, match="entering"):
            m = "visual" if "video" in said else "audio"
            Schedule(4, entering=dict(visual=0.5, audio=0.5) | {m: float(said.split()[-1])})
    elif "contextual" in said:
        with pytest.raises(ValueError, match="contextual"):
            VisionZipOm(Schedule(4), contextual=1.2)
    elif "per window" in said:
        with pytest.raises(ValueError):
            VisionZipOm(Schedule(4), **(dict(seconds=0.0) if "audio" in said else dict(grids=0)))
    elif "bf16" in said:
        x = torch.ones(4, 2)
        keep, merged = select_visionzip(x.bfloat16(), torch.ones(4), x, (4,), ((1, 1),))
        assert int(keep.sum()) == 2 and merged.dtype == torch.float32
    elif "no " in said:
        x = torch.zeros(0, 4)
        assert len(select_visionzip(x, x[:, 0], x, (), ())[0]) == 0
    elif "differs" in said:
        with pytest.raises((RuntimeError, IndexError)):
            x = torch.ones(4, 2)
            select_visionzip(x, torch.ones(3), x, (4,), ((1, 1),))
    elif "batch" in said:  # samples one behind the other, each with windows of its own
        given = torch.rand(8, 3), torch.rand(8), torch.rand(8, 2)
        both = select_visionzip(*given, (4, 4), ((1, 1),) * 2)
        ones = [select_visionzip(*x, (4,), ((1, 1),)) for x in zip(*(x.split(4) for x in given))]
        for got, parts in zip(both, zip(*ones)):
            assert torch.equal(got, torch.cat(parts))
    else:  # windows come from the layout, which refuses placeholders without media
        assert said == "video: video_grid_thw None"


# ---------------------------------------------------------------- end to end


def settings_of(c, n_visual, n_audio, layers):
    "Our method for recorded settings: average ratios, then as the method takes them."
    name = our_name(c["method"])
    kind = METHODS[name]
    pair = c["avg_video_ratio"], c["avg_audio_ratio"]
    if name.startswith("fastv"):
        pair = tuple(equal_ratio(r, layers, (c["fastv_k"],)) for r in pair)
    if name in ("fastv", "visionzip"):
        pair = keep_audio(*pair, n_visual, n_audio)
    ratios = map(at_least_one, pair, (n_visual, n_audio))
    keep = dict(zip(MODALITY.values(), ratios))
    if name.startswith("fastv"):
        keep = {m: (r,) for m, r in keep.items()}
        return kind(Schedule(layers, drop_layers=(c["fastv_k"],), keep_ratios=keep)), pair
    own = dict(contextual=c["contextual_ratio"], grids=c["grid_in_window"])
    own |= dict(seconds=float(c["sec_in_audio_window"]))
    return kind(Schedule(layers, entering=keep), **own), pair


def run_method(model, method, inputs, next_token=None):
    "What ours chose in its only stage, from what, and what came out."
    run = golden.run_method(model, method, inputs, next_token)
    everything = torch.arange(inputs["input_ids"].shape[1])
    run.kept = next(iter(run.kept.values()), everything)
    run.seen["scores"] = run.seen.get("drop2", [None])[0]
    return run


def e2e(name):
    return next(c for c in e2e_cases() if c.name == name)


@pytest.mark.parametrize("case", cases("e2e_baselines_index.json"))
def test_whole_runs(model, case):
    """Kept positions, statistics, keys, merged embeddings, scores, logits, caches, a decode step
    and FLOPs."""
    t = tensors(case, "e2e_baselines.safetensors")
    whole = e2e(case["case"])
    layers = len(adapter_for(model).layers(model))
    n = [int((whole.types == k).sum()) for k in MODALITY]
    method, pair = settings_of(case, *n, layers)
    if "video_ratio_used" in case:
        assert pair[0] == case["video_ratio_used"]
    check_for_trr(case, method, n)
    run = run_method(model, method, whole.inputs, whole.out["full.next_token"])
    names = enumerate(("text", "video", "audio"))
    counts = {f: int((whole.types[run.kept] == k).sum()) for k, f in names}
    assert counts == case["kept_counts"]
    assert run.cache_lengths == case["cache_lengths"] == t["cache_lengths"].tolist()
    gaps = [v for k, v in case.items() if k.startswith("margin") and v is not None]
    if any(map(near, gaps)):
        return
    assert torch.equal(run.kept, t["kept"])
    if "scores.after_layer2" in t:
        close(run.seen["scores"], t["scores.after_layer2"], 1e-6)
        # this hook runs before those of prune
        close(run.seen[2], t["hidden.after_layer2.before_drop"])
    else:
        check_entry_of(run, t, case)
    scale = max(1.0, float(t["last_logits"].abs().max()))
    close(run.logits, t["last_logits"].flatten(), 1e-5 * scale)
    close(run.decode, t["decode_logits"].flatten(), 1e-5 * scale)
    flops = reference_flops(
        run.tokens_per_layer, read_json("e2e_config.json")["text_config"], run.tokens_per_layer[-1]
    )
    assert flops == pytest.approx(case["prefill_flops"], rel=1e-12)


def check_for_trr(case, method, n):
    """The door for comparisons makes the recorded ratios of the same averages: FastV exchanges its
    setting ratios, VisionZip the averages."""
    if case["method"].startswith("fastv"):
        option = dict(layer=case["fastv_k"])
    else:
        option = dict(contextual=case["contextual_ratio"])
    recorded = method.schedule
    pair = case["avg_video_ratio"], case["avg_audio_ratio"]
    ours = type(method).for_trr(recorded.num_layers, *pair, *n, **option).schedule
    for field in ("drop_layers", "keep_ratios", "entering"):
        assert getattr(ours, field) == getattr(recorded, field)


def check_entry_of(run, t, case):
    "What VisionZip looked at, and what enters the first layer."
    inputs, n = run.seen["stage1"], len(t["video_attn_mean"])
    close(inputs.attention[:n], t["video_attn_mean"])
    close(inputs.keys["visual"], t["video_attn_key"].reshape(n, -1))
    if "audio_attn_mean" in t:
        close(inputs.attention[n:], t["audio_attn_mean"])
        close(inputs.keys["audio"], t["audio_attn_key"].reshape(len(t["audio_attn_mean"]), -1))
    # through the encoders, so not as close as the choice alone
    close(run.seen[0], t["inputs_embeds_kept"])


# ---------------------------------------------------------------- odd settings


def cut_inputs(model, case, said):
    "Inputs of an odd setting: the first case that interleaves, or one of its media."
    from test_golden import frames, prompt

    whole = next(c for c in e2e_cases() if c.inputs["use_audio_in_video"])
    if "video only" in said:
        return prompt(model, whole, "video")
    if "audio only" in said:
        return prompt(model, whole, frames(whole))
    return whole.inputs


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in index("e2e_quirks.json")])
def test_odd_baseline_setting(model, case):
    kind, _ = quirk_rule(case)
    inputs = cut_inputs(model, case, case["name"])
    layers = len(adapter_for(model).layers(model))
    n = {m: int(x) for m, x in layout_of(model, inputs).counts().items()}
    own = "contextual_ratio grid_in_window sec_in_audio_window"
    own = "fastv_k" if "fastv" in case["method"] else own
    keys = f"avg_video_ratio avg_audio_ratio {own}".split()
    given = dict(zip(keys, case["settings"]), method=case["method"])
    if kind == "refused":
        with pytest.raises(ValueError):
            if "visionzip" in case["method"]:
                ratios = dict(visual=given["avg_video_ratio"], audio=given["avg_audio_ratio"])
                METHODS[our_name(case["method"])](Schedule(layers, entering=ratios))
            else:
                settings_of(given, n["visual"], n["audio"], layers)
        return
    method, pair = settings_of(given, n["visual"], n["audio"], layers)
    before = model.config._attn_implementation
    model.set_attn_implementation(case["decoder_attention"])
    try:
        run = run_method(model, method, inputs)
    finally:
        model.set_attn_implementation(before)
    kinds = layout_of(model, inputs).modality[0][run.kept]
    found = dict(video=int((kinds == 1).sum()), audio=int((kinds == 2).sum()))
    if kind == "same" and "kept_counts" in case:
        assert found == {k: case["kept_counts"][k] for k in found}
    if kind == "same" and case["max_abs_diff_to_full_last_logits"] is not None:
        assert len(run.kept) == case["logits_rows"]
    if kind == "same" and case["equal_to_full"]:
        assert len(run.kept) == inputs["input_ids"].shape[1]
    if kind == "works":
        layout = layout_of(model, inputs, "keep", method.grids, method.seconds)
        planned = method.plan(layout, method.window_budgets(layout, 0))
        assert sum(found.values()) == sum(planned[-1].n_keep[0].values())
        assert min(found[f] for m, f in FILE_NAME.items() if n[m]) >= 1
    assert torch.isfinite(run.logits).all()


# ---------------------------------------------------------------- nothing is skipped silently


def test_every_baseline_file_is_read():
    lists = (GOLDEN / FOLDER).glob("*_index.json")
    source = open(__file__).read() + "".join(path.read_text() for path in lists)
    for path in (GOLDEN / FOLDER).iterdir():
        assert path.name in source, f"{path.name} is read by no test"


def test_most_baseline_entries_are_compared():
    for kind in ("fastv_drop", "visionzip_units", "e2e_baselines"):
        file = f"{kind}_index.json"
        entries = {str(c.get("prefix", c.get("name"))) for c in index(file)}
        assert sum((file, e) in FLAGGED for e in entries) < len(entries) / 5, file


__all__ = [name for name in dir() if name.startswith("test_")]
