"""Rules of the repository that no notebook can check about itself.

Each rule is a function of a folder that returns what breaks it, so the same function is run on the project, where it must find nothing,
and on a small planted project, where it must find the one thing that is wrong.
"""
import ast
import base64
import fnmatch
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_CELL, MAX_NOTEBOOK, MAX_PNG = 50, 300_000, 60_000
LAZY = {"av", "datasets", "transformers", "seaborn", "sklearn", "lmms_eval"}  # imported inside the functions that use them
NO_TORCH = {"media", "boundaries", "schedule", "figures", "paper"}
NO_SYNC = {"select"}
PROVENANCE = {  # what a stored result must carry to be traced back; alternatives separated by |
    "profiles": ("schema", "model", "revision", "weights", "data", "prompt", "seed", "versions|transformers", "threads"),
    "schedules": ("schema", "model", "revision", "seed", "evidence"),
    "results": ("schema", "model", "revision", "seed"),
}


# ---------------------------------------------------------------- reading the project

def notebooks(root): return sorted(p for p in (root/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

def code_cells(path):
    "(number, source, is exported) of the code cells of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [(i, "".join(c["source"])) for i, c in enumerate(cells) if c["cell_type"] == "code"]
    return [(i, s, bool(re.match(r"(\s*#.*\n)*?\s*#\s*\|\s*exports?i?\b", s))) for i, s in sources]

def module_order(root):
    "{module: prefix of its notebook}, such as {'media': '00'}; a late insertion is '03a' and sorts in between."
    order = {}
    for path in notebooks(root):
        names = [m[1] for _, s, _ in code_cells(path) if (m := re.search(r"#\s*\|\s*default_exp\s+(\S+)", s))]
        if names: order[names[0]] = path.name.split("_")[0]
    return order

def modules(root): return sorted(p for p in (root/"seats_analysis").glob("*.py") if p.stem not in ("__init__", "_modidx"))

def imported(tree):
    "(node, top-level name or None, module of ours or None) of every import, wherever it stands."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [(a.name, None) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level: names = [("seats_analysis." + (node.module or a.name), a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom): names = [(f"{node.module}.{a.name}" if node.module == "seats_analysis" else node.module, a.name)
                                                        for a in node.names]
        else: continue
        for full, name in names:
            top, _, rest = full.partition(".")
            ours = top == "seats_analysis" and rest and not rest.startswith("__")  # __version__ is not a module
            yield node, name, top, rest.split(".")[0] if ours else None

def tracked(root):
    "Files that are or would be committed."
    run = subprocess.run(["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, text=True)
    if run.returncode: return sorted(p for p in root.rglob("*") if p.is_file() and not {".venv", "build", ".git"} & set(p.parts))
    return [root/name for name in run.stdout.split("\0") if name and (root/name).is_file()]

def text_of(path):
    "Text of a file, None if it is binary."
    data = path.read_bytes()
    if b"\0" in data[:8192]: return None
    return data.decode("utf-8", errors="replace")


# ---------------------------------------------------------------- the rules

def upward_imports(root):
    "A module imports only from smaller-numbered ones; probe and prune never from one another; every module has a notebook."
    order, wrong = module_order(root), []
    for path in modules(root):
        if path.stem not in order: wrong.append(f"{path.name}: no notebook exports it"); continue
        for node, _, _, other in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if other is None: continue
            if other not in order: wrong.append(f"{path.name}:{node.lineno}: imports {other}, which no notebook exports")
            elif order[other] >= order[path.stem]: wrong.append(f"{path.name}:{node.lineno}: {order[path.stem]} imports {other} ({order[other]})")
            elif {path.stem, other} == {"probe", "prune"}: wrong.append(f"{path.name}:{node.lineno}: the schedule file is the seam, not an import")
    return wrong

def heavy_imports(root):
    "Heavy packages are imported where they are used; some modules do without torch; no `import *`."
    wrong = []
    for path in modules(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_top = {id(n) for n in tree.body}
        for node, name, top, _ in imported(tree):
            where = f"{path.name}:{node.lineno}"
            if name == "*": wrong.append(f"{where}: import *")
            if top in LAZY and id(node) in at_top: wrong.append(f"{where}: {top} at import time")
            if top == "torch" and id(node) in at_top and path.stem in NO_TORCH: wrong.append(f"{where}: torch in {path.stem}")
    return wrong

def long_cells(root):
    "An exported cell has at most MAX_CELL lines."
    return [f"{p.name} cell {i}: {n} lines" for p in notebooks(root) for i, s, exported in code_cells(p)
            if exported and (n := len(s.strip().splitlines())) > MAX_CELL]

def large_notebooks(root):
    "A notebook has at most MAX_NOTEBOOK bytes, a picture in it at most MAX_PNG."
    wrong = [f"{p.name}: {p.stat().st_size} bytes" for p in notebooks(root) if p.stat().st_size > MAX_NOTEBOOK]
    for path in notebooks(root):
        for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            for out in cell.get("outputs", []):
                size = len(base64.b64decode("".join(out.get("data", {}).get("image/png", ""))))
                if size > MAX_PNG: wrong.append(f"{path.name} cell {i}: picture of {size} bytes")
    return wrong

def bare_asserts(root):
    "No assert in an exported cell, except beside or under a comment that calls it an internal invariant."
    wrong = []
    for path in notebooks(root):
        for i, source, exported in code_cells(path):
            if not exported: continue
            lines = source.splitlines()
            for n in (n.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assert)):
                if not any("#" in line and "invariant" in line for line in lines[max(n - 2, 0):n]): wrong.append(f"{path.name} cell {i} line {n}: assert")
    return wrong

def last_cells(root):
    "A module notebook ends with the export, hidden; no notebook carries the traces of a converter."
    wrong = []
    for path in notebooks(root):
        if "jupytext" in json.loads(path.read_text(encoding="utf-8"))["metadata"]: wrong.append(f"{path.name}: jupytext metadata")
        cells = code_cells(path)
        if any(exported for _, _, exported in cells) and not re.match(r"#\|\s*hide\n.*nbdev_export\(\)", cells[-1][1], re.S):
            wrong.append(f"{path.name}: the last cell does not export")
    return wrong

def host_syncs(root):
    "Choices stay on the device: no call that waits for it, unless its line says that it works on the host."
    waits = {"item", "tolist", "cpu", "numpy"}
    wrong = []
    for path in (p for p in modules(root) if p.stem in NO_SYNC):
        source = path.read_text(encoding="utf-8")
        calls = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute))
        lines = source.splitlines()
        wrong += [f"{path.name}:{n.lineno}: .{n.func.attr}()" for n in calls
                  if n.func.attr in waits and not re.search(r"#.*\bhost\b", lines[n.end_lineno - 1])]
    return wrong

# Written in two parts, so that this file does not break its own rule.
PRIVATE = re.compile(r"(?<![\w.~%}-])/(?:" + "work|root|tmp|home|Users" + r")/[\w.]|\.\./" + "shared" + r"\b")
REGISTRY = re.compile("pypi" + r"\.org|python" + r"hosted\.org|--(?:extra-)?index" + "-url|--find" + "-links")

def private_paths(root):
    "No file names a folder of somebody's machine, or a package registry."
    found = []
    for path in tracked(root):
        for n, line in enumerate((text_of(path) or "").splitlines(), 1):
            for m in (PRIVATE.search(line), REGISTRY.search(line)):
                if m: found.append(f"{path.relative_to(root)}:{n}: {m[0]}")
    return found

def netcdf_attrs(path):
    import h5netcdf
    with h5netcdf.File(path, "r") as f: return dict(f.attrs)

def provenance(root):
    "Every stored JSON and NetCDF says what made it."
    wrong = []
    for folder, needed in PROVENANCE.items():
        for path in sorted([*(root/"data"/folder).rglob("*.json"), *(root/"data"/folder).rglob("*.nc")]):
            keys = netcdf_attrs(path) if path.suffix == ".nc" else json.loads(path.read_text(encoding="utf-8"))
            missing = [k for k in needed if not any(re.search(rf"(?:^|_)(?:{k})(?:_|$)", name) for name in keys)]
            if missing: wrong.append(f"{path.relative_to(root)}: no {', '.join(missing)}")
    return wrong

def unpacked_data(root):
    "Everything in data/testbed reaches the wheel."
    setup = (root/"setup.py").read_text(encoding="utf-8")
    patterns = ast.literal_eval(re.search(r'"data/testbed", (\[.*?\])', setup, re.S)[1]) + ["*.py"]
    names = [p.relative_to(root/"data"/"testbed").as_posix() for p in tracked(root) if (root/"data"/"testbed") in p.parents]
    return [n for n in names if not any(Path(n).match(p) if "**" in p else "/" not in n and fnmatch.fnmatch(n, p) for p in patterns)]

def unlisted_notebooks(root):
    "index.ipynb lists every notebook."
    index = root/"nbs"/"index.ipynb"
    if not index.exists(): return []
    text = index.read_text(encoding="utf-8")
    return [p.name for p in notebooks(root) if p != index and p.name not in text]

def late_defaults(root):
    "No function has a default of its own for `late`: `DEFAULT_LATE` is the only one."
    found = []
    for path in modules(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.Lambda)): continue
            a = node.args
            positional = [*a.posonlyargs, *a.args]
            pairs = [*zip(positional[len(positional) - len(a.defaults):], a.defaults), *zip(a.kwonlyargs, a.kw_defaults)]
            found += [f"{path.name}:{arg.lineno}: late={value.value!r}" for arg, value in pairs
                      if arg.arg == "late" and isinstance(value, ast.Constant) and value.value is not None]
    return found

RULES = (upward_imports, heavy_imports, long_cells, large_notebooks, bare_asserts, last_cells, host_syncs, private_paths, provenance,
         unpacked_data, unlisted_notebooks, late_defaults)


# ---------------------------------------------------------------- the project keeps them

@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
def test_project_keeps(rule):
    found = rule(ROOT)
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)

def test_import_is_light():
    "`import seats_analysis` takes under half a second and loads nothing heavy."
    code = ("import sys, time; t = time.perf_counter(); import seats_analysis; s = time.perf_counter() - t; "
            "print(s, *(m for m in ('torch', 'transformers', 'av', 'numpy', 'scipy', 'xarray', 'pandas', 'matplotlib') if m in sys.modules))")
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert min(float(r[0]) for r in runs) < 0.5
    assert all(len(r) == 1 for r in runs), runs[0][1:]

def test_init_is_only_the_version():
    body = ast.parse((ROOT/"seats_analysis"/"__init__.py").read_text()).body
    assert [ast.unparse(n).split(" = ")[0] for n in body] == ["__version__"]

def test_versions_agree():
    "The oldest transformers that is tested is the oldest that settings.ini allows, and CHANGELOG knows the version."
    settings = (ROOT/"settings.ini").read_text()
    allowed = re.search(r"transformers>=([\d.]+)", settings)[1]
    tested = re.search(r"^OLDEST\s*:=\s*(\S+)", (ROOT/"Makefile").read_text(), re.M)[1]
    assert tested == allowed or tested == allowed + ".0"
    assert re.search(r"^version = (\S+)", settings, re.M)[1] in (ROOT/"CHANGELOG.md").read_text()

def test_ci_calls_make_test():
    run = ROOT/".ci"/"run"
    assert "make test" in run.read_text() and run.stat().st_mode & 0o111


# ---------------------------------------------------------------- and each of them can fail

def write_notebook(path, *sources, **metadata):
    "A notebook of code cells."
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, outputs=[], execution_count=None, source=s) for i, s in enumerate(sources)]
    path.write_text(json.dumps(dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)))

EXPORT = "#| hide\nimport nbdev; nbdev.nbdev_export()"

@pytest.fixture
def project(tmp_path):
    "A small project in which nothing is wrong."
    for n, name in enumerate(("media", "probe", "select", "prune")):
        write_notebook(tmp_path/"nbs"/f"0{n}_{name}.ipynb", f"#| default_exp {name}", "#| export\nx = 1", EXPORT)
        (tmp_path/"seats_analysis").mkdir(exist_ok=True)
        (tmp_path/"seats_analysis"/f"{name}.py").write_text("x = 1\n")
    (tmp_path/"data"/"testbed").mkdir(parents=True)
    (tmp_path/"setup.py").write_text((ROOT/"setup.py").read_text())
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path

@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
def test_small_project_keeps(project, rule): assert rule(project) == []

@pytest.mark.parametrize("source, ok", [
    ("from .media import x", True), ("from seats_analysis.media import x", True), ("from seats_analysis import media", True),
    ("from .prune import x", False), ("import seats_analysis.prune", False), ("from . import prune", False),
    ("from seats_analysis import __version__", True), ("def f():\n    from seats_analysis import prune", False), ("from .select import x", False), ("from .gone import x", False)])
def test_plant_import(project, source, ok):
    (project/"seats_analysis"/"select.py").write_text(source + "\n")
    assert bool(upward_imports(project)) is not ok

def test_plant_seam(project):
    (project/"seats_analysis"/"prune.py").write_text("from .probe import x\n")
    assert "seam" in upward_imports(project)[0]

def test_plant_module_without_notebook(project):
    (project/"seats_analysis"/"stray.py").write_text("")
    assert "stray.py" in upward_imports(project)[0]

@pytest.mark.parametrize("source, ok", [
    ("import av", False), ("from transformers import x", False), ("import sklearn.metrics", False), ("import torch", False),
    ("from math import *", False), ("def f():\n    import av", True), ("import numpy as np", True)])
def test_plant_heavy_import(project, source, ok):
    (project/"seats_analysis"/"media.py").write_text(source + "\n")
    assert bool(heavy_imports(project)) is not ok

@pytest.mark.parametrize("n, ok", [(MAX_CELL, True), (MAX_CELL + 1, False)])
def test_plant_long_cell(project, n, ok):
    write_notebook(project/"nbs"/"00_media.ipynb", "\n".join(["#| export"] + ["x = 1"]*(n - 1)))
    assert bool(long_cells(project)) is not ok

def test_plant_large_notebook(project):
    write_notebook(project/"nbs"/"00_media.ipynb", "# " + "x"*MAX_NOTEBOOK)
    assert "00_media" in large_notebooks(project)[0]

def test_plant_large_picture(project):
    path = project/"nbs"/"00_media.ipynb"
    write_notebook(path, "1")
    nb = json.loads(path.read_text())
    nb["cells"][0]["outputs"] = [dict(output_type="display_data", metadata={}, data={"image/png": base64.b64encode(bytes(MAX_PNG + 1)).decode()})]
    path.write_text(json.dumps(nb))
    assert "picture" in large_notebooks(project)[0]

@pytest.mark.parametrize("source, ok", [
    ("#| export\nassert x", False), ("#| exporti\ndef f():\n    assert x, 'no'", False), ("assert x", True),
    ("#| export\n# internal invariant: the budget is planned\nassert x", True), ("#| export\nassert x  # internal invariant", True),
    ("#| hide\n#| export\nassert x", False)])
def test_plant_assert(project, source, ok):
    write_notebook(project/"nbs"/"00_media.ipynb", source)
    assert bool(bare_asserts(project)) is not ok

def test_plant_missing_export(project):
    write_notebook(project/"nbs"/"00_media.ipynb", "#| export\nx = 1", "x")
    assert "does not export" in last_cells(project)[0]

def test_plant_converter_metadata(project):
    write_notebook(project/"nbs"/"00_media.ipynb", EXPORT, jupytext={})
    assert "jupytext" in last_cells(project)[0]

@pytest.mark.parametrize("source, ok", [("x = y.sum().item()", False), ("x = y.tolist()", False), ("x = y.tolist()  # planned on the host", True),
                                        ("x = y.sum()", True)])
def test_plant_sync(project, source, ok):
    (project/"seats_analysis"/"select.py").write_text(source + "\n")
    assert bool(host_syncs(project)) is not ok

@pytest.mark.parametrize("line, ok", [
    ("see /" + "work/proj/x", False), ("'/" + "tmp/clip.mp4'", False), ("open(\"/" + "root/a\")", False), ("../" + "shared/notes.md", False),
    ("pip install --index" + "-url x", False), ("https://pypi" + ".org/simple", False), ("build/" + "tmp/x", True), ("frame/work/flow", True),
    ("https://example.com/home/", True), ("a / tmp / b", True)])
def test_plant_private_path(project, line, ok):
    (project/"README.md").write_text(f"first\n{line}\n")
    found = private_paths(project)
    assert found == [] if ok else len(found) == 1 and found[0].startswith("README.md:2")

def test_plant_ignored_file_is_not_checked(project):
    (project/".gitignore").write_text("build/\n")
    (project/"build").mkdir()
    (project/"build"/"log.txt").write_text("/" + "tmp/x")
    assert private_paths(project) == []

@pytest.mark.parametrize("source, ok", [("def f(late='certified'): pass", False), ("def f(*, late='estimate'): pass", False), ("def f(late=None): pass", True),
                                        ("def f(late=DEFAULT_LATE): pass", True), ("f(late='certified')", True)])
def test_plant_late_default(project, source, ok):
    (project/"seats_analysis"/"select.py").write_text(source + "\n")
    assert bool(late_defaults(project)) is not ok

def test_plant_untraceable_json(project):
    folder = project/"data"/"schedules"
    folder.mkdir()
    good = dict(schema="s/1", model="m", revision=None, seed=0, evidence={})
    (folder/"good.json").write_text(json.dumps(good))
    assert provenance(project) == []
    for key in good:
        (folder/"bad.json").write_text(json.dumps({k: v for k, v in good.items() if k != key}))
        assert provenance(project) == [f"data/schedules/bad.json: no {key}"]

def test_plant_untraceable_netcdf(project):
    import h5netcdf
    folder = project/"data"/"profiles"
    folder.mkdir()
    attrs = dict(schema="s/1", model="m", revision="r", weights_hash="1", data_hash="2", prompt_hash="3", seed=0, versions="v", threads=1)
    for name, drop in (("good", None), ("bad", "weights_hash")):
        with h5netcdf.File(folder/f"{name}.nc", "w") as f: f.attrs.update({k: v for k, v in attrs.items() if k != drop})
    assert provenance(project) == ["data/profiles/bad.nc: no weights"]

def test_plant_unpacked_data(project):
    (project/"data"/"testbed"/"clips").mkdir()
    for name in ("config.json", "model.safetensors", "clips/a.mp4"): (project/"data"/"testbed"/name).write_text("x")
    assert unpacked_data(project) == []
    (project/"data"/"testbed"/"notes.docx").write_text("x")
    assert unpacked_data(project) == ["notes.docx"]

def test_plant_unlisted_notebook(project):
    write_notebook(project/"nbs"/"index.ipynb", "# 00_media.ipynb 01_probe.ipynb 02_select.ipynb")
    assert unlisted_notebooks(project) == ["03_prune.ipynb"]


# ---------------------------------------------------------------- the runner can fail too

@pytest.fixture(scope="module")
def runner():
    sys.path.insert(0, str(ROOT/"tests"))
    try: import run_all
    finally: sys.path.pop(0)
    return run_all

@pytest.fixture
def nbdev_project(tmp_path):
    "A project that nbdev accepts, in sync."
    root = tmp_path/"p"
    (root/"seats_analysis").mkdir(parents=True)
    (root/"settings.ini").write_text((ROOT/"settings.ini").read_text())
    write_notebook(root/"nbs"/"00_media.ipynb", "#| default_exp media", "#| export\nx = 1", "x", EXPORT)
    subprocess.run([sys.executable, "-c", "from nbdev.cli import nbdev_export, nbdev_clean; nbdev_clean(); nbdev_export()"],
                   cwd=root, check=True, capture_output=True)
    return root

def test_sync_finds_drift(runner, nbdev_project):
    root, before = nbdev_project, runner.hashes(nbdev_project)
    assert runner.changed_by("nbdev_export", root) == [] and runner.changed_by("nbdev_clean", root) == []
    (root/"seats_analysis"/"media.py").write_text((root/"seats_analysis"/"media.py").read_text() + "\ny = 2\n")
    assert runner.changed_by("nbdev_export", root) == ["seats_analysis/media.py"]
    nb = json.loads((root/"nbs"/"00_media.ipynb").read_text())
    nb["cells"][2]["execution_count"] = 7
    (root/"nbs"/"00_media.ipynb").write_text(json.dumps(nb))
    drifted = runner.hashes(root)
    assert runner.changed_by("nbdev_clean", root) == ["nbs/00_media.ipynb"]
    assert runner.hashes(root) == drifted != before  # tried on a copy: the working tree is as it was

def test_sync_finds_broken_notebook(runner, nbdev_project):
    (nbdev_project/"nbs"/"01_bad.ipynb").write_text("{")
    assert runner.changed_by("nbdev_clean", nbdev_project) and runner.changed_by("nbdev_export", nbdev_project)

def test_notebook_outcomes(runner, nbdev_project):
    root = nbdev_project
    assert runner.test_notebook(root/"nbs"/"00_media.ipynb", root=root)[0]
    write_notebook(root/"nbs"/"01_bad.ipynb", "assert 1 == 2, 'planted'")
    passed, _, output = runner.test_notebook(root/"nbs"/"01_bad.ipynb", root=root)
    assert not passed and "planted" in output
    assert runner.test_notebook(root/"nbs"/"00_media.ipynb", root=root)[0]  # one at a time: a bad neighbour does not matter
    (root/"nbs"/"skip").mkdir()
    for name in ("skip/.notest", "skip/x.ipynb", "_y.ipynb"): (root/"nbs"/name).write_text("")
    assert [p.name for p in runner.notebooks(root)] == ["00_media.ipynb", "01_bad.ipynb"]

@pytest.mark.parametrize("attrs, returncode, counts", [
    ("tests='5' failures='0' errors='0' skipped='0'", 0, (5, 0)), ("tests='5' failures='1' errors='1' skipped='2'", 1, (1, 2)),
    ("tests='5' failures='0' errors='0' skipped='5'", 0, (0, 0)), ("tests='5' failures='0' errors='0' skipped='0'", 3, (5, 1)), (None, 1, (0, 1))])
def test_junit_counts(runner, tmp_path, attrs, returncode, counts):
    "A run that ends badly is never green, whatever its report says or if there is none."
    if attrs: (tmp_path/"x.xml").write_text(f"<testsuites><testsuite {attrs}/></testsuites>")
    assert runner.junit_counts(tmp_path/"x.xml", returncode) == counts

@pytest.mark.parametrize("body, counts", [
    ("import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('x')", (1, 1)),
    ("import os\ndef test_a(): os._exit(3)", (0, 1))])
def test_pytest_counts(runner, tmp_path, monkeypatch, body, counts):
    monkeypatch.setattr(runner, "RESULTS", tmp_path/"results")
    (tmp_path/"test_x.py").write_text(body)
    assert runner.pytest("x", "-p", "no:hypothesispytest", tmp_path/"test_x.py", cwd=tmp_path) == counts
