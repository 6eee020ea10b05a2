"""The built site: no formula as raw TeX, no page that scrolls sideways, an explorer that is right.

The pages are those of `make docs` where they are there and no older than what they are made from;
`make nightly` builds them. What needs a browser takes chromium, where there is one.
"""

import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from conftest import ROOT
import nbformat
import pytest

from seats_analysis import Schedule, find_boundaries, load_profile
from seats_analysis.schedules.cost import flops_fraction
from seats_analysis.storage.files import shipped_folder
from seats_analysis.testbed.load import TESTBEDS

SITE = ROOT / "build" / "docs" / "site"
WIDTHS = 375, 1280  # a phone, a desk
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update""".split()


@pytest.fixture(scope="module")
def formulas():
    "The hook of mkdocs that makes MathML."
    pytest.importorskip("latex2mathml", reason="the site's requirements are not installed")
    sys.path.insert(0, str(ROOT / "docs"))
    import formulas

    yield formulas
    sys.path.remove(str(ROOT / "docs"))


@pytest.fixture(scope="module")
def pages(request):
    "Every page of the site."
    if request.config.getoption("--nightly"):
        subprocess.run([sys.executable, ROOT / "docs" / "build.py"], check=True)
    made = SITE / "index.html"
    if not made.exists():
        pytest.skip("no site: make docs")
    sources = [*ROOT.glob("docs/**/*"), *ROOT.glob("nbs/**/*.ipynb"), ROOT / "README.md"]
    if max(p.stat().st_mtime for p in sources) > made.stat().st_mtime:
        pytest.skip("the site is older than what it is made from: make docs")
    return sorted(SITE.rglob("*.html"))


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


def test_every_formula_of_the_notebooks_has_mathml(formulas):
    "An unknown command would be printed as it stands."
    with pytest.raises(ValueError, match=r"no MathML for \\nosuchcommand"):
        formulas.mathml(r"a + \nosuchcommand b")
    raw = r'<p><span class="arithmatex">\(r &lt; \frac{K}{L}\)</span></p>'
    made = formulas.on_page_content(raw, None, None, None)
    assert "arithmatex" not in made and "<mfrac><mrow><mi>K</mi></mrow>" in made
    assert "&lt;" in made or "&#x0003C;" in made
    found = [
        tex
        for path in ROOT.glob("nbs/**/*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
        for tex in re.findall(r"(?<![\\$])\$([^$`\n]+)\$(?!\$)", cell.source)
    ]
    assert len(found) > 80 and all("</math>" in formulas.mathml(tex) for tex in found)


def test_no_page_shows_raw_tex(pages):
    texts = {p: p.read_text(encoding="utf-8") for p in pages}
    raw = {p.name: n for p, t in texts.items() if (n := t.count("arithmatex") + t.count("$$"))}
    assert not raw
    assert sum(t.count("<math") for t in texts.values()) > 100


MEASURE = """<!doctype html><title>widths</title><body><script>
const pages = %s, widths = %s, found = [];
const look = (path, width) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    const text = page.querySelector(".md-content");  // boxes of code reach into its margin
    const edge = text ? text.getBoundingClientRect().right + 1 : Infinity;
    const boxed = (e) => {
      for (let b = e.parentElement; b && b !== text; b = b.parentElement)
        if (frame.contentWindow.getComputedStyle(b).overflowX !== "visible") return true;
    };
    const over = text ? [...text.querySelectorAll("*")].filter((e) => {
      const r = e.getBoundingClientRect();
      return r.width > 1 && r.right > edge && !boxed(e);
    }) : [];
    const outside = over.map((e) => `${e.tagName}.${e.getAttribute("class")}`).slice(0, 3);
    found.push({path, width, page: root.scrollWidth, outside});
    frame.remove();
    done();
  };
  frame.src = "/" + path;
  document.body.append(frame);
});
(async () => {
  for (const width of widths) for (const path of pages) await look(path, width);
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


class Handler(SimpleHTTPRequestHandler):
    "The site's folder, one page that measures all others, and what that found."

    def do_GET(self):
        if self.path != "/measure":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.measure.encode())

    def do_POST(self):
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *args):
        pass


@needs_chromium
def test_no_page_scrolls_sideways(pages, tmp_path):
    "Nor does anything lie on the column beside the text, unless it scrolls in a box of its own."
    paths = [p.relative_to(SITE).as_posix() for p in pages]
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=SITE))
    server.done = threading.Event()
    server.measure = MEASURE % (json.dumps(paths), json.dumps(WIDTHS))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"--user-data-dir={tmp_path}"
    address = f"http://127.0.0.1:{server.server_port}/measure"
    # a port for a debugger keeps the browser open, as the pages take longer than their own loading
    browser = subprocess.Popen(
        [CHROMIUM, *QUIET, home, "--remote-debugging-port=0", address], stderr=subprocess.DEVNULL
    )
    try:
        assert server.done.wait(600), "the browser did not come to an end"
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
    assert len(server.found) == len(paths) * len(WIDTHS)
    wide = [f for f in server.found if f["page"] > f["width"] or f["outside"]]
    assert not wide, "\n".join(map(str, wide))


@needs_chromium
@pytest.mark.filterwarnings("ignore::seats_analysis.schedules.schedule.ScheduleWarning")
@pytest.mark.parametrize("name", ["testbed", "testbed-qwen3"])
@pytest.mark.parametrize("removed, family", [("both", "all"), ("both", "tone"), ("audio", "all")])
def test_the_explorer_says_what_the_package_says(pages, name, removed, family):
    "A setting in the address; numbers by the library's own calls, without the page's data."
    tolerance, trr = 5, 10
    setting = f"testbed={name}&removed={removed}&family={family}&tolerance={tolerance}&trr={trr}"
    address = f"{(SITE / 'explorer.html').as_uri()}#{setting}"
    command = [CHROMIUM, *QUIET, "--dump-dom", address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    words = re.search(r'<p class="words"[^>]*>(.*?)</p>', shown, re.S)[1]
    profile = load_profile(name)
    families = None if family == "all" else (family,)
    found = find_boundaries(profile, removed, tolerance / 100, families=families)
    assert f"{found.n_samples} questions. " in words
    assert f"middle block begins at layer {found.shallow_end + 1} (95 %: " in words
    assert f"late block begins at layer {found.late_start + 1} of {found.num_layers} (" in words
    tokens = json.loads(profile.attrs["tokens"])
    if removed != "both":
        found = {m: find_boundaries(profile, m, tolerance / 100) for m in ("visual", "audio")}
    plan = Schedule.from_trr(found, trr, tokens["visual"], tokens["audio"])
    config = shipped_folder("testbed") / TESTBEDS[name] / "config.json"
    config = json.loads(config.read_text(encoding="utf-8"))
    price = flops_fraction(plan, *(round(tokens[m]) for m in ("visual", "audio", "text")), config)
    assert f"TRR of {trr} % takes {round(100 * price, 1):g} % of the FLOPs" in words
    stairs = re.search(r'<div class="stairs">.*?</div>', shown, re.S)[0]
    assert stairs.count("<polyline") == 2 and "no schedule" not in stairs
