// Looks up what docs/explorer.py has computed (EXPLORER) and draws it; it decides nothing itself.
(function () {
  const root = document.getElementById("seats-explorer");
  const form = root.querySelector("form");
  const COLOURS = {both: "currentColor", visual: "#0173b2", audio: "#de8f05", control: "#8a8a8a"};
  const DASHES = {both: "", visual: "6 3", audio: "6 2 1 2", control: "1 3"};
  const MODALITIES = ["visual", "audio"];
  const CURVES = ["both", ...MODALITIES, "control"];
  const start = {testbed: "testbed", removed: "both", family: "all", tolerance: "1", trr: "10",
    modality: "both"};
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const name of asked.keys()) if (name in start) start[name] = asked.get(name);

  function fill(select, options) {
    const kept = select.value || start[select.name];
    select.replaceChildren(...options.map((o) => new Option(o.replaceAll("_", " "), o)));
    select.value = options.includes(kept) ? kept : options[0];
  }

  function slider(name, values) {
    form[name].max = values.length - 1;
    form[name].value = Math.max(0, values.indexOf(Number(start[name])));
  }

  function svg(parent, draw, ymax, layers, label) {
    // User units are pixels of the shown width, so that letters stay legible on a phone.
    const w = Math.max(260, parent.clientWidth);
    const h = Math.round(Math.min(320, 0.62 * w));
    const [left, right, top, bottom] = [38, 8, 16, 34];
    const x = (layer) => left + ((layer - 0.5) / (layers + 0.5)) * (w - left - right);
    const y = (v) => h - bottom - (v / ymax) * (h - top - bottom);
    const part = [];
    const add = (tag, attributes, text = "") => {
      const said = Object.entries(attributes).map(([k, v]) => `${k}="${v}"`).join(" ");
      part.push(`<${tag} ${said}>${text}</${tag}>`);
    };
    add("rect", {x: left, y: top, width: w - left - right, height: h - top - bottom,
      fill: "none", stroke: "currentColor", "stroke-width": 0.7});
    const step = ymax > 50 ? 25 : ymax > 20 ? 10 : ymax > 8 ? 5 : 2;
    for (let v = 0; v <= ymax; v += step) {
      add("line", {x1: left, x2: w - right, y1: y(v), y2: y(v), stroke: "currentColor", opacity: 0.15});
      add("text", {x: left - 4, y: y(v) + 4, "text-anchor": "end"}, v);
    }
    const every = Math.ceil(layers / (w / 34));
    for (let i = 1; i <= layers; i += every)
      add("text", {x: x(i), y: h - bottom + 14, "text-anchor": "middle"}, i);
    add("text", {x: (left + w - right) / 2, y: h - 4, "text-anchor": "middle"}, label);
    draw(add, x, y, {top, bottom: h - bottom});
    parent.innerHTML = `<svg viewBox="0 0 ${w} ${h}" role="img">${part.join("")}</svg>`;
  }

  function shade(add, x, box, blocks, layers) {
    if (typeof blocks === "string") return;
    const edges = [0, blocks[0], blocks[3], layers];
    ["shallow", "middle", "late"].forEach((name, i) => {
      const [a, b] = [x(edges[i] + 0.5), x(edges[i + 1] + 0.5)];
      if (b <= a) return;
      add("rect", {x: a, y: box.top, width: b - a, height: box.bottom - box.top,
        fill: "#029e73", opacity: [0.16, 0.07, 0][i]});
      if (b - a > 42) add("text", {x: (a + b) / 2, y: box.top - 4, "text-anchor": "middle"}, name);
    });
  }

  function place(layer, layers) {
    return layer < layers ? String(layer + 1) : "the end";
  }

  function span(low, high, layers) {
    const open = high >= layers ? ", and a later start is not excluded" : "";
    return `(95 %: ${place(low, layers)}${high > low ? ` to ${place(high, layers)}` : ""}${open})`;
  }

  function words(bed, found, blocks, tolerance, plan, trr) {
    const said = [`${found.questions} questions.`];
    if (typeof blocks === "string") said.push(`No blocks: ${blocks}.`);
    else {
      const [s, slow, shigh, l, low, high, proved] = blocks;
      said.push(`The middle block begins at layer ${place(s, bed.layers)} ${span(slow, shigh, bed.layers)}.`);
      said.push(l < bed.layers
        ? `The late block begins at layer ${l + 1} of ${bed.layers} ${span(low, high, bed.layers)}.`
        : "There is no late block: the last layer still needs the tokens.");
      said.push(proved < bed.layers
        ? `Certified at a loss of ${tolerance} %: from layer ${proved + 1}.`
        : `No layer is certified at a loss of ${tolerance} %.`);
    }
    if (plan === undefined) said.push("No schedule without blocks.");
    else if (typeof plan === "string") said.push(`No schedule: ${plan}.`);
    else said.push(`A schedule for a TRR of ${trr} % takes ${plan.flops} % of the FLOPs of the prefill.`);
    return said.join(" ");
  }

  function draw() {
    const bed = EXPLORER.testbeds[form.testbed.value];
    fill(form.removed, Object.keys(bed.conditions));
    const families = bed.conditions[form.removed.value];
    fill(form.family, Object.keys(families));
    const found = families[form.family.value];
    const tolerance = EXPLORER.tolerances[form.tolerance.value];
    const trr = EXPLORER.trrs[form.trr.value];
    const blocks = found.blocks[form.tolerance.value];
    const plan = (bed.plans[found.plans[form.tolerance.value]] || [])[form.trr.value];
    form.toleranceSaid.value = `${tolerance} %`;
    form.trrSaid.value = `${trr} %`;
    root.querySelector(".words").textContent = words(bed, found, blocks, tolerance, plan, trr);

    const shown = CURVES.filter((name) => form[`curve_${name}`].checked);
    svg(root.querySelector(".curves"), (add, x, y, box) => {
      shade(add, x, box, blocks, bed.layers);
      add("text", {x: x(bed.layers + 1), y: box.bottom + 14, "text-anchor": "end"}, "none");
      for (const [v, dash] of [[100 - tolerance, "5 4"], [found.chance, "1 3"]])
        add("line", {x1: x(0.5), x2: x(bed.layers + 1), y1: y(v), y2: y(v), stroke: "#d55e00",
          "stroke-dasharray": dash});
      for (const name of shown) {
        const own = bed.conditions[name] || {};
        const line = name === "control" ? bed.control : (own[form.family.value] || own.all).curve;
        const at = (values) => values.map((v, i) => `${x(i + 1)},${y(Math.min(v, 118))}`);
        if (name === form.removed.value)
          add("polygon", {points: [...at(line.high), ...at(line.low).reverse()].join(" "),
            fill: COLOURS[name], opacity: 0.18});
        add("polyline", {points: at(line.value).join(" "), fill: "none", stroke: COLOURS[name],
          "stroke-width": name === form.removed.value ? 2.6 : 1.4, "stroke-dasharray": DASHES[name]});
      }
    }, 120, bed.layers, "Tokens removed before layer");

    const kinds = form.modality.value === "both" ? MODALITIES : [form.modality.value];
    const known = plan && typeof plan !== "string";
    const most = known ? Math.max(...kinds.flatMap((m) => plan[m])) : 100;
    svg(root.querySelector(".stairs"), (add, x, y, box) => {
      shade(add, x, box, blocks, bed.layers);
      if (!known)
        add("text", {x: x(bed.layers / 2), y: y(most / 2), "text-anchor": "middle"}, "no schedule");
      else for (const m of kinds) {
        const points = plan[m].flatMap((v, i) => [`${x(i + 0.5)},${y(v)}`, `${x(i + 1.5)},${y(v)}`]);
        add("polyline", {points: points.join(" "), fill: "none", stroke: COLOURS[m], "stroke-width": 2.2,
          "stroke-dasharray": DASHES[m]});
      }
    }, 1.08 * most, bed.layers, "Layer");
  }

  function remember() {
    const named = ["testbed", "removed", "family", "modality"].map((n) => [n, form[n].value]);
    named.push(["tolerance", EXPLORER.tolerances[form.tolerance.value]]);
    named.push(["trr", EXPLORER.trrs[form.trr.value]]);
    history.replaceState(null, "", `#${new URLSearchParams(named)}`);
  }

  fill(form.testbed, Object.keys(EXPLORER.testbeds));
  fill(form.modality, ["both", ...MODALITIES]);
  slider("tolerance", EXPLORER.tolerances);
  slider("trr", EXPLORER.trrs);
  for (const name of CURVES)
    form.querySelector("fieldset").insertAdjacentHTML("beforeend",
      `<label><input type="checkbox" name="curve_${name}" checked>` +
      `<svg width="26" height="8"><line x1="0" x2="26" y1="4" y2="4" stroke="${COLOURS[name]}" ` +
      `stroke-width="2" stroke-dasharray="${DASHES[name]}"/></svg> ${name}</label>`);
  draw();
  form.addEventListener("input", () => { draw(); remember(); });
  addEventListener("resize", draw);
})();
