// The expert map: a cell an expert, coloured by where it is; those that the newest token used stand out and fade.

const [NEAR, FAR, DISK, MOVING] = Array(4).keys();
const KINDS = ["near", "far", "disk", "moving"];
const GLOW = [1, 1, 0.35, 0]; // how much a use shows: what is on its way is not computed now, and disk stays faint
const FADES = 0.62; // of the glow is left after each further pass
const GLOWS = 8; // passes until nothing is left
const SIDE = { left: 58, right: 14, top: 22, bottom: 4 };
const TONES = {
  light: { near: [66, 146, 198], far: [178, 209, 232], disk: [236, 239, 242], moving: [230, 159, 0], glow: [8, 30, 70] },
  dark: { near: [42, 112, 168], far: [34, 76, 114], disk: [36, 38, 41], moving: [230, 159, 0], glow: [232, 246, 255] },
};

const mixed = (from, to, share) => `rgb(${from.map((part, n) => Math.round(part + (to[n] - part) * share)).join(" ")})`;

/** Numbers of 1, 2 or 4 bytes, `count` of them; nothing stands for zeros. */
function counts(view, count) {
  const Type = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array }[view.byteLength / count];
  return Type ? Float64Array.from(numbers(Type, view)) : new Float64Array(count);
}

/** Ascending keys from the bytes that say how many are left out before each. */
function keysOf(bytes) {
  const keys = [];
  let key = -1;
  for (const gap of bytes) {
    key += gap;
    if (gap < 255) keys.push(++key);
  }
  return keys;
}

const code = (bytes, n) => (bytes[n >> 2] >> (2 * (n & 3))) & 3;

class ExpertMapView extends View {
  build() {
    this.facts = null;
    this.cursor = null;
    this.hover = null;
    this.title = element("strong", { className: "wbr-title" }, "Where the experts are");
    this.about = element("span", { className: "wbr-note" }, "waiting for the kernel \u2026");
    this.legend = element("div", { className: "wbe-legend" });
    this.canvas = element("canvas", { className: "wbe-canvas", role: "img" });
    this.field = element("div", { className: "wbe-field", tabIndex: 0, role: "application", "aria-roledescription": "map of experts", "aria-label": "Experts; arrows move from one to the next, Escape leaves them" }, this.canvas);
    this.readout = element("div", { className: "wbe-readout" });
    this.passes = new Passes();
    this.tip = new Tip(this.root);
    this.root.classList.add("wbv", "wbr", "wbe");
    this.root.setAttribute("role", "region");
    this.root.setAttribute("aria-label", "Expert map");
    this.root.append(element("header", { className: "wbr-head" }, this.title, this.about), this.notice, this.legend, this.field, this.readout, this.passes.element, this.said);
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.listen();
  }

  listen() {
    const { signal } = this.ended;
    const redraw = () => this.drawSoon();
    this.watchers = [new ResizeObserver(redraw), new IntersectionObserver(redraw), new MutationObserver(redraw)];
    this.watchers[0].observe(this.root);
    this.watchers[1].observe(this.root);
    this.watchers[2].observe(document.body, { attributes: true, attributeFilter: ["class", "style", "data-jp-theme-light", "data-jp-theme-name"] });
    for (const query of [matchMedia("(prefers-color-scheme: dark)"), this.still]) query.addEventListener("change", redraw, { signal });
    this.canvas.addEventListener("pointermove", (event) => this.onPointer(event));
    this.canvas.addEventListener("pointerleave", () => this.onPointer(null));
    this.field.addEventListener("keydown", (event) => this.onKey(event));
    for (const kind of ["focus", "blur"]) this.field.addEventListener(kind, redraw);
    this.root.setAttribute("data-lm-suppress-shortcuts", "true"); // keys are no shortcuts of the notebook around it
    this.root.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.altKey || event.stopPropagation(), { signal });
  }

  close() {
    super.close();
    clearTimeout(this.waiting);
    for (const watcher of this.watchers) watcher.disconnect();
  }

  // What the kernel says

  on_show({ facts, tokens, done, best }, [states, uses, seen]) {
    const cells = facts.layers.length * facts.experts;
    const bytes = numbers(Uint8Array, states);
    Object.assign(this, { facts, tokens, best, cells, step: 1 });
    this.states = Uint8Array.from({ length: cells }, (_, n) => code(bytes, n));
    this.uses = counts(uses, cells);
    this.seen = counts(seen, cells);
    this.passes.start(done, facts.block);
    const share = percent(Math.min(1, facts.slots / cells));
    this.about.textContent = `${facts.layers.length} layers of ${facts.experts} experts \u00b7 ${number(facts.slots)} slots ${facts.places[NEAR]} (${share})${facts.far ? ` \u00b7 ${number(facts.far)} ${facts.places[FAR]}` : ""}`;
    this.drawSoon();
  }

  on_news({ passes = [], done = [], best }, [changed, states, used]) {
    if (!this.facts) return; // all of it is asked for already
    const bytes = numbers(Uint8Array, states);
    if (changed.byteLength) keysOf(numbers(Uint8Array, changed)).forEach((key, n) => (this.states[key] = code(bytes, n)));
    else if (bytes.length) this.states.forEach((_, key) => (this.states[key] = code(bytes, key)));
    const marks = numbers(Uint8Array, used);
    let from = 0;
    for (let n = 0; n < passes.length; n += 2) {
      const [at, length] = passes.slice(n, n + 2);
      const part = marks.subarray(from, (from += length));
      const bits = length === Math.ceil(this.cells / 8);
      const keys = bits ? Array.from({ length: this.cells }, (_, key) => key).filter((key) => (part[key >> 3] >> (key & 7)) & 1) : keysOf(part);
      for (const key of keys) this.uses[key]++, (this.seen[key] = at);
      if (at > this.tokens) this.step = at - this.tokens;
      this.tokens = at;
    }
    this.best = best ?? this.best;
    this.passes.add(done);
    if (!this.still.matches) this.drawSoon();
    else this.waiting ??= setTimeout(() => ((this.waiting = null), this.drawSoon()), 1000); // no flicker
  }

  // What is looked at

  onPointer(event) {
    this.hover = event && this.facts ? this.under(event) : null;
    if (this.hover) {
      const [head, ...lines] = this.describe(this.hover).split(/: |, (?=used|never|last)/);
      this.tip.show(event, [head, ...lines]);
    } else this.tip.hide();
    this.drawSoon();
  }

  under(event) {
    const frame = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - frame.top - SIDE.top) / this.tall);
    const expert = Math.floor((event.clientX - frame.left - SIDE.left) / this.pitch);
    const inside = row >= 0 && row < this.facts.layers.length && expert >= 0 && expert < this.facts.experts;
    return inside ? { row, expert } : null;
  }

  onKey(event) {
    const across = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key] ?? 0;
    const down = { ArrowUp: -1, ArrowDown: 1, PageUp: -8, PageDown: 8 }[event.key] ?? 0;
    if (event.ctrlKey || event.metaKey || event.altKey || !this.facts) return;
    if (event.key === "Escape") this.cursor = null;
    else if (!across && !down) return;
    else if (!this.cursor) this.cursor = { row: 0, expert: 0 };
    else {
      const within = (value, end) => Math.max(0, Math.min(end - 1, value));
      const { row, expert } = this.cursor;
      this.cursor = { row: within(row + down, this.facts.layers.length), expert: within(expert + across, this.facts.experts) };
    }
    event.preventDefault();
    this.tip.hide();
    if (this.cursor) this.announce(this.describe(this.cursor));
    this.drawSoon();
  }

  /** The same words as in Python. */
  describe({ row, expert }) {
    const { layers, experts, places } = this.facts;
    const key = row * experts + expert;
    const said = `layer ${layers[row]}, expert ${expert}: ${places[this.states[key]]}`;
    const uses = this.uses[key];
    const ago = this.tokens - this.seen[key];
    if (!uses) return `${said}, never used`;
    const when = ago ? `${plural(ago, "token")} ago` : "just now";
    return `${said}, used ${uses === 1 ? "once" : `${number(uses)} times`}, ${uses > 1 ? "last " : ""}${when}`;
  }

  // Drawing

  draw() {
    if (!this.facts) return;
    this.drawMap(new Palette(this.root, this.about));
    this.drawWords();
    this.passes.draw(this.best);
  }

  measure() {
    const { layers, experts } = this.facts;
    const free = this.field.clientWidth - SIDE.left - SIDE.right;
    this.pitch = Math.max(3.5, Math.min(28, free / experts));
    this.tall = Math.max(6, Math.min(22, Math.round(this.pitch * 1.1)));
    this.wide = SIDE.left + experts * this.pitch + SIDE.right;
    this.high = SIDE.top + layers.length * this.tall + SIDE.bottom;
    const ratio = devicePixelRatio || 1;
    for (const [name, size] of [["width", this.wide], ["height", this.high]]) {
      if (this.canvas[name] !== Math.round(size * ratio)) this.canvas[name] = Math.round(size * ratio);
      this.canvas.style[name] = `${size}px`;
    }
    return free > 0;
  }

  drawMap(palette) {
    if (!this.measure()) return;
    const { facts: { layers, experts }, pitch, tall } = this;
    const ratio = devicePixelRatio || 1;
    const pen = this.canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.root.classList.toggle("wbe-dark", palette.dark);
    const tones = TONES[palette.dark ? "dark" : "light"];
    const shades = KINDS.map((kind, n) => Array.from({ length: GLOWS + 1 }, (_, age) => mixed(tones[kind], tones.glow, age < GLOWS ? FADES ** age * GLOW[n] : 0)));
    const edge = (place) => Math.round(place * ratio); // whole pixels of the screen: cells are sharp and their gaps alike
    const gap = Math.max(1, Math.round((pitch >= 9 ? 2 : 0.8) * ratio));
    for (let row = 0, key = 0; row < layers.length; row++) {
      const top = edge(SIDE.top + row * tall);
      const high = edge(SIDE.top + (row + 1) * tall) - top - gap;
      for (let expert = 0; expert < experts; expert++, key++) {
        const left = edge(SIDE.left + expert * pitch);
        const wide = edge(SIDE.left + (expert + 1) * pitch) - left - gap;
        const age = this.uses[key] && !this.still.matches ? Math.min(GLOWS, Math.floor((this.tokens - this.seen[key]) / this.step)) : GLOWS;
        const shade = shades[this.states[key]][age];
        if (this.states[key] === FAR && high > 8) { // half full: told apart without colours too
          pen.fillStyle = shades[DISK][GLOWS];
          pen.fillRect(left, top, wide, high);
          pen.fillStyle = shade;
          pen.fillRect(left, top + (high >> 1), wide, high - (high >> 1));
          continue;
        }
        pen.fillStyle = shade;
        pen.fillRect(left, top, wide, high);
      }
    }
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.drawLabels(pen, palette);
    const frame = (cell, colour) => {
      pen.strokeStyle = colour;
      pen.lineWidth = 2;
      pen.strokeRect(SIDE.left + cell.expert * pitch - 1.5, SIDE.top + cell.row * tall - 1.5, pitch + 2, tall + 2);
    };
    if (this.hover) frame(this.hover, palette.soft);
    if (this.cursor) frame(this.cursor, palette.forced);
  }

  drawLabels(pen, palette) {
    const { facts: { layers, experts }, pitch, tall } = this;
    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = palette.soft;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const every = Math.ceil(13 / tall);
    layers.forEach((layer, row) => row % every || pen.fillText(`layer ${layer}`, SIDE.left - 8, SIDE.top + (row + 0.45) * tall));
    pen.textAlign = "center";
    const step = pitch >= 20 ? 1 : pitch >= 9 ? 4 : 20;
    for (let expert = 0; expert < experts; expert += step) pen.fillText(String(expert), SIDE.left + (expert + 0.5) * pitch, SIDE.top - 10);
  }

  drawWords() {
    const { places, far } = this.facts;
    const held = [0, 0, 0, 0];
    let newest = 0;
    this.states.forEach((state, key) => {
      held[state]++;
      newest += this.uses[key] > 0 && this.seen[key] === this.tokens;
    });
    const item = (kind, text) => element("span", { className: "wbe-key" }, element("i", { className: `wbe-swatch wbe-${kind}` }), text);
    const shown = KINDS.map((kind, n) => [kind, n]).filter(([, n]) => n !== FAR || far);
    fill(this.legend, shown.map(([kind, n]) => item(kind, `${number(held[n])} ${places[n]}`)), newest && !this.still.matches ? item("glow", `${number(newest)} used just now`) : null);
    const said = shown.map(([, n]) => `${number(held[n])} ${places[n]}`).join(", ");
    this.canvas.setAttribute("aria-label", `${this.facts.layers.length} layers by ${this.facts.experts} experts: ${said}; ${number(newest)} used just now`);
    const cell = this.hover ?? this.cursor;
    this.readout.textContent = cell ? this.describe(cell) : "";
  }
}

export default showing(ExpertMapView);
