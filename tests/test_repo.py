"""Rules of the house that no notebook can check about itself.

Each rule is a function of a folder that returns what breaks it, so the same function is run on the
project, where it must find nothing, and on a small planted project, where it must find the one
thing that is wrong.
"""

import ast
import base64
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
import pytest

import measure
import mutations
import pins
import run_all

from seats_analysis.storage import moved

ROOMS = (  # imports go down this list only
    "storage",
    "inputs",
    "models",
    "statistics",
    "testbed",
    "probing",
    "boundaries",
    "schedules",
    "pruning",
    "baselines",
    "evaluation",
    "tuning",
    "serving",
    "plots",
    "cli",
    "lab",
)
LAB = "lab"  # what studies the instrument
CORE = "probing", "boundaries", "schedules", "pruning"
SEAM = {"probing", "pruning"}  # the schedule file lies between them, not an import
MAX_NOTEBOOK, MAX_PNG, MAX_PARAMETERS, MAX_PUBLIC, MAX_README = 300_000, 60_000, 6, 190, 900
LAZY = {
    "av",
    "datasets",
    "transformers",
    "seaborn",
    "sklearn",
    "lmms_eval",
    "pandas",
    "statsmodels",
}
NO_TORCH = {"inputs.media", "inputs.samples", "boundaries", "schedules.schedule", "plots", "cli"}
NO_SYNC = {"pruning.received", "pruning.select"}
PROVENANCE = {  # what a stored result must carry to be traced back; alternatives separated by |
    "profiles": "schema model revision weights data prompt seed versions|transformers threads",
    "flows": "schema model revision weights data prompt versions|transformers threads",
    "schedules": "schema model revision seed evidence",
    "results": "schema model revision seed",
}


# ---------------------------------------------------------------- reading the project


def notebooks(root):
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def is_exported(source):
    return bool(re.match(r"(\s*#.*\n)*?\s*#\s*\|\s*exports?i?\b", source))


def code_cells(path):
    "(number, source, is exported) of the code cells of a notebook."
    sources = [
        (i, "".join(c["source"])) for i, c in enumerate(cells_of(path)) if c["cell_type"] == "code"
    ]
    return [(i, s, is_exported(s)) for i, s in sources]


def module_order(root):
    "{module: (number of its room, name of its notebook)}; a room that is not known is above all."
    order = {}
    for path in notebooks(root):
        found = [re.search(r"#\s*\|\s*default_exp\s+(\S+)", s) for _, s, _ in code_cells(path)]
        for m in filter(None, found):
            room = m[1].split(".")[0]
            order[m[1]] = (ROOMS.index(room) if room in ROOMS else len(ROOMS), path.name)
    return order


def modules(root):
    "{dotted name within the package: path}"
    package = root / "seats_analysis"
    files = [p for p in package.rglob("*.py") if p.stem not in ("__init__", "_modidx")]
    return {".".join(p.relative_to(package).with_suffix("").parts): p for p in sorted(files)}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(name, tree, known):
    "(node, top package, module of ours or None, names) of every import in the module `name`."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                top, _, rest = a.name.partition(".")
                yield node, top, rest if top == "seats_analysis" and rest else None, []
        elif isinstance(node, ast.ImportFrom):
            full = node.module or ""
            if node.level:
                base = name.split(".")[: -node.level]
                full = ".".join(["seats_analysis", *base, *filter(None, [node.module])])
            top, _, rest = full.partition(".")
            names = [a.name for a in node.names]
            if top != "seats_analysis":
                yield node, top, None, names
                continue
            for n in names:  # `from .room import module` and `from .room.module import name`
                inner = ".".join(filter(None, [rest, n]))
                yield (node, top, inner, []) if inner in known else (node, top, rest or None, [n])


def tracked(root):
    "Files that are or would be committed."
    command = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "-z"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        inside = (p for p in root.rglob("*") if p.is_file())
        return sorted(p for p in inside if not {".venv", "build", ".git"} & set(p.parts))
    return [root / name for name in run.stdout.split("\0") if name and (root / name).is_file()]


def text_of(path):
    "Text of a file, None if it is binary."
    data = path.read_bytes()
    return None if b"\0" in data[:8192] else data.decode("utf-8", errors="replace")


# ---------------------------------------------------------------- the rules


def upward_imports(root):
    "Imports go down the rooms, and down the notebooks of one; every module has a notebook."
    order, wrong, known = module_order(root), [], modules(root)
    for name, path in known.items():
        if name not in order:
            wrong.append(f"{name}: no notebook exports it")
            continue
        for node, _, other, _ in imported(name, parsed(path), known):
            where = f"{name}:{node.lineno}"
            if other is None or other.startswith("__"):
                continue
            if other not in order:
                wrong.append(f"{where}: imports {other}, which no notebook exports")
            elif {name.split(".")[0], other.split(".")[0]} == SEAM:
                wrong.append(f"{where}: the schedule file is the seam, not an import of {other}")
            elif order[other] >= order[name]:
                wrong.append(f"{where}: imports {other}, which lies above it")
    return wrong


def private_imports(root):
    """What a room takes from another one is in that module's `__all__`. The laboratory may look
    into the instrument; nothing looks into the laboratory."""
    known = modules(root)
    public = {name: set(measure.public_names(parsed(path))) for name, path in known.items()}
    wrong = []
    for name, path in known.items():
        for node, _, other, names in imported(name, parsed(path), known):
            room = name.split(".")[0]
            if other in public and other.split(".")[0] != room:
                hidden = set(names) - public[other]
                if room == LAB:
                    hidden = {n for n in hidden if n.startswith("_")}
                wrong += [f"{name}:{node.lineno}: {n} is not public in {other}" for n in hidden]
    return wrong


def laboratory_imports(root):
    "Only the laboratory imports the laboratory; tests of the core do without it."
    known = modules(root)
    wrong = [
        f"{name}:{node.lineno}: imports {other}"
        for name, path in known.items()
        for node, _, other, _ in imported(name, parsed(path), known)
        if f"{other}.".startswith(f"{LAB}.") and not name.startswith(f"{LAB}.")
    ]
    files = {p: p.read_text(encoding="utf-8") for p in (root / "tests").glob("test_*.py")}
    files |= {
        p: "\n".join(s for _, s, _ in code_cells(p))
        for p in notebooks(root)
        if p.parent.name in ROOMS and p.parent.name != LAB
    }
    inside = re.compile(rf"seats_analysis\.{LAB}\b|seats_analysis import {LAB}\b")
    for path, text in sorted(files.items()):
        if path.name not in run_all.WHOLE and inside.search(text):
            wrong.append(f"{path.name}: uses the laboratory")
    return wrong


def heavy_imports(root):
    "Heavy packages are imported where they are used; some modules do without torch; no `import *`."
    wrong, known = [], modules(root)
    for name, path in known.items():
        tree = parsed(path)
        at_top = {id(n) for n in tree.body}
        no_torch = {name, name.split(".")[0]} & NO_TORCH
        for node, top, _, names in imported(name, tree, known):
            where = f"{name}:{node.lineno}"
            if "*" in names:
                wrong.append(f"{where}: import *")
            if top in LAZY and id(node) in at_top:
                wrong.append(f"{where}: {top} at import time")
            if top == "torch" and id(node) in at_top and no_torch:
                wrong.append(f"{where}: torch in {name}")
    return wrong


def entry_points(root):
    "Names of the face, and public methods of its classes."
    face = root / "seats_analysis" / "__init__.pyi"
    stub = ast.parse(face.read_text()) if face.exists() else ast.Module([], [])
    names = {a.name for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names}
    trees = [parsed(p) for p in modules(root).values()] if names else []
    classes = [n for t in trees for n in t.body if isinstance(n, ast.ClassDef) and n.name in names]
    methods = {f.name for c in classes for f in c.body if isinstance(f, ast.FunctionDef)}
    return names | {m for m in methods if not m.startswith("_")}


def wide_functions(root):
    "Only entry points, commands and Triton kernels have more than MAX_PARAMETERS parameters."
    wrong, entry = [], entry_points(root)
    for name, path in modules(root).items():
        for f in measure.functions_of(parsed(path)):
            outside = any(re.search("command|jit", ast.unparse(d)) for d in f.decorator_list)
            count = len(measure.parameters(f))
            if count > MAX_PARAMETERS and f.name not in entry and not outside:
                wrong.append(f"{name}:{f.lineno}: {f.name} has {count}")
    return wrong


def untaught(root):
    """In the core rooms every cell with a definition that is no helper (`_name`) is followed by an
    example with output, however it is exported."""
    wrong = []
    for path in (p for p in notebooks(root) if p.parent.name in CORE):
        cells = [c for c in cells_of(path) if c["cell_type"] == "code"]
        for i, cell in enumerate(cells):
            source = "".join(cell["source"])
            if not is_exported(source):
                continue
            kinds = (ast.FunctionDef, ast.ClassDef)
            names = [n.name for n in ast.parse(source).body if isinstance(n, kinds)]
            public = [n for n in names if not n.startswith("_")]
            after = cells[i + 1] if i + 1 < len(cells) else None
            shown = after and not is_exported("".join(after["source"])) and after.get("outputs")
            if public and not shown:
                wrong.append(f"{path.parent.name}/{path.name}: {public[0]} is not shown")
    return wrong


def size_of_the_house(root):
    "At most MAX_PUBLIC names in all `__all__` of the instrument, MAX_README words in README."
    ours = [p for name, p in modules(root).items() if not name.startswith(f"{LAB}.")]
    names = sum(len(measure.public_names(parsed(p))) for p in ours)
    readme = root / "README.md"
    words = len(readme.read_text(encoding="utf-8").split()) if readme.exists() else 0
    found = [f"{names} public names"] if names > MAX_PUBLIC else []
    return found + ([f"{words} words in README.md"] if words > MAX_README else [])


def deep_imports(root):
    "Tutorials use the face only."
    wrong = []
    for path in (p for p in notebooks(root) if p.parent.name == "tutorials"):
        for i, source, _ in code_cells(path):
            if re.search(r"^\s*(from seats_analysis|import seats_analysis\.)", source, re.M):
                wrong.append(f"{path.name} cell {i}: imports from a room")
    return wrong


def large_notebooks(root):
    "A notebook has at most MAX_NOTEBOOK bytes, a picture in it at most MAX_PNG."
    found = [(p, p.stat().st_size) for p in notebooks(root)]
    wrong = [f"{p.name}: {size} bytes" for p, size in found if size > MAX_NOTEBOOK]
    for path in notebooks(root):
        for i, cell in enumerate(cells_of(path)):
            for out in cell.get("outputs", []):
                size = len(base64.b64decode("".join(out.get("data", {}).get("image/png", ""))))
                if size > MAX_PNG:
                    wrong.append(f"{path.name} cell {i}: picture of {size} bytes")
    return wrong


def bare_asserts(root):
    "No assert in an exported cell, except beside or under a comment that calls it an invariant."
    wrong = []
    for path in notebooks(root):
        for i, source, exported in code_cells(path):
            lines = source.splitlines()
            tree = ast.parse(source) if exported else ast.Module([], [])
            for n in (n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)):
                near = lines[max(n - 2, 0) : n]
                if not any("#" in line and "invariant" in line for line in near):
                    wrong.append(f"{path.name} cell {i} line {n}: assert")
    return wrong


def host_syncs(root):
    "No call in a choice waits for the device, unless its line says that it works on the host."
    waits, wrong = {"item", "tolist", "cpu", "numpy"}, []
    for name, path in modules(root).items():
        source = path.read_text(encoding="utf-8") if name in NO_SYNC else ""
        lines = source.splitlines()
        for n in ast.walk(ast.parse(source)):
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute):
                if n.func.attr in waits and not re.search(r"#.*\bhost\b", lines[n.end_lineno - 1]):
                    wrong.append(f"{path.name}:{n.lineno}: .{n.func.attr}()")
    return wrong


# Written in two parts, so that this file does not break its own rule.
PRIVATE = re.compile(
    r"(?<![\w.~%}-])/(?:" + "work|root|tmp|home|Users" + r")/[\w.]|\.\./" + "shared" + r"\b"
)
REGISTRY = re.compile(
    "pypi" + r"\.org|python" + r"hosted\.org|--(?:extra-)?index" + "-url|--find" + "-links"
)


def private_paths(root):
    "No file names a folder of somebody's machine, or a package registry."
    found = []
    for path in tracked(root):
        for n, line in enumerate((text_of(path) or "").splitlines(), 1):
            for m in filter(None, (PRIVATE.search(line), REGISTRY.search(line))):
                found.append(f"{path.relative_to(root)}:{n}: {m[0]}")
    return found


def stored_keys(path):
    if path.suffix == ".json":
        return list(json.loads(path.read_text(encoding="utf-8")))
    import h5netcdf

    with h5netcdf.File(path, "r") as f:
        return list(f.attrs)


def provenance(root):
    "Every stored JSON and NetCDF says what made it."
    wrong = []
    for folder, needed in PROVENANCE.items():
        files = (root / "data" / folder).rglob("*.*")
        for path in sorted(p for p in files if p.suffix in (".json", ".nc")):
            keys = stored_keys(path)
            has = lambda k: any(re.search(rf"(?:^|_)(?:{k})(?:_|$)", key) for key in keys)
            if missing := [k for k in needed.split() if not has(k)]:
                wrong.append(f"{path.relative_to(root)}: no {', '.join(missing)}")
    return wrong


def unlisted_notebooks(root):
    "index.ipynb is the map: it lists every notebook."
    index = root / "nbs" / "index.ipynb"
    text = index.read_text(encoding="utf-8") if index.exists() else None
    names = [p.relative_to(root / "nbs").as_posix() for p in notebooks(root) if p != index]
    return [] if text is None else [n for n in names if n.removesuffix(".ipynb") not in text]


REFERENCE = "nbs/explanations/environment_and_files.ipynb"


def unlisted_variables(root):
    "The reference page names every variable of the environment that the package reads."
    page = root / REFERENCE
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    found = {
        name
        for path in modules(root).values()
        for name in re.findall(r"SEATS_[A-Z_]+", path.read_text(encoding="utf-8"))
    }
    return sorted(name for name in found if f"`{name}`" not in text)


RULES = (
    upward_imports,
    private_imports,
    laboratory_imports,
    heavy_imports,
    wide_functions,
    untaught,
    deep_imports,
    size_of_the_house,
    large_notebooks,
    bare_asserts,
    host_syncs,
    private_paths,
    provenance,
    unlisted_notebooks,
    unlisted_variables,
)


# ---------------------------------------------------------------- the project keeps them


@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
def test_project_keeps(rule):
    found = rule(ROOT)
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)


def test_the_named_mutations_are_there():
    assert mutations.missing(ROOT) == []


def test_the_reference_page_has_every_command():
    from typer.main import get_command

    from seats_analysis.cli.main import app

    text = (ROOT / REFERENCE).read_text(encoding="utf-8")
    assert [name for name in get_command(app).commands if f"| `{name}` |" not in text] == []


@pytest.mark.parametrize("name", sorted(moved._PLACES))
def test_names_of_earlier_versions_resolve(name):
    with pytest.warns(DeprecationWarning, match=f"{name} is now"):
        assert moved.look_up(name)


@pytest.mark.parametrize("quantity", measure.MAX)
def test_the_house_keeps_its_measures(quantity):
    now = house()[quantity]
    assert now <= measure.MAX[quantity], f"{quantity}: {now}"


@functools.cache
def house():
    return measure.measure(ROOT / "seats_analysis")


def python(code):
    run = [sys.executable, "-c", code]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    "`import seats_analysis` takes under half a second and loads nothing heavy."
    heavy = ("torch", "transformers", "av", "numpy", "scipy", "xarray", "pandas", "matplotlib")
    code = (
        "import sys, time; t = time.perf_counter(); import seats_analysis as sa; dir(sa); "
        f"print(time.perf_counter() - t, *(set({heavy!r}) & set(sys.modules)))"
    )
    runs = [python(code).split() for _ in range(3)]
    assert min(float(r[0]) for r in runs) < 0.5
    assert all(len(r) == 1 for r in runs), runs[0][1:]


def test_face():
    "Every name of the face can be had, is offered to tab completion, and is public in its module."
    import seats_analysis as sa

    stub = ast.parse((ROOT / "seats_analysis" / "__init__.pyi").read_text())
    pairs = [
        (n.module, a.name) for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names
    ]
    names = [name for _, name in pairs]
    assert 25 <= len(names) == len(set(names)) <= 55
    assert set(names) <= set(dir(sa))
    public = {m: set(measure.public_names(parsed(p))) for m, p in modules(ROOT).items()}
    assert [(m, n) for m, n in pairs if n not in public[m]] == []
    for name in names:
        assert getattr(sa, name) is not None
    with pytest.raises(AttributeError):
        sa.no_such_name


def test_versions_agree():
    "CHANGELOG knows the version; every requirement has a bound and a tested version within it."
    from packaging.specifiers import SpecifierSet

    version = re.search(r"^version = (\S+)", (ROOT / "settings.ini").read_text(), re.M)[1]
    assert version in (ROOT / "CHANGELOG.md").read_text()
    needed = pins.requirements("requirements")
    assert [name for name, bound in needed.items() if ">=" not in bound] == []
    bounds = pins.requirements("requirements", "dev_requirements")
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert list(pinned) == sorted(bounds)
    assert [n for n, number in pinned.items() if number not in SpecifierSet(bounds[n])] == []


def test_ci_calls_make_test():
    run = ROOT / ".ci" / "run"
    assert "make test" in run.read_text() and run.stat().st_mode & 0o111


# ---------------------------------------------------------------- and each of them can fail


def cell(source, outputs=()):
    code = dict(cell_type="code", id="c", metadata={}, outputs=list(outputs), execution_count=None)
    return code | dict(source=source)


def write_notebook(path, *cells):
    "A notebook of code cells."
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [c if isinstance(c, dict) else cell(c) for c in cells]
    cells = [c | dict(id=f"c{i}") for i, c in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))


SHOWN = cell("f()", [dict(output_type="stream", name="stdout", text="1")])
SMALL = "storage.files", "probing.run", "pruning.select", "pruning.session"


def notebook_of(root, name):
    room, module = name.split(".")
    return root / "nbs" / room / f"0{SMALL.index(name)}_{module}.ipynb"


def write_module(root, name, source):
    path = root / "seats_analysis" / Path(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")


@pytest.fixture
def project(tmp_path):
    "A small project in which nothing is wrong."
    for name in SMALL:
        source = "#| export\ndef f():\n    return 1"
        write_notebook(notebook_of(tmp_path, name), f"#| default_exp {name}", source, SHOWN)
        write_module(tmp_path, name, "__all__ = ['x']\nx = 1\n_y = 2")
    (tmp_path / "data").mkdir()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
def test_small_project_keeps(project, rule):
    assert rule(project) == []


PLANTED = [  # rule, module, source, whether it is refused
    (upward_imports, "pruning.select", "from seats_analysis.storage import files", False),
    (upward_imports, "pruning.session", "from .select import x", False),
    (upward_imports, "pruning.select", "import seats_analysis.pruning.session", True),
    (upward_imports, "storage.files", "def f():\n    from ..pruning.select import x", True),
    (upward_imports, "pruning.select", "from ..storage.removed import x", True),
    (upward_imports, "pruning.select", "from ..probing.run import x", True),
    (upward_imports, "pruning.stray", "", True),
    (private_imports, "pruning.select", "from ..storage.files import x", False),
    (private_imports, "pruning.session", "from .select import _y", False),
    (private_imports, "pruning.select", "from ..storage.files import _y", True),
    (laboratory_imports, "lab.bench", "from .train import x", False),
    (laboratory_imports, "cli.main", "def f():\n    from seats_analysis.lab import bench", True),
    (unlisted_variables, "storage.files", "x = environ['HOME']", False),
    (unlisted_variables, "storage.files", "x = environ['SEATS_NEW']", True),
    (heavy_imports, "storage.files", "import numpy as np\ndef f():\n    import av", False),
    (heavy_imports, "storage.files", "from transformers import x", True),
    (heavy_imports, "storage.files", "from math import *", True),
    (heavy_imports, "storage.files", "import torch", False),
    (heavy_imports, "plots.style", "import torch", True),
    (wide_functions, "storage.files", "def f(self, a, b, c, d, e, g, *h, **i): pass", False),
    (wide_functions, "storage.files", "def f(a, b, c, d, e, g, h): pass", True),
    (wide_functions, "storage.files", "@app.command()\ndef f(a, b, c, d, e, g, h): pass", False),
    (size_of_the_house, "storage.files", f"__all__ = {['x'] * (MAX_PUBLIC - 3)}", False),
    (size_of_the_house, "storage.files", f"__all__ = {['x'] * (MAX_PUBLIC - 2)}", True),
    (host_syncs, "pruning.select", "x = y.tolist()  # planned on the host", False),
    (host_syncs, "pruning.select", "x = y.sum().item()", True),
]


@pytest.mark.parametrize("rule, module, source, refused", PLANTED)
def test_plant_source(project, rule, module, source, refused):
    write_module(project, module, source)
    assert bool(rule(project)) is refused


DEFINED = "#| export\ndef f():\n    return 1"
PICTURE = {"image/png": base64.b64encode(bytes(MAX_PNG + 1)).decode()}
DRAWN = cell("1", [dict(output_type="display_data", metadata={}, data=PICTURE)])
CELLS = [  # rule, cells of a notebook, whether they are refused
    (untaught, (DEFINED, SHOWN), False),
    (untaught, (DEFINED, "f()"), True),
    (untaught, (DEFINED, DEFINED, SHOWN), True),
    (untaught, ("#| exporti\ndef f():\n    return 1",), True),
    (untaught, ("#| export\ndef _f():\n    return 1",), False),
    (bare_asserts, ("#| hide\n#| export\nassert x",), True),
    (bare_asserts, ("#| exporti\ndef f():\n    assert x, 'no'",), True),
    (bare_asserts, ("assert x",), False),
    (bare_asserts, ("#| export\n# invariant: the budget is planned\nassert x",), False),
    (large_notebooks, (DRAWN,), True),
    (large_notebooks, ("# " + "x" * MAX_NOTEBOOK,), True),
    (deep_imports, ("import seats_analysis as sa",), False),
    (deep_imports, ("import numpy\nfrom seats_analysis.pruning.session import prune",), True),
]


@pytest.mark.parametrize("rule, cells, refused", CELLS)
def test_plant_cells(project, rule, cells, refused):
    path = notebook_of(project, "pruning.select")
    if rule is deep_imports:
        path = project / "nbs" / "tutorials" / "01_start.ipynb"
    write_notebook(path, "#| default_exp pruning.select", *cells)
    assert bool(rule(project)) is refused


def test_plant_long_readme(project):
    (project / "README.md").write_text("word " * (MAX_README + 1))
    assert size_of_the_house(project) == [f"{MAX_README + 1} words in README.md"]


@pytest.mark.parametrize(
    "line, refused",
    [
        ("see /" + "work/proj/x", True),
        ("../" + "shared/notes.md", True),
        ("https://pypi" + ".org/simple", True),
        ("build/" + "tmp/x", False),
        ("https://example.com/home/", False),
    ],
)
def test_plant_private_path(project, line, refused):
    (project / "README.md").write_text(f"first\n{line}\n")
    assert bool(private_paths(project)) is refused
    (project / ".gitignore").write_text("README.md\n")
    assert private_paths(project) == []  # what is not committed is not checked


def test_plant_untraceable(project):
    import h5netcdf

    for folder in ("schedules", "profiles"):
        (project / "data" / folder).mkdir()
    attrs = dict.fromkeys("schema model revision seed".split(), 1)
    for more, name in (dict(evidence=1), "good"), ({}, "bad"):
        path = project / "data" / "schedules" / f"{name}.json"
        path.write_text(json.dumps(attrs | more))
    with h5netcdf.File(project / "data" / "profiles" / "bad.nc", "w") as file:
        file.attrs.update(attrs)
    lost = "data/profiles/bad.nc: no weights, data, prompt, versions|transformers, threads"
    assert provenance(project) == [lost, "data/schedules/bad.json: no evidence"]


def test_plant_unlisted_notebook(project):
    listed = "# storage/00_files probing/01_run pruning/02_select"
    write_notebook(project / "nbs" / "index.ipynb", listed)
    assert unlisted_notebooks(project) == ["pruning/03_session.ipynb"]


# ---------------------------------------------------------------- the runner can fail too


@pytest.fixture
def nbdev_project(tmp_path):
    "A project that nbdev and ruff accept, in sync."
    root = tmp_path / "p"
    (root / "seats_analysis").mkdir(parents=True)
    for name in ("settings.ini", "pyproject.toml"):
        (root / name).write_text((ROOT / name).read_text())
    path = root / "nbs" / "storage" / "00_files.ipynb"
    write_notebook(path, "#| default_exp storage.files", "#| export\nx = 1", "x")
    code = "from nbdev.cli import nbdev_export, nbdev_clean; nbdev_clean(); nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)
    return root


def test_sync_finds_drift(nbdev_project):
    root, before = nbdev_project, run_all.hashes(nbdev_project)
    module, path = root / "seats_analysis/storage/files.py", root / "nbs/storage/00_files.ipynb"
    assert not any(run_all.changed_by(c, root) for c in ("nbdev_export", "nbdev_clean"))
    module.write_text(module.read_text() + "\ny = 2\n")
    assert run_all.changed_by("nbdev_export", root) == ["seats_analysis/storage/files.py"]
    notebook = json.loads(path.read_text())
    notebook["cells"][2]["execution_count"] = 7
    path.write_text(json.dumps(notebook))
    assert run_all.changed_by("nbdev_clean", root) == ["nbs/storage/00_files.ipynb"]
    assert set(run_all.hashes(root)) == set(before)


def test_format_is_checked(nbdev_project):
    path = nbdev_project / "nbs" / "storage" / "00_files.ipynb"
    assert run_all.badly_formatted(nbdev_project) == ""
    write_notebook(path, "x = 'quoted'")
    assert "00_files" in run_all.badly_formatted(nbdev_project)
    write_notebook(path, "#| default_exp storage.files", "# " + "x" * 100)
    assert "E501" in run_all.badly_formatted(nbdev_project)


NOTEBOOKS = {  # which of them pass, and a word of what is said about the others
    "good": ("import os, numpy\nassert 'IN_TEST' in os.environ\nnumpy.set_printoptions(3)", None),
    "alone": ("import numpy\nassert numpy.get_printoptions()['precision'] != 3", None),
    "bad": ("assert 1 == 2", "AssertionError"),
    "skipped": ("#| weights\nassert 1 == 2", None),
    "wanted": ("#| slow\nassert 1 == 2", "AssertionError"),
    "crashed": ("import os\nos._exit(0)", "status 0"),
    "killed": ("import os\nos.abort()", "status -6"),
    "hung": ("import subprocess\nsubprocess.run(['sleep', '600'])", "stopped after 5 s"),
}


def test_notebook_runner(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "WORKERS", 1)  # in this order
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    paths = {name: tmp_path / "nbs" / f"{name}.ipynb" for name in NOTEBOOKS}
    for name, path in paths.items():
        write_notebook(path, NOTEBOOKS[name][0])
    options = dict(root=tmp_path, limit=5, imports=["numpy", "no_such_module"])
    found = list(run_all.test_notebooks(paths.values(), "slow", **options))
    assert [path for path, *_ in found] == list(paths.values())
    for (path, passed, seconds, _, output), (_, word) in zip(found, NOTEBOOKS.values()):
        assert passed is (word is None) and (word or "") in output and seconds < 8, (path, output)


def test_notebooks_nobody_ran_have_failed(tmp_path, monkeypatch):
    "The process above the notebooks breaks: every one of them is reported, none has passed."
    monkeypatch.setattr(run_all.sys, "executable", "false")
    found = list(run_all.test_notebooks([tmp_path / "a.ipynb", tmp_path / "b.ipynb"]))
    assert [passed for _, passed, *_ in found] == [False, False] and "ended with 1" in found[0][-1]


def test_pytest_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "RESULTS", tmp_path / "results")
    (tmp_path / "test_x.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    assert run_all.pytest("x", tmp_path / "test_x.py", cwd=tmp_path) == (1, 1)
    (tmp_path / "test_x.py").write_text("import nothing_of_this_name\n")
    assert run_all.pytest("x", tmp_path / "test_x.py", cwd=tmp_path) == (0, 1)
