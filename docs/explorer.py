"""What the explorer's page moves through, computed by the package for a grid of settings.

The page has no rule of its own: boundaries are those of `find_boundaries` (one bootstrap for all
tolerances, see `Resampled`), schedules those of `Schedule.from_trr`. Its script looks them up.
"""

import json
import warnings

from seats_analysis.boundaries.find import Resampled
from seats_analysis.boundaries.retention import needed_families
from seats_analysis.plots.dependency import curves_of
from seats_analysis.schedules.cost import flops_fraction
from seats_analysis.schedules.schedule import Schedule, ScheduleWarning
from seats_analysis.storage.files import shipped_folder
from seats_analysis.storage.schemas import load_profile
from seats_analysis.testbed.load import TESTBEDS

TOLERANCES = 0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20  # percent of the performance
TRRS = 2, 5, 7.5, 10, 12.5, 15, 20, 25, 30, 35, 40, 50, 60  # percent of the tokens
MODALITIES = "visual", "audio"
ALL = "all"


def percent(values):
    return [round(100 * float(v), 1) for v in values]


def curve(found):
    return {name: percent(found[name]) for name in ("value", "low", "high")}


def blocks(bounds):
    "Where they begin, 0-based, or a sentence that says why that is not known."
    if bounds.unmeasurable:
        return bounds.unmeasurable
    starts = [bounds.shallow_end, *bounds.shallow_end_ci, bounds.late_start, *bounds.late_start_ci]
    return [*starts, bounds.late_start_certified]


def schedule(pair, trr, tokens, config):
    "Layers of a plan and its price, or a sentence that says why there is none."
    counts = [tokens[m] for m in (*MODALITIES, "text")]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ScheduleWarning)
            plan = Schedule.from_trr(pair, trr, *counts[:2])
    except ValueError as error:
        return str(error)
    price = flops_fraction(plan, *map(round, counts), config)
    return dict(flops=percent([price])[0], **{m: percent(plan.levels(m)) for m in MODALITIES})


def testbed(name):
    "Curves, blocks and schedules of one shipped profile."
    profile = load_profile(name)
    tokens = json.loads(profile.attrs["tokens"])
    config = shipped_folder("testbed") / TESTBEDS[name] / "config.json"
    config = json.loads(config.read_text(encoding="utf-8"))
    conditions = {}
    decided = {}
    plans = {}
    for removed in ("both", *MODALITIES):
        families = conditions[removed] = {}
        for family in (ALL, *needed_families(profile, removed)):
            options = dict(families=None if family == ALL else (family,))
            drawn = Resampled.of(profile, removed, **options)
            found = curves_of(profile, [removed], **options)[removed]
            bounds = [drawn.decide(tolerance / 100) for tolerance in TOLERANCES]
            decided[removed, family] = bounds
            families[family] = dict(
                curve=curve(found),
                chance=percent([found["chance"]])[0],
                questions=found["n"],
                blocks=[blocks(b) for b in bounds],
            )
    for (removed, family), bounds in decided.items():
        if removed == "both":
            pairs = [dict.fromkeys(MODALITIES, b) for b in bounds]
        else:  # each modality gets the blocks of its own curve, as in the notebook's explorer
            own = [decided.get((m, family), decided[m, ALL]) for m in MODALITIES]
            pairs = [dict(zip(MODALITIES, pair)) for pair in zip(*own)]
        names = conditions[removed][family]["plans"] = []
        for pair in pairs:
            known = not any(b.unmeasurable for b in pair.values())
            name = " ".join(f"{b.shallow_end},{b.late_start}" for b in pair.values())
            names.append(name if known else None)
            if known and name not in plans:  # a schedule follows from the blocks alone
                plans[name] = [schedule(pair, trr, tokens, config) for trr in TRRS]
    return dict(
        layers=int(profile["layer"].max()),
        tokens={m: round(n) for m, n in tokens.items()},
        control=curve(curves_of(profile, ["both"])["control"]),
        conditions=conditions,
        plans=plans,
    )


def settings():
    "Everything that the page shows."
    return dict(
        tolerances=TOLERANCES, trrs=TRRS, testbeds={name: testbed(name) for name in TESTBEDS}
    )
