"""The paper's figures and tables: whose numbers they show, legible, right for any comparison."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_figures import check_texts, check_type, deep_profile, kept_of, visible_texts

from seats_analysis import Clip, Schedule, plot_dependency
from seats_analysis.lab import method_figures as M, paper as P, timing_figures as T
from seats_analysis.lab.answer_figures import family_figure
from seats_analysis.lab.reported import read_reported
from seats_analysis.lab.simulate import needed_figure
from seats_analysis.lab.style import say_source
from seats_analysis.plots import style
from seats_analysis.storage.schemas import SCHEMAS, load_json, save_json, save_profile
from seats_analysis.testbed.task import synthetic_profile

ROOT = Path(__file__).resolve().parents[2]
METHODS = [m for m in M.NAMES if m not in ("full", "vtw")]
LATE = tuple(f"{m}+late" for m in METHODS if m != "seats")
TUNED = "seats+tuned", "fastv-om+late+tuned"
FAMILIES = (
    "colour shape position tone pattern order see_while_hear hear_while_see count sequence control"
).split()


WITH = "flops_fraction_causal_with_selection"
FLOPS = "FLOPs, causal, with selection (% of full)"


ABLATIONS = (
    "no-stage1 no-stage2 no-stage3 uniform-trr flat-budgets attention-only diversity-only"
).split()


def row(method, trr, accuracy, label=None, setting="matched", cost=None, diff=None):
    cost = trr / 100 if cost is None else cost
    clip = lambda x: float(np.clip(x, 0, 1))
    part = lambda a: dict(
        accuracy=clip(a),
        low=clip(a - 0.1),
        high=clip(a + 0.08),
        n=90,
        clips=88,
        full_accuracy=1.0,
        diff_full=clip(a) - 1,
        diff_seats=0.0,
    )
    return dict(
        method=method,
        label=label or method,
        trr=trr,
        setting=setting,
        flops_fraction_causal_with_selection=cost,
        flops_fraction_causal_without_selection=cost - 0.01,
        floor=[],
        equal_cost=setting == "matched",
        retention_layers=trr / 100,
        retention_entry=1.4 * trr / 100,
        ms=10 * cost + (trr < 100),
        ms_selection=1.0,
        ms_prefill=10 * cost,
        ms_full=10.0,
        n=908,
        clips=500,
        accuracy=accuracy,
        low=clip(accuracy - 0.03),
        high=clip(accuracy + 0.02),
        full_accuracy=0.99,
        diff_full=accuracy - 0.99,
        diff_full_low=accuracy - 1.01,
        diff_full_high=accuracy - 0.98,
        mcnemar_p_full=0.5,
        diff_seats=diff,
        diff_seats_low=None if diff is None else diff - 0.02,
        diff_seats_high=None if diff is None else diff + 0.02,
        mcnemar_p_seats=None if diff is None else 0.0001,
        own_minimum=setting == "lowest setting",
        ranked=setting == "matched" and trr < 100,
        unparsable=0,
        families={f: part(accuracy - 0.3 * (i == 8)) for i, f in enumerate(FAMILIES)},
    )


def made_up(methods=METHODS, ablations=ABLATIONS, budgets=(35, 25, 15, 10), late=LATE, tuned=TUNED):
    "A comparison of the full size, with everything that can crowd a figure."
    rows = [
        row("full", 100, 0.99, setting="full"),
        row("vtw", 63.8, 0.97, "vtw (rule)", setting="rule", cost=0.8),
    ]
    for t in budgets:
        rows += [
            row(
                m,
                t,
                0.98 - 0.05 * i * (35 / t) ** 0.5 / 2,
                diff=-0.05 * i,
                setting="lowest setting" if m == "fastv" and t < 20 else "matched",
            )
            for i, m in enumerate(methods)
        ]
        rows += [row("vtw", t, 0.5, diff=-0.4)]
        rows += [row(m, t, 0.96 - 0.04 * i, diff=-0.02 * i) for i, m in enumerate(late)]
        rows += [row(m, t, 0.98 - 0.04 * i, setting="tuned", diff=0.0) for i, m in enumerate(tuned)]
        rows += [
            row(f"seats-{a}", t, 0.97 - 0.02 * i, diff=0.01 - 0.015 * i)
            for i, a in enumerate(ablations)
        ]
    return dict(
        schema=SCHEMAS["eval"].id,
        model="testbed",
        revision="local",
        seed=0,
        device="cpu",
        threads=2,
        clips=500,
        questions=1000,
        split="fresh",
        apart=["control"],
        rows=rows,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "The project's published numbers and schedules beside a made-up comparison."
    folder = tmp_path_factory.mktemp("data")
    for part in ("reported", "schedules", "profiles"):
        shutil.copytree(ROOT / "data" / part, folder / part)
    (folder / "results").mkdir()
    shutil.copy(ROOT / "data" / "results" / "kept_testbed.json", folder / "results")
    (folder / "results" / "eval_testbed.json").write_text(json.dumps(made_up()))
    return folder


PAPER = (
    "accuracy_against_time eval_testbed_comparison eval_testbed_late eval_testbed_ablations "
    "qwen2.5-omni-7b_overview qwen3-omni-30b-a3b_overview testbed_overview"
).split()


@pytest.fixture(scope="module")
def drawn(data):
    jobs = P.figure_jobs(data)
    return {name: jobs[name]() for name in PAPER}


def texts(fig):
    return [text for text, _ in visible_texts(fig)]


def test_no_text_overlaps_or_is_cut(drawn):
    learning = P.learning_curves_figure(made_up_log())
    check_texts(drawn | dict(learning=learning))
    check_type(drawn, style.WIDTHS.values())


LONG = (
    "a family whose name somebody took from the title of a benchmark",
    "another_family_with_quite_a_name",
    "what is the name of the person who speaks",
)


@pytest.mark.parametrize("families", [("",), ("music", "speech"), LONG], ids=len)
def test_figures_of_ones_own(families, tmp_path):
    "One family, two, and long names: nothing cut off, a LaTeX table."
    profile = synthetic_profile(clips=12, splits=("",))
    given = sorted(set(profile["family"].values))[: len(families)]
    profile = profile.isel(sample=np.isin(profile["family"].values, given))
    named = dict(zip(given, families))
    profile = profile.assign_coords(
        family=("sample", [named[f] for f in profile["family"].values])
    ).assign_attrs(needs="", model="somebody/a-fine-tuned-model-with-a-very-long-name-v2-2026")
    (tmp_path / "profiles").mkdir()
    save_profile(profile, tmp_path / "profiles" / "mine.nc")
    found = made_up(["seats", "random", "fastv"], (), (10,), (), ()) | dict(
        model=profile.attrs["model"], apart=[], chance=0.5
    )
    for r in found["rows"]:
        r["families"] = dict(zip(families, r["families"].values()))
    (tmp_path / "results").mkdir()
    save_json(tmp_path / "results" / "mine.json", found)
    jobs = P.figure_jobs(tmp_path)
    several = {"mine_families"} if len(families) > 1 else set()
    wanted = {"mine_dependency", "accuracy_against_time", "mine_comparison"}
    assert set(jobs) - {"mine_dependency_corrected"} == wanted | several
    drawn = {name: jobs[name]() for name in several | {"accuracy_against_time"}}
    check_texts(drawn)
    lines = drawn["accuracy_against_time"].axes[0].lines
    assert 50 in {y for line in lines for y in line.get_ydata()}  # chance is the data's own
    texts = P.table_texts(*P.tables(tmp_path)["mine_boundaries"], "mine_boundaries")
    assert "\\toprule" in texts[".tex"] and "both" in texts[".csv"]


def test_a_profile_that_cannot_be_drawn_does_not_stop_the_others(tmp_path):
    (tmp_path / "profiles").mkdir()
    profile = synthetic_profile(clips=8, splits=("",))
    save_profile(profile, tmp_path / "profiles" / "good.nc")
    bare = profile.assign_coords(n_choices=("sample", np.zeros(profile.sizes["sample"], int)))
    save_profile(bare, tmp_path / "profiles" / "bare.nc")
    with pytest.warns(P.FigureWarning, match="bare.nc: no figure, for no chosen question has"):
        jobs = P.figure_jobs(tmp_path)
    assert {name.split("_")[0] for name in jobs} == {"good"}
    assert set(P.tables(tmp_path)) == {"good_boundaries"}


def test_figures_replace_nothing_unasked(data, tmp_path):
    (tmp_path / "accuracy_against_time.pdf").write_text("mine")
    with pytest.raises(ValueError, match="accuracy_against_time.pdf exists; --overwrite"):
        P.make_figures(data, tmp_path, overwrite=False)
    assert [p.name for p in tmp_path.iterdir()] == ["accuracy_against_time.pdf"]


def test_no_legend_lies_on_data(drawn):
    "Legends stand outside of all axes, and inside the figure."
    stored = load_json(ROOT / "data" / "results" / "eval_testbed-qwen3.json", "eval")
    for name, fig in (drawn | dict(one_column=M.time_figure(None, stored))).items():
        with style.house_style():
            fig.draw_without_rendering()
            renderer = fig.canvas.get_renderer()
            for legend in [*fig.legends, *(ax.get_legend() for ax in fig.axes if ax.get_legend())]:
                box = legend.get_window_extent(renderer)
                assert min(box.x0, fig.bbox.x1 - box.x1) >= 2, (
                    f"{name}: a legend is cut off when saved"
                )
                for ax in fig.axes:
                    assert not box.overlaps(ax.get_window_extent(renderer).shrunk(0.98, 0.98)), name


def test_every_stored_figure_says_where_its_numbers_come_from(drawn):
    "Those of the paper and, where they need no bootstrap of many families, those of the project."
    said = ("Measured here", "Published", "Simulated here", "omputed from")
    jobs = P.figure_jobs(ROOT / "data")
    alike = ("corrected", "_test", "families", "eval_testbed", "accuracy", "percent", "overview")
    names = [n for n in jobs if not any(part in n for part in alike)]  # drawn beside these
    figs = drawn | {n: jobs[n]() for n in names}
    for name, fig in figs.items():
        assert any(s in t for t in texts(fig) for s in said), name
    assert len(figs) > len(drawn)


def test_many_families_of_a_deep_model_have_room():
    check_texts({"48 layers": family_figure(deep_profile(48))})


def test_stored_figures_keep_their_source_inside(data):
    "The line of a source is neither cut off nor on top of a legend."
    study = load_json(ROOT / "data" / "results" / "questions_needed.json", "needed")
    long = "Measured here on nothing, " + "95 % of it, " * 24
    fig = say_source(needed_figure(study), long, "Nothing is found")
    found = visible_texts(fig)
    for words, lines in (("Measured", 2), ("Nothing", 1)):
        text, box = next((t, b) for t, b in found if t.startswith(words))
        assert len(text.splitlines()) >= lines
        assert box.x0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
        assert not any(box.overlaps(b) for t, b in found if t != text)


def test_published_and_measured_never_share_a_panel(drawn):
    a, b = drawn["accuracy_against_time"].axes
    assert (a.get_title(loc="left")[:12], b.get_title(loc="left")[:16]) == (
        "a  published",
        "b  measured here",
    )
    stored = {
        (float(r["time_ms"]), float(r["accuracy"]))
        for r in read_reported(ROOT / "data" / "reported" / "tradeoff_qwen2_5_omni_7b.csv")
    }
    points = {
        xy
        for line in a.lines
        for xy in zip(line.get_xdata(), line.get_ydata())
        if line.get_marker() != "None"
    }
    assert points == stored
    ours = {
        round(100 * r["ms"] / r["ms_full"], 6)
        for r in made_up()["rows"]
        if M.kind_of(r) == "published"
    }
    seen = {
        round(float(x), 6)
        for line in b.lines
        if line.get_marker() not in ("None", "_", "|")
        for x in line.get_xdata()
    }
    assert seen == ours


def test_only_verified_numbers_are_drawn(tmp_path):
    folder = tmp_path / "reported"
    folder.mkdir()
    lines = (ROOT / "data" / "reported" / "tradeoff_qwen2_5_omni_7b.csv").read_text().splitlines()
    (folder / "tradeoff_qwen2_5_omni_7b.csv").write_text(
        "\n".join([*lines, "gossip,10,100,60,secondary"])
    )
    ax = P.figure_jobs(tmp_path)["accuracy_against_time"]().axes[0]
    assert max(y for line in ax.lines for y in line.get_ydata()) < 50 and "gossip" not in "".join(
        ax.get_legend_handles_labels()[1]
    )
    tables = P.tables(tmp_path)
    assert [r["statement"] for r in tables["reported_unverified"][1]] == [
        "method gossip; trr percent 10; time ms 100; accuracy 60"
    ]
    assert len(tables["reported"][1]) == len(lines) - 1


def test_methods_differ_without_colour():
    looks = [(k["marker"], k["markerfacecolor"] == "white") for k in map(M.method_look, M.NAMES)]
    om = [m for m in M.NAMES if m.endswith("-om")]
    assert len(set(looks)) == len(looks) and om == ["fastv-om", "visionzip-om", "divprune-om"]
    assert M.method_look("fastv-om+late") == M.method_look("fastv-om")


def test_findings_are_those_of_the_rows(drawn):
    "Who is best at the smallest budget; who comes near the full model in the least time."
    said = drawn["eval_testbed_comparison"].texts[-2].get_text()
    assert said == "Right at a TRR of 10 %: SEATS 98 %, full 99 %".replace(" %", "\u00a0%")
    said = drawn["accuracy_against_time"].texts[-2].get_text()
    near = [r for r in M.pick(made_up()) if r["accuracy"] >= 0.89]
    share = min(map(M.time_share, near))
    assert said.startswith("b: Within 10 points") and f"{share:.0f}\u00a0% of its time" in said
    assert "(1 CPU thread)" in M.source_of(made_up() | dict(threads=1))
    assert "908 questions (92 of control apart)" in M.source_of(made_up())


def test_few_methods_are_named_in_a_legend(drawn):
    "Those of the published panel, the best three, SEATS, random and full; the others are grey."
    (legend,) = drawn["accuracy_against_time"].legends
    names = [t.get_text() for t in legend.get_texts()]
    assert {"SEATS", "full", "random", "other methods"} < set(names) and len(names) <= 11


def test_times_carry_the_middle_half_of_their_repeats():
    found = load_json(next((ROOT / "data" / "results").glob("bench_intel*.json")), "bench")
    requests = T.main_requests(found["rows"])
    for ax, table in zip(T.timings_figure(requests).axes, requests.values()):
        full = table.loc[table["full"], "ttft_ms"].iloc[0]
        bars = ax.collections[0].get_segments()
        for bar, samples in zip(bars, table["samples"], strict=True):
            ends = np.percentile([s["ttft_ms"] for s in samples], (25, 75))
            assert bar[:, 0] == pytest.approx(100 * ends / full)


def test_what_is_not_ranked_is_drawn_open(drawn):
    axes = drawn["eval_testbed_comparison"].axes
    for ax, trr in zip(axes, (35, 25, 15, 10)):
        names = [t.get_text() for t in axes[0].get_yticklabels()]
        opened = {
            names[int(line.get_ydata()[0])]
            for line in ax.lines
            if line.get_marker() not in ("None", None) and line.get_markerfacecolor() == "white"
        }
        assert opened == (
            {"VTW (its rule, 64 %)", "FastV"} if trr < 20 else {"VTW (its rule, 64 %)"}
        )
    worst = min(
        (r for r in made_up()["rows"] if r["trr"] == 10 and M.kind_of(r) == "published"),
        key=lambda r: r["accuracy"],
    )
    assert names[-1] == M.NAMES[worst["method"]]


PARTS = [
    "no Stage I",
    "no Stage II",
    "no Stage III",
    "uniform TRR",
    "flat budgets",
    "attention only",
    "diversity only",
]


def test_marks_are_the_paired_differences(drawn):
    "With their intervals; open where the interval holds zero."
    axes = drawn["eval_testbed_ablations"].axes
    names = [t.get_text() for t in axes[0].get_yticklabels()]
    for ax, trr in zip(axes, (35, 25, 15, 10)):
        rows = [r for r in made_up()["rows"] if M.kind_of(r) == "ablation" and r["trr"] == trr]
        for r, part, line, bar in zip(rows, PARTS, ax.lines, ax.collections, strict=False):
            assert line.get_xdata()[0] == pytest.approx(100 * r["diff_seats"])
            assert names[int(line.get_ydata()[0])] == part
            span = 100 * np.array([r["diff_seats_low"], r["diff_seats_high"]])
            assert bar.get_segments()[0][:, 0] == pytest.approx(span)
            assert (line.get_markerfacecolor() == "white") == (abs(r["diff_seats"]) <= 0.02)


def test_a_part_that_cannot_be_had_at_equal_flops_is_a_cross():
    "No Stage I keeps more than the smaller budgets allow."
    found = made_up()
    for r in found["rows"]:
        r["equal_cost"] = r["method"] != "seats-no-stage1"
    for ax in M.ablation_figure(found).axes:
        marks = [line.get_marker() for line in ax.lines if len(line.get_xdata()) == 1]
        assert marks.count("x") == 1 and len(marks) == len(PARTS)


def test_a_comparison_that_was_not_timed():
    found = made_up()
    for r in found["rows"]:
        r["ms"] = None if r["method"] == "dycoke" else r["ms"]
    M.time_figure(None, found).draw_without_rendering()
    assert {r["time (% of full)"] for r in M.eval_rows(found) if r["method"] == "DyCoke"} == {""}


def test_overview_of_odd_schedules():
    "No drops, nothing late, late starts per modality, one layer, drops in neighbouring layers."
    prompt = dict(visual=100, audio=50, text=10)
    halves = {m: (0.5, 0.5, 0.5) for m in ("visual", "audio")}
    for plan, marks in (
        (Schedule(1), []),
        (Schedule(12), []),
        (Schedule(6, late_start=3), [3.5]),
        (Schedule(10, 2, (2, 3, 4), {"visual": 6, "audio": 8}, halves), [2.5, 3.5, 4.5, 6.5]),
    ):
        fig = P.overview_figure(plan, prompt)
        ax = fig.axes[0]
        heights = [p.get_height() for p in ax.patches[: 3 * plan.num_layers]]
        heights = np.reshape(heights, (3, -1))
        assert heights[0].tolist() == [10] * plan.num_layers and heights[:, 0].sum() == 160
        assert heights.sum(0).tolist() == list(plan.tokens(100, 50, 10))
        for row, m in ((1, "audio"), (2, "visual")):
            assert (heights[row, plan.late(m) :] == 0).all()
        assert [line.get_xdata()[0] for line in ax.lines] == marks


def test_tables_hold_the_same_numbers_in_all_formats(data, tmp_path):
    written = {p.name: p for p in P.write_tables(P.tables(data), tmp_path)}
    found = made_up()
    rows = list(csv.DictReader(io.StringIO(written["eval_testbed.csv"].read_text())))
    assert len(rows) == len(found["rows"])
    for r, stored in zip(rows, found["rows"]):
        assert float(r["accuracy (%)"].split()[0]) == pytest.approx(
            100 * stored["accuracy"], abs=0.051
        )
        assert r[FLOPS] == f"{100 * stored[WITH]:.1f}" and r["origin"].startswith("Measured here")
    md, tex = written["eval_testbed.md"].read_text(), written["eval_testbed.tex"].read_text()
    assert md.count("\n| ") == len(rows) + 1 and "Measured here" in md
    assert tex.count(r"\\") == len(rows) + 1 and "Measured here" in tex
    for r in rows:
        assert f"| {r['accuracy (%)']} |" in md and r["accuracy (%)"] in tex
    import re

    for name, path in written.items():
        if name.endswith(".tex"):
            assert not re.search(
                r"(?<!\\)[%#$_](?![<>\-]?\$)",
                path.read_text().split(r"\begin{tabular}")[1].replace("$<$", "").replace("$>$", ""),
            ), name


def test_late_removal_and_tuned_methods_have_tables_of_their_own():
    "Beside SEATS, and nothing of it in the others; a floor is named in every column it binds."
    found = made_up()
    names = lambda kind: {r["method"] for r in M.accuracy_rows(found, kind)}
    late = {f"{M.NAMES[m.removesuffix('+late')]}, late removal" for m in LATE}
    assert names("late") == {"full", "SEATS"} | late and not names("published") & late
    tuned = {"full", "SEATS", "SEATS, tuned", "FastV-om, late removal, tuned"}
    assert names("tuned") == tuned and not names("late") & {"SEATS, tuned"}
    for r in found["rows"]:
        if r["method"] == "visionzip":
            r.update(floor=["visual"], ranked=False, own_minimum=True)
    table = {r["method"]: r for r in M.accuracy_rows(found)}
    assert all(table["VisionZip"][f"TRR {t} %"].endswith("*") for t in (35, 25, 15, 10))
    rows = [r for r in M.eval_rows(found) if r["method"] == "VisionZip"]
    of_selection = "FLOPs, causal, of selection (% of full)"
    assert [(r["floor"], r[of_selection]) for r in rows] == [("visual", "1.0")] * 4


def test_a_star_marks_what_is_not_ranked():
    table = {r["method"]: r for r in M.accuracy_rows(made_up())}
    assert (
        table["FastV"]["TRR 10 %"].endswith("*")
        and not table["FastV"]["TRR 35 %"].endswith("*")
        and table["VTW (its rule, 64 %)"]["TRR 35 %"].endswith("*")
    )
    assert set(table["SEATS"]) == {
        "method",
        "TRR 35 %",
        "TRR 25 %",
        "TRR 15 %",
        "TRR 10 %",
    }  # a rule is no budget


def test_without_a_comparison_the_published_part_stands_alone(tmp_path):
    shutil.copytree(ROOT / "data" / "reported", tmp_path / "reported")
    jobs = P.figure_jobs(tmp_path)
    assert set(jobs) == {"accuracy_against_time"}
    assert [len(draw().axes) for draw in jobs.values()] == [1]
    assert set(P.tables(tmp_path)) == {"reported", "reported_unverified"}


@pytest.mark.parametrize(
    "break_it, says",
    [
        (lambda d: d["rows"][1].pop("accuracy"), "accuracy"),
        (lambda d: d.update(schema="other"), "schema"),
        (lambda d: d.update(rows=[]), "at least 1 item"),
    ],
)
def test_a_broken_comparison_is_refused_by_name(tmp_path, break_it, says):
    found = made_up()
    break_it(found)
    (tmp_path / "eval_x.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=says) as error:
        load_json(tmp_path / "eval_x.json", "eval")
    assert "eval_x.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "value,source\n", "value\n1\n", "value,source\n1,a friend\n"])
def test_broken_reports_are_refused_by_name(tmp_path, text):
    (tmp_path / "claims.csv").write_text(text)
    with pytest.raises(ValueError, match="claims.csv"):
        read_reported(tmp_path / "claims.csv")


def test_a_comparison_of_two_methods_at_one_budget():
    found = made_up(
        methods=["seats", "random"], ablations=("no-stage1",), budgets=(10,), late=(), tuned=()
    )
    found["rows"] = [r for r in found["rows"] if r["method"] != "vtw"]
    for draw in (M.comparison_figure, M.ablation_figure, lambda f: M.time_figure(None, f)):
        draw(found).draw_without_rendering()
    assert len(M.eval_rows(found)) == 4


def test_committed_tables_are_those_of_the_data(tmp_path):
    fresh = {p.name: p.read_bytes() for p in P.write_tables(P.tables(ROOT / "data"), tmp_path)}
    assert {p.name: p.read_bytes() for p in (ROOT / "figures" / "tables").iterdir()} == fresh


def made_up_log(families=FAMILIES):
    return [
        dict(
            step=s,
            loss=3 * np.exp(-s / 900) + 0.2,
            seconds=s,
            accuracy={f: min(1.0, 0.25 + s / 4000) for f in families},
        )
        for s in range(0, 4001, 200)
    ]


def test_learning_curves_of_unknown_families_and_a_short_log():
    names = [f"family{i}" for i in range(7)]
    fig = P.learning_curves_figure(made_up_log([*names, "family0*"])[:2])
    assert [ax.get_title(loc="left") for ax in fig.axes] == [*names, "loss (nats/token)"]
    assert [len(ax.lines) for ax in fig.axes] == [3, *[2] * 6, 1]  # with chance


def test_the_command_draws_a_folder_of_data_without_a_model(data, tmp_path):
    folder, out = tmp_path / "data", tmp_path / "figures"
    for part in ("reported", "results"):
        shutil.copytree(data / part, folder / part, ignore=shutil.ignore_patterns("kept*"))
    for part in ("schedules", "testbed/qwen2.5-omni"):
        (folder / part).mkdir(parents=True)
    save_profile(synthetic_profile(clips=40), folder / "profiles" / "m.nc")
    for trr in (35, 10):
        Schedule.published("qwen2.5-omni-7b", trr).save(folder / "schedules" / f"m_trr{trr}.json")
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (16, 112, 112, 3)).astype("uint8")
    wave = (0.1 * rng.standard_normal(128000)).astype("float32")
    Clip("noise", frames, 2.0, wave, 16000).save(folder / "results" / "noise.mp4")
    (folder / "results" / "kept_testbed.json").write_text(json.dumps(kept_of()))
    log = folder / "testbed" / "qwen2.5-omni" / "train_log.jsonl"
    log.write_text("\n".join(map(json.dumps, made_up_log())))
    code = (
        "import sys; from typer.testing import CliRunner; "
        "from seats_analysis.cli import main as cli; "
        "r = CliRunner().invoke(cli.app, sys.argv[1:]); print(r.output); "
        "assert not {'torch', 'transformers'} & set(sys.modules), 'a model library was imported'; "
        "sys.exit(r.exit_code)"
    )
    words = "figures", "--data", folder, "--out", out
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    compared = "comparison ablations late tuned".split()
    names = [f"eval_testbed_{n}" for n in compared] + (
        "accuracy_against_time kept_testbed m_dependency m_dependency_corrected m_dependency_test "
        "m_families m_retention testbed_learning"
    ).split()
    files = {p.name for p in out.iterdir()}
    assert files == {f"{n}{s}" for n in names for s in (".png", ".pdf")} | {"tables"}
    tables = [f"eval_testbed_{n}" for n in ("accuracy", "families", *compared[1:])]
    tables += "eval_testbed reported reported_unverified m_boundaries".split()
    written = {p.name for p in (out / "tables").iterdir()}
    assert written == {f"{n}.{s}" for n in tables for s in ("csv", "md", "tex")}


def test_committed_figures_are_those_of_the_data():
    "Whatever can be drawn from data/ is in figures/, and nothing else."
    if not (ROOT / "data" / "profiles" / "testbed.nc").exists():
        pytest.skip("no committed profile yet")
    names = set(P.figure_jobs(ROOT / "data"))
    assert (
        {p.stem for p in (ROOT / "figures").glob("*.png")}
        == names
        == {p.stem for p in (ROOT / "figures").glob("*.pdf")}
    )


def test_a_model_that_only_guesses_still_gets_its_figures(tmp_path):
    guess = synthetic_profile(full=0.25, clips=30)
    (tmp_path / "profiles").mkdir()
    save_profile(guess, tmp_path / "profiles" / "guess.nc")
    jobs = P.figure_jobs(tmp_path)
    assert set(jobs) == {
        "guess_dependency",
        "guess_dependency_test",
        "guess_families",
    }  # nothing is above chance, so nothing is corrected
    for draw in jobs.values():
        draw()
    with pytest.raises(ValueError, match="not above chance"):
        plot_dependency(guess, corrected=True)


@pytest.mark.parametrize("text", ['{"broken": \n{}\n', '{"loss": 1}\n'])
def test_a_broken_log_is_refused_by_name(tmp_path, text):
    (tmp_path / "l.jsonl").write_text(text)
    with pytest.raises(ValueError, match="l.jsonl"):
        P.read_log(tmp_path / "l.jsonl")
