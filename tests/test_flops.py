"""FLOPs mean one thing: causal; every key and heading says so, and the same plan has one number."""

import csv
import json
import re

from conftest import ROOT
import pytest

from seats_analysis import Schedule, load_testbed, testbed_samples
from seats_analysis.evaluation.compare import FLOPS
from seats_analysis.evaluation.prepared import DataShape
from seats_analysis.storage.schemas import SCHEMAS, load_json
from seats_analysis.testbed.load import TESTBEDS

DATA = ROOT / "data"
TABLES = DATA.parent / "figures" / "tables"
WITH = "flops_fraction_causal_with_selection"
WITHOUT = "flops_fraction_causal_without_selection"
# two data sets: questions are two tokens longer or shorter, and no plan removes text
TEXT = 0.0025


def keys_of(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def says_its_convention(text):
    conventions = re.search("causal|counter", text)
    return bool(conventions and re.search("with(out)?.selection|of.selection", text))


def test_every_stored_key_says_its_convention():
    for path in sorted(DATA.glob("*/*.json")):
        for key in set(keys_of(json.loads(path.read_text()))):
            if "flops" in key:  # `flops` alone holds one number for each convention
                assert key == "flops" or says_its_convention(key), (path.name, key)
    for file, kind, key in (
        ("testbed", "results", WITHOUT),
        ("eval_testbed", "eval", WITH),
    ):  # and a file without is refused
        found = load_json(DATA / "results" / f"{file}.json", kind)
        del found["rows"][0][key]
        assert SCHEMAS[kind].wrong_with(found) == f"`rows.0.{key}`: field required"


def test_every_heading_says_its_convention():
    headings = [FLOPS]
    for path in sorted(TABLES.glob("eval_*.csv")):
        headings += [h for h in next(csv.reader(path.open())) if "FLOPs" in h]
    assert len(headings) > 2 * 2  # two testbeds are compared
    assert all(says_its_convention(h) for h in headings), headings


@pytest.mark.parametrize("name", ["testbed", "testbed-qwen3"])
def test_the_same_plan_has_one_number_everywhere(name):
    "SEATS at 35 to 10 %: its closed form, the demo's answers, the comparison and its table."
    shape = DataShape.of(*load_testbed(TESTBEDS[name]), testbed_samples("test", limit=24))
    demo = load_json(DATA / "results" / f"{name}.json", "results")["rows"]
    compared = load_json(DATA / "results" / f"eval_{name}.json", "eval")["rows"]
    table = list(csv.DictReader((TABLES / f"eval_{name}.csv").open()))
    for trr in (35, 25, 15, 10):
        plan = Schedule.load(f"{name}/{trr}")
        (answers,) = [r for r in demo if (r["method"], r["trr"]) == ("seats", trr)]
        (row,) = [r for r in compared if (r["label"], r["trr"]) == ("seats", trr)]
        (line,) = [r for r in table if (r["method"], r["kept (TRR, %)"]) == ("SEATS", str(trr))]
        for found in (answers, row):
            assert found[WITH] == pytest.approx(shape.cost(plan), abs=TEXT)
            decoder = shape.cost(plan) - shape.selection(plan)
            assert found[WITHOUT] == pytest.approx(decoder, abs=TEXT)
        assert answers[WITH] - answers[WITHOUT] == pytest.approx(shape.selection(plan), rel=0.01)
        assert line["FLOPs, causal, with selection (% of full)"] == f"{100 * row[WITH]:.1f}"
        for other in compared:  # and everyone who is ranked there costs the same
            if other["ranked"] and other["trr"] == trr:
                assert other[WITH] == pytest.approx(row[WITH], rel=0.02)
    for rows in (demo, compared):
        assert rows[0]["method"] == "full" and rows[0][WITH] == rows[0][WITHOUT] == 1
