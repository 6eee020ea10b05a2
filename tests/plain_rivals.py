"""The other methods as plain loops over tokens, written from their papers' pseudo-code."""

import math

from plain import naive_order


def cos(a, b):
    return float(a.double() @ b.double() / max(float(a.double().norm() * b.double().norm()), 1e-12))


def best(values, n, among):
    return sorted(sorted(among, key=lambda i: (-values[i], i))[:n])


def divprune(x, n):
    "Greedy max-min distance; also the closest decision between best and second best."
    chosen, slack = naive_order(x, None, n)
    return sorted(chosen), slack


def visionzip(x, attention, keys, sizes, counts):
    "Window by window: the most attended stay, every so-manieth of the rest collects the others."
    keep, out, start = [], x.double().clone(), 0
    for n, (dominant, contextual) in zip(sizes, counts):
        here = list(range(start, start + n))
        top = best(attention.tolist(), dominant, here)
        rest = [i for i in here if i not in top]
        anchors = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
        groups = {a: [] for a in anchors}
        for i in rest:
            if anchors and i not in anchors:
                groups[max(anchors, key=lambda a: (cos(keys[i], keys[a]), -a))].append(i)
        for a, members in groups.items():
            if members:
                out[a] = x[a].double() + x[members].double().mean(0)
        keep += top + anchors
        start += n
    return sorted(keep), out


def dycoke(frames, k):
    "frames: equal tensors (P, D). Positions kept, counted over all frames."
    P, keep = len(frames[0]), []
    for f, x in enumerate(frames):
        role = f % 4
        if role == 0:
            chosen = range(P)
        else:
            before = frames[f - 2] if role == 2 else frames[f - 1]
            chosen = best([-cos(a, b) for a, b in zip(x, before)], int(k * P), range(P))
        keep += [f * P + i for i in chosen]
    return keep


def omnizip_audio(audio, visual, attention, dominant, contextual, g):
    strong = best(attention.tolist(), dominant, range(len(audio)))
    rest = [i for i in range(len(audio)) if i not in strong]
    anchors = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    out = audio.double().clone()
    for a in anchors:
        mine = [
            i
            for i in rest
            if i not in anchors and max(anchors, key=lambda b: (cos(audio[i], audio[b]), -b)) == a
        ]
        value = {
            i: max(cos(audio[i], v) for v in visual) if len(visual) else cos(audio[i], audio[a])
            for i in mine
        }
        mine = sorted(mine, key=lambda i: (-value[i], i))[:g]
        if not mine:
            continue
        total = sum(math.exp(value[i]) for i in mine)
        out[a] = (
            audio[a].double() + sum(math.exp(value[i]) / total * audio[i].double() for i in mine)
        ) / 2
    return sorted(strong + anchors), out


def omnizip_rates(retained, sizes, keep, low, high):
    "Fraction of each time group kept; None where there is no sound."
    mean = min(max(1 - keep / sum(sizes), low), high)
    clip = lambda v: min(max(v, low), high)
    heard = [(high + (low - high) * r, n) for r, n in zip(retained, sizes) if r is not None]
    a, b = 0.0, high / low
    for _ in range(200):
        m = (a + b) / 2
        if sum(clip(f * m) * n for f, n in heard) < mean * sum(n for _, n in heard):
            a = m
        else:
            b = m
    share = [1 - (mean if r is None else clip((high + (low - high) * r) * b)) for r in retained]
    scale = keep / sum(s * n for s, n in zip(share, sizes))
    return [s * scale for s in share]


def peaks(x, k=5):
    "Density peaks of one frame."
    n = len(x)
    d = [[1 - cos(a, b) for b in x] for a in x]
    near = [sorted(d[i][j] for j in range(n) if j != i)[:k] for i in range(n)]
    rho = [math.exp(-sum(v) / len(v)) if v else 1.0 for v in near]
    out = []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if j != i and rho[j] > rho[i] + 1e-7]
        out.append(
            rho[i]
            * (min(denser) if denser else max((d[i][j] for j in range(n) if j != i), default=0.0))
        )
    return out


def omnizip_visual(frames, shares):
    "frames: equal tensors (P, D); shares: fraction kept of each time group of two frames."
    P, keep, total, done = len(frames[0]), [], 0.0, 0
    for f, x in enumerate(frames):
        total += shares[f // 2] * P
        n = math.floor(total + 0.5 - 1e-9) - done
        done += n
        value = peaks(x) if f % 2 == 0 else [-cos(a, b) for a, b in zip(x, frames[f - 1])]
        keep += [f * P + i for i in best(value, n, range(P))]
    return keep


def scaled(values, among):
    low, high = min(values[i] for i in among), max(values[i] for i in among)
    return {i: float(values[i] - low) / float(high - low + 1e-6) for i in among}


def omnipack_salience(x, attention, P, ratio):
    "P: tokens of a frame; None: sound."
    n, step = len(x), P or 1
    seen = scaled(attention, range(n))
    beside = [[j for j in (i - step, i + step) if 0 <= j < n] for i in range(n)]
    differs = [max(1 - cos(x[i], x[j]) for j in near) for i, near in enumerate(beside)]
    if P is None:
        new = scaled(differs, range(n))
        return [seen[i] + 0.25 * new[i] for i in range(n)]
    frame = [x[i // P * P : i // P * P + P].double().mean(0) for i in range(n)]
    stands = scaled([max(differs[i], 1 - cos(x[i], frame[i])) for i in range(n)], range(n))
    inner = [P <= i < n - P for i in range(n)]
    turns = [1 - cos(x[i] - x[i - P], x[i + P] - x[i]) if inner[i] else 0.0 for i in range(n)]
    turns = scaled(turns, range(n))
    event = scaled([stands[i] + 0.35 * turns[i] for i in range(n)], range(n))
    weight = 0.35 * (0.35 + 0.65 * min(max((ratio - 0.14) / (0.42 - 0.14), 0), 1))
    return [seen[i] * (1 + weight * event[i]) for i in range(n)]


def omnipack_enter(x, attention, places, keep, P, ratio):
    "Salient tokens, peaks among all others, and what is left goes into the nearest kept one."
    n = len(x)
    share, pull, own = (0.25, 0.10, 0.62) if P else (0.35, 0.05, 0.65)
    if keep == n:
        return list(range(n)), x
    axes = [scaled(axis.double(), range(n)) for axis in places.T]
    far = [
        [math.dist([a[i] for a in axes], [a[j] for a in axes]) for j in range(n)] for i in range(n)
    ]
    salience = omnipack_salience(x, attention, P, ratio)
    first = max(1, round(keep * share))
    kept = best(salience, first, range(n))
    rest = [i for i in range(n) if i not in kept]
    d, rho, louder = {}, {}, scaled(salience, rest)
    for i in rest:
        apart = scaled(far[i], rest)
        d[i] = {j: 1 - cos(x[i], x[j]) + 0.2 * apart[j] for j in rest if j != i}
        near = sorted(d[i].values())[:7]
        dense = math.exp(-sum(v**2 for v in near) / max(len(near), 1))
        rho[i] = dense * (1 + 0.35 * louder[i])
    value = {
        i: rho[i]
        * min([v for j, v in d[i].items() if rho[j] > rho[i]] or [max(d[i].values(), default=0)])
        for i in rest
    }
    kept = sorted(kept + best(value, keep - first, rest))
    gone = [i for i in range(n) if i not in kept]
    weight, loud = scaled(salience, gone), scaled(salience, kept)
    total, sums = {i: 1.0 for i in kept}, {i: x[i].double() for i in kept}
    for i in gone:
        apart = scaled(far[i], kept)
        to = max(kept, key=lambda j: cos(x[i], x[j]) - pull * apart[j] + 0.1 * loud[j])
        w = 0.5 + 0.5 * weight[i]
        total[to] += w
        sums[to] = sums[to] + w * x[i].double()
    out = x.double().clone()
    for i in kept:
        out[i] = own * x[i].double() + (1 - own) * sums[i] / total[i]
    return kept, out


def omnipack_drop(h, kinds, counts):
    "Like the text, like the other modality, dense; spread out; what goes is merged."
    at = {k: [i for i, kind in enumerate(kinds) if kind == k] for k in (0, 1, 2)}
    keep, out = list(at[0]), h.double().clone()
    for k, n in counts.items():
        own = at[k]
        asked = {
            i: max(cos(h[i], h[at[0]].mean(0)), *(cos(h[i], h[j]) for j in at[0])) for i in own
        }
        cross = {i: cos(h[i], h[at[3 - k]].mean(0)) for i in own}
        dense = {i: math.exp(-sum(1 - cos(h[i], h[j]) for j in own) / len(own)) for i in own}
        parts = [scaled(v, own) for v in (asked, cross, dense)]
        worth = {i: sum(p[i] for p in parts) for i in own}
        weight = scaled(worth, own)
        chosen = [max(own, key=lambda i: worth[i])]
        while len(chosen) < n:
            free = [i for i in own if i not in chosen]
            gap = {i: min(1 - cos(h[i], h[j]) for j in chosen) * (1 + weight[i]) for i in free}
            chosen.append(max(free, key=lambda i: gap[i]))
        keep += chosen
        gone = [i for i in own if i not in chosen]
        pressing = scaled(worth, gone) if gone else {}
        total = {i: 1.0 for i in chosen}
        for i in gone:
            to = max(chosen, key=lambda j: cos(h[i], h[j]))
            w = ((cos(h[i], h[to]) + 1) / 2) ** 2 * (0.5 + 0.5 * pressing[i])
            total[to] += w
            out[to] += w * h[i].double()
        for i in chosen:
            out[i] /= total[i]
    return sorted(keep), out


def top_by_modality(scores, kinds, counts):
    "FastV, PyramidDrop: the best of each modality, all text."
    keep = [i for i, k in enumerate(kinds) if k == 0]
    for kind, n in counts.items():
        keep += best(scores, n, [i for i, k in enumerate(kinds) if k == kind])
    return sorted(keep)
