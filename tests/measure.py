"""The size and shape of the house in numbers, beside those of the time before it was rebuilt.

    python tests/measure.py [FOLDER]      a package's folder; default: seats_analysis

Counted in exported modules without the generated index: tokens without comments (a string counts
one), lines, functions and their length, columns, raises and asserts, names in `__all__` and those
that another module uses.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
BEFORE = {  # flat modules (commit 26c813f), by this script
    "Python tokens": 142_502,
    "files": 28,
    "lines": 13_963,
    "functions": 1_294,
    "lines of a function: median / p90 / max": "7 / 15 / 38",
    "width of a line: median / p90 / max": "57 / 118 / 225",
    "lines over 100 columns": 2_279,
    "raise + assert per 100 lines": 2.6,
    "functions with more than 6 parameters": 62,
    "public names": 790,
    "public names used by another module": 294,
    "README, words": 3_563,
}
_LAYOUT = {getattr(tokenize, kind) for kind in "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()}


def sources(folder):
    "{path: text} of the modules of a package."
    files = sorted(p for p in Path(folder).rglob("*.py") if p.name != "_modidx.py")
    return {p: p.read_text(encoding="utf-8") for p in files}


def tokens_of(text):
    return sum(t.type not in _LAYOUT for t in tokenize.generate_tokens(io.StringIO(text).readline))


def public_names(tree):
    "The names in a module's `__all__`."
    lists = [
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
    ]
    return [e.value for value in lists for e in getattr(value, "elts", ())]


def functions_of(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def parameters(function):
    "Names of a function's parameters, without self, cls, *args and **kwargs."
    a = function.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return [n for n in names if n not in ("self", "cls")]


def spread(values):
    "Median, 90th percentile and maximum, as text."
    values = sorted(values) or [0]
    p90 = values[min(int(0.9 * len(values)), len(values) - 1)]
    return f"{median(values):.0f} / {p90} / {values[-1]}"


def measure(folder):
    "{quantity: number or text} of a package."
    texts = sources(folder)
    trees = {p: ast.parse(t) for p, t in texts.items()}
    functions = [f for tree in trees.values() for f in functions_of(tree)]
    lengths = [f.end_lineno - f.lineno + 1 for f in functions]
    lines = [line for t in texts.values() for line in t.splitlines()]
    widths = [len(line) for line in lines if line.strip()]
    checks = sum(
        isinstance(n, (ast.Raise, ast.Assert)) for t in trees.values() for n in ast.walk(t)
    )
    public = {(p, name) for p, tree in trees.items() for name in public_names(tree)}
    names = {
        p: {n.id for n in ast.walk(t) if isinstance(n, ast.Name)}
        | {a.name for n in ast.walk(t) if isinstance(n, ast.ImportFrom) for a in n.names}
        for p, t in trees.items()
    }
    shared = sum(any(name in names[q] for q in names if q != p) for p, name in public)
    return {
        "Python tokens": sum(map(tokens_of, texts.values())),
        "files": len(texts),
        "lines": len(lines),
        "functions": len(functions),
        "lines of a function: median / p90 / max": spread(lengths),
        "width of a line: median / p90 / max": spread(widths),
        "lines over 100 columns": sum(w > 100 for w in widths),
        "raise + assert per 100 lines": round(100 * checks / max(len(lines), 1), 1),
        "functions with more than 6 parameters": sum(len(parameters(f)) > 6 for f in functions),
        "public names": len(public),
        "public names used by another module": shared,
        "README, words": len((ROOT / "README.md").read_text(encoding="utf-8").split()),
    }


def main():
    now = measure(sys.argv[1] if len(sys.argv) > 1 else ROOT / "seats_analysis")
    print("| | before | now |\n|---|---|---|")
    for key, value in now.items():
        shown = [f"{x:,}" if isinstance(x, int) else x for x in (BEFORE.get(key, ""), value)]
        print(f"| {key} | {shown[0]} | {shown[1]} |")


if __name__ == "__main__":
    main()
