// Stacked areas with marks and a cursor, as SVG: `x` increases, parts are stacked from the bottom up.

const SVG = "http://www.w3.org/2000/svg";
const TALL = 190;
const MARGIN = { left: 74, right: 14, top: 26, bottom: 30 };

function shape(tag, properties, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A rounder step, so that about `count` of them make `span`. */
function stepOf(span, count) {
  const rough = Math.max(span, 1e-9) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((step) => step * power >= rough);
}

export class Areas {
  /** `moved(index)` is called when the cursor is put on a point. */
  constructor(label, moved) {
    this.moved = moved;
    this.at = -1;
    this.element = shape("svg", { class: "wbm-areas", tabindex: "0", role: "slider", "aria-label": label, "aria-valuemin": "0" });
    this.element.addEventListener("pointermove", (event) => this.put(this.nearest(event.offsetX)));
    this.element.addEventListener("pointerleave", () => this.put(-1));
    this.element.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    const last = this.x.length - 1;
    const from = this.at < 0 ? last + 1 : this.at;
    const to = { ArrowLeft: from - 1, ArrowRight: Math.min(last, from + 1), PageUp: from - 10, PageDown: from + 10, Home: 0, End: last, Escape: -1 }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.put(event.key === "Escape" ? -1 : Math.min(last, Math.max(0, to)));
  }

  put(index) {
    if (index === this.at) return;
    this.at = index;
    this.drawCursor();
    this.moved(index);
  }

  nearest(offset) {
    if (!this.x.length) return -1;
    const wanted = this.from + ((offset - MARGIN.left) / this.across) * this.span;
    let best = 0;
    for (let n = 1; n < this.x.length; n++) if (Math.abs(this.x[n] - wanted) < Math.abs(this.x[best] - wanted)) best = n;
    return best;
  }

  /** parts: [{ kind, values }]; marks: [{ x, kind, text }]; `axis` names x, `line` an optional { values } above all. */
  draw({ x, parts, marks, axis, line }) {
    const wide = Math.max(320, this.element.clientWidth || 900);
    this.x = x;
    this.across = wide - MARGIN.left - MARGIN.right;
    this.from = x[0] ?? 0;
    this.span = (x[x.length - 1] ?? 1) - this.from || 1;
    this.tops = parts.map(() => []);
    x.forEach((_, n) => {
      let sum = 0;
      parts.forEach(({ values }, part) => this.tops[part].push((sum += values[n])));
    });
    const most = Math.max(1, ...(this.tops.at(-1) ?? []), ...(line?.values ?? []).filter((value) => value !== null));
    const step = stepOf(most, 4);
    this.most = Math.ceil(most / step) * step;
    const right = MARGIN.left + this.across;
    const children = [];
    for (let value = 0; value <= this.most * 1.0001; value += step) {
      const y = this.y(value);
      children.push(shape("line", { class: "wbm-grid", x1: MARGIN.left, x2: right, y1: y, y2: y }), shape("text", { class: "wbm-tick", x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, round(value)));
    }
    for (let part = parts.length - 1; part >= 0; part--) children.push(shape("path", { class: `wbm-area wbm-area-${parts[part].kind}`, d: this.path(this.tops[part], true) }));
    if (line) children.push(shape("path", { class: "wbm-over", d: this.path(line.values, false) }));
    const across = stepOf(this.span, 6);
    for (let value = Math.ceil(this.from / across) * across; value <= this.from + this.span; value += across) {
      children.push(shape("text", { class: "wbm-tick", x: this.place(value), y: MARGIN.top + TALL + 16, "text-anchor": "middle" }, Number(value.toPrecision(6)).toLocaleString("en")));
    }
    children.push(shape("text", { class: "wbm-tick", x: right, y: MARGIN.top + TALL + 29, "text-anchor": "end" }, axis));
    children.push(...marks.flatMap((mark) => this.mark(mark)), (this.cursor = shape("g", { class: "wbm-cursor" })));
    this.element.setAttribute("viewBox", `0 0 ${wide} ${TALL + MARGIN.top + MARGIN.bottom}`);
    this.element.setAttribute("height", TALL + MARGIN.top + MARGIN.bottom);
    this.element.setAttribute("aria-valuemax", String(Math.max(0, x.length - 1)));
    this.element.replaceChildren(...children);
    if (this.at >= x.length) this.at = -1;
    this.drawCursor();
  }

  place = (x) => MARGIN.left + (this.across * (x - this.from)) / this.span;
  y = (value) => MARGIN.top + TALL * (1 - value / this.most);

  /** In steps: what was seen holds until the next look. */
  path(values, closed) {
    const points = [];
    let before = null;
    this.x.forEach((x, n) => {
      if (values[n] === null) return;
      const [at, up] = [this.place(x).toFixed(1), this.y(values[n]).toFixed(1)];
      if (before !== null && before !== up) points.push(`${at},${before}`);
      points.push(`${at},${(before = up)}`);
    });
    if (!points.length) return "";
    const ends = closed ? [`${this.place(this.x.at(-1)).toFixed(1)},${this.y(0)}`, `${this.place(this.x[0]).toFixed(1)},${this.y(0)}`] : [];
    return `M${[...points, ...ends].join("L")}${closed ? "Z" : ""}`;
  }

  mark({ x, kind, text }) {
    if (x < this.from || x > this.from + this.span) return [];
    const at = this.place(x);
    if (kind === "block") return [shape("path", { class: "wbm-mark-block", d: `M${at - 3},${MARGIN.top + TALL + 5}L${at},${MARGIN.top + TALL}L${at + 3},${MARGIN.top + TALL + 5}Z` }, shape("title", {}, text))];
    const made = [shape("line", { class: `wbm-mark wbm-mark-${kind}`, x1: at, x2: at, y1: MARGIN.top - 8, y2: MARGIN.top + TALL }, shape("title", {}, text))];
    const near = at > MARGIN.left + this.across - 90;
    if (kind !== "prompt") made.push(shape("text", { class: `wbm-said wbm-said-${kind}`, x: near ? at - 4 : at + 4, y: kind === "format" ? MARGIN.top - 12 : MARGIN.top - 1, "text-anchor": near ? "end" : "start" }, text));
    return made;
  }

  drawCursor() {
    if (!this.cursor) return;
    const children = [];
    if (this.at >= 0) {
      const at = this.place(this.x[this.at]);
      children.push(shape("line", { x1: at, x2: at, y1: MARGIN.top, y2: MARGIN.top + TALL }));
      for (const top of this.tops) children.push(shape("circle", { cx: at, cy: this.y(top[this.at]), r: 3 }));
    }
    this.cursor.replaceChildren(...children);
  }
}
