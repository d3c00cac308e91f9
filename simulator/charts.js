// What the pages of a forecast and of the planner share.
const hint = (element, text) => {
  element.onpointermove = (event) => show(event, text);
  element.onpointerleave = () => show(null, "");
};

const digits = (value, count = 3) => value === 0 ? "0" : Math.abs(value) >= 1000
  ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(count));
function time(seconds, count = 3) {
  const size = Math.abs(seconds);
  if (size >= 1 || size === 0) return digits(seconds, count) + " s";
  return size >= 1e-3 ? digits(seconds * 1e3, count) + " ms" : digits(seconds * 1e6, count) + " µs";
}
const percent = (share) => (share * 100).toFixed(1) + " %";

function legend(id, items) {
  for (const [name, color, opacity] of items) {
    const entry = add(byId(id), "span"), mark = add(entry, "i");
    mark.style.background = color;
    mark.style.opacity = opacity || 1;
    entry.append(name);
  }
}

function table(id, heads, rows) {
  const right = heads.map((head) => head.startsWith(">"));
  const line = add(add(byId(id), "thead"), "tr");
  heads.forEach((head, i) => add(line, "th", head.replace(">", ""), right[i] ? { class: "right" } : {}));
  const body = add(byId(id), "tbody");
  for (const row of rows) {
    const tr = add(body, "tr");
    row.forEach((cell, i) => add(tr, "td", cell, right[i] ? { class: "right" } : {}));
  }
}

function bars(id, rows, form, color) { // rows: [name, value]
  responsive(byId(id), (holder, width) => {
    const row = 26, label = Math.min(350, width * 0.48), right = 112;
    const most = Math.max(...rows.map((r) => Math.abs(r[1])));
    const svg = add(holder, "svg", undefined, { viewBox: `0 0 ${width} ${rows.length * row}`, height: rows.length * row });
    rows.forEach(([name, value], i) => {
      const y = i * row, length = Math.max(1, Math.abs(value) / most * (width - label - right - 12));
      const fits = Math.floor(label / 6.1);
      add(svg, "text", name.length > fits ? name.slice(0, fits - 1) + "…" : name, { x: label - 10, y: y + 17, "text-anchor": "end", class: "strong" });
      add(svg, "rect", undefined, { x: label, y: y + 4, width: length, height: row - 8, rx: 3, fill: color });
      add(svg, "text", form(value), { x: label + length + 8, y: y + 17 });
      hint(add(svg, "rect", undefined, { x: 0, y, width, height: row, fill: "transparent" }), `${name}\n${form(value)}`);
    });
  });
}

// A drawn thing as a button, for the mouse and for the keyboard.
function pressable(element, label, act) {
  for (const [name, value] of [["tabindex", 0], ["role", "button"], ["aria-label", label.replaceAll("\n", ", ")]]) element.setAttribute(name, value);
  element.style.cursor = "pointer";
  element.onclick = act;
  element.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); act(); } };
}

// Throughput against memory headroom; `pick(kind, index)` is called for a dot of the front or ranking.
function pareto(id, marks, found, pick) {
  byId(marks).replaceChildren();
  legend(marks, [["fits", "var(--grey)", 0.5], ["Pareto front", "var(--orange)"], ["fastest", "var(--blue)"]]);
  const words = (c) => `${c.layout}\nrecompute ${c.recompute}\n${digits(c.rate, 4)} tokens/s per device, MFU ${percent(c.mfu)}\n${c.peak.toFixed(1)} GiB peak, ${c.headroom.toFixed(1)} GiB left`;
  return responsive(byId(id), (holder, width) => {
    const height = 340, left = 64, bottom = 42, top = 22;
    const all = found.cloud.concat(found.front.map((c) => [c.headroom, c.rate]), found.ranking.map((c) => [c.headroom, c.rate]));
    const spread = (i) => { const values = all.map((p) => p[i]), low = Math.min(...values), high = Math.max(...values), pad = (high - low) * 0.05 || 1; return [Math.max(0, low - pad), high + pad]; };
    const [x0, x1] = spread(0), [y0, y1] = spread(1);
    const x = (v) => left + (v - x0) / (x1 - x0) * (width - left - 10), y = (v) => height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom);
    const svg = add(holder, "svg", undefined, { viewBox: `0 0 ${width} ${height}`, height, role: pick ? "group" : "img", "aria-label": "throughput against memory headroom" });
    for (const tick of ticks(y0, y1, 5)) {
      add(svg, "line", undefined, { x1: left, x2: width - 10, y1: y(tick), y2: y(tick), stroke: "var(--line)" });
      add(svg, "text", digits(tick, 4), { x: left - 8, y: y(tick) + 4, "text-anchor": "end" });
    }
    for (const tick of ticks(x0, x1, width / 110)) add(svg, "text", digits(tick, 4), { x: x(tick), y: height - 24, "text-anchor": "middle" });
    add(svg, "text", "memory headroom, GiB", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" });
    add(svg, "text", "tokens/s per device", { x: 0, y: 12 });
    const dots = found.cloud.map(([a, b]) => `M${x(a).toFixed(1)} ${y(b).toFixed(1)}h0`).join("");
    add(svg, "path", undefined, { d: dots, stroke: "var(--grey)", "stroke-width": 4, "stroke-linecap": "round", opacity: 0.35 });
    const front = found.front.map((c) => [x(c.headroom), y(c.rate)]);
    add(svg, "path", undefined, { d: "M" + front.map((p) => p.join(" ")).join("L"), fill: "none", stroke: "var(--orange)", "stroke-width": 2 });
    for (const [kind, color, r] of [["front", "var(--orange)", 5], ["ranking", "var(--blue)", 4]]) {
      found[kind].forEach((c, i) => {
        const dot = add(svg, "circle", undefined, { cx: x(c.headroom), cy: y(c.rate), r, fill: color, stroke: "var(--card)", "stroke-width": 1.5, class: kind });
        hint(dot, words(c));
        if (pick) pressable(dot, words(c), () => pick(kind, i));
      });
    }
  });
}
