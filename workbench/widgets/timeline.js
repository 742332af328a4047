// The memory timeline: readings come some at a time; which of them are stacked, and over what, is chosen here.

const [SECONDS, TOKENS, WRITTEN, PACKED, WINDOWS, RING, RECORDED, RSS, ALLOCATED, RESERVED, USED] = Array(11).keys();
const SHOWS = { cache: "The cache", ours: "All we allocated", whole: "The process" };
const WORDS = { prompt: "prompt", stop: "stopped", end: "end", prefill: "read" };

class TimelineView extends View {
  build() {
    this.rows = null;
    this.shows = "cache";
    this.over = "seconds";
    this.areas = new Areas("Memory over time", (index) => this.read(index));
    this.keys = element("div", { className: "wbm-keys" });
    this.readout = element("p", { className: "wbm-note wbm-readout", role: "status" });
    this.what = this.choice("Show", Object.entries(SHOWS), (value) => (this.shows = value));
    this.along = this.choice("Over", [["seconds", "time"], ["tokens", "tokens"]], (value) => (this.over = value));
    this.root.classList.add("wbv", "wbm");
    this.root.setAttribute("role", "region");
    this.root.setAttribute("aria-label", "Memory timeline");
    this.body = element("div", { className: "wbm-part", hidden: true }, this.areas.element, this.readout, this.keys);
    this.root.append(element("header", { className: "wbm-head" }, element("span", { className: "wbm-title" }, "Memory"), this.what, element("span", { className: "wbm-space" }), this.along), this.notice, this.body, this.said);
    const { signal } = this.ended;
    this.root.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.altKey || event.stopPropagation(), { signal });
    this.sized = new ResizeObserver(() => this.drawSoon());
    this.sized.observe(this.root);
  }

  choice(label, options, choose) {
    const group = element("span", { className: "wbm-choice", role: "group", "aria-label": label });
    const buttons = options.map(([value, text]) => {
      const button = element("button", { className: "wbm-button", type: "button", "data-value": value }, text);
      button.addEventListener("click", () => {
        choose(value);
        this.areas.at = -1;
        this.drawSoon();
      });
      return button;
    });
    fill(group, buttons);
    return group;
  }

  close() {
    this.sized.disconnect();
    super.close();
  }

  on_show({ rows, marks, fixed, device }) {
    Object.assign(this, { rows, marks, fixed, device });
    this.body.hidden = false;
    this.what.querySelector("[data-value=whole]").textContent = device ? "The device" : SHOWS.whole;
    this.drawSoon();
  }

  on_grow({ from, rows, marks }) {
    if (!this.rows) return;
    this.rows.splice(from, Infinity, ...rows);
    this.marks.push(...marks);
    this.drawSoon();
  }

  /** [kind, name, value of a row] of every part, from the bottom up. */
  parts() {
    const weights = this.fixed.reduce((sum, [, bytes]) => sum + bytes, 0);
    const ours = (row) => weights + row[PACKED] + row[WINDOWS] + row[RING] + row[RECORDED];
    const cache = [["latent", "rows that hold a token", (row) => row[WRITTEN]], ["room", "room in the last blocks", (row) => Math.max(0, row[PACKED] - row[WRITTEN])], ["windows", "recent tokens in bf16", (row) => row[WINDOWS]]];
    if (this.shows === "cache") return cache;
    if (this.shows === "ours") {
      return [...this.fixed.map(([name, bytes], n) => [`w${n % 8}`, name, () => bytes]), ["latent", "cache", (row) => row[PACKED] + row[WINDOWS]], ["scales", "routing ring", (row) => row[RING]], ["windows", "recorder", (row) => row[RECORDED]]];
    }
    const whole = this.device
      ? [["rotary", "activations", (row) => Math.max(0, row[ALLOCATED] - ours(row))], ["room", "kept by PyTorch", (row) => row[RESERVED] - row[ALLOCATED]], ["w3", "driver and other processes", (row) => Math.max(0, row[USED] - row[RESERVED])]]
      : [["room", "Python, PyTorch, activations, kept after use", (row) => Math.max(0, row[RSS] - ours(row))]];
    return [["latent", "all we allocated", ours], ...whole];
  }

  /** Rows in order of what is below them; over tokens the latest of each count. */
  points() {
    if (this.over === "seconds") return this.rows;
    const latest = new Map(this.rows.map((row) => [row[TOKENS], row]));
    return [...latest.values()].sort((a, b) => a[TOKENS] - b[TOKENS]);
  }

  draw() {
    if (!this.rows) return;
    for (const [group, value] of [[this.what, this.shows], [this.along, this.over]]) {
      for (const button of group.children) button.setAttribute("aria-pressed", String(button.dataset.value === value));
    }
    const at = this.over === "seconds" ? SECONDS : TOKENS;
    this.shown = this.points();
    this.named = this.parts().filter(([, , value]) => this.shown.some((row) => value(row) > 0));
    const marks = this.marks.map(([seconds, tokens, kind, text]) => ({ x: at === SECONDS ? seconds : tokens, kind, text: kind === "format" ? text : kind === "block" ? text : WORDS[kind] ?? kind }));
    const shown = at === SECONDS ? marks : marks.filter(({ kind }) => kind === "block" || kind === "format");
    this.areas.draw({
      x: this.shown.map((row) => row[at]),
      parts: this.named.map(([kind, , value]) => ({ kind, values: this.shown.map(value) })),
      marks: shown,
      axis: at === SECONDS ? "seconds" : "tokens cached",
    });
    this.read(this.areas.at);
  }

  read(index) {
    const row = this.shown[index < 0 ? this.shown.length - 1 : index];
    if (!row) return;
    const when = index < 0 ? "Now" : `At ${row[SECONDS].toFixed(1)} s`;
    const sum = this.named.reduce((total, [, , value]) => total + value(row), 0);
    this.readout.textContent = `${when}, ${plural(row[TOKENS], "token")} cached: ${exact(sum)}${this.named.length > 1 ? " in all" : ""}`;
    this.areas.element.setAttribute("aria-valuenow", String(index < 0 ? this.shown.length - 1 : index));
    this.areas.element.setAttribute("aria-valuetext", this.readout.textContent);
    fill(this.keys, [...this.named].reverse().map(([kind, name, value]) => key(kind, `${name} ${size(value(row))}`)), this.marks.some(([, , kind]) => kind === "block") ? element("span", { className: "wbm-key" }, "\u25b2 blocks allocated or given back") : null);
  }
}

export default showing(TimelineView);
