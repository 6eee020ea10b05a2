"""The probe of whole answers against a plain loop with masks."""

import json

import numpy as np
import pytest
import torch

import naive
import seats_analysis as sa
from seats_analysis import adapter_for, load_testbed
from seats_analysis.inputs.layout import Modality
from seats_analysis.models.encode import encode_questions
from seats_analysis.probing.branches import answer_scores
from seats_analysis.storage.files import shipped_folder
from seats_analysis.testbed.load import TESTBEDS

pytestmark = pytest.mark.usefixtures("no_grad")
CONDITIONS = dict(visual=["visual"], audio=["audio"], both=["visual", "audio"])


# of Gemma 4 the loop knows neither windows nor shared keys: tests/test_matrix.py
@pytest.fixture(scope="module", params=["testbed", "testbed-qwen3"])
def testbed(request):
    return load_testbed(TESTBEDS[request.param])


@pytest.fixture(scope="module")
def caption():
    folder = shipped_folder("testbed")
    r = json.loads((folder / "captions.jsonl").read_text().splitlines()[0])
    return sa.Sample(str(folder / r["video"]), r["question"], (r["caption"],), 0, id="caption")


def plain(model, encoded, ids, gone, rule, layer):
    "Log-probabilities (T, V) of an answer: everything in one sequence, masks in every layer."
    S = encoded.shape[1]
    N = S + len(ids) - 1
    answer = torch.arange(N) >= S
    media = torch.zeros(N, dtype=torch.bool)
    media[:S] = torch.isin(
        encoded.layout.modality[0], torch.tensor([Modality.CODES[m] for m in gone])
    )

    def allowed(l):
        blind = dict(
            retain=~media & (l >= layer),
            evict=answer | (~media & (l >= layer)),
            below=answer & (l < layer),
        )
        blind["from"] = answer & (l >= layer)
        return torch.ones(N, N, dtype=torch.bool).tril() & ~(blind[rule][:, None] & media)

    return naive.masked(model, encoded, ids[:-1], allowed).float().log_softmax(-1)


def test_equals_a_plain_loop(testbed, caption):
    "Every rule and condition at some layers; the first token sees what the prompt saw."
    model, processor = testbed
    (questions,) = encode_questions(model, processor, [caption])
    ids = list(questions.choice_ids[0][0])
    L = adapter_for(model).num_layers(model)
    layers = [0, 5, 11, L]
    found = answer_scores(model, questions, tuple(CONDITIONS), layers)
    encoded = sa.encode(model, processor, [caption])
    full = plain(model, encoded, ids, (), "retain", L)
    for (name, rule, layer), scores in found.items():
        if name is None:
            assert scores["stays"].all() and not scores["kl"].any()
            continue
        logp = plain(model, encoded, ids, CONDITIONS[name], rule, layer)
        nll = -logp[range(len(ids)), ids]
        np.testing.assert_allclose(scores["nll"][0], nll, atol=2e-3, rtol=2e-3)
        kl = (full.exp() * (full - logp)).sum(-1)
        np.testing.assert_allclose(scores["kl"][0], kl, atol=2e-3, rtol=2e-3)
        assert scores["kl"][0, 0] < 1e-6 or rule in ("retain", "evict")
    rules = {rule for _, rule, _ in found} - {None}
    assert rules == {"retain", "evict", "from", "below"}
    assert {layer for name, _, layer in found if name} == set(layers)


def test_few_tokens_at_once_change_nothing(testbed, caption):
    model, processor = testbed
    (questions,) = encode_questions(model, processor, [caption])
    layers = list(range(0, adapter_for(model).num_layers(model) + 1, 4))
    a = answer_scores(model, questions, ("both",), layers)
    b = answer_scores(model, questions, ("both",), layers, max_branch_tokens=1)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key]["kl"], b[key]["kl"], atol=1e-3, rtol=1e-3)
