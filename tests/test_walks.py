"Pages that follow the code show the code as it is."

import inspect
import json
from pathlib import Path

import pytest
from seats_analysis.pruning.encoders import EncoderWatch
from seats_analysis.pruning.session import Session

PAGE = Path(__file__).parents[1] / "nbs" / "explanations" / "walk_prune.ipynb"
HOOKS = {
    Session: "before_thinker before_decoder before_layer after_decoder after_thinker",
    EncoderWatch: "before_visual before_audio after_tower",
}


@pytest.mark.parametrize(
    "hook", [getattr(c, n) for c, names in HOOKS.items() for n in names.split()]
)
def test_walk_prune_prints_every_hook(hook):
    cells = json.loads(PAGE.read_text())["cells"]
    outputs = (out.get("text", ()) for cell in cells for out in cell.get("outputs", ()))
    assert inspect.getsource(hook) in "\n".join(map("".join, outputs))
