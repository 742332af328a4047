// What tints the tokens of the replies in the token view, and the legend that says so: "colour by" one number of each.

const COLUMNS = { probability: 2, entropy: 4, ms: 7, cache_bytes: 8 }; // of a step, see inspect.js
const OF_READING = ["margin", "expert"];
const NOTES = { probability: ", before sampling", entropy: "of the model's distribution", ms: "of its step", cache_bytes: "held after it" };

/** How the tokens of one reply were read: the strongest expert of every layer, and the narrowest margin of all. */
export class Readings {
  constructor() {
    this.experts = [];
    this.margins = [];
    this.rows = [];
  }

  /** Tokens `from`, `from` + 1 ...; see tint.py. False if some are missing before them. */
  take({ from, experts, margins, rows }, facts) {
    if (from > this.margins.length) return false;
    const wide = facts.experts > 255;
    const ids = unpacked(wide ? Uint16Array : Uint8Array, experts);
    const narrowest = unpacked(Float32Array, margins);
    const width = facts.layers.length;
    unpacked(Uint8Array, rows).forEach((row, n) => {
      this.experts[from + n] = ids.subarray(n * width, (n + 1) * width);
      this.margins[from + n] = narrowest[n];
      this.rows[from + n] = row;
    });
    this.unused = wide ? 65535 : 255;
    return true;
  }

  margin = (index) => this.margins[index] ?? NaN;

  expert(index, row) {
    const expert = this.experts[index]?.[row] ?? this.unused;
    return expert === this.unused ? NaN : expert;
  }
}

function unpacked(Type, text) {
  return new Type(Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer);
}

/** `view` is the chat: its facts, its path and its way to the kernel are read, not kept. */
export class Tint {
  constructor(view) {
    this.view = view;
    this.asked = false;
    this.box = element("select", {});
    this.box.addEventListener("change", () => this.change());
    this.legend = element("span", { className: "wbc-ends" });
    this.element = element("div", { className: "wbc-legend", hidden: true }, element("label", {}, "colour by", this.box), this.legend);
  }

  /** The colours that this model has. */
  offer() {
    const { colours = [], layers = [] } = this.view.facts;
    const options = colours.flatMap(({ name, label }) => {
      if (name === "expert") return layers.map((layer) => [`expert ${layer}`, `${label}, layer ${layer}`]);
      return name === "margin" && !layers.length ? [] : [[name, label]];
    });
    if (this.box.options.length === options.length) return;
    this.box.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
  }

  show(on) {
    this.element.hidden = !on;
    this.ask();
  }

  change() {
    this.ask();
    this.view.card.hide();
    this.draw();
  }

  /** Tells the kernel whether it is to say how tokens were read; `anew` where it does not know any more. */
  ask(anew = false) {
    const wanted = !this.element.hidden && OF_READING.includes(this.name);
    if (wanted === this.asked && !(anew && wanted)) return;
    this.asked = wanted;
    this.view.tell({ kind: "readings", view: this.view.id, on: wanted });
  }

  take(parts) {
    if (!this.asked) return; // another view of this panel wanted them
    for (const part of parts) {
      const message = this.view.messages.get(part.turn);
      if (message && !message.readings.take(part, this.view.facts)) return this.ask(true);
    }
  }

  get name() {
    return this.box.value.split(" ")[0];
  }

  get row() {
    return this.view.facts.layers.indexOf(Number(this.box.value.split(" ")[1]));
  }

  // Numbers

  /** NaN: not measured. */
  value(message, index, name = this.name) {
    if (name === "margin") return message.readings.margin(index);
    return name === "expert" ? message.readings.expert(index, this.row) : message.steps[index][COLUMNS[name]] ?? NaN;
  }

  /** Of tokens that together make a character the most striking value, or the last one's expert and cache. */
  ofGroup(message, { first, last }) {
    const { name } = this;
    if (name === "expert" || name === "cache_bytes") return this.value(message, last);
    const values = message.steps.slice(first, last + 1).map((_, n) => this.value(message, first + n));
    return name === "probability" || name === "margin" ? Math.min(...values) : Math.max(...values);
  }

  /** What the card says of a token beside its probabilities. */
  describe(message, index) {
    if (this.element.hidden) return [];
    const { name, view } = this;
    const { layers, experts, groups, colours } = view.facts;
    const known = ["ms", "cache_bytes"].filter((each) => !Number.isNaN(this.value(message, index, each)));
    const lines = [known.map((each) => `${colours.find((colour) => colour.name === each).label} ${inWords(this.value(message, index, each), each)}`).join(" \u00b7 ")];
    const value = this.value(message, index);
    if (Number.isNaN(value)) lines.push(`${this.box.selectedOptions[0].text}: not measured`);
    else if (name === "margin") lines.push(`margin ${inWords(value, name)} in layer ${layers[message.readings.rows[index]]}, the narrowest`);
    else if (name === "expert") lines.push(`layer ${layers[this.row]}: expert ${value}${groups > 1 ? `, of group ${bandOf(value, { experts, groups }).number}` : ""}`);
    return lines.filter(Boolean);
  }

  // Drawing

  draw() {
    const colour = this.view.facts.colours?.find(({ name }) => name === this.name);
    if (this.element.hidden || !colour) return;
    const replies = this.view.path.filter((message) => message.isReply);
    const values = replies.flatMap((message) => message.steps.map((_, index) => this.value(message, index)));
    const known = values.filter((value) => !Number.isNaN(value));
    const ends = colour.name === "expert" ? [0, 1] : scaleOf(colour, known);
    const key = `${this.box.value} ${ends}`;
    for (const message of replies) this.paint(message, colour, ends, key);
    this.drawLegend(colour, ends, known.length < values.length);
  }

  /** What was measured stays; after it, tokens may still be read. */
  paint(message, colour, ends, key) {
    if (message.painted.key !== key) message.painted = { key, to: 0 };
    for (let n = message.painted.to; n < message.spans.length; n++) {
      const value = this.ofGroup(message, message.groups.list[n]);
      this.tint(message.spans[n], value, colour, ends);
      if (!Number.isNaN(value)) message.painted.to = n + 1;
    }
    if (message.hasEnd) this.tint(message.tail, this.ofGroup(message, message.group("end")), colour, ends);
  }

  tint({ classList, style }, value, { name, power }, ends) {
    const known = !Number.isNaN(value);
    classList.toggle("wbc-unmeasured", !known);
    classList.toggle("wbc-banded", known && name === "expert");
    classList.toggle("wbc-cost", known && COSTS.includes(name));
    if (known && name === "expert") {
      const { hue, strength } = bandOf(value, this.view.facts);
      style.setProperty("--hue", hue);
      style.setProperty("--strength", `${strength}%`);
    } else style.setProperty("--tint", known ? shareOf(value, ends, power).toFixed(3) : "0");
  }

  drawLegend(colour, ends, incomplete) {
    const { name, unit } = colour;
    const { layers } = this.view.facts;
    const parts = [];
    if (name === "expert") parts.push(...bandsOf(this.view.facts, "wbc"));
    else {
      const [clear, full] = endsOf(colour, ends);
      const bar = element("i", { className: COSTS.includes(name) ? "wbc-scale wbc-costs" : "wbc-scale" });
      const note = name === "margin" ? `narrowest of ${layers.length === 1 ? "one layer" : `${layers.length} layers`}, ${unit}` : name === "probability" ? unit + NOTES[name] : NOTES[name];
      parts.push(element("span", {}, clear), bar, element("span", {}, full), element("span", {}, note));
    }
    if (incomplete) parts.push(element("span", { className: "wbc-band" }, element("i", { className: "wbc-swatch wbc-unmeasured" }), "not measured"));
    this.legend.replaceChildren(...parts);
  }
}
