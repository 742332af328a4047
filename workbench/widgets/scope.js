// The routing scope. Tokens come once, packed; what is drawn is worked out here, so that scrubbing asks nobody.

const FOLLOWS = -1; // the token that is looked at: whatever is newest
const NEIGHBOURS = 14;

class ScopeView extends LiveView {
  get ownTraits() {
    return ["mode", "by"];
  }

  build() {
    this.empty({ label: "", about: "", live: true, layers: [], experts: 0, k: 0, groups: 1, kept: null });
    this.title = element("strong", { className: "wbr-title" }, "Routing");
    this.about = element("span", { className: "wbr-note wbr-about" });
    this.modes = this.choice("What is shown", "mode", [["token", "This token", "The experts this token chose, brighter for larger gates"], ["answer", "Whole answer", "How often each expert was chosen"]]);
    this.counts = this.choice("What counts", "by", [["count", "by tokens", "How many tokens chose the expert"], ["gate", "by gate", "The sum of its gates: how much it weighed"]]);
    this.live = element("button", { className: "wbr-button wbr-live", type: "button", title: "Follow the newest token" }, element("i"), "Live");
    this.live.addEventListener("click", () => this.set({ token: this.get("token") === FOLLOWS ? this.shown : FOLLOWS }));
    this.grid = new Grid(() => this.drawSoon());
    const { element: field } = this.grid;
    field.addEventListener("pointermove", (event) => this.onPointer(event));
    field.addEventListener("pointerleave", () => this.onPointer(null));
    field.addEventListener("click", (event) => this.onClick(event));
    field.addEventListener("keydown", (event) => this.onKey(event));
    field.addEventListener("focus", () => this.drawSoon());
    field.addEventListener("blur", () => this.drawSoon());
    this.scale = element("i", { className: "wbr-scale" });
    this.most = element("span");
    this.hint = element("span", { className: "wbr-hint" });
    this.legend = element("div", { className: "wbr-legend" }, element("span", {}, "0"), this.scale, this.most, this.hint, this.counts);
    this.range = element("input", { className: "wbr-range", type: "range", min: "0", max: "0", step: "1", "aria-label": "Token" });
    this.range.addEventListener("input", () => this.set({ token: Number(this.range.value) }));
    this.place = element("span", { className: "wbr-place" });
    this.before = element("span", { className: "wbr-before" });
    this.now = element("b", { className: "wbr-now" });
    this.after = element("span", { className: "wbr-after" });
    this.text = element("div", { className: "wbr-text", dir: "auto" }, this.before, this.now, this.after);
    this.text.addEventListener("click", ({ target }) => {
      if (target.dataset.token) this.set({ token: Number(target.dataset.token) });
    });
    this.readout = element("div", { className: "wbr-readout", "aria-live": "polite" });
    this.tip = new Tip(this.root);
    this.root.classList.add("wbr");
    this.root.append(
      element("header", { className: "wbr-head" }, this.title, this.about, element("span", { className: "wbr-space" }), this.modes, this.live),
      this.notice, this.grid.element, this.legend,
      element("div", { className: "wbr-scrub" }, this.range, this.place), this.text, this.readout, this.said);
  }

  /** A row of buttons, one of them pressed, for a trait. */
  choice(label, trait, options) {
    const box = element("span", { className: "wbr-choice", role: "group", "aria-label": label });
    for (const [value, text, title] of options) {
      const button = element("button", { className: "wbr-button", type: "button", title, value }, text);
      button.addEventListener("click", () => this.set({ [trait]: value }));
      box.append(button);
    }
    return box;
  }

  // What the kernel says

  empty(facts) {
    this.facts = facts;
    this.pieces = [];
    const cells = facts.layers.length * facts.experts;
    this.experts = new Grown(Int16Array, facts.layers.length * facts.k);
    this.gates = new Grown(Float32Array, facts.layers.length * facts.k);
    this.margins = new Grown(Float32Array, facts.layers.length);
    this.heat = { count: new Float64Array(cells), gate: new Float64Array(cells) };
    this.newest = -1;
    this.largest = { gate: 0, margin: 0 };
    this.exact = this.wanted = null; // a token with its gates and margins in full, and the one that was asked for
    this.cursor = { row: 0, expert: 0 };
  }

  on_show(message, buffers) {
    this.empty(message.facts);
    this.known = true;
    this.take(message, buffers);
  }

  on_tokens(message, buffers) {
    if (!this.known) return; // all of it is asked for already
    if (message.from > this.pieces.length) this.ask();
    else this.take(message, buffers);
  }

  on_exact({ token }, [gates, margins]) {
    this.exact = { token, gates: numbers(Float32Array, gates), margins: numbers(Float32Array, margins) };
    this.drawSoon();
  }

  take({ from, pieces, scale }, [ids, gates, margins]) {
    if (from < this.pieces.length) this.forget(from);
    const wide = this.facts.experts > 255;
    const unused = wide ? 65535 : 255;
    this.experts.write(from, Int16Array.from(numbers(wide ? Uint16Array : Uint8Array, ids), (id) => (id === unused ? -1 : id)));
    this.gates.write(from, Float32Array.from(numbers(Uint8Array, gates), (code) => scale * (code / 255) ** 2));
    this.margins.write(from, Float32Array.from(numbers(Int8Array, margins), (code) => (code === -128 ? NaN : Math.sign(code) * (code / 127) ** 2)));
    this.pieces.push(...pieces);
    for (let token = from; token < this.pieces.length; token++) this.count(token, 1);
    if (this.exact?.token >= from) this.exact = null;
    if (this.wanted >= from) this.wanted = null;
    this.drawSoon();
  }

  /** Adds one token to the heat, or takes it out again with sign -1. */
  count(token, sign) {
    const experts = this.experts.row(token);
    const gates = this.gates.row(token);
    experts.forEach((expert, n) => {
      if (expert < 0) return;
      const cell = Math.floor(n / this.facts.k) * this.facts.experts + expert;
      this.heat.count[cell] += sign;
      this.heat.gate[cell] += sign * gates[n];
      this.largest.gate = Math.max(this.largest.gate, gates[n]);
      if (sign > 0) this.newest = token;
    });
    for (const margin of this.margins.row(token)) if (margin > this.largest.margin) this.largest.margin = margin;
  }

  forget(from) {
    for (let token = from; token < this.pieces.length; token++) this.count(token, -1);
    this.pieces.length = from;
    this.newest = Math.min(this.newest, from - 1);
    if (this.get("token") >= from) this.set({ token: FOLLOWS });
  }

  // What is looked at

  get shown() {
    const token = this.get("token");
    return token >= 0 && token < this.pieces.length ? token : this.newest >= 0 ? this.newest : this.pieces.length - 1;
  }

  get selected() {
    return { row: this.facts.layers.indexOf(this.get("layer")), expert: this.get("expert") };
  }

  /** What the shown token chose in a row: [{expert, gate, rank}], strongest first. */
  chosen(row) {
    const { k } = this.facts;
    if (this.shown < 0) return [];
    const experts = this.experts.row(this.shown).subarray(row * k, (row + 1) * k);
    const exact = this.exact?.token === this.shown ? this.exact.gates : this.gates.row(this.shown);
    return [...experts].map((expert, rank) => ({ expert, rank, gate: exact[row * k + rank] })).filter(({ expert }) => expert >= 0);
  }

  margin(row) {
    if (this.exact?.token !== this.shown) return this.shown < 0 ? NaN : this.margins.row(this.shown)[row];
    const used = this.chosen(row);
    return used.length ? this.exact.margins[row * this.facts.k + used.at(-1).rank] : NaN;
  }

  onPointer(event) {
    const hover = event && this.grid.under(event);
    if (hover) this.tip.show(event, this.describe(hover));
    else this.tip.hide();
    this.hover = hover;
    this.drawSoon();
  }

  onClick(event) {
    const cell = this.grid.under(event);
    if (!cell) return;
    this.cursor = { row: cell.row, expert: Math.max(0, cell.expert) };
    const { row, expert } = this.selected;
    const again = row === cell.row && expert === cell.expert;
    this.set(again ? { layer: -1, expert: -1 } : { layer: this.facts.layers[cell.row], expert: cell.expert });
  }

  onKey(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    const down = { ArrowUp: -1, ArrowDown: 1, PageUp: -8, PageDown: 8 }[event.key];
    const within = (value, end) => Math.max(0, Math.min(end - 1, value));
    const { layers, experts } = this.facts;
    if (event.ctrlKey || event.metaKey || event.altKey || !layers.length) return;
    if (down) {
      this.cursor.row = within(this.cursor.row + down, layers.length);
      this.grid.reveal(this.cursor.row);
    } else if (steps && this.get("mode") === "token" && !event.shiftKey) this.set({ token: within(this.shown + steps, this.pieces.length) });
    else if (steps) this.cursor.expert = within(this.cursor.expert + steps, experts);
    else if (event.key === "Enter") this.enter();
    else if (event.key === "Escape") this.set({ layer: -1, expert: -1 });
    else return;
    event.preventDefault();
    this.drawSoon();
  }

  /** Selects at the cursor: of a token its strongest expert there, and with every further Enter the next one. */
  enter() {
    const { row } = this.cursor;
    if (this.get("mode") === "token") {
      const chosen = this.chosen(row).map(({ expert }) => expert);
      const at = this.selected.row === row ? chosen.indexOf(this.selected.expert) : -1;
      this.cursor.expert = chosen.length ? chosen[(at + 1) % chosen.length] : -1;
    }
    this.set({ layer: this.facts.layers[row], expert: this.cursor.expert });
  }

  // Drawing

  draw() {
    const { layers, live, label, about } = this.facts;
    const mode = this.get("mode");
    const { row } = this.selected;
    if (row >= 0 && row !== this.lastRow) this.cursor = { row, expert: Math.max(0, this.selected.expert) };
    this.lastRow = row;
    for (const [box, trait] of [[this.modes, "mode"], [this.counts, "by"]])
      for (const button of box.children) button.setAttribute("aria-pressed", String(button.value === this.get(trait)));
    this.counts.hidden = mode !== "answer";
    this.live.hidden = !live;
    this.live.setAttribute("aria-pressed", String(this.get("token") === FOLLOWS));
    this.title.textContent = label ? `Routing of ${label.split("/").at(-1)}` : "Routing";
    this.about.textContent = this.known ? about : "waiting for the kernel \u2026";
    this.grid.element.hidden = !layers.length;
    const palette = new Palette(this.root, this.about);
    const heat = this.heat[this.get("by")];
    const top = mode === "token" ? this.largest.gate : heat.reduce((most, value) => Math.max(most, value), 0);
    this.grid.draw(this.picture(mode, heat, top), palette);
    this.scale.style.background = palette.gradient;
    this.drawWords(mode, top);
    if (mode === "token") this.askExact();
  }

  picture(mode, heat, top) {
    const { facts, selected, cursor, hover } = this;
    const focused = document.activeElement === this.grid.element;
    const common = { facts, selected, hover, focused, cursor: focused ? { row: cursor.row, expert: mode === "token" ? -1 : cursor.expert } : { row: -1, expert: -1 } };
    if (mode === "answer") {
      const busiest = this.busiest();
      const most = Math.max(...busiest, 1);
      return {
        ...common, keptIn: () => null, sideHead: "busiest / mean",
        at: (row, expert) => ({ share: top ? heat[row * facts.experts + expert] / top : 0, rank: null }),
        side: (row) => (Number.isNaN(busiest[row]) ? { share: null, text: "\u2013" } : { share: busiest[row] / most, text: `\u00d7 ${busiest[row].toFixed(1)}` }),
      };
    }
    const rows = facts.layers.map((_, row) => new Map(this.chosen(row).map((choice) => [choice.expert, choice])));
    const none = { share: null, rank: null };
    const size = facts.experts / facts.groups;
    return {
      ...common, sideHead: "margin",
      at: (row, expert) => {
        const choice = rows[row].get(expert);
        return choice ? { share: top > 0 ? Math.max(0.02, Math.sqrt(choice.gate / top)) : 0.02, rank: choice.rank } : none;
      },
      keptIn: (row) => (facts.kept === null ? null : new Set([...rows[row].keys()].map((expert) => Math.floor(expert / size)))),
      side: (row) => {
        const margin = this.margin(row);
        if (Number.isNaN(margin)) return { share: null, text: "not read" };
        return margin < 0 ? { share: null, text: "forced" } : { share: Math.sqrt(margin / (this.largest.margin || 1)), text: short(margin, this.exact?.token === this.shown) };
      },
    };
  }

  /** For every row how much more often than the mean its busiest expert was chosen. */
  busiest() {
    const { layers, experts } = this.facts;
    const heat = this.heat[this.get("by")];
    return layers.map((_, row) => {
      const own = heat.subarray(row * experts, (row + 1) * experts);
      const sum = own.reduce((total, value) => total + value, 0);
      return sum > 0 ? (Math.max(...own) * experts) / sum : NaN;
    });
  }

  drawWords(mode, top) {
    const { pieces, shown } = this;
    const unit = mode === "token" ? "gate" : this.get("by") === "count" ? "tokens" : "sum of gates";
    this.most.textContent = `${mode === "answer" && this.get("by") === "count" ? number(top) : short(top)} ${unit}`;
    const { ranked, outlined } = this.grid;
    const marks = [ranked && "number: rank", this.facts.kept !== null && "grey: group kept", "margin: the last one chosen over the best left out (bar: square root)"];
    this.hint.textContent = mode === "token" ? marks.filter(Boolean).join(" \u00b7 ") : `${outlined ? "outline" : "blank"}: never chosen`;
    this.range.max = String(Math.max(0, pieces.length - 1));
    this.range.value = String(Math.max(0, shown));
    this.range.disabled = pieces.length < 2;
    this.place.textContent = pieces.length ? `token ${number(shown)} of ${number(pieces.length)}` : "no tokens yet";
    const near = (from, to) => pieces.slice(Math.max(0, from), Math.max(0, to)).map((piece, n) => {
      return element("span", { "data-token": String(Math.max(0, from) + n) }, piece.replace(/\n/g, "\u21b5"));
    });
    this.before.replaceChildren(...near(shown - NEIGHBOURS, shown));
    this.now.textContent = shown < 0 ? "" : visible(pieces[shown]);
    this.after.replaceChildren(...near(shown + 1, shown + 1 + NEIGHBOURS));
    this.range.setAttribute("aria-valuetext", shown < 0 ? "no token" : `token ${shown} ${pieces[shown]}`);
    const follows = this.facts.live && this.get("token") === FOLLOWS;
    this.readout.setAttribute("aria-live", follows ? "off" : "polite");
    const said = this.sentence(mode);
    if (this.readout.textContent !== said) this.readout.textContent = said;
    const { layers, experts } = this.facts;
    this.grid.canvas.setAttribute("aria-label", `${layers.length} layers by ${experts} experts, ${mode === "token" ? "the choice of one token" : "the whole answer"}. ${said}`);
    const keys = mode === "token" ? "left and right: tokens, up and down: layers" : "arrows: layers and experts";
    this.grid.element.setAttribute("aria-label", `Experts; ${keys}, Enter selects, Escape clears`);
  }

  /** The cursor's row in words. */
  sentence(mode) {
    const { facts, shown } = this;
    if (!facts.layers.length || shown < 0) return "";
    const row = document.activeElement === this.grid.element ? this.cursor.row : this.row;
    const layer = facts.layers[row];
    if (mode === "answer") {
      const counts = [...this.heat.count.subarray(row * facts.experts, (row + 1) * facts.experts)];
      const order = counts.map((_, expert) => expert).sort((a, b) => counts[b] - counts[a]).slice(0, 4);
      return `layer ${layer}: ${order.map((expert) => `${expert} (${plural(counts[expert], "token")})`).join(", ")}; ${counts.filter((count) => !count).length} of ${facts.experts} never chosen`;
    }
    const chosen = this.chosen(row);
    const head = `token ${shown} '${visible(this.pieces[shown])}': layer ${layer}`;
    if (!chosen.length) return `${head} has not read it yet`;
    const exact = this.exact?.token === shown;
    const margin = this.margin(row);
    const cut = margin < 0 ? "the last one was forced" : `margin ${short(margin, exact)}`;
    return `${head} chose ${chosen.map(({ expert, gate }) => `${expert} (${short(gate, exact)})`).join(", ")}; ${cut}`;
  }

  /** What the tip says of a cell. */
  describe({ row, expert }) {
    const { layers, experts, groups } = this.facts;
    const margin = this.margin(row);
    const cut = Number.isNaN(margin) ? null : margin < 0 ? "the last one chosen was forced" : `margin of the last one chosen ${short(margin, this.exact?.token === this.shown)}`;
    if (expert < 0) return [`layer ${layers[row]}`, ...(cut ? [cut] : [])];
    const group = groups > 1 ? `, group ${Math.floor(expert / (experts / groups))}` : "";
    const lines = [`layer ${layers[row]}, expert ${expert}${group}`];
    if (this.get("mode") === "token") {
      const choice = this.chosen(row).find((each) => each.expert === expert);
      lines.push(choice ? `rank ${choice.rank + 1}, gate ${short(choice.gate, this.exact?.token === this.shown)}` : "not chosen by this token");
      if (choice && cut) lines.push(cut);
    }
    const cell = row * experts + expert;
    const times = this.heat.count[cell];
    lines.push(`chosen by ${plural(times, "token")} of ${number(this.newest + 1)}`);
    if (times) lines.push(`sum of gates ${short(this.heat.gate[cell])}`);
    return lines;
  }

  /** Eight bits are enough to draw; what is read as a number is asked for once the token stays. */
  askExact() {
    const token = this.shown;
    if (token < 0 || this.exact?.token === token || this.wanted === token) return;
    this.wanted = token;
    clearTimeout(this.settling);
    this.settling = setTimeout(() => this.tell({ kind: "exact", token }), 150);
  }

  close() {
    super.close();
    clearTimeout(this.settling);
  }
}

export default showing(ScopeView);
