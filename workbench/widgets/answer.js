// An answer as far as it was routed: every token's experts, gates and margins, unpacked, and how often each was chosen.

/** `facts`: {label, about, live, layers, experts, k, groups, kept}. Cells of a heat are rows of experts. */
class Answer {
  constructor(facts) {
    this.facts = facts;
    this.pieces = [];
    const rows = facts.layers.length;
    this.experts = new Grown(Int16Array, rows * facts.k);
    this.gates = new Grown(Float32Array, rows * facts.k);
    this.margins = new Grown(Float32Array, rows);
    this.heat = { count: new Float64Array(rows * facts.experts), gate: new Float64Array(rows * facts.experts) };
    this.newest = -1; // the last token that experts have read
    this.largest = { gate: 0, margin: 0 };
    this.exact = null; // the gates and margins of one token in full, all its slots
  }

  get length() {
    return this.pieces.length;
  }

  /** Tokens `from`, `from` + 1 ... in three buffers: ids [tokens, layers, k] in 8 bits or, for more than 255 experts,
   * in 16, all bits set where a slot is unused; gates [tokens, layers, k] as square roots of their share of `scale`;
   * margins of the last slot [tokens, layers] as square roots with a sign, -128 where there is none. */
  take({ from, pieces, scale }, [ids, gates, margins]) {
    if (from < this.length) this.forget(from);
    const wide = this.facts.experts > 255;
    const unused = wide ? 65535 : 255;
    this.experts.write(from, Int16Array.from(numbers(wide ? Uint16Array : Uint8Array, ids), (id) => (id === unused ? -1 : id)));
    this.gates.write(from, Float32Array.from(numbers(Uint8Array, gates), (code) => scale * (code / 255) ** 2));
    this.margins.write(from, Float32Array.from(numbers(Int8Array, margins), (code) => (code === -128 ? NaN : Math.sign(code) * (code / 127) ** 2)));
    for (const piece of pieces) this.pieces.push(piece);
    for (let token = from; token < this.length; token++) this.count(token, 1);
  }

  /** Adds one token to the heat, or takes it out again with sign -1. */
  count(token, sign) {
    const gates = this.gates.row(token);
    this.experts.row(token).forEach((expert, n) => {
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
    for (let token = from; token < this.length; token++) this.count(token, -1);
    this.pieces.length = from;
    this.newest = Math.min(this.newest, from - 1);
    if (this.exact?.token >= from) this.exact = null;
  }

  isExact = (token) => this.exact?.token === token;

  /** What a token chose in a row: [{expert, gate, rank, forced}], strongest first. Of more than the last one it is only
   * known that an edit forced it where the token is known in full. */
  chosen(token, row) {
    if (token < 0) return [];
    const { k } = this.facts;
    const gates = this.isExact(token) ? this.exact.gates : this.gates.row(token);
    const experts = this.experts.row(token).subarray(row * k, (row + 1) * k);
    const chosen = Array.from(experts, (expert, rank) => ({ expert, rank, gate: gates[row * k + rank], forced: false })).filter(({ expert }) => expert >= 0);
    if (this.isExact(token)) for (const choice of chosen) choice.forced = this.exact.margins[row * k + choice.rank] < 0;
    else if (chosen.length) chosen.at(-1).forced = this.margins.row(token)[row] < 0;
    return chosen;
  }

  /** By how much the last chosen one made the cut; negative: it was forced; NaN: nothing was chosen. */
  margin(token, row) {
    if (token < 0) return NaN;
    if (!this.isExact(token)) return this.margins.row(token)[row];
    const last = this.chosen(token, row).at(-1);
    return last ? this.exact.margins[row * this.facts.k + last.rank] : NaN;
  }

  counts = (row, by = "count") => this.heat[by].subarray(row * this.facts.experts, (row + 1) * this.facts.experts);

  /** For every row how many times the mean its busiest expert has; NaN for none. */
  busiest(by) {
    return this.facts.layers.map((_, row) => {
      const own = this.counts(row, by);
      const sum = own.reduce((total, value) => total + value, 0);
      return sum > 0 ? (own.reduce((most, value) => Math.max(most, value)) * own.length) / sum : NaN;
    });
  }

  group = (expert) => Math.floor(expert / (this.facts.experts / this.facts.groups));
}
