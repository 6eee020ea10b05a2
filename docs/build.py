"""Lay out the pages of the site and build it: `python docs/build.py` (or `make docs`).

Notebooks become Markdown with their stored outputs, in the folders of the repository, so that links
between them, README and figures are the same here as there and mkdocs can check every one. Formulas
become MathML (formulas.py). The reference lists the names of the package's face.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import explorer
import yaml
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "docs"
PAGES = BUILD / "pages"
UPSTREAM = [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("docs/upstream/*.md"))]
TEXTS = "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "data/results/bench_notes.md", *UPSTREAM
TABS = {"tutorials": "Tutorials", "explanations": "Explanations", "results": "Results"}
HIDDEN = re.compile(r"\s*#\s*\|\s*(hide\s*$|default_exp)", re.M)


def room_order():
    "Folders of nbs/ that hold modules, in the order in which they are built on one another."
    source = ast.parse((ROOT / "tests" / "test_repo.py").read_text(encoding="utf-8"))
    value = next(
        n.value
        for n in source.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "ROOMS"
    )
    return [room for room in ast.literal_eval(value) if (ROOT / "nbs" / room).is_dir()]


def page_of(path):
    return PAGES / path.relative_to(ROOT).with_suffix(".md")


def write_notebook(path):
    "One notebook as a page, its pictures beside it."
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.language_info = dict(name="python")  # cleaned away in the stored one
    notebook.cells = [
        c for c in notebook.cells if c.cell_type == "markdown" or not HIDDEN.match(c.source)
    ]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"\A(\s*#\s*\|.*\n)+", "", cell.source)
    exporter = MarkdownExporter()
    text, resources = exporter.from_notebook_node(
        notebook, resources=dict(unique_key=f"{path.stem}", output_files_dir=f"{path.stem}_files")
    )
    page = page_of(path)
    page.parent.mkdir(parents=True, exist_ok=True)
    for name, data in resources["outputs"].items():
        target = page.parent / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    page.write_text(linked(text), encoding="utf-8")


def linked(text):
    "Links to notebooks become links to their pages."
    return re.sub(r"(\]\([^)\s]+?)\.ipynb((?:#[^)]*)?\))", r"\1.md\2", text)


def write_reference():
    "One entry for every name of the face, by room."
    stub = ast.parse((ROOT / "seats_analysis" / "__init__.pyi").read_text(encoding="utf-8"))
    lines, room = ["# Reference", "", "`import seats_analysis as sa` offers these names."], None
    for node in (n for n in stub.body if isinstance(n, ast.ImportFrom)):
        if (here := node.module.split(".")[0]) != room:
            room = here
            lines += ["", f"## {room}"]
        lines += [f"\n::: seats_analysis.{node.module}.{a.name}" for a in node.names]
    (PAGES / "reference.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_explorer():
    "The explorer's page, its script, and what that looks up."
    for name in ("explorer.md", "explorer.js", "style.css"):
        shutil.copy(ROOT / "docs" / name, PAGES)
    data = json.dumps(explorer.settings(), separators=(",", ":"))
    (PAGES / "explorer_data.js").write_text(f"const EXPLORER = {data};\n", encoding="utf-8")


def navigation():
    "Home, the three kinds of reading, the notebooks of the modules by room, and the reference."
    shown = lambda folder: [  # noqa: E731
        page_of(p).relative_to(PAGES).as_posix()
        for p in sorted((ROOT / "nbs" / folder).glob("*.ipynb"))
    ]
    tabs = [{title: shown(folder)} for folder, title in TABS.items() if shown(folder)]
    modules = ["nbs/index.md", *({room: shown(room)} for room in room_order())]
    experiments = {"Experiments": shown("experiments")}
    more = ["CONTRIBUTING.md", "CHANGELOG.md", {"For vLLM": UPSTREAM}, experiments]
    return [
        {"Home": "index.md"},
        {"Explorer": "explorer.md"},
        *tabs,
        {"Modules": modules},
        {"Reference": "reference.md"},
        {"More": more},
    ]


def main():
    shutil.rmtree(BUILD, ignore_errors=True)
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            write_notebook(path)
    (PAGES / "index.md").write_text(
        linked((ROOT / "README.md").read_text(encoding="utf-8")), encoding="utf-8"
    )
    for name in TEXTS:
        target = PAGES / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(linked((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copytree(
        ROOT / "figures",
        PAGES / "figures",
        ignore=shutil.ignore_patterns("*.pdf", "*.tex", "*.csv"),
    )
    write_explorer()
    write_reference()
    config = yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8"))
    config |= dict(nav=navigation(), hooks=[str(ROOT / "docs" / "formulas.py")])
    reference = config["plugins"][1]["mkdocstrings"]["handlers"]["python"]["options"]
    reference["extensions"] = [str(ROOT / "docs" / "comments.py")]
    (BUILD / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", BUILD / "mkdocs.yml"]
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
