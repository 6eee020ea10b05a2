"A panel must follow its controls, show what the library says, and never take a file away."

import json

from conftest import ROOT
import pytest

from seats_analysis import explore, find_boundaries
from seats_analysis.boundaries.retention import needed_families
from seats_analysis.plots import explorer
from seats_analysis.plots.explorer import ALL
from seats_analysis.storage.schemas import save_profile
from seats_analysis.testbed.task import synthetic_profile

DATA = ROOT / "data"


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    panel = explore(DATA, tmp_path_factory.mktemp("schedules"))
    panel.profile.value = "testbed-qwen3"
    return panel


@pytest.fixture(scope="module")
def source(panel):
    return panel.source


def test_every_control_changes_the_picture_and_nothing_is_resampled(panel, source, monkeypatch):
    "Bootstraps are drawn once for each condition and family."
    source.drawn("audio", ALL), source.drawn("visual", ALL), source.drawn("both", "tone")
    never = lambda *args, **options: pytest.fail("a bootstrap was drawn")
    monkeypatch.setattr(explorer.Resampled, "of", never)
    monkeypatch.setattr(explorer, "curves_of", never)
    before = dict(removed="both", family=ALL, tolerance=0.01, trr=10, late="estimate")
    changed = dict(removed="audio", family="tone", tolerance=0.1, trr=20, late="certified")
    first = bytes(panel.picture.value)
    for name, value in changed.items():
        panel.settings[name].value = value
        assert getattr(panel.view, name) == value and bytes(panel.picture.value) != first, name
        panel.settings[name].value = before[name]
    assert bytes(panel.picture.value) == first


@pytest.mark.parametrize("tolerance", [0.004, 0.1])
def test_lookups_are_the_boundaries(source, tolerance):
    for removed in source.conditions:
        for family in (ALL, needed_families(source.profile, removed)[0]):
            families = None if family == ALL else (family,)
            assert source.view(removed, family, tolerance).bounds == find_boundaries(
                source.profile, removed, tolerance, families=families
            )


@pytest.mark.parametrize("name", ["../../..", "/etc/x", "a/b"])
def test_no_name_in_the_data_leads_out_of_the_folder(tmp_path, name):
    made = synthetic_profile(clips=80)
    made = made.assign_coords(family=made.family.str.replace("tone", name, regex=False))
    needs = {name if k == "tone" else k: v for k, v in json.loads(made.attrs["needs"]).items()}
    made.attrs |= dict(needs=json.dumps(needs), tokens='{"visual": 128, "audio": 80, "text": 9}')
    profile = tmp_path / "deep" / "er" / "profiles" / "p.nc"
    panel = explore(save_profile(made, profile), profile.parent / "out", n_boot=50)
    panel.settings["removed"].value = "audio"
    panel.settings["family"].value = name
    path = panel.save()
    assert path.parent == profile.parent / "out" and [path] == list(tmp_path.rglob("*.json"))


def test_without_widgets_there_is_the_figure(monkeypatch):
    import sys
    from matplotlib.figure import Figure

    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert isinstance(explore(DATA, n_boot=50), Figure)


def test_a_profile_of_ones_own_is_offered(source, tmp_path):
    "Other layers, no splits, no token counts, one condition: whatever can be shown is shown."
    own = (
        source.profile.sel(layer=[0, 3, 6, 12, 16], removed=["visual"])
        .drop_vars("split")
        .assign_attrs(model="nobody/model")
    )
    del own.attrs["tokens"]
    (tmp_path / "profiles").mkdir()
    for name in "ab":
        save_profile(own, tmp_path / "profiles" / f"{name}.nc")
    panel = explore(tmp_path, tmp_path, n_boot=50)
    assert panel.profile.options == ("a", "b")
    assert panel.settings["removed"].options == ("visual",)
    assert panel.view.bounds.layers == (0, 3, 6, 12, 16)
    assert (
        panel.button.disabled
        and "profile has no condition" in panel.words.value
        and panel.save() is None
    )
    panel.profile.value = "b"
    assert panel.view.source.name == "b"
