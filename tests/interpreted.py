"""The Triton kernels against the PyTorch code of `select`, on random shapes. Run in a process of
its own: without a GPU the interpreter must be asked for before
Triton is imported.

    TRITON_INTERPRET=1 python tests/interpreted.py [CASES]

Prints one JSON line: how many cases, and what differed; and how many of the first 20 (or fewer)
differ when the kernels are given other numbers, as they should."""

import json
import os
import random
import sys

import torch

from seats_analysis.pruning import kernels, received, select

LAUNCH = kernels.greedy_launch
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sizes_of(r, most):
    """Windows as they occur: equal ones with a short one at the end, of one or two lengths, or of
    any."""
    kind, size = r.random(), r.randint(1, most)
    if kind < 0.6:
        return [size] * r.randint(1, 2) + [r.randint(1, size)] * (r.random() < 0.7)
    if kind < 0.8:
        return [size] * r.randint(1, 2) + [r.randint(1, most)] * r.randint(1, 2)
    return [r.randint(1, most) for _ in range(r.randint(1, 4))]


def both(call, spoil):
    "What a call gives without and with the kernels, which get other numbers if `spoil`."
    for on in "01":
        os.environ["SEATS_TRITON"] = on
        yield call(on == "1" and spoil)


def greedy(r, g, spoil=False):
    "The same tokens, whatever the features: distinct, few directions only, repeated, broken."
    sizes = sizes_of(r, r.choice((5, 14, 36)))
    features = torch.randn(sum(sizes), r.randint(1, 24), generator=g)
    if r.random() < 0.3:
        features = features[torch.randint(0, len(features), (len(features),), generator=g)]
    if r.random() < 0.2:
        features = features.sign()
    if r.random() < 0.1:
        features[torch.rand(features.shape, generator=g) < 0.05] = torch.nan
    attention = torch.rand(len(features), generator=g) if r.random() < 0.6 else None
    kernels.TILE = r.choice((32, 256, 8192))  # tables read in many pieces, in a few, in one
    counts = [r.choice((0, s, r.randint(0, s), r.randint(0, s))) for s in sizes]
    as_wide = r.choice((1, 1, 1, 1, kernels.LARGEST))  # as launched for the largest windows, too
    kernels.greedy_launch = lambda width: LAUNCH(max(width, as_wide))
    features, attention = features.to(DEVICE), None if attention is None else attention.to(DEVICE)
    plain, fused = both(
        lambda spoiled: select.select_in_clip(
            features.flip(0) if spoiled else features, attention, sizes, counts
        ),
        spoil,
    )
    per_window = [int(x.sum()) for x in fused.split(sizes)]
    finite = bool(torch.isfinite(features).all())  # of broken features only the counts are promised
    return per_window == counts and (torch.equal(plain, fused) or not finite), dict(
        sizes=sizes, counts=counts
    )


def statistic(r, g, spoil=False):
    """The same numbers to rounding; windows of unequal size, head sizes that are no power of two,
    half precision, strides."""
    sizes = sizes_of(r, r.choice((9, 30, 70, 80)))
    shape = sum(sizes), r.randint(1, 2), r.choice((4, 16, 20, 40))
    q, k = (torch.randn(shape, generator=g) * r.choice((0.3, 1.0, 3.0)) for _ in range(2))
    if r.random() < 0.3:
        q, k = q.bfloat16(), k.bfloat16()
    if r.random() < 0.3:
        q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    q, k = q.to(DEVICE), k.to(DEVICE)
    plain, fused = both(
        lambda spoiled: received.attention_received(q, k * 1.1 if spoiled else k, sizes), spoil
    )
    worst = float((plain - fused).abs().max())
    return fused.dtype == torch.float32 and worst < 1e-4 and abs(
        float(fused.mean()) - 1
    ) < 1e-5, dict(sizes=sizes, shape=shape, worst=worst)


def differing(cases, **kwargs):
    "{check: what is known of each case that differs}."
    wrong = dict(greedy=[], statistic=[])
    for seed in range(cases):
        for check in (greedy, statistic):
            ok, about = check(random.Random(seed), torch.Generator().manual_seed(seed), **kwargs)
            if not ok:
                wrong[check.__name__].append(dict(seed=seed, **about))
    return wrong


def main(cases):
    wrong, spoiled = differing(cases), differing(min(cases, 20), spoil=True)
    count = lambda found: {k: len(v) for k, v in found.items()}
    print(
        json.dumps(
            dict(
                cases=cases,
                device=DEVICE,
                wrong=count(wrong),
                spoiled=count(spoiled),
                first={k: v[:1] for k, v in wrong.items()},
            )
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
