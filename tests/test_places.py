"""Models whose weights lie elsewhere, or whose linear layers are others: pruned, probed alike."""

import copy

import kinds, naive, numpy as np, pytest, tiny, torch
from accelerate import dispatch_model
from test_own_code import Int8, replaced

from seats_analysis.models.encode import encode
from seats_analysis.models.families import adapter_for
from seats_analysis.models.scoring import score_choices
from seats_analysis.probing.run import probe_dependency
from seats_analysis.pruning.session import prune

pytestmark = pytest.mark.usefixtures("no_grad")


def measured(model, processor, samples):
    "A pruned pass, what it kept, and a profile."
    batch = encode(model, processor, samples)
    with prune(model, tiny.schedule(entering=tiny.ratios(0.5, 0.5))) as run:
        total = score_choices(model, batch).total
    profile = probe_dependency(model, processor, samples[:1], layers=[0, 3], progress=False)
    return total, run.tokens_per_layer.tolist(), profile


@pytest.fixture(params=["qwen3-vl-moe", "qwen2-audio", "qwen3.5"])
def given(request):
    return kinds.model(request.param), kinds.processor(request.param), kinds.samples(request.param)


@pytest.mark.filterwarnings("ignore")
def test_a_device_map_with_cpu_and_disk_changes_nothing(given, tmp_path):
    model, *asked = given
    total, kept, profile = measured(model, *asked)
    where = {n.rpartition(".")[0]: "cpu" for n, _ in model.named_parameters()}
    where |= {n: "disk" for n in where if ".layers." in n and ".layers.1." not in n or "head" in n}
    model = dispatch_model(copy.deepcopy(model), where, offload_dir=tmp_path)
    assert next(adapter_for(model).lm_head(model).parameters()).is_meta
    there = measured(model, *asked)
    assert torch.equal(total.nan_to_num(), there[0].nan_to_num()) and kept == there[1]
    assert profile.identical(there[2])  # the hash of all weights among its attributes


def int8_of_torchao(model):
    quantization = pytest.importorskip("torchao.quantization", reason="no torchao")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def int8(model):
    model = replaced(model, Int8)
    model.lm_head = Int8(model.lm_head)
    return model


@pytest.mark.parametrize("change", [int8, int8_of_torchao])
def test_other_linear_layers_are_asked_as_they_are(given, change):
    model, processor, samples = given
    model = change(model)
    total, kept, profile = measured(model, processor, samples)
    one = encode(model, processor, samples[:1])
    plain = naive.removal_scores(model, one, profile["removed"].values, [0, 3, 6])
    for name, layer in list(plain)[1:]:
        expected = plain[name, layer].metrics(one.samples, plain[None, 6])["nll"]
        found = profile["nll"].sel(removed=name, layer=layer)
        np.testing.assert_allclose(found, expected, atol=5e-5)
    assert total.isfinite().any() and kept[0][0] > kept[0][-1]
    if change is not int8:
        return
    model.lm_head.int8[0, 0] += 1
    assert adapter_for(model).hash_weights(model) != profile.attrs["weights_sha256"]
