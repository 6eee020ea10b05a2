"""Models whose weights lie elsewhere, or whose linear layers are others: pruned and probed alike."""

import copy

import kinds, pytest, tiny, torch
from accelerate import dispatch_model
from torch import nn

from seats_analysis.models.encode import encode
from seats_analysis.models.families import adapter_for
from seats_analysis.models.scoring import score_choices
from seats_analysis.probing.run import probe_dependency
from seats_analysis.pruning.session import prune

pytestmark = pytest.mark.usefixtures("no_grad")
MODELS = {f: tiny.thinker for f in tiny.FAMILIES} | {"qwen3.5": kinds.model}


class Int8(nn.Module):
    "A linear layer in int8, each position with a scale of its own; it has no `weight`."

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("whole", (linear.weight / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        whole = (x / scale).round()
        return nn.functional.linear(whole, self.whole.float()) * scale * self.scale[:, 0] + (
            0 if self.bias is None else self.bias
        )


def int8(model):
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8(child))
    return model


def measured(model, processor, samples):
    "A pruned pass, what it kept, and a profile."
    batch = encode(model, processor, samples)
    with prune(model, tiny.schedule(entering=tiny.ratios(0.5, 0.5))) as run:
        total = score_choices(model, batch).total
    profile = probe_dependency(model, processor, samples[:1], layers=[0, 3], progress=False)
    return total, run.tokens_per_layer.tolist(), profile


@pytest.fixture(params=MODELS)
def given(request):
    known = request.param in kinds.ROWS
    made = kinds if known else tiny
    samples = kinds.samples(request.param) if known else tiny.three()
    return MODELS[request.param](request.param), made.processor(request.param), samples


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


def test_other_linear_layers_are_asked_as_they_are(given):
    model, processor, samples = given
    int8(model)
    total, kept, profile = measured(model, processor, samples)
    plain = probe_dependency(
        model, processor, samples[:1], layers=[0, 3], method="plain", progress=False
    )
    torch.testing.assert_close(
        torch.tensor(profile["nll"].values), torch.tensor(plain["nll"].values), atol=1e-2, rtol=0
    )
    assert total.isfinite().any() and kept[0][0] > kept[0][-1]
    with torch.no_grad():
        adapter_for(model).lm_head(model).whole[0, 0] += 1
    assert adapter_for(model).hash_weights(model) != profile.attrs["weights_sha256"]
