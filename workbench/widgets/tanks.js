// A column for every layer: what it holds as a tank that fills, and what a change of format cost it.

const PARTS = ["latent", "rotary", "scales"];

/** Labels that would overlap are left out. */
function labelled(columns, make) {
  const every = Math.ceil(columns / 30);
  return Array.from({ length: columns }, (_, layer) => make(layer, layer % every === 0 ? String(layer) : "\u00a0"));
}

/** Tanks of equal scale; `parts` [latent, rotary, scales] bytes a row, `sizes` bytes allocated of each layer. */
export class Tanks {
  constructor() {
    this.columns = element("div", { className: "wbm-columns", role: "img" });
    this.legend = element("div", { className: "wbm-keys" });
    this.element = element("div", { className: "wbm-tanks" }, this.columns, this.legend);
  }

  draw({ tokens, parts, sizes, windows, recent }) {
    const row = parts.reduce((sum, part) => sum + part, 0);
    const most = Math.max(...sizes, 1) + windows;
    const shares = (allocated) => [...parts.map((part) => tokens * part), Math.max(0, allocated - tokens * row), windows];
    const kinds = [...PARTS, "room", "windows"];
    const words = (allocated) => {
      const [latent, rotary, scales, room, wide] = shares(allocated);
      return `${exact(allocated + wide)}: latent ${exact(latent)}, rotary key ${exact(rotary)}${scales ? `, scales ${exact(scales)}` : ""}, room for more ${exact(room)}${wide ? `, recent tokens in bf16 ${exact(wide)}` : ""}`;
    };
    fill(this.columns, labelled(sizes.length, (layer, label) => {
      const pieces = shares(sizes[layer]).map((bytes, at) => {
        const piece = element("i", { className: `wbm-fill-${kinds[at]}` });
        piece.style.height = `${(100 * bytes) / most}%`;
        return piece;
      });
      return element("span", { className: "wbm-column", title: `layer ${layer}: ${words(sizes[layer])}` }, element("span", { className: "wbm-tank" }, pieces), label);
    }));
    this.element.classList.toggle("wbm-few", sizes.length <= 10);
    this.columns.setAttribute("aria-label", `${plural(sizes.length, "layer")}. Layer 0 holds ${words(sizes[0])}.`);
    const [latent, rotary, scales, room, wide] = shares(sizes[0]);
    fill(this.legend, key("latent", `latent ${exact(latent)}`), key("rotary", `rotary key ${exact(rotary)}`),
      parts[2] ? key("scales", `scales ${exact(scales)}`) : null, key("room", `room for ${plural(row ? Math.round(room / row) : 0, "token")} more ${exact(room)}`),
      wide ? key("windows", `last ${recent} tokens in bf16 too ${exact(wide)}`) : null);
  }
}

/** Relative errors of each layer, latent and rotary key side by side on a logarithmic axis from 0.01 % to 100 %. */
export class Losses {
  constructor() {
    this.element = element("div", { className: "wbm-loss" });
  }

  draw(errors) {
    const height = (error) => (error > 0 ? Math.min(100, Math.max(2, 25 * (Math.log10(error) + 4))) : 0);
    const said = (error) => (error === null ? "not a number" : error === 0 ? "0 %" : error < 0.0001 ? "< 0.01 %" : `${Number((100 * error).toPrecision(2))} %`);
    const columns = labelled(errors.length, (layer, label) => {
      const bars = ["latent", "rotary"].map((kind, at) => {
        const bar = element("i", { className: `wbm-fill-${kind}` });
        bar.style.height = `${height(errors[layer][at])}%`;
        return bar;
      });
      return element("span", { className: "wbm-column", title: `layer ${layer}: latent ${said(errors[layer][0])}, rotary key ${said(errors[layer][1])}` }, element("span", { className: "wbm-pair" }, bars), label);
    });
    const mean = (at) => Math.sqrt(errors.reduce((sum, pair) => sum + pair[at] ** 2, 0) / errors.length);
    const worst = (at) => errors.reduce((best, pair, layer) => (pair[at] > errors[best][at] ? layer : best), 0);
    const words = (name, at) => `${name} ${said(mean(at))}${mean(at) ? `, most in layer ${worst(at)}: ${said(errors[worst(at)][at])}` : ""}`;
    const axis = element("span", { className: "wbm-scale", "aria-hidden": "true" }, ...["100 %", "1 %", "0.01 %"].map((text) => element("span", {}, text)));
    const table = element("table", {}, element("tr", {}, ["layer", "latent", "rotary key"].map((name) => element("th", { scope: "col" }, name))),
      errors.map((pair, layer) => element("tr", {}, element("th", { scope: "row" }, String(layer)), pair.map((error) => element("td", {}, said(error))))));
    fill(this.element, element("div", { className: "wbm-columns wbm-losses", "aria-hidden": "true" }, axis, columns),
      element("div", { className: "wbm-keys" }, key("latent", words("latent", 0)), key("rotary", words("rotary key", 1))),
      element("details", {}, element("summary", {}, "as a table"), table));
  }
}
