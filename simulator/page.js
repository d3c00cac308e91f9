// What the pages of runs and of forecasts share.
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function add(parent, tag, text, attributes = {}) {
  const svg = parent.namespaceURI === SVG || tag === "svg";
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}

function show(event, text) {
  const tip = byId("tip");
  tip.style.display = text ? "block" : "none";
  if (!text) return;
  tip.textContent = text;
  const left = event.clientX + 14, top = event.clientY + 14;
  tip.style.left = Math.max(4, left + tip.offsetWidth > innerWidth ? left - tip.offsetWidth - 28 : left) + "px";
  tip.style.top = (top + tip.offsetHeight > innerHeight ? top - tip.offsetHeight - 28 : top) + "px";
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

function heading(title, subtitle, tiles) {
  byId("title").textContent = title;
  byId("subtitle").textContent = subtitle;
  for (const [value, note] of tiles) {
    const tile = add(byId("tiles"), "div", undefined, { class: "card" });
    add(tile, "b", value);
    add(tile, "span", note);
  }
}

// Draws into an element now, and again whenever its width changes.
function responsive(holder, draw) {
  let drawn;
  const redraw = () => {
    drawn = holder.clientWidth;
    holder.replaceChildren();
    draw(holder, Math.max(240, drawn));
  };
  redraw();
  new ResizeObserver(() => { if (holder.clientWidth !== drawn) redraw(); }).observe(holder);
  return redraw;
}
