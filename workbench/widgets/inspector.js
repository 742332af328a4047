// The token inspector: what chose a token, and how every layer routed it. The kernel sends one token at a time.

class InspectorView extends View {
  build() {
    this.seen = null;
    this.bars = new Bars((expert) => this.choose(this.layer, expert));
    this.head = element("header", { className: "wbi-head" });
    this.context = element("div", { className: "wbi-context", dir: "auto" });
    this.origin = element("section", { className: "wbi-part wbi-origin" });
    this.layers = element("div", { className: "wbi-layers", role: "listbox", tabIndex: 0, "aria-orientation": "horizontal" });
    this.layers.addEventListener("click", (event) => {
      const column = event.target.closest("[data-layer]");
      if (column) this.choose(Number(column.dataset.layer), -1);
    });
    this.layersPart = element("section", { className: "wbi-part" },
      element("div", { className: "wbi-line" }, element("h4", { className: "wbi-heading" }, "Layers"),
        element("span", { className: "wbi-soft" }, "height: margin at the cut (square root). Low is a close call. \u2191 \u2193 go through them.")),
      this.layers);
    this.caption = element("h3", { className: "wbi-layer" });
    this.table = element("section", { className: "wbi-part wbi-table" });
    this.parts = element("section", { className: "wbi-part wbi-sides" });
    this.routing = element("div", {}, this.layersPart, this.caption, this.bars.element, this.table, this.parts);
    this.empty = element("div", { className: "wbi-empty" }, "No token is open. Choose one in a linked view, or with .open(token).");
    this.unread = element("section", { className: "wbi-part" });
    this.body = element("div", { className: "wbi-body" }, this.context, this.origin, this.unread, this.routing);
    this.amount = element("input", { className: "wbi-amount", type: "number", step: "0.5", min: "0", value: "2", "aria-label": "Bias by, in logits" });
    this.scope = element("select", { className: "wbi-scope", "aria-label": "Where an edit acts" },
      element("option", { value: "" }, "every token"), element("option", { value: "here" }, "this token only"));
    this.asked = element("p", { className: "wbi-soft" });
    this.root.classList.add("wbv", "wbi");
    this.root.setAttribute("role", "region");
    this.root.setAttribute("aria-label", "Token inspector");
    this.root.append(this.head, this.notice, this.empty, this.body, this.said);
    this.root.addEventListener("keydown", (event) => this.onKey(event), { signal: this.ended.signal });
    this.draw();
  }

  // What the kernel says

  on_show({ inspection, layer, expert, editable, browsable }, [buffer]) {
    const same = this.seen && inspection && this.seen.token === inspection.token;
    this.seen = inspection;
    this.waiting = null;
    Object.assign(this, { layer, expert, editable, browsable });
    if (inspection) {
      const size = inspection.n_experts;
      const bytes = buffer ? buffer.buffer.slice(buffer.byteOffset, buffer.byteOffset + buffer.byteLength) : new ArrayBuffer(0);
      const scores = new Float32Array(bytes);
      this.routed = inspection.layers.map((each, place) => new Routed(each, scores.subarray(place * size, (place + 1) * size), inspection));
      if (!same) this.asked.textContent = "";
      if (!same) this.announce(`Token ${visible(inspection.text)}, position ${inspection.position}. ${this.current?.sentence ?? ""}`);
    }
    this.drawSoon();
  }

  on_chosen({ layer, expert, view }) {
    if (view === this.id) return; // drawn already, and the reader may have gone on since
    Object.assign(this, { layer, expert });
    this.drawSoon();
  }

  on_edited({ text }) {
    this.announce(`Asked for: ${text}`);
    this.asked.textContent = `Asked for: ${text}`;
  }

  on_notice(message) {
    this.waiting = null;
    super.on_notice(message);
  }

  // What the reader does

  get current() {
    return this.routed?.find((each) => each.layer === this.layer);
  }

  choose(layer, expert) {
    if (layer === this.layer && expert === this.expert) return;
    const moved = layer !== this.layer;
    Object.assign(this, { layer, expert });
    this.tell({ kind: "choose", layer, expert });
    this.announce(moved ? this.current.sentence : this.bars.words(expert));
    this.drawSoon();
  }

  step(by) {
    const places = this.routed.map((each) => each.layer);
    const next = places[places.indexOf(this.layer) + by];
    if (next !== undefined) this.choose(next, -1);
  }

  go(by) {
    const token = (this.waiting ?? this.seen.token) + by;
    if (!this.browsable || token < 0) return;
    this.waiting = token;
    this.tell({ kind: "open", token });
    this.drawSoon();
  }

  edit(kind, expert, sign = 1) {
    this.expert = expert;
    this.drawSoon();
    const amount = sign * Math.abs(Number(this.amount.value) || 0);
    this.tell({ kind: "edit", edit: kind, layer: this.layer, expert, amount, here: this.scope.value === "here" });
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation(); // plain keys are not shortcuts of the notebook around us
    if (!this.seen || event.target.matches("input, select")) return;
    const { key } = event;
    const inLayers = event.target === this.layers;
    if (key === "ArrowDown" || (inLayers && key === "ArrowRight")) this.step(1);
    else if (key === "ArrowUp" || (inLayers && key === "ArrowLeft")) this.step(-1);
    else if (key === "PageDown") this.go(1);
    else if (key === "PageUp") this.go(-1);
    else if (key === "Escape" && this.expert >= 0) this.choose(this.layer, -1);
    else if (key === "Enter" && event.target === this.bars.plot) this.table.querySelector("tr.wbi-current button")?.focus();
    else return;
    event.preventDefault();
  }

  // Drawing

  draw() {
    const { seen } = this;
    this.empty.hidden = Boolean(seen);
    this.body.hidden = !seen;
    this.head.hidden = !seen;
    if (!seen) return;
    this.drawHead();
    fill(this.context, element("span", {}, seen.before), element("mark", {}, seen.text || "\u2205"), element("span", {}, seen.after));
    this.drawOrigin();
    const layer = this.current;
    this.routing.hidden = !layer;
    this.unread.hidden = Boolean(layer);
    fill(this.unread, missing("routing", seen.how.layers));
    if (!layer) return;
    this.drawLayers();
    fill(this.caption, `Layer ${layer.layer}`, element("span", { className: "wbi-soft" },
      `which experts read this token, to predict the next one`));
    this.bars.draw(layer, this.expert, seen.how);
    this.drawTable(layer);
    this.drawSides(layer);
  }

  drawHead() {
    const { seen } = this;
    const turn = (label, title, by) => {
      const button = element("button", { className: "wbi-button", type: "button", title, "aria-label": title, hidden: !this.browsable, disabled: by < 0 && seen.token === 0 }, label);
      button.addEventListener("click", () => this.go(by));
      return button;
    };
    const facts = [["id", seen.id], ["position", seen.position], ["from", seen.phase === "prefill" ? "the prompt" : "the model"]];
    if (seen.probability !== null) facts.push(["probability", percent(seen.probability)]);
    if (seen.logprob !== null) facts.push(["before sampling", percent(Math.exp(seen.logprob))]);
    if (seen.entropy !== null) facts.push(["entropy", `${seen.entropy.toFixed(2)} nats`]);
    if (seen.ms !== null) facts.push(["time", `${seen.ms.toFixed(1)} ms`]);
    const focused = this.head.contains(document.activeElement) ? [...this.head.querySelectorAll("button")].indexOf(document.activeElement) : -1;
    fill(this.head, 
      element("code", { className: "wbi-token" }, visible(seen.text)),
      element("div", { className: "wbi-facts" }, facts.map(([name, value]) => element("span", {}, element("small", {}, name), ` ${value}`))),
      element("span", { className: "wbi-space" }),
      element("span", { className: "wbi-soft" }, this.waiting == null ? seen.model : `opening token ${this.waiting} \u2026`),
      turn("\u2039", "Previous token (Page Up)", -1), turn("\u203a", "Next token (Page Down)", 1));
    if (focused >= 0) this.head.querySelectorAll("button")[focused]?.focus();
  }

  drawOrigin() {
    const { seen } = this;
    const title = element("h4", { className: "wbi-heading" }, "What chose it");
    const edits = seen.edits.length ? element("p", { className: "wbi-soft" }, `Edits in force: ${seen.edits.join("; ")}.`) : null;
    if (seen.phase === "prefill" && !seen.alternatives) {
      fill(this.origin, title, element("p", { className: "wbi-soft" }, "It is part of the prompt: nobody chose it."), edits);
      return;
    }
    if (!seen.alternatives) {
      fill(this.origin, title, missing("alternatives", seen.how.alternatives), edits);
      return;
    }
    const most = Math.max(...seen.alternatives.map(([, , before, after]) => Math.max(before ?? 0, after ?? 0)), 1e-9);
    const bar = (value, kind) => {
      const stick = element("i", { className: `wbi-share wbi-${kind}` });
      stick.style.width = `${(120 * (value ?? 0)) / most}px`;
      return element("td", { className: "wbi-share-cell" }, stick, element("span", {}, value === 0 && kind === "after" ? "cut" : percent(value)));
    };
    const rows = seen.alternatives.map(([id, text, before, after]) => element("tr", { className: id === seen.id ? "wbi-current" : "" },
      element("td", {}, element("code", {}, visible(text)), id === seen.id ? " \u2713" : ""), bar(before, "before"), bar(after, "after")));
    fill(this.origin, title, element("table", {}, element("tr", {}, ["token", "model", "after sampling"].map((name) => element("th", {}, name))), rows), edits);
  }

  drawLayers() {
    const most = Math.max(...this.routed.map((each) => Math.abs(each.margin ?? 0)), 1e-9);
    this.layers.setAttribute("aria-label", "Layers. Arrows go through them.");
    fill(this.layers, ...this.routed.map((each) => {
      const stick = element("i", { className: each.margin < 0 ? "wbi-stick wbi-below" : "wbi-stick" });
      stick.style.height = `${Math.max(3, 100 * Math.sqrt(Math.abs(each.margin ?? 0) / most))}%`;
      return element("div", { className: "wbi-column", role: "option", "data-layer": each.layer, title: each.sentence,
        id: `${this.id}-${each.layer}`, "aria-selected": String(each.layer === this.layer), "aria-label": each.sentence },
      element("div", { className: "wbi-shaft" }, stick), element("span", {}, String(each.layer)));
    }));
    this.layers.setAttribute("aria-activedescendant", `${this.id}-${this.layer}`);
  }

  drawTable(layer) {
    const { seen } = this;
    const shown = [...layer.experts];
    if (this.expert >= 0 && !shown.includes(this.expert)) shown.push(this.expert);
    const names = ["expert", ...(layer.grouped ? ["group"] : []), ...(layer.scores ? ["score"] : []), "gate", "margin", ...(layer.lens ? ["pushes towards"] : [])];
    const head = names.map((name) => element("th", {}, name));
    const focus = this.table.contains(document.activeElement) ? document.activeElement : null;
    if (this.editable) head.push(element("th"));
    const table = element("table", { className: layer.lens || this.editable ? "" : "wbi-plain" }, element("tr", {}, head), shown.map((expert) => this.row(layer, expert)));
    const unknown = layer.lens ? null : missing("what each expert pushes towards", seen.how.lens);
    const how = this.editable ? element("span", { className: "wbi-soft" }, "edit for ", this.scope, " bias by ", this.amount, " logits") : null;
    fill(this.table, element("div", { className: "wbi-line" }, element("h4", { className: "wbi-heading" }, "Experts"), element("span", { className: "wbi-space" }), how),
      table, unknown, this.editable ? this.asked : null);
    if (focus) (focus.isConnected ? focus : this.table.querySelector(`[data-action="${focus.dataset.action}"]`))?.focus();
  }

  row(layer, expert) {
    const slot = layer.slot.get(expert);
    const cells = [element("td", {}, element("b", {}, String(expert)), slot === undefined ? element("small", {}, MARKS[layer.mark(expert)]) : layer.forced.has(expert) ? element("small", {}, "forced") : null)];
    const number = (value) => element("td", { className: "wbi-number" }, value);
    if (layer.grouped) cells.push(number(String(layer.group(expert))));
    if (layer.scores) cells.push(number(figure(layer.scores[expert])));
    cells.push(number(slot === undefined ? "\u2013" : figure(layer.gates[slot])), number(slot === undefined ? "\u2013" : figure(layer.margins[slot])));
    if (layer.lens) cells.push(element("td", { className: "wbi-words" }, (layer.lens[expert] ?? []).map(([text, logit]) => element("code", { title: `${figure(logit)} logits` }, visible(text)))));
    if (this.editable) {
      const button = (label, title, action, ...rest) => {
        const made = element("button", { className: "wbi-button", type: "button", title, "aria-label": `${label}: expert ${expert}`, "data-action": `${label}-${expert}` }, label);
        made.addEventListener("click", () => this.edit(action, expert, ...rest));
        return made;
      };
      cells.push(element("td", { className: "wbi-actions" },
        button("Ablate", "The router cannot choose it", "ablate"), button("Force", "It is always among the chosen", "force"),
        button("Bias \u2212", "Lower its router logit", "bias", -1), button("Bias +", "Raise its router logit", "bias", 1)));
    }
    return element("tr", { className: expert === this.expert ? "wbi-current" : "" }, cells);
  }

  drawSides(layer) {
    const title = element("h4", { className: "wbi-heading" }, "Shared and routed experts");
    if (layer.routed === null && layer.shared === null) {
      fill(this.parts, title, missing("lengths", this.seen.how.parts));
      return;
    }
    const most = Math.max(layer.routed ?? 0, layer.shared ?? 0, 1e-9);
    const row = (name, value) => {
      const stick = element("i", { className: `wbi-share wbi-${name}` });
      stick.style.width = `${(120 * (value ?? 0)) / most}px`;
      return element("tr", {}, element("th", {}, name), element("td", { className: "wbi-share-cell" }, stick, element("span", {}, value === null ? "none" : figure(value))));
    };
    const cosine = layer.cosine === null ? "" : `Cosine between the two: ${figure(layer.cosine)}${Math.abs(layer.cosine) < 0.2 ? ", almost at right angles" : layer.cosine > 0 ? ", partly the same way" : ", partly against each other"}.`;
    fill(this.parts, title, element("table", {}, row("routed", layer.routed), row("shared", layer.shared)),
      element("p", { className: "wbi-soft" }, `Length of what each adds to the residual stream. ${cosine}`));
  }
}

export default showing(InspectorView);
