"""Figures: legible, the same bytes twice, drawn from stored data alone."""

import itertools

import numpy as np
import pytest

from seats_analysis import (
    Boundaries,
    Clip,
    Schedule,
    find_boundaries,
    plot_dependency,
    plot_kept,
    plot_retention,
)
from seats_analysis.plots import dependency, style
from seats_analysis.storage.schemas import SCHEMAS
from seats_analysis.testbed.task import ramp, synthetic_profile


def made_up_bounds(profile):
    return {
        r: find_boundaries(profile, r, margin=0.1, n_boot=100) for r in ("both", "visual", "audio")
    }


@pytest.fixture(scope="module")
def profile():
    return synthetic_profile(clips=40)


@pytest.fixture(scope="module")
def clip():
    rng = np.random.default_rng(0)
    wave = (0.1 * rng.standard_normal(128000)).astype("float32")
    return Clip(
        id="noise",
        frames=rng.integers(0, 255, (16, 112, 112, 3)).astype("uint8"),
        fps=2.0,
        waveform=wave,
        sample_rate=16000,
    )


def kept_of(n_visual=128, n_audio=80, grid=(8, 4, 4)):
    stages = [
        dict(
            stage=1, layer=0, visual=list(range(0, n_visual, 3)), audio=list(range(0, n_audio, 2))
        ),
        dict(
            stage=2, layer=4, visual=list(range(0, n_visual, 9)), audio=list(range(0, n_audio, 7))
        ),
        dict(stage=3, layer=9, visual=[], audio=[]),
    ]
    return dict(
        schema=SCHEMAS["kept"].id,
        clip="noise.mp4",
        grid=list(grid),
        audio_tokens=n_audio,
        audio_rate=10,
        stages=stages,
        question="what is it ?",
        answered="noise",
    )


def deep_profile(layers):
    "A profile for a model of the size of the real ones."
    s, l = layers // 2, layers - layers // 6
    return synthetic_profile({r: ramp(layers, s, l) for r in ("visual", "audio", "both")}, clips=20)


def every_figure(profile, clip):
    "All figures, and those that crowd most: many layers, many families."
    bounds = made_up_bounds(profile)
    yield "dependency", plot_dependency(profile, bounds)
    yield "corrected", plot_dependency(profile, bounds, corrected=True)
    yield "without boundaries", plot_dependency(profile, split=None)
    deep = deep_profile(48)
    yield "dependency, 48 layers", plot_dependency(deep, made_up_bounds(deep))
    for name in ("qwen2.5-omni-7b", "qwen3-omni-30b-a3b"):
        yield (
            f"retention of {name}",
            plot_retention({f"TRR {t} %": Schedule.published(name, t) for t in (35, 25, 15, 10)}),
        )
    yield (
        "retention of a short model",
        plot_retention(Schedule.from_boundaries(Boundaries(12, 3, 9), 0.1, 0.3)),
    )
    yield "kept", plot_kept(clip, kept_of())


def beside(**texts):
    "A kept file with a second run."
    texts = dict(truth="noise", full="noise") | texts
    second = kept_of() | dict(label="tuned", **texts)
    second["stages"] = second["stages"][1:]
    return kept_of() | texts | dict(label="pruned", answered="tone", beside=[second])


@pytest.fixture(scope="module")
def drawn(profile, clip):
    return dict(every_figure(profile, clip))


def visible_texts(fig):
    "Every piece of text that is drawn, with its box in pixels."
    from matplotlib.text import Text

    with style.house_style():
        fig.draw_without_rendering()
        renderer = fig.canvas.get_renderer()
        found = [
            t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip() and _drawn(t)
        ]
        return [(t.get_text(), t.get_window_extent(renderer)) for t in found]


def _drawn(text):
    "Not a tick label that its axis hides."
    for ax in text.figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if text in (tick.label1, tick.label2):
                    lo, hi = sorted(axis.get_view_interval())
                    shown = (
                        tick.label1.get_visible()
                        if text is tick.label1
                        else tick.label2.get_visible()
                    )
                    return shown and lo - 1e-9 <= tick.get_loc() <= hi + 1e-9
    return True


def check_texts(figs):
    "No text of any figure overlaps another one or is cut off."
    for name, fig in figs.items():
        texts, canvas = visible_texts(fig), fig.bbox
        for (a, box), (b, other) in itertools.combinations(texts, 2):
            shared = (
                min(box.x1, other.x1) - max(box.x0, other.x0),
                min(box.y1, other.y1) - max(box.y0, other.y0),
            )
            assert min(shared) < 1.5, f"{name}: {a!r} and {b!r} overlap by {shared}"
        for text, box in texts:
            assert (
                box.x0 >= -3
                and box.y0 >= -3
                and box.x1 <= canvas.x1 + 3
                and box.y1 <= canvas.y1 + 3
            ), f"{name}: {text!r} is cut off"


def check_type(figs, widths):
    "Letters are large enough to read, and a figure is as wide as a journal's column."
    from matplotlib.text import Text

    for name, fig in figs.items():
        assert fig.get_size_inches()[0] in widths
        sizes = [t.get_fontsize() for t in fig.findobj(Text) if t.get_text().strip()]
        assert min(sizes) >= 5.5, name


def test_texts_are_legible_at_one_column(drawn):
    check_texts(drawn)
    check_type(drawn, [style.WIDTHS[1]])


def test_conditions_differ_without_colour():
    for key in ("linestyle", "marker"):
        values = [look[key] for look in dependency.LOOKS.values()]
        assert len(set(values)) == len(values)


def test_printed_layers_start_at_one(profile):
    bounds = {"both": Boundaries(12, 3, 8, 9, shallow_end_ci=(2, 3), late_start_ci=(7, 9))}
    ax, strip = plot_dependency(profile, bounds).axes
    assert [t.get_text() for t in strip.get_xticklabels()] == [*map(str, range(1, 13)), "none"]
    edges = sorted(
        {round(x, 3) for p in ax.patches for x in (p.get_x(), p.get_x() + p.get_width())}
    )
    assert edges == [0.5, 3.5, 8.5, 12.5]
    assert [line.get_xdata().tolist() for line in strip.lines] == [[4], [9], [10]]
    spans = [c.get_segments()[0][:, 0].tolist() for c in strip.collections]
    assert spans == [[3, 4], [8, 10]]
    curve = next(line for line in ax.lines if line.get_label() == "both")
    assert curve.get_xdata().tolist() == list(range(1, 14)) and curve.get_ydata()[-1] == 100


def test_curves_are_the_retained_performance(profile, drawn):
    from seats_analysis.boundaries.retention import retained

    ax = drawn["dependency"].axes[0]
    for removed in ("both", "visual", "audio"):
        line = next(line for line in ax.lines if line.get_label() == removed)
        np.testing.assert_allclose(line.get_ydata(), 100 * retained(profile, removed).retained)


def test_an_unscanned_layer_leaves_a_gap(profile):
    some = profile.isel(layer=[0, 4, 8, 12])
    line = next(line for line in plot_dependency(some).axes[0].lines if line.get_label() == "both")
    assert line.get_xdata().tolist() == [1, 5, 9, 13]


def test_files_of_figures_have_no_dates(clip, tmp_path):
    for path in style.save_figure(plot_kept(clip, kept_of()), tmp_path / "kept"):
        assert not any(word in path.read_bytes() for word in (b"CreationDate", b"atplotlib"))


@pytest.mark.parametrize("part", ["video", "audio"])
def test_kept_figure_of_one_modality(clip, part):
    from dataclasses import replace

    if part == "video":
        fig = plot_kept(replace(clip, waveform=None), kept_of(n_audio=0))
    else:
        fig = plot_kept(replace(clip, frames=None), kept_of(n_visual=0, grid=(0, 0, 0)))
    assert len(fig.axes) == 3


def test_kept_figure_shows_what_was_kept(clip):
    kept = kept_of()
    fig = plot_kept(clip, kept)
    frames, sound = fig.axes[2], fig.axes[3]
    assert len(frames.collections[0].get_paths()) == len(kept["stages"][0]["visual"])
    assert len(sound.collections[-1].get_segments()) == len(kept["stages"][0]["audio"])
    image = frames.images[0].get_array()
    assert (image[:28, :28] == clip.frames[0, :28, :28]).all() and (
        image[:28, 28:56] != clip.frames[0, :28, 28:56]
    ).any()


def test_a_wrong_answer_is_called_wrong_beside_the_truth(clip):
    fig = plot_kept(clip, beside())
    heads = [ax.get_title(loc="left").splitlines() for ax in fig.axes]
    first, second = (h for h in heads if h and h[-1].startswith("all tokens"))
    assert first[:4] == ["asked: what is it ?", "truth: noise", "full model: noise"] + [
        "pruned: tone, wrong"
    ]
    assert second[3] == "tuned: noise" and len(fig.axes) == 2 * (3 + 2)


def test_the_first_figure_says_what_is_found_and_nothing_more(profile):
    "The finding as a title, no band of few questions, no mark where nothing is certified."
    bounds = Boundaries(
        12, 3, 8, 12, shallow_end_ci=(2, 3), late_start_ci=(7, 12), parameters=dict(tolerance=0.02)
    )
    ax, strip = plot_dependency(profile, {"both": bounds}).axes
    assert ax.get_title(loc="left") == "From layer 9 on, removal costs at most 2 %"
    assert len(ax.collections) == 3  # visual, audio, both; not control
    assert [line.get_marker() for line in strip.lines] == ["o", "o", ">"]
    labels = strip.get_legend_handles_labels()[1]
    assert "later not excluded" in labels and "late, certified" not in labels
