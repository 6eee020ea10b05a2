"""The recorded reference: where it lies, how it is read, and which of its entries are set apart by
which of their fields.

Everything is decided by the fields of an entry, never by its name, so that the same code reads any
folder with the same set of files.
Layers in the files are counted from 1 ("after layer d"); that is what this project calls "before
layer d", counted from 0.
"""

import json
import math
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file

from seats_analysis import Schedule
from seats_analysis.inputs.layout import Modality
from seats_analysis.schedules.solve import drop_shares

MODALITIES = tuple(Modality.CODES)

GOLDEN = Path(os.environ.get("SEATS_GOLDEN") or Path(__file__).parent / "fixtures" / "golden")
NEAR_TIE = 2e-5  # closer decisions than this depend on the order of summation
FLOAT32, BF16_STATISTIC, BF16_SCORE = 1e-5, 1e-2, 2e-3
FILE_NAME = dict(visual="video", audio="audio")  # how the files call the modalities


@cache
def read_json(name):
    return json.loads((GOLDEN / name).read_text())


@cache
def read_tensors(name):
    return load_file(GOLDEN / name)


def index(name, key="cases"):
    return read_json(name)[key]


def part(name, prefix):
    "The tensors of a file whose names begin so, without that."
    found = read_tensors(name).items()
    return {k.removeprefix(prefix): v for k, v in found if k.startswith(prefix)}


def tensors(case):
    "The tensors of one index entry."
    return part(case["file"], case["prefix"])


def close(a, b, tol=FLOAT32):
    "Numbers that ours computes in float32, against recorded ones of any precision."
    torch.testing.assert_close(a, b.float(), atol=tol, rtol=0)


def label(case):
    return case["prefix"] + case.get("name", "")


def near(gap):
    return gap is not None and gap < NEAR_TIE


def runs_of(types):
    """Ordinal of each token's run of consecutive tokens of its modality (1 video, 2 audio), -1 for
    text; and the larger number of runs."""
    ids, seen, last = [], {1: 0, 2: 0}, 0
    for kind in types:
        if kind in seen and kind != last:
            seen[kind] += 1
        ids.append(seen[kind] - 1 if kind in seen else -1)
        last = kind
    return torch.tensor(ids), max(seen.values())


# ---------------------------------------------------------------- the schedule


def recorded(case, modality):
    """(target, entering, active drops, late_start, layers, recorded ratios) of one modality,
    0-based."""
    inputs, outputs, name = case["inputs"], case["outputs"], FILE_NAME[modality]
    drops = [d for d in outputs["drop_layers"] if d < outputs["remove_layer"]]
    return (
        inputs[f"{name}_ratio"],
        inputs[f"{name}_encoder_ratio"],
        drops,
        outputs["remove_layer"],
        outputs["num_layers"],
        outputs[f"{name}_inner_progressive_ratio_list"],
    )


def is_feasible(target, entering, drops, last, layers):
    """Whether levels of the recorded form can average the target, from their definition: strength 0
    gives the most, strength 1 the least."""
    average = lambda strength: (
        float(
            np.diff([0, *drops, last])
            @ (entering * (1 - strength * np.r_[0, drop_shares(len(drops))]))
        )
        / layers
    )
    return (
        entering <= 1
        and average(1.0) < target <= average(0.0)
        and (bool(drops) or math.isclose(target, average(0.0), rel_tol=1e-9))
    )


# ---------------------------------------------------------------- end to end


@cache
def e2e_model():
    "transformers' own model with the recorded weights, whatever its version calls them."
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = Qwen2_5OmniThinkerConfig(**read_json("e2e_config.json"))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = (
        False  # 5.x ties them unless told otherwise
    )
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    names = set(model.state_dict())

    def found(name):
        return next(
            n
            for n in (name.replace("model.", "model.language_model.", 1), "model." + name, name)
            if n in names
        )

    weights = {
        found(name): value for name, value in read_tensors("e2e_weights.safetensors").items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("rotary" in n or "inv_freq" in n for n in missing), (
        missing,
        unexpected,
    )
    return model


@dataclass(frozen=True)
class Stage:
    "One shortening of an end-to-end case."

    name: str  # ours: stage1, drop{layer}, late{layer}
    layer: int  # the input of this layer is the first that is shorter
    kept: torch.Tensor  # (n,) recorded original positions
    counts: dict  # recorded tokens left of "video", "audio" and "text"
    ratios: tuple | None  # at a drop: fractions of visual and audio tokens kept
    gap: float | None  # recorded relative distance of its closest decision


class Case:
    "One end-to-end case."

    def __init__(self, entry):
        self.entry = entry
        self.name = entry["name"]
        self.seats = entry["seats"]
        self.out = part("e2e_cases.safetensors", f"{self.name}.out.")
        self.inputs = part("e2e_cases.safetensors", f"{self.name}.in.")
        self.inputs["use_audio_in_video"] = entry["use_audio_in_video"]
        ids = self.inputs["input_ids"][0]
        video, audio = (ids == index("e2e_index.json", "token_ids")[f] for f in FILE_NAME.values())
        self.types = video + 2 * audio  # 0 text
        self.stages = tuple(self._stages())
        self.drops = tuple(s for s in self.stages if s.ratios)

    def _stages(self):
        def stage(name, layer, key, margin, ratios=None):
            gaps = [v for k, v in self.entry["margins"].items() if k.startswith(margin)]
            counts = self.entry["counts"][key]
            return Stage(name, layer, self.out[key], counts, ratios, min(gaps, default=None))

        yield stage("stage1", 0, "kept.stage1", "stage1_")
        for kind, d, n in self.entry["schedule"]:
            key = f"kept.after_layer{d}.{kind}"
            assert len(self.out[key]) == n
            ratios = self._ratios(d) if kind == "drop" else None
            yield stage(f"{kind}{d}", d, key, f"{kind}_after_layer{d}_", ratios)

    def _ratios(self, d):
        step = self.seats["drop_layers"].index(d)
        lists = [self.seats[f"{f}_inner_progressive_ratio_list"] for f in FILE_NAME.values()]
        return tuple(r[step] if step < len(r) else 0.85 for r in lists)

    def plan(self, layers):
        "Our schedule with the recorded numbers."
        late = [s.layer for s in self.stages if s.name.startswith("late")]
        return Schedule(
            num_layers=layers,
            drop_layers=tuple(s.layer for s in self.drops),
            late_start=late[0] if late else None,
            entering={m: min(self.seats[f"{f}_encoder_ratio"], 1.0) for m, f in FILE_NAME.items()},
            keep_ratios={
                m: tuple(s.ratios[i] for s in self.drops) for i, m in enumerate(MODALITIES)
            },
        )

    def totals(self):
        """Per drop: (visual, audio) totals from the recorded counts before it, and as ours plans
        them from the stage I counts alone."""
        after = lambda ratios, n: tuple(min(k, max(1, round(r * k))) for r, k in zip(ratios, n))
        two = lambda counts: (counts["video"], counts["audio"])
        before, planned = two(self.stages[0].counts), two(self.stages[0].counts)
        for s in self.drops:
            recorded, planned = after(s.ratios, before), after(s.ratios, planned)
            yield s, recorded, planned
            before = two(s.counts)

    def flags(self):
        """stage name -> (field, value, reason) where the recorded choice is not what ours should
        be; every later stage inherits it."""
        tie = "near tie: decided by the order of summation"
        found = {}
        full, _ = runs_of(self.types.tolist())
        first = self.stages[0]
        if near(first.gap):
            found["stage1"] = "margins", first.gap, tie
        before = first.kept
        for s, recorded, planned in self.totals():
            runs, _ = runs_of(self.types[before].tolist())
            pairs = {(a, b) for a, b in zip(full[before].tolist(), runs.tolist()) if a >= 0}
            shifted = any(len(set(side)) != len(pairs) for side in zip(*pairs))
            kept = s.counts["video"] + s.counts["audio"]
            if kept != sum(recorded):
                why = f"the reference kept {kept} where its own totals are {sum(recorded)}"
                found[s.name] = "counts", kept, why
            elif sum(recorded) != sum(planned):
                why = (
                    f"the split of the drop before rounds to {sum(recorded)}; ours keeps "
                    f"the {sum(planned)} planned from stage I"
                )
                found[s.name] = "counts", list(recorded), why
            elif shifted:
                why = (
                    "a run emptied before shifts the pairing of runs; ours are fixed on "
                    "the full prompt"
                )
                found[s.name] = "kept", len(before), why
            elif near(s.gap):
                found[s.name] = "margins", s.gap, tie
            before = s.kept
        return found

    @property
    def comparable(self):
        "The stages before the first flagged one."
        flagged = self.flags()
        return list(takewhile(lambda n: n not in flagged, [s.name for s in self.stages]))


@cache
def e2e_cases():
    return tuple(Case(entry) for entry in index("e2e_index.json"))


def run_method(model, method, inputs, next_token=None, kv="evict"):
    "What ours chose, from what, and what came out."
    from seats_analysis import adapter_for, prune

    seen = {}

    class Watched(type(method)):
        def select(self, inputs):
            seen["stage1"] = inputs
            return super().select(inputs)

        def drop(self, tokens, scores, step, windows):
            seen[step.name] = scores
            return super().drop(tokens, scores, step, windows)

    def note(i):
        return lambda layer, args: (seen.setdefault(i, args[0][0]), None)[1]

    layers = adapter_for(model).layers(model)
    with torch.no_grad(), ExitStack() as stack:
        # registered before prune: they see what a layer would get if nothing were cut before it;
        # layer 0 after stage I
        for i, layer in enumerate(layers):
            stack.enter_context(layer.register_forward_pre_hook(note(i)))
        run = stack.enter_context(prune(model, Watched(**vars(method)), kv=kv))
        out = model(**inputs, use_cache=True)
        cache = out.past_key_values
        lengths = [cache.get_seq_length(i) for i in range(len(layers))]
        kept = {k: v[0] for k, v in run.kept.items()}
        per_layer = run.tokens_per_layer[0].tolist()
        decode = None
        if next_token is not None:
            step = model(input_ids=next_token.view(1, 1), past_key_values=cache)
            decode = step.logits[0, -1]
    return SimpleNamespace(
        kept=kept,
        seen=seen,
        logits=out.logits[0, -1],
        decode=decode,
        cache_lengths=lengths,
        tokens_per_layer=per_layer,
    )


def run_pruned(model, case, kv="evict"):
    "`run_method` of SEATS on one case, with the hidden states that each stage shortens."
    from seats_analysis import adapter_for
    from seats_analysis.pruning.seats import Seats

    plan = Seats(case.plan(adapter_for(model).num_layers(model)))
    run = run_method(model, plan, case.inputs, case.out["full.next_token"], kv)
    run.hidden = {s.name: run.seen[s.layer] for s in case.stages if s.layer}
    return run


# ---------------------------------------------------------------- odd settings

QUIRKS = {  # key of e2e_quirks.json -> what ours does instead
    "baseline": "the same lengths after every stage",
    "drop_layer_equals_late_minus_1": "works: drop and late removal before the same layer "
    "both apply, in order",
    "drop_layer_after_late": "a drop after the late start is refused when the schedule is built",
    "both_encoder_ratios_1_disables_all": "stages are independent: no stage I, all others",
    "one_encoder_ratio_1": "the same lengths after every stage",
    "encoder_ratio_above_1": "refused when the schedule is built",
    "empty_ratio_lists_default_085": "missing ratios are refused when the schedule is built",
    "late_L_plus_1": "no layer sees a shorter sequence, so nothing is removed; every "
    "layer has the recorded length",
    "late_L_plus_2": "a late start past the last layer is refused; `None` says the same "
    "and has the recorded lengths",
    "late_none": "the same lengths after every stage",
    "audio_only_first_call": "works",
    "audio_only_after_av_call": "works, from its own statistic instead of an earlier call's",
    "video_only_first_call": "works",
    "video_only_after_av_call": "works, from its own statistic instead of an earlier call's",
    "two_audios_even": "works; windows begin anew with each sound",
    "two_audios_both_odd_after_cnn": "works; the statistic is pooled sound by sound",
    "two_audios_first_odd_after_cnn": "works; the statistic is pooled sound by sound, so "
    "no later token is shifted by half a frame",
    "video_first_token_dropped": "works: every stage runs, wherever the first token goes",
}


def quirk_base():
    "The base setting, as the note of e2e_quirks.json states it."
    note = read_json("e2e_quirks.json")["note"]
    find = lambda pattern: re.search(pattern, note, re.I).groups()
    numbers = lambda text, kind: tuple(kind(x) for x in re.findall(r"[\d.]+", text))
    (visual, audio), (layers,) = find(r"encoder ratios ([\d.]+)/([\d.]+)"), find(r"\((\d+) layers")
    return SimpleNamespace(
        visual=float(visual),
        audio=float(audio),
        drops=numbers(find(r"drop_layers \[([^]]*)\]")[0], int),
        ratios=numbers(find(r", ratios \[([^]]*)\]")[0], float),
        late=int(find(r"late_block_layer (\d+)")[0]) - 1,
        layers=int(layers),
    )


# ---------------------------------------------------------------- what is set apart


@dataclass(frozen=True)
class Flag:
    "One recorded entry that is not simply compared."

    file: str
    entry: str
    field: str  # what sets it apart
    value: object
    reason: str
    ours: str  # what is tested instead


def _flagged_schedules():
    for case in index("schedule.json"):
        if "exception" in case:
            yield Flag(
                "schedule.json",
                case["name"],
                "exception",
                case["exception"],
                case["message"],
                "ours has no such argument",
            )
            continue
        for m in MODALITIES:
            target, entering, drops, last, layers, _ = recorded(case, m)
            if not is_feasible(target, entering, drops, last, layers):
                yield Flag(
                    "schedule.json",
                    case["name"],
                    f"{FILE_NAME[m]}_ratio",
                    round(target, 6),
                    f"cannot be reached with encoder ratio {entering:.4g}, drops {drops} "
                    f"and late start {last}: clipped silently",
                    "refused with the feasible range",
                )


def _flagged_diversity():
    for case in index("windivprune_index.json"):
        for field in ("min_rel_gap_per_row", "min_rel_gap_per_window"):
            for i, gap in enumerate(case.get(field) or ()):
                if near(gap):
                    yield Flag(
                        "windivprune_index.json",
                        label(case),
                        f"{field}[{i}]",
                        gap,
                        "near tie: decided by the order of summation",
                        "exact count",
                    )
    for case in index("windivprune_ties.json"):
        if case["exact_arithmetic"]:
            continue
        lost = case["num_retained"] - case["num_distinct_kept"]
        yield Flag(
            "windivprune_ties.json",
            label(case),
            "num_distinct_kept" if lost else "exact_arithmetic",
            case["num_distinct_kept"] if lost else False,
            f"a token is picked more than once, so {case['num_distinct_kept']} of "
            f"{case['num_retained']} are kept"
            if lost
            else "distances equal but for rounding noise",
            f"exactly {case['num_retained']} distinct tokens",
        )


def _flagged_drops():
    for case in index("topdown_index.json"):
        flag = lambda field, value, reason, ours: Flag(
            "topdown_index.json", label(case), field, value, reason, ours
        )
        if case["total_mismatch"]:
            yield flag(
                "total_mismatch",
                case["total_mismatch"],
                f"window floors keep {case['kept_total']} where {case['intended_total']} "
                "are planned",
                f"exactly {case['intended_total']}, no window over its size",
            )
        elif near(case.get("min_distance_to_rounding_tie")):
            yield flag(
                "min_distance_to_rounding_tie",
                case["min_distance_to_rounding_tie"],
                "a window's budget is a rounding tie",
                "exact total",
            )
        elif not case["tie_order_defined"]:
            yield flag(
                "tie_order_defined",
                False,
                "equal scores: which token stays is not defined",
                "counts per window, and the multiset of kept scores",
            )


def _flagged_e2e():
    for case in e2e_cases():
        for name, (field, value, reason) in case.flags().items():
            yield Flag(
                "e2e_index.json",
                f"{case.name} {name}",
                field,
                value,
                reason,
                "our planned totals from here on",
            )
    for name, result in index("e2e_quirks.json", "results").items():
        ours, first = QUIRKS[name], result[0] if isinstance(result, list) else result
        what = (
            f"lengths {[n for _, n in first['drops']]}"
            if first["ok"]
            else f"{first['exception']}: {first['message']}"
        )
        yield Flag("e2e_quirks.json", name, "ok", first["ok"], what, ours)


def flagged():
    """Every recorded entry that is not simply compared, with its reason and with what is tested
    instead."""
    return [*_flagged_schedules(), *_flagged_diversity(), *_flagged_drops(), *_flagged_e2e()]
