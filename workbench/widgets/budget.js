// The budget slider: memory, context and cache format, and the plan they make. All arithmetic is the kernel's.

const GIB = 2 ** 30;
const COLOUR = {
  "expert slots": "scales", "expert slots (host)": "scales", experts: "scales", cache: "latent", workspace: "rotary", process: "w3", embedding: "w0",
  attention: "w1", "shared experts": "w2", dense: "w7", "router and norms": "w4", head: "w5", "rotary table": "w6", residents: "w1",
};

/** Bytes as memory is sold: "16 GiB", "384 MiB". */
const sold = (bytes) => (bytes >= GIB ? `${Number((bytes / GIB).toPrecision(4)).toLocaleString("en")} GiB` : `${Number((bytes / 2 ** 20).toPrecision(3))} MiB`);

class BudgetView extends View {
  build() {
    this.result = null;
    this.controls = element("div", { className: "wbm-controls" });
    this.slots = element("b", {});
    this.slotsOf = element("span", {});
    this.speed = element("b", {});
    this.speedOf = element("span", {});
    this.room = element("b", {});
    this.roomOf = element("span", {});
    this.tiers = element("div", {});
    this.error = element("div", { className: "wbv-error", role: "alert", hidden: true });
    this.title = element("span", { className: "wbm-title" });
    this.plan = element("div", { className: "wbb-plan" },
      element("div", { className: "wbm-tiles" }, tile(this.slots, this.slotsOf), tile(this.speed, this.speedOf), tile(this.room, this.roomOf)), this.tiers);
    this.root.classList.add("wbv", "wbm", "wbb");
    this.root.setAttribute("role", "region");
    this.root.setAttribute("aria-label", "Budget");
    this.root.append(element("header", { className: "wbm-head" }, this.title, element("span", { className: "wbm-note" }, "computed from the configuration; nothing is allocated")), this.notice, this.controls, this.error, this.plan, this.said);
    this.root.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.altKey || event.stopPropagation(), { signal: this.ended.signal });
  }

  select(label, name, options) {
    const id = `wbb-${name}-${this.id}`;
    const control = element("select", { id }, options.map((value) => element("option", { value }, value)));
    control.addEventListener("change", () => this.choose(name, control.value));
    const put = (value) => {
      if (![...control.options].some((option) => option.value === value)) control.append(element("option", { value }, value));
      control.value = value;
    };
    return { put, element: element("div", { className: "wbm-control" }, element("label", { htmlFor: id }, label), control) };
  }

  /** `unit`: how many of what is chosen make one of the number beside the slider. */
  slider(label, name, stops, unit, words) {
    const id = `wbb-${name}-${this.id}`;
    const range = element("input", { type: "range", id, min: "0", max: String(stops.length - 1), step: "1" });
    const number = element("input", { type: "number", min: "0", step: unit === 1 ? "1" : "any", "aria-label": `${label}, exactly` });
    const said = (value) => String(unit === 1 ? value : Number((value / unit).toPrecision(5)));
    range.addEventListener("input", () => {
      number.value = said(stops[range.value]);
      this.choose(name, stops[range.value]);
    });
    number.addEventListener("change", () => {
      const wanted = Math.round(Number(number.value) * unit);
      if (wanted > 0 && Number.isFinite(wanted)) this.choose(name, wanted);
      else number.value = said(this.result.wanted[name]);
    });
    const put = (value) => {
      const at = stops.findIndex((stop) => stop >= value);
      range.value = String(at < 0 ? stops.length - 1 : at);
      range.setAttribute("aria-valuetext", words(value));
      if (document.activeElement !== number) number.value = said(value);
    };
    return { put, element: element("div", { className: "wbm-control" }, element("label", { htmlFor: id }, label), range, number) };
  }

  /** One question at a time, the newest of each kind next: a slider that is dragged asks faster than it is answered. */
  choose(name, value) {
    this.wanted = new Map(this.wanted ?? []).set(name, value);
    this.next();
  }

  next() {
    if (!this.wanted?.size || this.waiting) return;
    const [[name, value]] = this.wanted;
    this.wanted.delete(name);
    this.waiting = true;
    this.tell({ kind: "choose", [name]: value });
  }

  on_show(message) {
    const { facts } = message;
    this.facts = facts;
    this.title.textContent = `Budget of ${facts.model}`;
    const tokens = [];
    for (let value = 256; value < facts.most; value *= 2) tokens.push(value);
    this.choices = {
      ...(facts.stops.vram ? { vram: this.slider(`${facts.near}, GiB`, "vram", facts.stops.vram, GIB, sold) } : {}),
      ram: this.slider("Main memory, GiB", "ram", facts.stops.ram, GIB, sold),
      context: this.slider("Context, tokens", "context", [...tokens, facts.most], 1, (value) => plural(value, "token")),
      cache: this.select("Cache format", "cache", facts.formats),
      recipe: this.select("Weights", "recipe", facts.recipes),
    };
    fill(this.controls, Object.values(this.choices).map((choice) => choice.element));
    this.on_result(message);
  }

  on_result({ wanted, error, plan }) {
    if (!this.facts) return;
    this.result = { wanted, error, plan };
    this.waiting = false;
    this.notice.hidden = true;
    this.drawSoon();
    this.next();
  }

  on_notice(message) {
    this.waiting = false;
    super.on_notice(message);
    this.next();
  }

  draw() {
    if (!this.result) return;
    const { wanted, error, plan } = this.result;
    // what is about to be asked is where the reader left it
    for (const [name, choice] of Object.entries(this.choices)) if (!this.wanted?.has(name)) choice.put(wanted[name]);
    this.error.hidden = !error;
    this.error.textContent = error ? `${error}${plan ? " Below is the last plan that fitted." : ""}` : "";
    this.plan.hidden = !plan;
    this.plan.classList.toggle("wbb-stale", Boolean(error));
    if (!plan) return;
    const count = (value) => value.toLocaleString("en");
    this.slots.textContent = percent(plan.experts ? plan.slots / plan.experts : 1);
    this.slotsOf.textContent = `of the experts near: ${count(plan.slots)} of ${count(plan.experts)}, ${size(plan.block)} each${plan.host.length ? `; ${count(plan.far)} behind` : ""}`;
    const rate = (value) => figure(value);
    const [low, high] = plan.speed ?? [];
    this.speed.textContent = high ? `${rate(low[0])} to ${rate(high[0])}` : "?";
    this.speedOf.textContent = high ? `tokens/s: ${percent(low[1])} hits and nothing overlaps, to ${percent(high[1])} and all does, bound by ${high[2]}` : "tokens/s: run workbench doctor --measure once";
    const [, tokens] = plan.capacity.find(([name]) => name === wanted.cache.split("+")[0]) ?? plan.capacity[0];
    this.room.textContent = count(tokens);
    this.roomOf.textContent = `tokens of context with as many slots; ${plan.capacity.map(([name, most]) => `${name} ${count(most)}`).join(", ")}`;
    const near = this.facts.stops.vram ? [this.facts.near, plan.vram] : ["main memory", plan.ram];
    const places = [[...near, plan.near], ["main memory", plan.ram, plan.host], ["disk", null, plan.disk]];
    fill(this.tiers, places.filter(([, , parts]) => parts.length).map((place) => this.tier(...place)));
  }

  tier(name, limit, parts) {
    const total = parts.reduce((sum, [, bytes]) => sum + bytes, 0);
    const all = limit ?? total;
    const drawn = [...parts.map(([part, bytes]) => [part, bytes, COLOUR[part] ?? "room"]), ...(limit > total ? [["free", limit - total, "room"]] : [])];
    const stack = element("div", { className: "wbm-stack", role: "img", "aria-label": `${name}: ${drawn.map(([part, bytes]) => `${part} ${size(bytes)}`).join(", ")}` }, drawn.map(([part, bytes, kind]) => {
      const piece = element("i", { className: `wbm-fill-${kind}`, title: `${part}: ${exact(bytes)}, ${percent(bytes / all)}` });
      piece.style.flexGrow = String(bytes / all);
      return piece;
    }));
    const words = limit ? `${size(total)} of ${size(limit)} (${sold(limit)})` : size(total);
    return element("section", { className: "wbm-part", "aria-label": name }, heading(`${name[0].toUpperCase()}${name.slice(1)}`, element("span", { className: "wbm-note" }, words)), stack,
      element("div", { className: "wbm-keys" }, drawn.map(([part, bytes, kind]) => key(kind, `${part} ${size(bytes)}`))));
  }
}

export default showing(BudgetView);
