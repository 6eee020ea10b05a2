"""A pruned forward pass written down plainly: one sample, a loop over the layers, lists of
positions. No hooks, no masks but the causal one."""

from dataclasses import replace

import torch
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as qwen25

from seats_analysis import adapter_for
from seats_analysis.inputs.layout import Modality
from seats_analysis.models.decoder import Decoder
from seats_analysis.models.encode import encode, layout_of
from seats_analysis.probing.branches import Stream, Tail, marks_of
from seats_analysis.probing.selectors import check_removed
from plain import naive_order, stage2

VISUAL, AUDIO = Modality.CODES.values()

CODE = dict(visual=VISUAL, audio=AUDIO)


def attention_received(q, k, widths):
    """Attention that each key receives inside its window, mean over the heads; `widths` of the
    windows."""
    out = []
    for a, b in zip(q.double().split(widths), k.double().split(widths)):
        logits = torch.einsum("ihd,jhd->hij", a, b) / a.shape[-1] ** 0.5
        out.append(torch.softmax(logits, -1).mean(0).sum(0))
    return torch.cat(out).float()


def windows(n, width):
    return [min(width, n - i) for i in range(0, n, width)]


def towers(model, encoded):
    """What enters the decoder, and the attention that tokens receive: of images and of videos, and
    of all sounds."""
    tower = adapter_for(model)
    modules = dict(
        visual=tower.visual(model).blocks[-1].attn,
        audio=tower.audio_tower(model).layers[-1].self_attn,
    )
    seen = dict(visual=[], audio=[])
    handles = []
    for name, module in modules.items():

        def keep(m, args, kwargs, name=name):
            x = args[0] if args else kwargs["hidden_states"]
            seen[name].append((x, kwargs.get("position_embeddings")))

        handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    inputs = Decoder(model).inputs(encoded.inputs)
    for h in handles:
        h.remove()
    # in the order in which they are encoded
    kinds = [k for k in ("image", "video") if f"{k}_grid_thw" in encoded.inputs]
    visual = {
        k: visual_statistic(model, x, rotary, encoded.inputs[f"{k}_grid_thw"])
        for k, (x, rotary) in zip(kinds, seen["visual"])
    }
    frames = encoded.inputs.get("feature_attention_mask")
    audio = [audio_statistic(model, x, frames.sum(-1).tolist()) for x, _ in seen["audio"]]
    return inputs, visual, audio


def visual_statistic(model, x, rotary, grids):
    "By merged token in natural order."
    tower = adapter_for(model).visual(model)
    attn = tower.blocks[-1].attn
    if hasattr(attn, "qkv"):
        q, k, _ = attn.qkv(x).view(len(x), 3, attn.num_heads, -1).unbind(1)
    else:
        q, k = (p(x).view(len(x), attn.num_heads, -1) for p in (attn.q, attn.k))
    q, k = qwen25.apply_rotary_pos_emb_vision(q, k, *rotary)
    widths = [n for t, h, w in grids.tolist() for n in windows(t * h * w, 2 * h * w)]
    stat = attention_received(q, k, widths).view(-1, 4).mean(1)
    if not hasattr(tower, "window_size"):
        return stat
    # windows of 2 x 2 merged tokens of one grid, row by row, short at the edges
    order = []
    for t, h, w in (h2 // torch.tensor([1, 2, 2]) for h2 in grids):
        place = len(order) + torch.arange(t * h * w).view(t, h, w)
        for g in place:
            cells = (cell for rows in g.split(2) for cell in rows.split(2, 1))
            order += [int(i) for cell in cells for i in cell.flatten()]
    return stat[torch.tensor(order).argsort()]


def audio_statistic(model, x, frames):
    tower = adapter_for(model).audio_tower(model)
    attn = tower.layers[-1].self_attn
    q, k = (p(x).view(len(x), attn.num_heads, -1) for p in (attn.q_proj, attn.k_proj))
    if hasattr(tower, "conv2d1"):
        return attention_received(q, k, [w for n in frames for w in windows(qwen3_tokens(n), 26)])
    rows = [(n + 1) // 2 for n in frames]
    # 2 s at 10 rows a second
    stat = attention_received(q, k, [w for n in rows for w in windows(n, 20)])
    pairs = [part[: len(part) // 2 * 2].view(-1, 2).mean(1) for part in stat.split(rows)]
    return torch.cat(pairs)


def qwen3_tokens(frames):
    from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import (
        _get_feat_extract_output_lengths,
    )

    return int(_get_feat_extract_output_lengths(torch.tensor(frames)))


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


def run_layer(layer, h, cos, sin, allowed=None):  # (S, S) bool; None = causal
    n = h.shape[1]
    allowed = torch.ones(n, n).tril().bool() if allowed is None else allowed
    mask = torch.zeros(n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return layer(
        h, attention_mask=mask[None, None], position_embeddings=(cos, sin), position_ids=None
    )


class DeepStack:
    "What a Qwen3-Omni text model adds after its first layers."

    def __init__(self, inputs):
        self.levels = inputs.get("deepstack_visual_embeds") or []
        places = inputs["visual_pos_masks"][0].nonzero()[:, 0].tolist() if self.levels else []
        self.row = {p: i for i, p in enumerate(places)}

    def add(self, layer, h, here):
        if layer < len(self.levels):
            h = h.clone()
            for at, p in enumerate(here):
                if p in self.row:
                    h[0, at] += self.levels[layer][self.row[p]]
        return h


def stage1(plan, layout, h, stats):
    "Positions kept, and how many of each modality."
    kind = layout.modality[0].tolist()
    chosen = [i for i, code in enumerate(kind) if code not in (VISUAL, AUDIO)]
    aim = {}
    for name, stat in stats.items():
        mine = [i for i, code in enumerate(kind) if code == CODE[name]]
        aim[name] = 0
        for w in sorted({int(layout.window[0, i]) for i in mine}):
            group = [i for i in mine if layout.window[0, i] == w]
            n = kept_of(len(group), plan.entering[name])
            received = stat[[mine.index(i) for i in group]]
            chosen += [group[j] for j in naive_order(h[0, group], received, n)[0]]
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


def prefill(model, encoded, plan, layout=None, earlier=None):
    """Kept positions by stage, those that every layer sees, and the last logits; `layout` where
    images count as visual; `earlier`: the `Conversation` that this turn goes on."""
    ad = adapter_for(model)
    layout = encoded.layout if layout is None else layout
    inputs, visual, audio = towers(model, encoded)
    h = inputs["inputs_embeds"]
    kind = layout.modality[0].tolist()
    deep = DeepStack(inputs)
    stats = dict(
        visual=in_sequence(model, encoded, layout, visual), audio=audio[0] if audio else None
    )
    here, aim = stage1(plan, layout, h, stats)
    kept = {} if min(plan.entering.values()) == 1 else {"stage1": here}
    sets = []
    layers = ad.layers(model)
    h = h[:, here]
    start = 0 if earlier is None else earlier.end
    cos, sin = ad.decoder(model).rotary_emb(h, encoded.position_ids + start)
    for l, layer in enumerate(layers):
        if l in plan.drop_layers:
            i = plan.drop_layers.index(l)
            aim = {m: kept_of(aim[m], plan.keep_ratios[m][i]) for m in aim}
            text = [j for j, p in enumerate(here) if kind[p] not in (VISUAL, AUDIO)]
            end = max((p for p, code in enumerate(kind) if code in (VISUAL, AUDIO)), default=-1)
            queries = [j for j in text if here[j] > end] if plan.query == "text" else text[-1:]
            there = {m: sum(kind[p] == c for p in here) for m, c in CODE.items()}
            keep = stage2(
                text_scores(layers[l - 1], h, cos[:, here], sin[:, here], queries),
                layout.modality[:, here],
                layout.chunk[:, here],
                int(layout.chunk.max()) + 1,
                *divide(aim, there, plan.keep_ratios["visual"][i]),
                plan.temperature,
            )[0].tolist()
            h = h[:, keep]
            here = kept[f"drop{l}"] = [p for p, k in zip(here, keep) if k]
        if gone := [m for m in CODE if plan.late(m) == l]:
            aim |= dict.fromkeys(gone, 0)
            keep = [kind[p] not in [CODE[m] for m in gone] for p in here]
            h = h[:, keep]
            here = kept[f"late{l}"] = [p for p, k in zip(here, keep) if k]
        sets.append(here)
        run = run_layer if earlier is None else earlier.run
        h = deep.add(l, run(layer, h, cos[:, here], sin[:, here]), here)
    return kept, sets, ad.lm_head(model)(ad.decoder(model).norm(h))[:, -1]


def masked(model, encoded, tokens, allowed):  # layer -> (N, N) bool, who sees whom
    """Logits at the prompt's end and after each of some tokens, (tokens + 1, V): one pass over
    everything."""
    ad = adapter_for(model)
    S = encoded.shape[1]
    inputs = Decoder(model).inputs(encoded.inputs)
    new = ad.thinker(model).get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
    h = torch.cat([inputs["inputs_embeds"], new], 1)
    after = encoded.position_ids.max() + torch.arange(1, len(tokens) + 1).expand(3, 1, -1)
    cos, sin = ad.decoder(model).rotary_emb(h, torch.cat([encoded.position_ids, after], -1))
    deep = DeepStack(inputs)
    for l, layer in enumerate(ad.layers(model)):
        h = deep.add(l, run_layer(layer, h, cos, sin, allowed(l)), range(S))
    return ad.lm_head(model)(ad.decoder(model).norm(h))[0, S - 1 :]


def continued(model, encoded, sets, tokens, kv, cache=None):  # cache: of a schedule
    "`masked`, where masks take the place of slices and caches."
    S = encoded.shape[1]
    total = S + len(tokens)

    def allowed(l):
        seen = torch.zeros(total, total, dtype=torch.bool)
        seen[:, S:] = True
        seen[:S, sets[l]] = True
        seen[S:, sets[l if kv == "retain" else -1]] = True
        for m, (start, end) in (cache or {}).items():
            if not start <= l < end:
                seen[S:, :S][:, encoded.layout.modality[0] == Modality.CODES[m]] = False
        return seen.tril() | torch.eye(total, dtype=torch.bool)

    return masked(model, encoded, tokens, allowed)


class Conversation:
    "Turns of (encoded alone, positions that every layer sees of it, tokens of the answer)."

    def __init__(self, model, turns):
        self.ad, self.model, self.turns, self.layer, self.end = (
            adapter_for(model),
            model,
            turns,
            0,
            0,
        )
        rows, positions = [], []
        for encoded, _, tokens in turns:
            inputs = Decoder(model).inputs(encoded.inputs)
            new = model.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
            rows.append((torch.cat([inputs["inputs_embeds"], new], 1), DeepStack(inputs)))
            last = int(encoded.position_ids.max()) + 1
            after = last + torch.arange(len(tokens)).expand(3, 1, -1)
            positions.append(torch.cat([encoded.position_ids, after], -1) + self.end)
            self.end += last + len(tokens)
        self.parts, self.deep = (list(x) for x in zip(*rows))
        self.cos, self.sin = self.ad.decoder(model).rotary_emb(rows[0][0], torch.cat(positions, -1))

    def run(self, layer, h, cos, sin):
        "One layer on everything so far and on rows behind it, which are returned."
        seen = []
        for (encoded, sets, tokens), part in zip(self.turns, self.parts):
            mine = torch.zeros(part.shape[1], dtype=torch.bool)
            mine[sets[self.layer]] = mine[encoded.shape[1] :] = True
            seen.append(mine)
        seen = torch.cat([*seen, torch.ones(h.shape[1], dtype=torch.bool)])
        allowed = seen.expand(len(seen), -1).tril() | torch.eye(len(seen), dtype=torch.bool)
        everything = [torch.cat([*self.parts, h], 1)]
        everything += [torch.cat(pair, 1) for pair in ((self.cos, cos), (self.sin, sin))]
        *parts, h = run_layer(layer, *everything, allowed).split(
            [*(p.shape[1] for p in self.parts), h.shape[1]], 1
        )
        self.parts = [
            deep.add(self.layer, part, range(encoded.shape[1]))
            for part, deep, (encoded, *_) in zip(parts, self.deep, self.turns)
        ]
        self.layer += 1
        return h

    def logits(self):
        "At the end of the last turn's prompt and after each token of its answer."
        nothing = self.parts[0][:, :0], self.cos[:, :0], self.sin[:, :0]
        for layer in self.ad.layers(self.model):
            self.run(layer, *nothing)
        h = self.ad.decoder(self.model).norm(self.parts[-1])
        return self.ad.lm_head(self.model)(h)[0, self.turns[-1][0].shape[1] - 1 :]


def with_answer(model, processor, sample, text):  # -> `Encoded`, and how many tokens the text has
    "A prompt with an answer behind it, as teacher forcing has it."
    encoded = encode(model, processor, [sample])
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    n = ids.shape[1]
    at = encoded.position_ids[..., -1:] + torch.arange(1, n + 1)
    more = dict(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=at)
    longer = {k: torch.cat([encoded.inputs[k], x], -1) for k, x in more.items()}
    inputs = encoded.inputs | longer
    return replace(encoded, inputs=inputs, layout=layout_of(model, inputs)), n


def removed(model, encoded, layer, kinds):
    "Logits (positions that stay, V) when all of some modalities go before a layer."
    ad = adapter_for(model)
    inputs = Decoder(model).inputs(encoded.inputs)
    h = inputs["inputs_embeds"]
    deep = DeepStack(inputs)
    here = list(range(h.shape[1]))
    cos, sin = ad.decoder(model).rotary_emb(h, encoded.position_ids)
    for l, block in enumerate(ad.layers(model)):
        if l == layer:
            here = [p for p in here if encoded.layout.modality[0, p] not in kinds]
            h = h[:, here]
        h = deep.add(l, run_layer(block, h, cos[:, here], sin[:, here]), here)
    return ad.lm_head(model)(ad.decoder(model).norm(h))[0]


@torch.no_grad()
def removal_scores(model, encoded, removed, layers, bypass=False):
    """(condition, layer) -> Scores of one prompt, by a run from layer 0 for every removal; with
    `bypass` also (None, layer), the full run without that layer."""
    tail = Tail.pack([()], encoded.choice_ids)
    S, last = encoded.shape[1], layers[-1]
    after = encoded.position_ids[..., -1:] + 1 + tail.depth
    whole = Stream.enter(model, encoded, S, tail.ids[None], after)
    allowed = torch.ones(S + len(tail.ids), S + len(tail.ids)).tril().bool()
    allowed[S:, S:] = tail.allowed

    def cut(stays):
        keep = stays.nonzero()[:, 0]
        line = len(keep) - len(tail.ids)
        mask = whole.decoder.mask(allowed[keep][:, keep][None, None], whole.hidden.dtype, line=line)
        return keep, replace(whole[keep], mask=mask)

    def scores(stream):
        return tail.score(whole.decoder, stream.hidden[:, -1 - len(tail.ids) :])[0]

    gone = marks_of(whole, encoded, check_removed(removed))
    _, full = cut(torch.ones(len(allowed), dtype=torch.bool))
    out = {(None, last): scores(full.through(0, last))}
    for layer in layers[:-1]:
        for name, marks in gone.items():
            keep, part = cut(~marks)
            part = replace(part, hidden=full.through(0, layer).hidden[:, keep])
            out[name, layer] = scores(part.through(layer, last))
        if bypass:
            before = full.through(0, layer)
            after = before.through(layer, layer + 1)
            hidden = whole.decoder.skipped(before.hidden, after.hidden)
            without = replace(before, hidden=before.inject(hidden, layer))
            out[None, layer] = scores(without.through(layer + 1, last))
    return out


@torch.no_grad()
def knockouts(walk, branches):
    "`Knockouts.branch` by a pass of its own for every knockout, with a mask over all positions."
    decoder = walk.stream.decoder
    sees = walk.sides.sees(torch.arange(walk.stream.hidden.shape[1]))

    def run(less, blocked):  # who sees whom in the layers and heads that are blocked
        stream, read = walk.stream, []
        for layer in range(len(decoder.layers)):
            allowed = torch.stack([less if at else sees for at in blocked[layer]])
            mask = decoder.mask(allowed[None], stream.hidden.dtype)
            stream = replace(stream, mask=mask).through(layer, layer + 1)
            read += walk.score(stream.hidden[:, walk.questions.shared :])
        return read

    found = {}
    for name, b in branches.items():
        less = sees.clone()
        order = torch.cat([b.cut.fixed, b.cut.rows]).argsort()
        less[b.cut.rows] = b.cut.sees[1][:, order]
        jobs = b.blocked.flatten(1).any(1).nonzero()[:, 0].tolist()
        found[name] = {j: run(less, b.blocked[j])[-1] for j in jobs}
    read = run(sees, torch.zeros(len(decoder.layers), 1))
    return read[-1], found, read
