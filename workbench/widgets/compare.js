// Side by side: two traces of the same prompt. The kernel sends both at once, and the details of a token when asked.

class CompareView extends View {
  build() {
    this.data = null;
    this.whole = false;
    this.pairs = new Pairs((row) => this.move(row), (row) => this.shared(row));
    this.head = element("header", { className: "wbs-head" });
    this.tiles = element("div", { className: "wbs-tiles" });
    this.settings = element("section", { className: "wbs-settings" });
    this.promptButton = this.button("Prompt", "Show the tokens of the prompt too", () => this.showPrompt());
    this.promptButton.setAttribute("aria-pressed", "false");
    this.nextButton = this.button("Next difference", "Go to the next token that differs (N)", () => this.next());
    this.layers = element("select", { className: "wbs-layers", "aria-label": "Layer the lines are about" });
    this.layers.addEventListener("change", () => this.choose(Number(this.layers.value)));
    this.bar = element("div", { className: "wbs-bar" },
      element("span", { className: "wbs-soft" }, "line below a token: routing that is not shared, in"), this.layers,
      element("span", { className: "wbs-space" }), this.promptButton, this.nextButton);
    this.cursor = element("section", { className: "wbs-cursor" });
    this.chart = element("section", { className: "wbs-chart" });
    this.body = element("div", {}, this.tiles, this.settings, this.bar, this.pairs.element, this.cursor, this.chart);
    this.root.classList.add("wbv", "wbs");
    this.root.setAttribute("role", "region");
    this.root.setAttribute("aria-label", "Side by side");
    this.root.append(this.head, this.notice, this.body, this.said);
    this.root.addEventListener("keydown", (event) => this.onKey(event), { signal: this.ended.signal });
    this.body.hidden = true;
  }

  button(label, title, action) {
    const made = element("button", { className: "wbs-button", type: "button", title }, label);
    made.addEventListener("click", action);
    return made;
  }

  // What the kernel says

  on_show(data, [measured, shared]) {
    const copy = (view) => view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
    this.data = data;
    this.logprobs = new Float32Array(copy(measured));
    this.overlaps = new Uint8Array(copy(shared));
    Object.assign(this, { row: data.row, layer: data.layer, detail: data.cursor });
    if (data.prompt === data.texts[0].length) this.whole = true;
    this.body.hidden = false;
    this.drawHead();
    this.drawTiles();
    this.drawSettings();
    fill(this.layers, element("option", { value: "-1" }, "all layers"), data.layers.map((layer) => element("option", { value: layer }, `layer ${layer}`)));
    this.pairs.build(data, this.whole ? 0 : data.prompt);
    this.drawSoon();
  }

  on_moved({ row, layers, view }) {
    if (view !== this.id) this.row = row;
    if (row === this.row) this.detail = layers;
    this.drawSoon();
  }

  on_layer({ layer, view }) {
    if (view === this.id) return;
    this.layer = layer;
    this.pairs.shade();
    this.drawSoon();
  }

  // What the reader does

  /** Of a row: in the chosen layer, or the mean over all that both have read. */
  shared(row) {
    const { layers } = this.data;
    const known = [...this.overlaps.subarray(row * layers.length, (row + 1) * layers.length)];
    const place = layers.indexOf(this.layer);
    const values = (place < 0 ? known : [known[place]]).filter((value) => value !== UNKNOWN);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length / 254 : null;
  }

  move(row) {
    const first = this.pairs.from;
    row = Math.max(first, Math.min(row, this.data.same.length - 1));
    if (row === this.row) return;
    this.row = row;
    this.detail = null;
    clearTimeout(this.resting); // the details can wait until a held key is let go
    this.resting = setTimeout(() => this.tell({ kind: "move", row }), 60);
    this.announce(this.pairs.words(row));
    this.drawSoon();
  }

  next() {
    const { same } = this.data;
    const from = Math.max(this.row, this.pairs.from - 1);
    const found = same.findIndex((is, row) => row > from && !is);
    if (found >= 0) this.move(found);
    else this.announce("No other difference");
  }

  choose(layer) {
    this.layer = layer;
    this.tell({ kind: "layer", layer });
    this.pairs.shade();
    this.drawSoon();
  }

  showPrompt() {
    this.whole = !this.whole;
    this.pairs.build(this.data, this.whole ? 0 : this.data.prompt);
    this.drawSoon();
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation(); // plain keys are not shortcuts of the notebook around us
    if (!this.data || event.target.matches("select, button")) return;
    const { key } = event;
    const layers = [-1, ...this.data.layers];
    const at = layers.indexOf(this.layer);
    if (key === "ArrowRight") this.move(this.row + 1);
    else if (key === "ArrowLeft") this.move(this.row < 0 ? this.pairs.from : this.row - 1);
    else if (key === "Home") this.move(this.pairs.from);
    else if (key === "End") this.move(this.data.same.length - 1);
    else if (key === "n" || key === "N") this.next();
    else if (key === "ArrowDown" && at + 1 < layers.length) this.choose(layers[at + 1]);
    else if (key === "ArrowUp" && at > 0) this.choose(layers[at - 1]);
    else if (!key.startsWith("Arrow")) return;
    event.preventDefault();
  }

  close() {
    clearTimeout(this.resting);
    super.close();
  }

  // Drawing

  draw() {
    if (!this.data) return;
    this.layers.value = String(this.layer);
    this.promptButton.setAttribute("aria-pressed", String(this.whole));
    this.promptButton.hidden = !this.data.prompt || this.data.prompt === this.data.same.length;
    this.nextButton.disabled = !this.data.same.includes(0);
    this.pairs.mark(this.row);
    this.drawCursor();
    this.drawChart();
  }

  drawHead() {
    const side = (name, place) => element("span", { className: `wbs-side wbs-${name}` }, element("i", {}), element("b", {}, this.data.labels[place]), element("span", { className: "wbs-soft" }, place ? "below" : "above"));
    fill(this.head, side("a", 0), side("b", 1));
  }

  drawTiles() {
    const { summary, positions, texts, prompt } = this.data;
    const tile = (value, name, title) => element("div", { className: "wbs-tile", title }, element("b", {}, value), element("span", {}, name));
    const { first, overlap, logprob, compared } = summary;
    const parted = first !== null;
    const name = (text) => (text === null ? "nothing" : visible(text));
    const words = parted ? `first difference: ${name(texts[0][first])} or ${name(texts[1][first])}` : "no token differs";
    const tiles = [tile(parted ? `position ${positions[first]}` : "none", words, "The first token that is not the same in both")];
    if (summary.equal !== null) tiles.push(tile(percent(summary.equal), `of ${plural(summary.generated, "generated token")} the same`, "At the same position, so also by coincidence once they have parted"));
    const shared = overlap.filter((value) => value !== null).map(percent);
    if (shared.length) tiles.push(tile(shared.join(" \u2192 "), shared.length > 1 ? "routing shared, before they part and after" : "routing shared", "Experts chosen in both over experts chosen in either, mean over tokens and layers. Once they part, other tokens are routed otherwise."));
    if (logprob !== null) tiles.push(tile(`${figure(logprob)} nats`, `mean |\u0394 log p|${parted ? " before they part" : ""}`, `Of the ${plural(compared, "token")} with a log-probability in both`));
    fill(this.tiles, tiles);
  }

  drawSettings() {
    const { settings, labels } = this.data;
    if (!settings.length) {
      fill(this.settings, element("p", { className: "wbs-soft" }, "Nothing was set differently."));
      return;
    }
    const brief = (text) => (text.length > 160 ? `${text.slice(0, 159)}\u2026` : text);
    const rows = settings.map(([name, ...values]) => element("tr", {}, element("th", {}, name), values.map((value) => element("td", {}, brief(value)))));
    fill(this.settings, element("table", {}, element("tr", {}, element("th", {}, "set differently"), labels.map((label) => element("th", {}, label))), rows));
  }

  drawCursor() {
    const { row, data } = this;
    if (row < 0) {
      fill(this.cursor, element("p", { className: "wbs-soft" }, "Choose a token, or press \u2192: both sides move together. \u2191 \u2193 choose a layer, N goes to the next difference."));
      return;
    }
    const side = (name, place) => {
      const text = data.texts[place][row];
      const logprob = this.logprobs[2 * row + place];
      const likely = Number.isNaN(logprob) ? (row < data.prompt ? "of the prompt" : "probability not recorded") : `probability ${percent(Math.exp(logprob))} before sampling`;
      return element("div", { className: `wbs-side wbs-${name}` }, element("i", {}), element("code", {}, text === null ? "nothing" : visible(text)), element("span", { className: "wbs-soft" }, text === null ? "it had ended" : likely));
    };
    fill(this.cursor, element("div", { className: "wbs-here" }, element("b", {}, `Position ${data.positions[row]}`), side("a", 0), side("b", 1)), this.drawDetail());
  }

  drawDetail() {
    if (!this.detail) return element("p", { className: "wbs-soft" }, "\u2026");
    if (!this.detail.length) return element("p", { className: "wbs-soft" }, "Not read by both: it was generated last, or one side had ended.");
    const changed = this.detail.filter(([layer, overlap]) => (this.layer < 0 ? overlap < 1 : layer === this.layer));
    if (!changed.length) return element("p", { className: "wbs-soft" }, "The same experts read it in all layers.");
    const list = (experts, kind) => element("td", { className: `wbs-${kind}` }, experts.length ? experts.join(", ") : "\u2013");
    return element("div", { className: "wbs-detail" }, element("table", {},
      element("tr", {}, ["layer", "shared", ...this.data.labels.map((label) => `only in \u201c${label}\u201d`)].map((name) => element("th", {}, name))),
      changed.map(([layer, overlap, a, b]) => element("tr", {}, element("td", {}, String(layer)), element("td", {}, percent(overlap)), list(a, "a"), list(b, "b")))));
  }

  drawChart() {
    const { layers, by_layer: [before, after], summary } = this.data;
    const parted = summary.first !== null;
    const column = (layer, place) => {
      const bars = [[before[place], "before"], [after[place], "after"]].filter(([value]) => value !== null).map(([value, kind]) => {
        const bar = element("i", { className: `wbs-${kind}` });
        bar.style.height = `${Math.max(2, 100 * value)}%`;
        return bar;
      });
      const words = `Layer ${layer}: ${before[place] === null ? "" : `${percent(before[place])} shared${parted ? " before they part" : ""}`}${after[place] === null ? "" : `, ${percent(after[place])} after`}`;
      const made = element("button", { className: "wbs-column", type: "button", title: words, "aria-label": words, "aria-pressed": String(layer === this.layer) },
        element("span", { className: "wbs-bars" }, bars), element("span", {}, String(layer)));
      made.addEventListener("click", () => this.choose(layer === this.layer ? -1 : layer));
      return made;
    };
    const focus = this.chart.contains(document.activeElement) ? [...this.chart.querySelectorAll("button")].indexOf(document.activeElement) : -1;
    const key = parted ? element("span", { className: "wbs-soft wbs-keys" }, element("i", { className: "wbs-before" }), "before they part", element("i", { className: "wbs-after" }), "after") : null;
    fill(this.chart, element("div", { className: "wbs-line" }, element("h4", {}, "Routing shared, by layer"), key),
      element("div", { className: "wbs-columns" }, element("span", { className: "wbs-axis" }, element("span", {}, "100 %"), element("span", {}, "0")), layers.map(column)));
    if (focus >= 0) this.chart.querySelectorAll("button")[focus]?.focus();
  }
}

export default showing(CompareView);
