// The cache meter: how many bytes are held, what other schemes would hold, layer by layer, and in which format.

class CacheMeterView extends View {
  build() {
    this.state = null;
    this.busy = false;
    this.title = element("span", { className: "wbm-title" });
    this.badge = element("b", { className: "wbm-badge" });
    this.note = element("span", { className: "wbm-note" });
    this.written = element("b", {});
    this.writtenOf = element("span", {});
    this.allocated = element("b", {});
    this.allocatedOf = element("span", {});
    this.share = element("b", {});
    this.choice = element("select", { "aria-label": "Baseline of the ratio" });
    this.choice.addEventListener("change", () => this.tell({ kind: "baseline", name: this.choice.value }));
    this.bars = new Bars("The same tokens in other schemes");
    this.barsTitle = element("h4", {});
    this.tanks = new Tanks();
    this.tanksTitle = element("h4", {});
    this.wide = element("select", { "aria-label": "Recent tokens kept in bf16" });
    this.wide.addEventListener("change", () => this.drawFormats());
    this.formats = element("tbody");
    this.losses = new Losses();
    this.cost = element("section", { className: "wbm-part wbm-cost", "aria-label": "What the last switch did", hidden: true });
    const columns = ["format", "", "bytes a token and layer", "bits", "these tokens", ""];
    const table = element("table", { className: "wbm-formats" }, element("thead", {}, element("tr", {}, columns.map((name) => element("th", { scope: "col" }, name)))), this.formats);
    const part = (label, ...children) => element("section", { className: "wbm-part", "aria-label": label }, ...children);
    this.body = element("div", { hidden: true },
      element("div", { className: "wbm-tiles" }, tile(this.written, this.writtenOf), tile(this.allocated, this.allocatedOf), tile(this.share, element("span", {}, "than ", this.choice))),
      part("Other schemes", element("div", { className: "wbm-line" }, this.barsTitle, element("span", { className: "wbm-note" }, "logarithmic: every step is ten times as much")), this.bars.element),
      part("Layers", element("div", { className: "wbm-line" }, this.tanksTitle, element("span", { className: "wbm-note" }, "in blocks of 64 tokens")), this.tanks.element),
      part("Format", heading("Its format", element("span", { className: "wbm-space" }), element("label", {}, "keep recent tokens in bf16 too", this.wide)), table),
      this.cost);
    this.root.classList.add("wbv", "wbm");
    this.root.setAttribute("role", "region");
    this.root.setAttribute("aria-label", "Cache meter");
    this.root.append(element("header", { className: "wbm-head" }, this.title, this.badge, this.note), this.notice, this.body, this.said);
    // plain keys are not shortcuts of the notebook around us
    this.root.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.altKey || event.stopPropagation(), { signal: this.ended.signal });
  }

  // What the kernel says

  on_show(message) {
    this.facts = message.facts;
    this.switched = message.switched;
    this.busy = false;
    fill(this.choice, this.facts.baselines.map(([name, doc, , own]) => element("option", { value: name, title: doc }, own ? name : `${name}, another model`)));
    fill(this.wide, element("option", { value: "" }, "no"), this.facts.wide.map((count) => element("option", { value: `+${count}` }, String(count))));
    this.wide.value = this.facts.wide.map((count) => `+${count}`).find((end) => message.next.endsWith(end)) ?? "";
    this.body.hidden = false;
    this.on_baseline({ name: message.baseline });
    this.take(message);
  }

  on_grow(message) {
    if (this.facts) this.take(message);
  }

  on_switched(message) {
    if (!this.facts) return;
    this.busy = false;
    this.notice.hidden = true;
    this.switched = message.switched;
    const { before, after, held } = message.switched;
    this.announce(`The cache is in ${after} now, before in ${before}: ${exact(held[0])} became ${exact(held[1])}`);
    this.take(message);
  }

  on_baseline({ name }) {
    this.baseline = name;
    this.choice.value = name;
    this.drawSoon();
  }

  on_notice(message) {
    this.busy = false;
    super.on_notice(message);
  }

  take(state) {
    this.state = state;
    this.drawSoon();
  }

  // Drawing

  /** [latent, rotary, scales] bytes of a row in this format. */
  parts(format) {
    return this.facts.formats.find(({ name }) => name === format.split("+")[0]).parts;
  }

  row = (format) => this.parts(format).reduce((sum, part) => sum + part, 0);

  draw() {
    if (!this.state) return;
    const { facts, state } = this;
    const row = this.row(state.format);
    const rows = state.tokens * row * facts.layers;
    this.held = { row, written: rows + state.windows, allocated: state.packed + state.windows };
    this.perToken = state.tokens ? this.held.written / state.tokens : row * facts.layers;
    this.title.textContent = `Cache of ${facts.model}`;
    this.badge.textContent = state.format;
    this.note.textContent = state.next !== state.format ? `${state.next} from the next reply on` : state.tokens ? "" : "Nothing is cached yet: say something.";
    this.drawTiles();
    this.drawBars();
    this.drawTanks();
    this.drawFormats();
    this.drawCost();
  }

  drawTiles() {
    const { facts, state, held } = this;
    this.written.textContent = exact(held.written);
    this.writtenOf.textContent = `${plural(state.tokens, "token")} \u00d7 ${plural(facts.layers, "layer")} \u00d7 ${exact(held.row)}${state.windows ? ` + ${exact(state.windows)} of recent tokens` : ""}`;
    this.allocated.textContent = exact(held.allocated);
    const room = state.blocks * facts.block - state.tokens;
    this.allocatedOf.textContent = `allocated, with room for ${plural(Math.max(0, room), "more token")}`;
    this.allocatedOf.parentElement.title = `${plural(state.blocks, "block")} of ${facts.block} tokens in every layer`;
    const [, doc, bytes] = facts.baselines.find(([name]) => name === this.baseline);
    const share = this.perToken / bytes;
    this.share.textContent = `${less(share)} ${share <= 1 ? "less" : "more"}`;
    this.share.parentElement.title = `${exact(this.perToken)} a token, where ${this.baseline} takes ${exact(bytes)}: ${doc}`;
  }

  drawBars() {
    const { facts, state, held } = this;
    const tokens = state.tokens || 1;
    const mine = this.perToken * tokens;
    const rows = facts.baselines.map(([name, note, bytes, own]) => ({ name: own ? name : `${name}, another model`, note, bytes: bytes * tokens, kind: "other", factor: times((bytes * tokens) / mine) }));
    rows.push({ name: `this cache, ${state.format}`, note: "rows that hold a token", bytes: mine, kind: "mine", factor: "1\u00d7" });
    rows.sort((a, b) => b.bytes - a.bytes);
    if (state.tokens) rows.push({ name: "and with its room for more", note: "allocated, in blocks", bytes: held.allocated, kind: "room", factor: times(held.allocated / mine) });
    this.barsTitle.textContent = state.tokens ? `What ${state.tokens === 1 ? "this token takes" : `these ${state.tokens.toLocaleString("en")} tokens take`}` : "What one token would take";
    this.bars.draw(rows, "this cache = 1");
  }

  drawTanks() {
    const { facts, state } = this;
    const sizes = state.layers ?? Array(facts.layers).fill(state.packed / facts.layers);
    this.tanksTitle.textContent = `Its ${plural(facts.layers, "layer")}`;
    this.tanks.draw({ tokens: state.tokens, parts: this.parts(state.format), sizes, windows: state.windows / facts.layers, recent: state.format.split("+")[1] });
  }

  drawFormats() {
    const { facts, state } = this;
    const focused = this.formats.contains(document.activeElement) ? document.activeElement.getAttribute("data-format") : null;
    const width = facts.row[0] + facts.row[1];
    const most = Math.max(...facts.formats.map(({ name }) => this.row(name)));
    fill(this.formats, facts.formats.map(({ name, doc, parts, packed }) => {
      const full = packed ? name + this.wide.value : name;
      const row = this.row(name);
      const wide = 2 * width * Number(full.split("+")[1] ?? 0); // bytes of the recent tokens in bf16
      const used = state.format === full && state.next === full;
      const kinds = ["latent", "rotary", "scales"];
      const bar = element("span", { className: "wbm-track", "aria-hidden": "true" }, parts.map((bytes, at) => {
        const piece = element("i", { className: `wbm-fill-${kinds[at]}` });
        piece.style.width = `${(100 * bytes) / most}%`;
        return piece;
      }));
      const button = element("button", { className: "wbm-button", type: "button", disabled: this.busy, "data-format": name, "aria-label": `Switch the cache to ${full}` }, "Switch");
      button.addEventListener("click", () => this.switch(full));
      return element("tr", { className: used ? "wbm-used" : "" },
        element("th", { scope: "row" }, full),
        element("td", { className: "wbm-doc" }, doc),
        element("td", { title: `latent ${exact(parts[0])}, rotary key ${exact(parts[1])}, scales ${exact(parts[2])}` }, bar, element("span", { className: "wbm-count" }, exact(row))),
        element("td", { title: "of an element, scales included" }, ((8 * row) / width).toFixed(2)),
        element("td", {}, size((row * (state.tokens || 1) + wide) * facts.layers)),
        element("td", {}, used ? element("span", { className: "wbm-inuse" }, "\u2713 in use") : button));
    }));
    if (focused) this.formats.querySelector(`[data-format="${focused}"]`)?.focus();
  }

  switch(format) {
    this.busy = true;
    this.notice.hidden = true;
    this.tell({ kind: "switch", format });
    this.drawFormats();
  }

  drawCost() {
    const { switched } = this;
    this.cost.hidden = !switched;
    if (!switched || switched === this.shown) return;
    this.shown = switched;
    const { before, after, held, errors, dropped } = switched;
    const change = held[0] ? `${exact(held[0])} \u2192 ${exact(held[1])}` : "nothing was cached";
    const about = dropped
      ? "The rows were dropped: what recent tokens are kept wide belongs to a conversation, so the next reply reads all of it anew."
      : !errors.length ? "There were no rows to convert; it counts from the next reply on."
        : "Relative error (root mean square) that this switch added to what was cached. What an earlier format lost stays lost.";
    if (errors.length) this.losses.draw(errors);
    fill(this.cost, heading(`${before} \u2192 ${after}`, element("b", { className: "wbm-change" }, change)), element("p", { className: "wbm-note" }, about), errors.length ? this.losses.element : null);
  }
}

export default showing(CacheMeterView);
