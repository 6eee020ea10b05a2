"""The published formulas as plain loops, one token at a time: what the tensor code is compared
with."""

import math


def naive_order(features, attention, steps):
    """One window, one token at a time, as the formula reads; the closest distance between best and
    second best is returned too."""
    u = features.double() / (features.double().norm(dim=1, keepdim=True) + 1e-8)
    d = 1 - u @ u.T
    if attention is not None:
        d = d * (attention.double() * 1e6)
    gap, chosen, slack = (
        [sorted(d[:, j].tolist())[min(1, len(d) - 1)] for j in range(len(d))],
        [],
        math.inf,
    )
    for _ in range(steps):
        free = sorted((j for j in range(len(d)) if j not in chosen), key=lambda j: (-gap[j], j))
        if len(free) > 1:
            slack = min(slack, (gap[free[0]] - gap[free[1]]) / max(abs(gap[free[0]]), 1e-12))
        pick = free[0]
        gap = [
            float(d[pick, j]) if not chosen else min(gap[j], float(d[pick, j]))
            for j in range(len(d))
        ]
        chosen.append(pick)
    return chosen, slack


def naive_repair(budget, cap, total):
    "One token at a time till the sum is right."
    budget = list(budget)
    while sum(budget) > total and max(budget) > 1:
        budget[budget.index(max(budget))] -= 1
    while sum(budget) < total:
        room = [b for b, c in zip(budget, cap) if b < c]
        i = next(i for i, (b, c) in enumerate(zip(budget, cap)) if b < c and b == min(room))
        budget[i] += 1
    return budget


def naive_split(b, f, size_v, size_a):
    "Visual and audio part of one window's budget, with the published floors."
    v = min(round(b * f), size_v)
    a = min(b - v, size_a)
    v += min(b - v - a, size_v - v)
    a += min(b - v - a, size_a - a)
    if size_v and v < 1:
        v, a = 1, max(1, min(size_a, b - 1)) if a > 1 else a
    if size_a and a < 1:
        a, v = 1, max(1, min(size_v, b - 1)) if v > 1 else v
    return v, a


def softmax(x, tau):
    e = [math.exp((v - max(x)) / tau) for v in x]
    return [v / sum(e) for v in e]


def naive_budgets(mean_v, mean_a, size_v, size_a, t_v, t_a, tau):
    "The published plan of one step, token by token."
    p_v, p_a = softmax(mean_v, tau), softmax(mean_a, tau)
    cap = [v + a for v, a in zip(size_v, size_a)]
    budget = [min(max(round((t_v + t_a) * (x + y) / 2), 1), c) for x, y, c in zip(p_v, p_a, cap)]
    budget = naive_repair(budget, cap, t_v + t_a)
    split = [x * t_v / (x * t_v + y * t_a + 1e-12) for x, y in zip(p_v, p_a)]
    return [naive_split(*row) for row in zip(budget, split, size_v, size_a)]


def stage2(scores, modality, chunk, n_chunks, visual, audio, *args, **kwargs):
    "`select_in_chunks` on bare tensors, with the totals of each modality."
    from types import SimpleNamespace

    from seats_analysis.pruning.select import select_in_chunks

    tokens = SimpleNamespace(modality=modality, chunk=chunk)
    n_keep = [dict(visual=v, audio=a) for v, a in zip(visual, audio, strict=True)]
    return select_in_chunks(scores, tokens, n_chunks, n_keep, *args, **kwargs)
