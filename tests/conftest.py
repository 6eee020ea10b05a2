"""Options, markers, settings and fixtures shared by tests."""

import gc
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FAMILIES = "qwen2.5-omni", "qwen3-omni"  # as in tiny.py, which imports torch
MARKERS = {
    "nightly": "long version, run by `make nightly`",
    "cuda": "needs a GPU, skipped where there is none",
    "weights": "needs real checkpoints, named by SEATS_WEIGHTS",
}


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="run the long versions too")


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    _hypothesis_profile("nightly" if config.getoption("--nightly") else "ci")


def _hypothesis_profile(name):
    """The same cases every time in `make test`, thousands of fresh ones in `make nightly`; no
    deadlines, for machines differ."""
    try:
        from hypothesis import settings
    except ImportError:
        return  # the tests that need it say so themselves
    settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
    settings.register_profile("nightly", deadline=None, max_examples=2000)
    settings.load_profile(name)


def _has_cuda():
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    "Skip what this machine or this run is not meant for, with the reason."
    reasons = {}
    if not config.getoption("--nightly"):
        reasons["nightly"] = "only in make nightly"
    if "SEATS_WEIGHTS" not in os.environ:
        reasons["weights"] = "SEATS_WEIGHTS names no folder of checkpoints"
    if any("cuda" in item.keywords for item in items) and not _has_cuda():
        reasons["cuda"] = "no GPU"
    for item in items:
        for name in reasons.keys() & set(item.keywords):
            item.add_marker(pytest.mark.skip(reason=reasons[name]))


def pytest_collection_finish(session):
    "What imports made is not looked through again by every collection of garbage."
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    gc.unfreeze()


# ---------------------------------------------------------------- shared by several files


@pytest.fixture
def no_grad():
    import torch

    with torch.no_grad():
        yield


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def processor(family):
    import tiny

    return tiny.processor(family)


@pytest.fixture(scope="session")
def model(family):
    import tiny

    return tiny.thinker(family)


@pytest.fixture(scope="session")
def batches(model, processor):
    "One sample, and three of unequal length."
    import tiny
    from seats_analysis import encode

    return {n: encode(model, processor, tiny.three()[:n]) for n in (1, 3)}


@pytest.fixture
def no_model(monkeypatch):
    "Commands must end before they load one."
    from seats_analysis.cli import app

    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(app, "load_model", load)


@pytest.fixture(scope="module")
def one_thread():
    "A forked process must not inherit a pool of threads."
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
