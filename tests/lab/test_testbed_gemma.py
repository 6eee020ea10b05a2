"""A small Gemma 4 for the testbed's task: where its tokens lie, and that training asks what the
stock model would be asked."""

import random
from dataclasses import replace

import numpy as np
import torch

from seats_analysis.lab.batches import Batch, TrainConfig, branches, features
from seats_analysis.lab.train import Trainer, packed_hidden
from seats_analysis.models.encode import encode
from seats_analysis.testbed.load import build_model, build_processor
from seats_analysis.testbed.task import Scene

C = replace(TrainConfig.recipe("gemma4"), layers=4, batch=1, text_batch=2, text_steps=1)


def test_a_small_gemma_has_cells_and_times_and_is_trained(tmp_path):
    scene = Scene.draw(5)
    model = build_model("gemma4", C.layers).eval()
    processor = build_processor("gemma4")
    made = branches(scene, random.Random(0), C)
    asked = [replace(b.sample, video=scene.clip()) for b in made[:2]]
    stock = encode(model, processor, asked)
    layout = stock.layout[0]
    assert layout.window[layout.visual].bincount().tolist() == [4 * 6] * 16
    assert layout.window[layout.audio].bincount().tolist() == [2 * Scene.AUDIO_RATE] * 4
    words = processor.tokenizer.convert_ids_to_tokens(stock.inputs["input_ids"][0])
    assert [w for w in words if ":" in w] == [f"00:{k // 2:02}" for k in range(16)]

    patches, mel = features([scene], "gemma4")
    frame = torch.from_numpy(scene.frames()[3]) / 255  # cell 1 of row 2: patches in row 4 and 5
    cell = patches[3].view(8, 12, 14, 14, 3)[4:6, 2:4].transpose(1, 2).reshape(28, 28, 3)
    assert torch.equal(cell, frame[56:84, 28:56])
    click = scene.waveform()
    click[3 * 16000 - 400 : 3 * 16000 + 400] += 0.5
    rows = processor.feature_extractor([scene.waveform(), click], return_tensors="pt")
    with torch.no_grad():
        told = model.model.audio_tower.subsample_conv_projection(rows.input_features)[0]
        at = (told[0] - told[1]).norm(dim=-1).argmax()
        assert at == 3 * Scene.AUDIO_RATE
        hidden = packed_hidden(model, Batch([made], patches=patches, mel=mel), C)[0]
        logits = model(**stock.inputs).logits[:, -1]
    ends = np.cumsum([0, len(made[0].ids)])
    places = [end + b.asked[0] - 1 for end, b in zip(ends, made)]
    torch.testing.assert_close(model.lm_head(hidden[0, places]), logits, atol=1e-4, rtol=0)

    run = Trainer(C, tmp_path)
    before = [p.clone() for p in run.model.parameters()]
    losses = [run.train(Batch.of_step(0, C))[0] for _ in range(2)]
    run.train(Batch.of_step(1, C))
    assert losses[1] < losses[0]
    assert not any(map(torch.equal, before, run.model.parameters()))
