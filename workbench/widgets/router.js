// How one layer routed a token: all router scores as bars with the cut, groups kept and dropped, the chosen in a table.

const MARKS = {
  chosen: "chosen",
  forced: "forced by an edit",
  open: "not chosen",
  dropped: "in a dropped group: cannot be chosen",
};

/** One layer of an inspection, worked out for drawing. `scores` is a Float32Array of all experts, or null. */
export class Routed {
  constructor(layer, scores, facts) {
    Object.assign(this, layer);
    this.scores = layer.scored ? scores : null;
    this.size = facts.n_experts / facts.n_group;
    this.grouped = facts.n_group > 1;
    this.groups = facts.n_group;
    this.slot = new Map(layer.experts.map((expert, slot) => [expert, slot]));
    const known = layer.margins.filter((margin) => margin !== null);
    this.margin = known.length ? Math.min(...known) : null;
    this.forced = new Set(layer.experts.filter((_, slot) => layer.margins[slot] < 0));
  }

  group = (expert) => Math.floor(expert / this.size);
  isKept = (group) => !this.kept || this.kept.includes(group);

  mark(expert) {
    if (this.slot.has(expert)) return this.forced.has(expert) ? "forced" : "chosen";
    return this.isKept(this.group(expert)) ? "open" : "dropped";
  }

  /** All experts, best first; those without scores are the chosen alone. */
  get ranked() {
    if (!this.scores) return [...this.experts];
    return [...this.scores.keys()].sort((a, b) => this.scores[b] - this.scores[a] || a - b);
  }

  /** What the height of a bar stands for: the router's score, or the gate where no scores are known. */
  height = (expert) => (this.scores ? this.scores[expert] : this.gates[this.slot.get(expert)]);

  /** The best expert that could have been chosen and was not. */
  get runnerUp() {
    return this.scores ? this.ranked.find((expert) => this.mark(expert) === "open") : undefined;
  }

  /** Dropped experts that score above the weakest chosen one: what the limit to a few groups cost. */
  get passedOver() {
    if (!this.scores) return [];
    const weakest = Math.min(...this.experts.filter((expert) => !this.forced.has(expert)).map((expert) => this.scores[expert]));
    return this.ranked.filter((expert) => this.mark(expert) === "dropped" && this.scores[expert] > weakest);
  }

  get sentence() {
    const margin = this.margin === null ? "" : `; margin at the cut ${figure(this.margin)}`;
    return `Layer ${this.layer}: experts ${this.experts.join(", ")}${margin}`;
  }
}

/** The bars. `choose(expert)` is told of a click or an arrow key. */
export class Bars {
  constructor(choose) {
    this.choose = choose;
    this.byGroup = false;
    this.log = false;
    this.prefix = `wbi-${Math.random().toString(36).slice(2)}`;
    this.groupButton = this.toggle("By group", "Experts in their groups instead of best first", (on) => (this.byGroup = on));
    this.logButton = this.toggle("Log scale", "Equal ratios are equal heights: small scores can be told apart", (on) => (this.log = on));
    this.title = element("h4", { className: "wbi-heading" });
    this.top = element("span", { className: "wbi-top" });
    this.plot = element("div", { className: "wbi-bars", role: "listbox", tabIndex: 0, "aria-orientation": "horizontal" });
    this.plot.addEventListener("click", (event) => {
      const bar = event.target.closest("[data-expert]");
      if (bar) this.choose(Number(bar.dataset.expert));
    });
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
    this.readout = element("div", { className: "wbi-readout" });
    this.plot.addEventListener("pointerover", (event) => this.read(event.target.closest("[data-expert]")?.dataset.expert));
    this.plot.addEventListener("pointerleave", () => this.read());
    this.legend = element("div", { className: "wbi-legend" });
    this.strip = element("div", { className: "wbi-groups" });
    this.notes = element("div", { className: "wbi-notes" });
    this.element = element("section", { className: "wbi-part" },
      element("div", { className: "wbi-line" }, this.title, element("span", { className: "wbi-space" }), this.groupButton, this.logButton),
      element("div", { className: "wbi-plot" }, this.top, this.plot), this.readout, this.legend, this.strip, this.notes);
  }

  toggle(label, title, set) {
    const button = element("button", { className: "wbi-toggle", type: "button", title, "aria-pressed": "false" }, label);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      set(on);
      this.draw(this.routed, this.expert, this.how);
    });
    return button;
  }

  onKey(event) {
    const at = this.order.indexOf(this.expert);
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? 0 : at - 1, Home: 0, End: this.order.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.choose(this.order[Math.max(0, Math.min(to, this.order.length - 1))]);
  }

  draw(routed, expert, how) {
    Object.assign(this, { routed, expert, how });
    const all = routed.scores !== null;
    this.title.textContent = all ? `Router scores of all ${routed.scores.length} experts` : `Gates of the ${routed.experts.length} chosen experts`;
    this.groupButton.hidden = !all || !routed.grouped;
    this.logButton.hidden = !all;
    const byGroup = this.byGroup && all && routed.grouped;
    this.order = byGroup ? [...routed.scores.keys()] : routed.ranked;
    this.most = Math.max(...this.order.map(routed.height), 1e-9);
    const least = Math.min(...this.order.map(routed.height).filter((score) => score > 0));
    this.least = Math.max(least, this.most / 1e5) / 1.5; // so that the smallest can be seen too
    this.dense = this.order.length > 80;
    this.top.textContent = this.log && all ? `${figure(this.most)}, down to ${figure(this.least)} at the foot` : figure(this.most);
    this.plot.setAttribute("aria-label", `${this.title.textContent}, ${byGroup ? "by group" : "best first"}. Left and right arrows go through them.`);
    this.plot.className = `wbi-bars${this.dense ? " wbi-dense" : ""}${byGroup ? " wbi-by-group" : ""}${all ? "" : " wbi-few"}`;
    fill(this.plot, ...(byGroup ? this.inGroups() : this.inOrder()));
    const bar = this.plot.querySelector("[aria-selected=true]");
    if (bar) this.plot.setAttribute("aria-activedescendant", bar.id);
    else this.plot.removeAttribute("aria-activedescendant");
    this.explain(all);
    this.read();
  }

  inOrder() {
    const cut = this.routed.runnerUp;
    return this.order.flatMap((expert) => (expert === cut ? [this.cut(), this.bar(expert)] : [this.bar(expert)]));
  }

  inGroups() {
    const { routed } = this;
    const groups = Array.from({ length: routed.groups }, (_, group) => {
      const bars = this.order.filter((expert) => routed.group(expert) === group).map((expert) => this.bar(expert));
      const kept = routed.isKept(group);
      return element("div", { className: kept ? "wbi-group" : "wbi-group wbi-out", role: "presentation" },
        element("div", { className: "wbi-group-bars", role: "presentation" }, bars),
        element("div", { className: "wbi-group-name", role: "presentation" }, `${group} ${routed.kept ? (kept ? "kept" : "dropped") : ""}`));
    });
    const level = this.routed.runnerUp === undefined ? null : element("i", { className: "wbi-level" });
    if (level) level.style.bottom = `calc(${this.share(routed.scores[routed.runnerUp])} * var(--wbi-height) + var(--wbi-foot))`;
    return [...groups, level];
  }

  cut() {
    return element("i", { className: "wbi-cut", role: "presentation" }, element("span", {}, "cut"));
  }

  share(score) {
    if (!this.log) return Math.max(0, score / this.most);
    return Math.max(0, Math.log(Math.max(score, 1e-30) / this.least) / Math.log(this.most / this.least));
  }

  bar(expert) {
    const mark = this.routed.mark(expert);
    const stick = element("i", { className: "wbi-stick" });
    stick.style.height = `${100 * this.share(this.routed.height(expert))}%`;
    return element("div", {
      className: `wbi-bar wbi-${mark}`, id: `${this.prefix}-${expert}`, role: "option", "data-expert": expert,
      "aria-selected": String(expert === this.expert), "aria-label": this.words(expert),
    }, element("div", { className: "wbi-shaft" }, stick), element("span", { className: "wbi-id" }, String(expert)));
  }

  words(expert) {
    const { routed } = this;
    const group = routed.grouped ? `, group ${routed.group(expert)}` : "";
    const slot = routed.slot.get(expert);
    const score = routed.scores ? `: score ${figure(routed.scores[expert])}` : "";
    const gate = slot === undefined ? "" : `, gate ${figure(routed.gates[slot])}, margin ${figure(routed.margins[slot])}`;
    return `Expert ${expert}${group}${score}, ${MARKS[routed.mark(expert)]}${gate}`;
  }

  /** The expert under the pointer, or else the one that is looked at. */
  read(expert = this.expert >= 0 && this.order.includes(this.expert) ? this.expert : undefined) {
    this.readout.textContent = expert === undefined ? "\u00a0" : this.words(Number(expert));
  }

  explain(all) {
    const { routed, notes, legend, strip } = this;
    const marks = all ? new Set(this.order.map((expert) => routed.mark(expert))) : new Set();
    fill(legend, ...Object.keys(MARKS).filter((mark) => marks.has(mark)).map((mark) =>
      element("span", {}, element("i", { className: `wbi-key wbi-${mark}` }, element("i", { className: "wbi-stick" })), MARKS[mark])));
    fill(strip, ...this.drawGroups());
    const lines = [];
    if (!all) lines.push(missing("scores of the other experts", this.how.scores));
    if (routed.margin !== null) lines.push(element("p", {}, this.cutLine()));
    const over = routed.passedOver;
    if (over.length) {
      const named = over.slice(0, 8).map((expert) => `${expert} (${figure(routed.scores[expert])})`).join(", ");
      lines.push(element("p", {}, `Grey although they score above the weakest chosen, because their group was dropped: ${named}${over.length > 8 ? ` and ${over.length - 8} more` : ""}.`));
    }
    fill(notes, ...lines);
  }

  cutLine() {
    const { routed } = this;
    const { margin, runnerUp } = routed;
    const over = margin < 0 ? "An edit forced the choice: the weakest chosen lies" : "The weakest chosen lies";
    const best = runnerUp === undefined ? "the best one left out" : `expert ${runnerUp}, the best one left out`;
    const ratio = routed.scores && margin > 0 ? `, ${percent(margin / (routed.scores[runnerUp] + margin))} of its own score` : "";
    return `${over} ${figure(Math.abs(margin))} ${margin < 0 ? "below" : "above"} ${best}${ratio}.`;
  }

  drawGroups() {
    const { routed } = this;
    if (!routed.scores || !routed.grouped || !routed.kept) return [];
    const best = Array.from({ length: routed.groups }, (_, group) => Math.max(...routed.scores.subarray(group * routed.size, (group + 1) * routed.size)));
    const order = [...best.keys()].sort((a, b) => Number(routed.isKept(b)) - Number(routed.isKept(a)) || best[b] - best[a]);
    const chips = order.map((group) => element("span", { className: routed.isKept(group) ? "wbi-chip" : "wbi-chip wbi-out" },
      element("b", {}, `group ${group}`), ` ${figure(best[group])} `, element("small", {}, routed.isKept(group) ? "kept" : "dropped")));
    return [element("span", { className: "wbi-soft" }, `The best ${routed.kept.length} of ${routed.groups} groups, by their best expert:`), ...chips];
  }
}
