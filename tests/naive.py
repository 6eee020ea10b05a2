"""A pruned forward pass written down plainly: one sample, a loop over the layers, lists of
positions. No hooks, no masks but the causal one."""

import torch
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as qwen25

from seats_analysis.models.families import adapter_for
from seats_analysis.models.decoder import Decoder
from seats_analysis.inputs.layout import AUDIO, VISUAL
from plain import stage2

CODE = dict(visual=VISUAL, audio=AUDIO)


def attention_received(q, k, widths):
    """Attention that each key receives inside its window, mean over the heads; `widths` of the
    windows."""
    out, start = torch.zeros(len(q)), 0
    for n in widths:
        w = slice(start, start + n)
        for h in range(q.shape[1]):
            out[w] += (
                torch.softmax(q[w, h].double() @ k[w, h].double().T / q.shape[-1] ** 0.5, -1)
                .sum(0)
                .float()
                / q.shape[1]
            )
        start += n
    return out


def windows(n, width):
    return [min(width, n - i) for i in range(0, n, width)]


def towers(model, encoded):
    """What enters the decoder, and the attention that tokens receive: of images and of videos, and
    of all sounds."""
    seen, handles, tower = [], [], adapter_for(model)

    def keep(name):
        return lambda m, args, kwargs: seen.append(
            (name, args[0] if args else kwargs["hidden_states"], kwargs.get("position_embeddings"))
        )

    for name, m in (
        ("visual", tower.visual(model).blocks[-1].attn),
        ("audio", tower.audio_tower(model).layers[-1].self_attn),
    ):
        handles.append(m.register_forward_pre_hook(keep(name), with_kwargs=True))
    inputs = Decoder(model).inputs(encoded.inputs)
    for h in handles:
        h.remove()
    kinds = [
        k for k in ("image", "video") if f"{k}_grid_thw" in encoded.inputs
    ]  # in the order in which they are encoded
    calls = zip(kinds, [s for s in seen if s[0] == "visual"])
    visual = {
        k: visual_statistic(model, x, rotary, encoded.inputs[f"{k}_grid_thw"])
        for k, (_, x, rotary) in calls
    }
    audio = [
        audio_statistic(model, x, encoded.inputs["feature_attention_mask"].sum(-1).tolist())
        for name, x, _ in seen
        if name == "audio"
    ]
    return inputs, visual, audio


def visual_statistic(model, x, rotary, grids):
    "By merged token in natural order."
    tower = adapter_for(model).visual(model)
    attn, n = tower.blocks[-1].attn, len(x)
    if hasattr(attn, "qkv"):
        q, k, _ = attn.qkv(x).view(n, 3, attn.num_heads, -1).unbind(1)
    else:
        q, k = (p(x).view(n, attn.num_heads, -1) for p in (attn.q, attn.k))
    q, k = qwen25.apply_rotary_pos_emb_vision(q, k, *rotary)
    stat = (
        attention_received(
            q, k, [w for t, h, w_ in grids.tolist() for w in windows(t * h * w_, 2 * h * w_)]
        )
        .view(-1, 4)
        .mean(1)
    )
    if not hasattr(tower, "window_size"):
        return stat
    natural, first = (
        torch.empty_like(stat),
        0,
    )  # windows of 2 x 2 merged tokens of one grid, row by row, short at the edges
    for t, h, w in grids.tolist():
        order = [
            (g, y, x)
            for g in range(t)
            for Y in range(0, h // 2, 2)
            for X in range(0, w // 2, 2)
            for y in range(Y, min(Y + 2, h // 2))
            for x in range(X, min(X + 2, w // 2))
        ]
        for i, (g, y, x) in enumerate(order):
            natural[first + (g * (h // 2) + y) * (w // 2) + x] = stat[first + i]
        first += len(order)
    return natural


def audio_statistic(model, x, frames):
    tower = adapter_for(model).audio_tower(model)
    attn, pooled = tower.layers[-1].self_attn, not hasattr(tower, "conv2d1")
    q, k = (p(x).view(len(x), attn.num_heads, -1) for p in (attn.q_proj, attn.k_proj))
    if not pooled:
        return attention_received(q, k, [w for n in frames for w in windows(qwen3_tokens(n), 26)])
    out, rows = [], [(n + 1) // 2 for n in frames]
    stat = attention_received(
        q, k, [w for n in rows for w in windows(n, 20)]
    )  # 2 s at 10 rows a second
    for part in stat.split(rows):
        out.append(part[: len(part) // 2 * 2].view(-1, 2).mean(1))
    return torch.cat(out)


def qwen3_tokens(frames):
    from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import (
        _get_feat_extract_output_lengths,
    )

    return int(_get_feat_extract_output_lengths(torch.tensor(frames)))


def greedy(x, a, n):
    "Greedy max-min choice in one window, in float64."
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    d = (1 - x @ x.T) * a.double()
    if n >= len(x):
        return list(range(len(x)))
    chosen = [int(d.sort(0).values[min(1, len(x) - 1)].argmax())]
    while len(chosen) < n:
        gain = d[chosen].amin(0)
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
    return sorted(chosen)


def kept_of(n, ratio):
    return min(n, max(1, round(n * ratio))) if n else 0


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def scores(layer, h, cos, sin, query):
    "Of all positions by one position's query, over all positions."
    x, a = layer.input_layernorm(h), layer.self_attn
    q, k = (p(x).view(1, h.shape[1], -1, a.head_dim) for p in (a.q_proj, a.k_proj))
    if hasattr(a, "q_norm"):
        q, k = a.q_norm(q), a.k_norm(k)
    q, k = (rotate(t.transpose(1, 2), cos[:, None], sin[:, None]) for t in (q, k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.softmax(
        torch.einsum("bhd,bhsd->bhs", q[:, :, query], k) / a.head_dim**0.5, -1
    ).mean(1)


def text_scores(layer, h, cos, sin, queries):
    "The largest score from any of several positions, each over what precedes it."
    each = []
    for j in queries:
        seen = slice(0, j + 1)
        row = scores(layer, h[:, seen], cos[:, seen], sin[:, seen], j)
        each.append(torch.nn.functional.pad(row, (0, h.shape[1] - j - 1)))
    return torch.stack(each).amax(0)


def run_layer(layer, h, cos, sin):
    mask = torch.zeros(h.shape[1], h.shape[1]).masked_fill(
        ~torch.ones(h.shape[1], h.shape[1]).tril().bool(), torch.finfo(torch.float32).min
    )
    return layer(
        h, attention_mask=mask[None, None], position_embeddings=(cos, sin), position_ids=None
    )


class DeepStack:
    "What a Qwen3-Omni text model adds after its first layers."

    def __init__(self, inputs):
        here = inputs.get("visual_pos_masks")
        self.levels = inputs.get("deepstack_visual_embeds") or []
        self.row = (
            {} if here is None else {p: i for i, p in enumerate(here[0].nonzero()[:, 0].tolist())}
        )

    def add(self, layer, h, here):
        if layer >= len(self.levels):
            return h
        h = h.clone()
        for at, p in enumerate(here):
            if p in self.row:
                h[0, at] += self.levels[layer][self.row[p]]
        return h


def stage1(plan, layout, h, visual, audio):
    "Positions kept, and how many of each modality."
    kind, windows_, aim = layout.modality[0], layout.window[0], {}
    chosen = [i for i in range(len(kind)) if kind[i] not in (VISUAL, AUDIO)]
    for name, stat in (("visual", visual), ("audio", audio)):
        mine, aim[name] = [i for i in range(len(kind)) if kind[i] == CODE[name]], 0
        for w in sorted({int(windows_[i]) for i in mine}):
            group = [i for i in mine if windows_[i] == w]
            n = kept_of(len(group), plan.entering[name])
            at = [mine.index(i) for i in group]
            chosen += [group[j] for j in greedy(h[0, group], stat[at], n)]
            aim[name] += n
    return sorted(chosen), aim


def divide(planned, there, ratio):
    "Totals of one step: the planned sum, split by what is there where both modalities are planned."
    if not all(planned.values()):
        return [planned["visual"]], [planned["audio"]]
    total = sum(planned.values())
    visual = max(
        total - there["audio"], min(max(1, round(ratio * there["visual"])), there["visual"], total)
    )
    return [visual], [total - visual]


def in_sequence(model, encoded, layout, visual):
    "Statistics of those visual tokens that count, in the order of the prompt."
    config = adapter_for(model).config(model)
    source = {getattr(config, f"{k}_token_id"): iter(stat.tolist()) for k, stat in visual.items()}
    return torch.tensor(
        [next(source[i]) for i in encoded.inputs["input_ids"][0][layout.visual[0]].tolist()]
    )


def prefill(model, encoded, plan, layout=None):
    """Kept positions by stage, those that every layer sees, and the last logits; `layout` where
    images count as visual."""
    ad, layout = adapter_for(model), encoded.layout if layout is None else layout
    inputs, visual, audio = towers(model, encoded)
    h, kind, deep = inputs["inputs_embeds"], layout.modality[0], DeepStack(inputs)
    here, aim = stage1(
        plan, layout, h, in_sequence(model, encoded, layout, visual), audio[0] if audio else None
    )
    kept, sets, layers = {}, [], ad.layers(model)
    if min(plan.entering.values()) < 1:
        kept["stage1"] = here
    h, (cos, sin) = h[:, here], ad.decoder(model).rotary_emb(h, encoded.position_ids)
    for l, layer in enumerate(layers):
        if l in plan.drop_layers:
            aim = {m: kept_of(aim[m], plan.keep_ratios[m][plan.drop_layers.index(l)]) for m in aim}
            text = [j for j, p in enumerate(here) if kind[p] not in (VISUAL, AUDIO)]
            end = max((j for j, p in enumerate(here) if kind[p] in (VISUAL, AUDIO)), default=-1)
            queries = [j for j in text if j > end] if plan.query == "text" else text[-1:]
            there = {m: sum(int(kind[p]) == c for p in here) for m, c in CODE.items()}
            totals = divide(aim, there, plan.keep_ratios["visual"][plan.drop_layers.index(l)])
            keep = stage2(
                text_scores(layers[l - 1], h, cos[:, here], sin[:, here], queries),
                kind[None, here],
                layout.chunk[:, here],
                int(layout.chunk.max()) + 1,
                *totals,
                plan.temperature,
            )[0].tolist()
            h, here = h[:, keep], [p for p, k in zip(here, keep) if k]
            kept[f"drop{l}"] = here
        if gone := [c for m, c in CODE.items() if plan.late(m) == l]:
            aim = {m: 0 if c in gone else aim[m] for m, c in CODE.items()}
            keep = [kind[p] not in gone for p in here]
            h, here = h[:, keep], [p for p, k in zip(here, keep) if k]
            kept[f"late{l}"] = here
        sets.append(here)
        h = deep.add(l, run_layer(layer, h, cos[:, here], sin[:, here]), here)
    return kept, sets, ad.lm_head(model)(ad.decoder(model).norm(h))[:, -1]


def removed(model, encoded, layer, kinds):
    "Last logits when all positions of some modalities go before a layer."
    ad, inputs, kind = (
        adapter_for(model),
        Decoder(model).inputs(encoded.inputs),
        encoded.layout.modality[0],
    )
    h, deep, here = inputs["inputs_embeds"], DeepStack(inputs), list(range(len(kind)))
    cos, sin = ad.decoder(model).rotary_emb(h, encoded.position_ids)
    for l, block in enumerate(ad.layers(model)):
        if l == layer:
            keep = [kind[p] not in kinds for p in here]
            h, here = h[:, keep], [p for p, k in zip(here, keep) if k]
        h = deep.add(l, run_layer(block, h, cos[:, here], sin[:, here]), here)
    return ad.lm_head(model)(ad.decoder(model).norm(h))[:, -1]
