// The token strip. One span a token; colours are worked out here from the numbers that came with it.

const PROMPT = 1;
const SPECIAL = 2;
const ORDER = ["1st", "2nd", "3rd"];

class StripView extends LiveView {
  get ownTraits() {
    return ["colour_by", "slot"];
  }

  build() {
    this.body = element("div", { className: "wbr-strip", tabIndex: 0, role: "listbox", "aria-label": "Tokens; left and right go through them" });
    this.start({ live: true, layers: [], experts: 0, k: 0, groups: 1, breaks: [], colours: [] });
    this.colour = this.select("colour by", (value) => this.set({ colour_by: value }));
    this.layer = this.select("layer", (value) => this.set({ layer: Number(value), expert: -1 }));
    this.slot = this.select("choice", (value) => this.set({ slot: Number(value) }));
    this.ids = element("button", { className: "wbr-button", type: "button", title: "Write the number of the expert beside each token", "aria-pressed": "false" }, "ids");
    this.ids.addEventListener("click", () => {
      this.ids.setAttribute("aria-pressed", String(this.ids.getAttribute("aria-pressed") !== "true"));
      this.drawSoon();
    });
    this.legend = element("div", { className: "wbr-legend wbr-top" });
    this.readout = element("div", { className: "wbr-readout", "aria-live": "polite" });
    this.tip = new Tip(this.root);
    this.body.addEventListener("click", ({ target }) => {
      const token = this.numberOf(target);
      this.tip.hide(); // the line below says the same
      if (token >= 0) this.set({ token: token === this.get("token") ? -1 : token });
    });
    this.body.addEventListener("pointerover", (event) => {
      const token = this.numberOf(event.target);
      if (token >= 0) this.tip.show(event, this.describe(token));
      else this.tip.hide();
    });
    this.body.addEventListener("pointerleave", () => this.tip.hide());
    this.body.addEventListener("keydown", (event) => this.onKey(event));
    this.body.addEventListener("scroll", () => {
      const { scrollTop, scrollHeight, clientHeight } = this.body;
      this.atEnd = scrollHeight - scrollTop - clientHeight < 30;
    });
    this.root.classList.add("wbv", "wbr");
    this.root.append(
      element("header", { className: "wbr-head" }, element("strong", { className: "wbr-title" }, "Tokens"), this.colour.label, this.layer.label, this.slot.label, this.ids,
        element("span", { className: "wbr-space" }), this.legend),
      this.notice, this.body, this.readout, this.said);
  }

  select(name, action) {
    const box = element("select", {});
    box.addEventListener("change", () => action(box.value));
    return { box, label: element("label", {}, name, box) };
  }

  // What the kernel says

  start(facts) {
    this.facts = facts;
    this.pieces = [];
    this.spans = [];
    this.measured = new Grown(Float32Array, 5);
    this.tokenIds = new Grown(Int32Array, 1);
    this.flags = new Grown(Uint8Array, 1);
    this.chosen = new Grown(Int16Array, 1);
    this.margins = new Grown(Float32Array, 1);
    this.gates = new Grown(Float32Array, 1);
    this.breaks = new Map(facts.breaks);
    this.body.replaceChildren();
    this.painted = { key: "", to: 0 };
    this.atEnd = true;
  }

  on_show(message, buffers) {
    this.start(message.facts);
    this.known = true;
    const options = (box, list) => box.replaceChildren(...list.map(([value, text]) => element("option", { value: String(value) }, text)));
    options(this.colour.box, message.facts.colours.map(({ name, label }) => [name, label]));
    options(this.layer.box, message.facts.layers.map((layer) => [layer, String(layer)]));
    options(this.slot.box, Array.from({ length: message.facts.k }, (_, slot) => [slot, ORDER[slot] ?? `${slot + 1}th`]));
    this.take(message, buffers);
  }

  on_tokens(message, buffers) {
    if (!this.known) return; // all of it is asked for already
    if (message.from > this.pieces.length) this.ask();
    else this.take(message, buffers);
  }

  on_column(_, buffers) {
    this.takeColumn(0, buffers);
    this.painted.key = "";
    this.drawSoon();
  }

  take({ from, pieces }, [measured, ids, flags, ...column]) {
    this.measured.write(from, numbers(Float32Array, measured));
    this.tokenIds.write(from, numbers(Int32Array, ids));
    this.flags.write(from, numbers(Uint8Array, flags));
    this.takeColumn(from, column);
    for (const span of this.spans.splice(from)) span.remove();
    for (const block of [...this.body.querySelectorAll(".wbr-block")]) if (!block.querySelector(".wbr-token")) block.remove();
    this.pieces.length = from;
    for (const piece of pieces) this.add(piece);
    this.painted.to = Math.min(this.painted.to, from);
    this.drawSoon();
  }

  takeColumn(from, [chosen, margins, gates]) {
    this.chosen.write(from, numbers(Int16Array, chosen));
    this.margins.write(from, numbers(Float32Array, margins));
    this.gates.write(from, numbers(Float32Array, gates));
  }

  add(piece) {
    const token = this.pieces.length;
    const [flags] = this.flags.row(token);
    const prompt = Boolean(flags & PROMPT);
    const title = this.breaks.get(token);
    let block = this.body.lastElementChild;
    if (!block || title !== undefined || block.classList.contains("wbr-prompt") !== prompt) {
      if (title !== undefined) this.body.append(element("div", { className: "wbr-sequence" }, title));
      block = element("div", { className: prompt ? "wbr-block wbr-prompt" : "wbr-block", role: "presentation" });
      this.body.append(block);
    }
    const span = element("span", { className: flags & SPECIAL ? "wbr-token wbr-special" : "wbr-token", role: "option", id: `${this.id}-${token}`, "data-token": String(token) }, piece.replace(/\n/g, "\u21b5\n") || "\u2205");
    block.append(span);
    this.pieces.push(piece);
    this.spans.push(span);
  }

  // What is looked at

  numberOf(target) {
    const span = target.closest?.(".wbr-token");
    return span ? Number(span.dataset.token) : -1;
  }

  get row() {
    return Math.max(0, this.facts.layers.indexOf(this.get("layer")));
  }

  onKey(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity, PageUp: -20, PageDown: 20 }[event.key];
    const line = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const last = this.pieces.length - 1;
    if (event.ctrlKey || event.metaKey || event.altKey || last < 0) return;
    const now = Math.min(this.get("token"), last);
    if (event.key === "Escape") this.set({ token: -1 });
    else if (line && now >= 0) this.set({ token: this.beside(now, line) });
    else if (step || line) this.set({ token: now < 0 ? (step < 0 ? last : 0) : Math.max(0, Math.min(last, now + step)) });
    else return;
    event.preventDefault();
  }

  /** The token nearest above or below. */
  beside(token, line) {
    const own = this.spans[token].getBoundingClientRect();
    let best = token;
    let line_top = null;
    for (let next = token + line; next >= 0 && next < this.spans.length; next += line) {
      const box = this.spans[next].getClientRects()[0];
      if (Math.abs(box.top - own.top) < 4) continue;
      if (line_top === null) line_top = box.top;
      else if (Math.abs(box.top - line_top) > 4) break;
      if (best === token || Math.abs(box.left - own.left) < Math.abs(this.spans[best].getClientRects()[0].left - own.left)) best = next;
    }
    return best;
  }

  // Numbers

  /** What tints a token; NaN: not measured. */
  value(token, name = this.get("colour_by")) {
    const [logprob, sampled, entropy, ms, cache] = this.measured.row(token);
    const values = { probability: Math.exp(logprob), surprise: -logprob, sampled, entropy, ms, cache_bytes: cache };
    if (name === "margin") return this.margins.row(token)[0];
    return name === "expert" ? (this.chosen.row(token)[0] < 0 ? NaN : this.chosen.row(token)[0]) : values[name];
  }

  /** [value without tint, value with full tint] */
  scale(colour) {
    const known = this.pieces.map((_, token) => this.value(token, colour.name));
    return scaleOf(colour, known.filter((value) => !Number.isNaN(value)));
  }

  // Drawing

  draw() {
    const { facts } = this;
    const name = this.get("colour_by");
    const colour = facts.colours.find((each) => each.name === name) ?? { name, label: name, unit: "", clear: 0, full: 1, power: 1 };
    const routed = facts.layers.length > 0;
    this.colour.box.value = name;
    this.layer.box.value = String(facts.layers[this.row] ?? "");
    this.slot.box.value = String(Math.min(this.get("slot"), facts.k - 1));
    this.layer.label.hidden = !routed || (name !== "expert" && name !== "margin");
    this.slot.label.hidden = this.ids.hidden = name !== "expert" || !routed;
    for (const option of this.colour.box.options) option.disabled = !routed && ["expert", "margin"].includes(option.value);
    const ends = name === "expert" ? [0, 1] : this.scale(colour);
    const key = `${name} ${ends} ${this.ids.getAttribute("aria-pressed")}`;
    if (key !== this.painted.key) this.painted = { key, to: 0 };
    for (let token = this.painted.to; token < this.spans.length; token++) this.paint(token, colour, ends);
    this.painted.to = this.spans.length;
    this.drawLegend(colour, ends);
    this.drawSelected();
  }

  paint(token, { name, power }, ends) {
    const { classList, style, dataset } = this.spans[token];
    const value = this.value(token, name);
    const known = !Number.isNaN(value);
    classList.toggle("wbr-unmeasured", !known);
    classList.toggle("wbr-banded", known && name === "expert");
    classList.toggle("wbr-cost", known && COSTS.includes(name));
    classList.toggle("wbr-read", this.gates.row(token)[0] !== 0);
    delete dataset.expert;
    if (known && name === "expert") {
      const { hue, strength } = bandOf(value, this.facts);
      style.setProperty("--hue", hue);
      style.setProperty("--strength", `${strength}%`);
      if (this.ids.getAttribute("aria-pressed") === "true") dataset.expert = value;
    } else {
      style.setProperty("--tint", known ? shareOf(value, ends, power).toFixed(3) : "0");
    }
  }

  drawLegend(colour, ends) {
    const { name, unit } = colour;
    const parts = [];
    const unmeasured = this.spans.reduce((count, _, token) => count + Number.isNaN(this.value(token, name)), 0);
    if (name === "expert") parts.push(...bandsOf(this.facts, "wbr"));
    else {
      const [clear, full] = endsOf(colour, ends);
      const bar = element("i", { className: COSTS.includes(name) ? "wbr-scale wbr-costs" : "wbr-scale wbr-tints" });
      parts.push(element("span", {}, clear), bar, element("span", {}, full));
      if (unit && !["nats", "ms", "bytes"].includes(unit)) parts.push(element("span", {}, unit));
    }
    if (unmeasured) parts.push(element("i", { className: "wbr-swatch wbr-unmeasured" }), element("span", {}, name === "expert" ? "not read" : "not measured"));
    const { layers } = this.facts;
    if (this.get("expert") >= 0 && layers.includes(this.get("layer"))) {
      const count = this.spans.reduce((sum, _, token) => sum + (this.gates.row(token)[0] !== 0), 0);
      parts.push(element("span", { className: "wbr-read" }, `read by expert ${this.get("expert")} of layer ${this.get("layer")}`), element("span", {}, `(${number(count)})`));
    }
    this.legend.replaceChildren(...parts);
  }

  drawSelected() {
    const token = this.get("token");
    const span = this.spans[token];
    if (this.marked !== span) {
      this.marked?.classList.remove("wbr-selected");
      this.marked?.setAttribute("aria-selected", "false");
      span?.classList.add("wbr-selected");
      span?.setAttribute("aria-selected", "true");
      this.marked = span;
      if (span) this.reveal(span);
    }
    if (span) this.body.setAttribute("aria-activedescendant", span.id);
    else {
      this.body.removeAttribute("aria-activedescendant");
      if (this.facts.live && this.atEnd) this.body.scrollTop = this.body.scrollHeight;
    }
    const [head, ...lines] = span ? this.describe(token) : [`${plural(this.pieces.length, "token")}. Choose one to see its numbers and follow it in linked views.`];
    const said = [head, ...lines].join(" \u00b7 ");
    if (this.readout.textContent !== said) this.readout.textContent = said;
  }

  reveal(span) {
    const { scrollTop, clientHeight } = this.body;
    if (span.offsetTop < scrollTop) this.body.scrollTop = span.offsetTop - 8;
    else if (span.offsetTop + span.offsetHeight > scrollTop + clientHeight) this.body.scrollTop = span.offsetTop + span.offsetHeight + 8 - clientHeight;
  }

  describe(token) {
    const [id] = this.tokenIds.row(token);
    const [flags] = this.flags.row(token);
    const lines = [`token ${token} '${visible(this.pieces[token])}'`, `${flags & PROMPT ? "prompt" : "answer"}${id >= 0 ? `, id ${id}` : ""}`];
    const absent = [];
    for (const { name, label } of this.facts.colours) {
      if (name === "expert" || (name === "margin" && !this.facts.layers.length)) continue;
      const value = this.value(token, name);
      if (Number.isNaN(value)) absent.push(label);
      else if (name === "margin") lines.push(`layer ${this.facts.layers[this.row]}: expert ${this.chosen.row(token)[0]}, margin ${inWords(value, name)}`);
      else lines.push(`${label} ${inWords(value, name)}`);
    }
    if (absent.length) lines.push(`not measured: ${absent.join(", ")}`);
    return lines;
  }
}

export default showing(StripView);
