// The routing scope. Tokens come once, packed; what is drawn is worked out here, so that scrubbing asks nobody.

const NEIGHBOURS = 14; // tokens of text to either side of the one that is looked at
const NOTHING = { label: "", about: "", live: true, layers: [], experts: 0, k: 0, groups: 1, kept: null };

class ScopeView extends LiveView {
  get ownTraits() {
    return ["mode", "by"];
  }

  build() {
    this.start(NOTHING);
    this.title = element("strong", { className: "wbr-title" });
    this.about = element("span", { className: "wbr-note" });
    this.modes = this.choice("What is shown", "mode", [["token", "This token", "The experts this token chose, brighter for larger gates"], ["answer", "Whole answer", "How often each expert was chosen"]]);
    this.counts = this.choice("What counts", "by", [["count", "by tokens", "How many tokens chose the expert"], ["gate", "by gate", "The sum of its gates: how much it weighed"]]);
    this.live = element("button", { className: "wbr-button wbr-live", type: "button", title: "Follow the newest token" }, element("i"), "Live");
    this.live.addEventListener("click", () => this.set({ token: this.follows ? this.shown : -1 }));
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
    this.hint = element("span", { className: "wbr-hint", title: "Shades and bars are square roots, so that small numbers are seen. A group is grey if an expert of it was chosen: it was kept." });
    this.legend = element("div", { className: "wbr-legend wbr-under" }, element("span", {}, "0"), this.scale, this.most, this.hint, this.counts);
    this.range = element("input", { className: "wbr-range", type: "range", min: "0", max: "0", step: "1", "aria-label": "Token" });
    this.range.addEventListener("input", () => this.set({ token: Number(this.range.value) }));
    this.place = element("span", { className: "wbr-place" });
    this.before = element("span", { className: "wbr-before" });
    this.now = element("b", { className: "wbr-now" });
    this.after = element("span", { className: "wbr-after" });
    this.text = element("div", { className: "wbr-text" }, this.before, this.now, this.after);
    this.text.addEventListener("click", ({ target }) => {
      if (target.dataset.token) this.set({ token: Number(target.dataset.token) });
    });
    this.readout = element("div", { className: "wbr-readout", "aria-live": "polite" });
    this.tip = new Tip(this.root);
    this.root.classList.add("wbv", "wbr");
    this.root.append(
      element("header", { className: "wbr-head" }, this.title, this.about, element("span", { className: "wbr-space" }), this.modes, this.live),
      this.notice, this.grid.element, this.legend, element("div", { className: "wbr-scrub" }, this.range, this.place), this.text, this.readout, this.said);
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

  start(facts) {
    this.answer = new Answer(facts);
    this.wanted = null; // the token that was asked for in full
    this.cursor = { row: 0, expert: 0 };
    this.hover = null;
  }

  on_show(message, buffers) {
    this.start(message.facts);
    this.known = true;
    this.answer.take(message, buffers);
    this.drawSoon();
  }

  on_tokens(message, buffers) {
    if (!this.known) return; // all of it is asked for already
    if (message.from > this.answer.length) {
      this.ask();
      return;
    }
    this.answer.take(message, buffers);
    if (this.wanted >= message.from) this.wanted = null;
    this.drawSoon();
  }

  on_exact({ token }, [gates, margins]) {
    this.answer.exact = { token, gates: numbers(Float32Array, gates), margins: numbers(Float32Array, margins) };
    this.drawSoon();
  }

  // What is looked at

  get follows() {
    return this.get("token") < 0;
  }

  get shown() {
    const token = this.get("token");
    const { length, newest } = this.answer;
    return token >= 0 && token < length ? token : newest >= 0 ? newest : length - 1;
  }

  get selected() {
    return { row: this.answer.facts.layers.indexOf(this.get("layer")), expert: this.get("expert") };
  }

  get focused() {
    return document.activeElement === this.grid.element;
  }

  onPointer(event) {
    this.hover = event && this.grid.under(event);
    if (this.hover) this.tip.show(event, this.describe(this.hover));
    else this.tip.hide();
    this.drawSoon();
  }

  onClick(event) {
    const cell = this.grid.under(event);
    if (!cell) return;
    const { row, expert } = this.selected;
    const again = row === cell.row && expert === cell.expert;
    this.cursor = { row: cell.row, expert: Math.max(0, cell.expert) };
    this.set(again ? { layer: -1, expert: -1 } : { layer: this.answer.facts.layers[cell.row], expert: cell.expert });
  }

  onKey(event) {
    const across = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    const down = { ArrowUp: -1, ArrowDown: 1, PageUp: -8, PageDown: 8 }[event.key];
    const within = (value, end) => Math.max(0, Math.min(end - 1, value));
    const { layers, experts } = this.answer.facts;
    if (event.ctrlKey || event.metaKey || event.altKey || !layers.length) return;
    if (down) {
      this.cursor.row = within(this.cursor.row + down, layers.length);
      this.grid.reveal(this.cursor.row);
    } else if (across && this.get("mode") === "token") this.set({ token: within(this.shown + across, this.answer.length) });
    else if (across) this.cursor.expert = within(this.cursor.expert + across, experts);
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
      const chosen = this.answer.chosen(this.shown, row).map(({ expert }) => expert);
      const at = this.selected.row === row ? chosen.indexOf(this.selected.expert) : -1;
      this.cursor.expert = chosen.length ? chosen[(at + 1) % chosen.length] : -1;
    }
    this.set({ layer: this.answer.facts.layers[row], expert: this.cursor.expert });
  }

  // Drawing

  draw() {
    const { facts, heat, largest } = this.answer;
    const mode = this.get("mode");
    const { row, expert } = this.selected;
    if (row >= 0 && row !== this.drawnRow) this.cursor = { row, expert: Math.max(0, expert) };
    this.drawnRow = row;
    for (const [box, trait] of [[this.modes, "mode"], [this.counts, "by"]]) {
      for (const button of box.children) button.setAttribute("aria-pressed", String(button.value === this.get(trait)));
    }
    this.counts.hidden = mode !== "answer";
    this.live.hidden = !facts.live;
    this.live.setAttribute("aria-pressed", String(this.follows));
    this.title.textContent = facts.label ? `Routing of ${facts.label.split("/").at(-1)}` : "Routing";
    this.about.textContent = this.known ? facts.about : "waiting for the kernel \u2026";
    this.grid.element.hidden = !facts.layers.length;
    const top = mode === "token" ? largest.gate : heat[this.get("by")].reduce((most, value) => Math.max(most, value), 0);
    const palette = new Palette(this.root, this.about);
    this.scale.style.background = palette.gradient;
    this.grid.draw(this.picture(mode, top), palette);
    this.drawWords(mode, top);
    if (mode === "token") this.askExact();
  }

  /** What the grid draws; see there. */
  picture(mode, top) {
    const { answer, shown, focused } = this;
    const { facts, largest } = answer;
    const cursor = focused ? { row: this.cursor.row, expert: mode === "token" ? -1 : this.cursor.expert } : { row: -1, expert: -1 };
    const common = { facts, cursor, selected: this.selected, hover: this.hover };
    if (mode === "answer") {
      const by = this.get("by");
      const busiest = answer.busiest(by);
      const most = busiest.reduce((largest, value) => (value > largest ? value : largest), 1);
      return {
        ...common, sideHead: "busiest / mean", keptIn: () => null,
        at: (row, expert) => ({ share: top ? answer.counts(row, by)[expert] / top : 0, rank: null }),
        side: (row) => (Number.isNaN(busiest[row]) ? { share: null, text: "\u2013" } : { share: busiest[row] / most, text: `\u00d7 ${busiest[row].toFixed(1)}` }),
      };
    }
    const rows = facts.layers.map((_, row) => new Map(answer.chosen(shown, row).map((choice) => [choice.expert, choice])));
    const root = (value, most) => (most > 0 ? Math.sqrt(value / most) : 0);
    return {
      ...common, sideHead: "margin",
      keptIn: (row) => (facts.kept === null ? null : new Set([...rows[row].values()].filter(({ forced }) => !forced).map(({ expert }) => answer.group(expert)))),
      at: (row, expert) => {
        const choice = rows[row].get(expert);
        return choice ? { ...choice, share: Math.max(0.02, root(choice.gate, top)) } : { share: null, rank: null };
      },
      side: (row) => {
        const margin = answer.margin(shown, row);
        if (Number.isNaN(margin)) return { share: null, text: "not read" };
        return margin < 0 ? { share: null, text: "forced" } : { share: root(margin, largest.margin), text: short(margin, answer.isExact(shown)) };
      },
    };
  }

  drawWords(mode, top) {
    const { shown, answer: { facts, pieces } } = this;
    const unit = mode === "token" ? "gate (\u221a)" : this.get("by") === "count" ? "tokens" : "sum of gates";
    this.most.textContent = `${Number.isInteger(top) ? number(top) : short(top)} ${unit}`;
    const { ranked, outlined } = this.grid;
    const marks = [ranked && "number: rank", facts.kept !== null && "grey: kept group", "margin (\u221a): the last chosen over the best left out"];
    this.hint.textContent = mode === "token" ? marks.filter(Boolean).join(" \u00b7 ") : `${outlined ? "outline" : "blank"}: never chosen`;
    this.range.max = String(Math.max(0, pieces.length - 1));
    this.range.value = String(Math.max(0, shown));
    this.range.disabled = pieces.length < 2;
    this.range.setAttribute("aria-valuetext", shown < 0 ? "no token" : `token ${shown} ${pieces[shown]}`);
    this.place.textContent = pieces.length ? `token ${number(shown)} of ${number(pieces.length)}` : "no tokens yet";
    const near = (from, to) => {
      const start = Math.max(0, from);
      return pieces.slice(start, Math.max(start, to)).map((piece, n) => element("span", { "data-token": String(start + n) }, piece.replace(/\n/g, "\u21b5")));
    };
    this.before.replaceChildren(...near(shown - NEIGHBOURS, shown));
    this.now.textContent = shown < 0 ? "" : visible(pieces[shown]);
    this.after.replaceChildren(...near(shown + 1, shown + 1 + NEIGHBOURS));
    const said = this.sentence(mode);
    this.readout.setAttribute("aria-live", facts.live && this.follows ? "off" : "polite"); // nobody can listen to a stream
    if (this.readout.textContent !== said) this.readout.textContent = said;
    this.grid.canvas.setAttribute("aria-label", `${facts.layers.length} layers by ${facts.experts} experts, ${mode === "token" ? "the choice of one token" : "the whole answer"}. ${said}`);
    const keys = mode === "token" ? "left and right: tokens, up and down: layers" : "arrows: layers and experts";
    this.grid.element.setAttribute("aria-label", `Experts; ${keys}, Enter selects, Escape clears`);
  }

  /** One row in words: that of the cursor, or of the selected layer. */
  sentence(mode) {
    const { shown, answer } = this;
    const { layers, experts } = answer.facts;
    if (!layers.length || shown < 0) return "";
    const row = this.focused ? this.cursor.row : Math.max(0, this.selected.row);
    if (mode === "answer") {
      const counts = [...answer.counts(row)];
      const order = counts.map((_, expert) => expert).sort((a, b) => counts[b] - counts[a]).slice(0, 4);
      return `layer ${layers[row]}: ${order.map((expert) => `${expert} (${plural(counts[expert], "token")})`).join(", ")}; ${counts.filter((count) => !count).length} of ${experts} never chosen`;
    }
    const chosen = answer.chosen(shown, row);
    const head = `token ${shown} '${visible(answer.pieces[shown])}': layer ${layers[row]}`;
    if (!chosen.length) return `${head} has not read it yet`;
    const list = chosen.map(({ expert, gate, forced }) => `${expert} (${short(gate, answer.isExact(shown))}${forced ? ", forced" : ""})`).join(", ");
    return `${head} chose ${list}; ${this.cut(row)}`;
  }

  cut(row) {
    const margin = this.answer.margin(this.shown, row);
    return margin < 0 ? "the last one was forced" : `margin ${short(margin, this.answer.isExact(this.shown))}`;
  }

  /** What the tip says of a cell. */
  describe({ row, expert }) {
    const { shown, answer } = this;
    const { layers, groups } = answer.facts;
    const chosen = this.get("mode") === "token" ? answer.chosen(shown, row) : [];
    if (expert < 0) return [`layer ${layers[row]}`, ...(chosen.length ? [this.cut(row)] : [])];
    const lines = [`layer ${layers[row]}, expert ${expert}${groups > 1 ? `, group ${answer.group(expert)}` : ""}`];
    const choice = chosen.find((each) => each.expert === expert);
    if (choice) lines.push(`rank ${choice.rank + 1}, gate ${short(choice.gate, answer.isExact(shown))}`, `layer ${layers[row]}: ${this.cut(row)}`);
    else if (this.get("mode") === "token") lines.push("not chosen by this token");
    if (choice?.forced) lines.push("forced by an edit");
    const times = answer.counts(row)[expert];
    lines.push(`chosen by ${plural(times, "token")} of ${number(answer.newest + 1)}`);
    if (times) lines.push(`sum of gates ${short(answer.counts(row, "gate")[expert])}`);
    return lines;
  }

  /** Eight bits are enough to draw; what is read as a number is asked for in full once the token stays. */
  askExact() {
    const token = this.shown;
    if (token < 0 || this.answer.isExact(token) || this.wanted === token) return;
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
