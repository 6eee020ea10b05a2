"A panel must follow a slider, show what the library says, and never take a file away."

import time
from pathlib import Path

import numpy as np
import pytest

from seats_analysis.plots import explorer
from seats_analysis.boundaries.find import find_boundaries
from seats_analysis.plots.explorer import ALL, Painter, explore, save_plan
from seats_analysis.schedules.schedule import Schedule

DATA = Path(__file__).resolve().parents[1] / "data"
LIMIT = 0.2  # seconds of CPU; a slider's event takes a third of it where nothing else runs


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    if not (DATA / "profiles" / "testbed.nc").exists():
        pytest.skip("no committed profile yet")
    return explore(DATA, tmp_path_factory.mktemp("schedules"))


@pytest.fixture(scope="module")
def source(panel):
    return panel.source


def seconds(widget, values):
    "Median CPU seconds from a new value to the finished picture."
    took = []
    for value in values:
        start = time.process_time()
        widget.value = value
        took.append(time.process_time() - start)
    return float(np.median(took))


def test_sliders_and_choices_are_followed(panel):
    panel.removed.value = "both"
    shown = {panel.picture.value}
    for name, values in dict(
        tolerance=np.linspace(0.005, 0.15, 11),
        trr=np.linspace(5, 30, 11),
        family=[*panel.family.options] * 2,
        removed=["visual", "audio", "both"] * 3,
    ).items():
        assert (
            seconds(getattr(panel, name), [v.item() if hasattr(v, "item") else v for v in values])
            < LIMIT
        ), name
        shown.add(panel.picture.value)
    assert len(shown) == 4  # at the end the condition is what it was, and so is the picture
    panel.family.value, panel.tolerance.value, panel.trr.value = ALL, 0.01, 10


def test_nothing_is_resampled_for_a_move(panel, monkeypatch):
    "All bootstraps are drawn when a profile is opened."
    monkeypatch.setattr(
        explorer.Resampled, "of", lambda *args, **options: pytest.fail("a bootstrap was drawn")
    )
    monkeypatch.setattr(
        explorer, "curve_of", lambda *args, **options: pytest.fail("a band was computed")
    )
    monkeypatch.setattr(explorer, "_frame", lambda *args, **options: pytest.fail("axes were drawn"))
    for removed in panel.source.conditions:
        panel.removed.value = removed
        for family in panel.family.options:
            panel.family.value = family
        panel.tolerance.value, panel.trr.value = 0.033, 17.5
    panel.removed.value, panel.family.value, panel.tolerance.value, panel.trr.value = (
        "both",
        ALL,
        0.01,
        10,
    )


@pytest.mark.parametrize("tolerance", [0.004, 0.1])
def test_lookups_are_the_boundaries(source, tolerance):
    for removed in source.conditions:
        for family in source.families(removed):
            families = None if family == ALL else (family,)
            assert source.view(removed, family, tolerance).bounds == find_boundaries(
                source.profile, removed, tolerance, families=families
            )


def test_a_schedule_is_that_of_the_library(source):
    tokens = source.tokens["visual"], source.tokens["audio"]
    both = Schedule.from_trr(
        find_boundaries(source.profile, "both", 0.02), 15, *tokens, late="certified"
    )
    apart = Schedule.from_trr(
        {m: find_boundaries(source.profile, m, 0.02) for m in ("visual", "audio")},
        15,
        *tokens,
        late="estimate",
    )
    assert source.view("both", tolerance=0.02, trr=15, late="certified").plan == both
    assert (
        source.view("visual", tolerance=0.02, trr=15).plan
        == source.view("audio", tolerance=0.02, trr=15).plan
        == apart
    )


def test_a_painter_keeps_nothing_of_an_earlier_view(source):
    used, fresh = Painter(), Painter()
    for removed in source.conditions:
        used(source.view(removed, tolerance=0.1, trr=40))
    assert used(source.view()) == fresh(source.view())


def test_the_button_takes_no_file_away(panel):
    path = panel.save()
    assert Schedule.load(path) == panel.view.plan and str(path) in panel.status.value
    path.write_text("{}")  # somebody's own
    other = panel.save()
    assert other != path and path.read_text() == "{}" and Schedule.load(other) == panel.view.plan
    assert save_plan(panel.view.plan, other.parent, other.stem)[1] is False
    blocked = explore(DATA, other, n_boot=50)  # the folder is a file
    assert blocked.save() is None and "not saved" in blocked.status.value


def test_without_widgets_there_is_the_figure(monkeypatch):
    import sys
    from matplotlib.figure import Figure

    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert isinstance(explore(DATA, n_boot=50), Figure)


def test_a_profile_of_ones_own_is_offered(source, tmp_path):
    "Other layers, no splits, no token counts, one condition: whatever can be shown is shown."
    own = (
        source.profile.sel(layer=[0, 3, 6, 12, 20], removed=["visual"])
        .drop_vars("split")
        .assign_attrs(model="nobody/model")
    )
    del own.attrs["tokens"]
    (tmp_path / "profiles").mkdir()
    for name in "ab":
        own.to_netcdf(tmp_path / "profiles" / f"{name}.nc", engine="h5netcdf")
    panel = explore(tmp_path, tmp_path, n_boot=50)
    assert (
        panel.profile.options == ("a", "b")
        and panel.removed.options == ("visual",)
        and panel.view.bounds.layers == (0, 3, 6, 12, 20)
    )
    assert panel.button.disabled and "how many tokens" in panel.words.value and panel.save() is None
    panel.profile.value = "b"
    assert panel.view.source.name == "b"
