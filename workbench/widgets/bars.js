// Bytes in words, and as bars on a logarithmic axis.

const UNITS = ["B", "KB", "MB", "GB", "TB", "PB"];

export const exact = (count) => `${Math.round(count).toLocaleString("en")} B`;

/** Exact up to 100,000 bytes; then in powers of 1,000 with three digits. */
export function size(count) {
  if (Math.abs(count) < 1e5) return exact(count);
  let power = 0;
  while (Math.abs(count) >= 999.5 && power < UNITS.length - 1) (count /= 1000), power++;
  return `${Number(count.toPrecision(3))} ${UNITS[power]}`;
}

/** As on an axis: in powers of 1,000 from the first on. */
export const round = (count) => (count >= 1000 && count < 1e5 ? `${Number((count / 1000).toPrecision(3))} KB` : size(count));

/** How many times as much: "6.4\u00d7", "0.5\u00d7", "71\u00d7". */
export const times = (ratio) => `${ratio >= 99.5 ? Math.round(ratio).toLocaleString("en") : Number(ratio.toPrecision(2))}\u00d7`;

/** "84.4 %", with as many digits as tell it from 0 and 100. */
export function less(share) {
  const value = 100 * Math.abs(1 - share);
  return `${value > 99.9 && value < 100 ? value.toFixed(2) : value.toFixed(1)} %`;
}

/** A bar a row on one logarithmic axis of whole powers of ten. */
export class Bars {
  constructor(label) {
    this.axis = element("div", { className: "wbm-axis", "aria-hidden": "true" });
    this.body = element("tbody");
    const head = element("tr", {}, element("th", { scope: "col" }, element("span", { className: "wbv-hidden" }, "Scheme")), element("th", { scope: "col", className: "wbm-across" }, this.axis, element("span", { className: "wbv-hidden" }, "Bytes as a bar")),
      element("th", { scope: "col" }, "bytes"), (this.factor = element("th", { scope: "col" })));
    this.element = element("table", { className: "wbm-bars", "aria-label": label }, element("thead", {}, head), this.body);
  }

  /** rows: [{ name, note, bytes, kind, factor }]; `kind` "mine", "room" or "other"; `factor` names its last column. */
  draw(rows, factor) {
    const sizes = rows.map((row) => row.bytes).filter((bytes) => bytes > 0);
    const low = Math.floor(Math.log10(Math.min(...sizes, 1e12)));
    const high = Math.max(low + 2, Math.ceil(Math.log10(Math.max(...sizes, 1)) + 0.001));
    const place = (bytes) => (bytes > 0 ? Math.max(0.4, (100 * (Math.log10(bytes) - low)) / (high - low)) : 0);
    this.factor.textContent = factor;
    const every = Math.ceil((high - low) / 6);
    const ticks = [];
    for (let power = low; power <= high; power += every) {
      const tick = element("span", {}, round(10 ** power));
      tick.style.left = `${place(10 ** power) * (power > low)}%`;
      ticks.push(tick);
    }
    fill(this.axis, ticks);
    this.element.style.setProperty("--wbm-step", `${(100 * every) / (high - low)}%`);
    fill(this.body, rows.map((row) => this.row(row, place(row.bytes))));
  }

  row({ name, note, bytes, kind, factor }, width) {
    const bar = element("i", { className: `wbm-bar wbm-${kind}` });
    bar.style.width = `${width}%`;
    return element("tr", { className: `wbm-row-${kind}` },
      element("th", { scope: "row", title: note ?? "" }, name),
      element("td", { className: "wbm-across", "aria-hidden": "true" }, element("span", { className: "wbm-track" }, bar)),
      element("td", { title: exact(bytes) }, size(bytes)),
      element("td", {}, factor ?? ""));
  }
}

/** A coloured square and its name. */
export const key = (kind, ...text) => element("span", { className: "wbm-key" }, element("i", { className: `wbm-fill wbm-fill-${kind}` }), ...text);

/** A heading with something beside it. */
export const heading = (text, ...beside) => element("div", { className: "wbm-line" }, element("h4", {}, text), ...beside);

/** A number people look for, and what it is. */
export const tile = (value, about, title = "") => element("div", { className: "wbm-tile", title }, value, about);
