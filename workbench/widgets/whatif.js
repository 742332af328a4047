// What if: five choices, and what they take. All arithmetic is the kernel's; this half asks and draws.

const KINDS = { latent: "latent", "rotary key": "rotary", scales: "scales", padding: "room", "recent tokens": "windows" };

/** Powers of two up to `most`, and `most` itself. */
function stops(most, first) {
  const found = [];
  for (let value = first; value < most; value *= 2) found.push(value);
  return [...found, most];
}

class WhatIfView extends View {
  build() {
    this.result = null;
    this.choices = {
      model: this.select("Model", "model"),
      format: this.select("Cache format", "format"),
      dtype: this.select("Weights in", "dtype"),
      context: this.slider("Context, tokens of each sequence", "context", 0),
      batch: this.slider("Batch, sequences at once", "batch", 1),
    };
    this.cache = element("b", {});
    this.cacheOf = element("span", {});
    this.weights = element("b", {});
    this.weightsOf = element("span", {});
    this.all = element("b", {});
    this.allOf = element("span", {});
    this.bars = new Bars("The same tokens in other schemes");
    this.stack = element("div", { className: "wbm-stack", role: "img" });
    this.parts = element("tbody");
    const head = element("thead", {}, element("tr", {}, ["part", "bytes", "", "share"].map((name) => element("th", { scope: "col" }, name))));
    const part = (label, ...children) => element("section", { className: "wbm-part", "aria-label": label }, ...children);
    this.body = element("div", { hidden: true },
      element("div", { className: "wbm-controls" }, ...Object.values(this.choices).map((choice) => choice.element)),
      element("div", { className: "wbm-tiles" }, tile(this.cache, this.cacheOf), tile(this.weights, this.weightsOf), tile(this.all, this.allOf)),
      part("Cache", heading("The cache, beside other schemes for the same tokens", element("span", { className: "wbm-note" }, "logarithmic")), this.bars.element),
      part("Parts", heading("Everything, part by part"), this.stack, element("table", { className: "wbm-parts" }, head, this.parts)));
    this.root.classList.add("wbv", "wbm");
    this.root.setAttribute("role", "region");
    this.root.setAttribute("aria-label", "What if");
    this.root.append(element("header", { className: "wbm-head" }, element("span", { className: "wbm-title" }, "What if"), element("span", { className: "wbm-note" }, "computed from the configuration; nothing is allocated")), this.notice, this.body, this.said);
    this.root.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.altKey || event.stopPropagation(), { signal: this.ended.signal });
  }

  select(label, name) {
    const id = `wbm-${name}-${this.id}`;
    const control = element("select", { id });
    control.addEventListener("change", () => this.choose(name, control.value));
    return { control, element: element("div", { className: "wbm-control" }, element("label", { htmlFor: id }, label), control) };
  }

  slider(label, name, least) {
    const id = `wbm-${name}-${this.id}`;
    const range = element("input", { type: "range", id, min: "0", step: "1" });
    const number = element("input", { type: "number", min: String(least), step: "1", "aria-label": `${label}, exactly` });
    const made = { range, number, stops: [least], element: element("div", { className: "wbm-control" }, element("label", { htmlFor: id }, label), range, number) };
    range.addEventListener("input", () => {
      number.value = String(made.stops[range.value]);
      this.choose(name, made.stops[range.value]);
    });
    number.addEventListener("change", () => {
      const wanted = Math.round(Number(number.value));
      if (Number.isFinite(wanted)) this.choose(name, wanted);
    });
    return made;
  }

  /** One question at a time, the newest next: a slider that is dragged asks faster than it is answered. */
  choose(name, value) {
    this.wanted = { kind: "choose", [name]: value };
    this.next();
  }

  next() {
    if (!this.wanted || this.waiting) return;
    this.waiting = true;
    this.tell(this.wanted);
    this.wanted = null;
  }

  on_show(message) {
    const { facts } = message;
    this.facts = facts;
    fill(this.choices.model.control, facts.models.map((name) => element("option", { value: name }, name)));
    fill(this.choices.dtype.control, facts.dtypes.map((name) => element("option", { value: name }, name)));
    this.choices.batch.stops = stops(facts.batch, 1);
    this.body.hidden = false;
    this.on_result(message);
  }

  on_result(message) {
    this.result = message;
    this.waiting = false;
    this.notice.hidden = true;
    this.choices.context.stops = stops(message.most, 1);
    this.drawSoon();
    this.next();
  }

  on_notice(message) {
    this.waiting = false;
    super.on_notice(message);
    this.next();
  }

  draw() {
    const { result } = this;
    if (!result) return;
    fill(this.choices.format.control, result.formats.map(([name, row]) => element("option", { value: name }, `${name}: ${exact(row)} a token and layer`)));
    for (const name of ["model", "format", "dtype"]) this.choices[name].control.value = result[name];
    for (const name of ["context", "batch"]) this.place(this.choices[name], result[name]);
    const sum = (parts) => parts.reduce((total, [, bytes]) => total + bytes, 0);
    const [cache, weights] = [sum(result.cache), sum(result.weights)];
    const [total, active] = result.parameters;
    this.cache.textContent = size(cache);
    this.cache.title = exact(cache);
    this.cacheOf.textContent = `cache: ${exact(result.per_token)} a token, ${result.ratio}`;
    this.weights.textContent = size(weights);
    this.weights.title = exact(weights);
    const many = (count) => (count >= 1e9 ? `${(count / 1e9).toPrecision(3)}B` : `${(count / 1e6).toPrecision(3)}M`);
    this.weightsOf.textContent = `weights: ${many(total)} parameters, ${many(active)} active`;
    this.all.textContent = size(cache + weights + result.table[1]);
    this.allOf.textContent = `together, without activations`;
    this.drawBars(cache);
    this.drawParts(cache + weights + result.table[1]);
  }

  place({ range, number, stops }, value) {
    const at = stops.findIndex((stop) => stop >= value);
    range.max = String(stops.length - 1);
    range.value = String(at < 0 ? stops.length - 1 : at);
    range.setAttribute("aria-valuetext", value.toLocaleString("en"));
    number.max = String(stops.at(-1));
    if (document.activeElement !== number) number.value = String(value);
  }

  drawBars(cache) {
    const rows = this.result.baselines.map(([name, note, bytes, own]) => ({ name: own ? name : `${name}, another model`, note, bytes, kind: "other", factor: cache ? times(bytes / cache) : "" }));
    rows.push({ name: `this cache, ${this.result.format}`, bytes: cache, kind: "mine", factor: "1\u00d7" });
    rows.sort((a, b) => b.bytes - a.bytes);
    this.bars.draw(rows, "this cache = 1");
  }

  drawParts(total) {
    const { weights, table, cache } = this.result;
    const parts = [...weights.map(([name, bytes], n) => [name, bytes, `w${n}`]), [...table, "w7"], ...cache.map(([name, bytes]) => [`cache: ${name}`, bytes, KINDS[name]])].filter(([, bytes]) => bytes > 0);
    const share = (bytes) => `${((100 * bytes) / total).toFixed(bytes / total < 0.0995 ? 2 : 1)} %`;
    fill(this.stack, parts.map(([name, bytes, kind]) => {
      const piece = element("i", { className: `wbm-fill-${kind}`, title: `${name}: ${size(bytes)}, ${share(bytes)}` });
      piece.style.flexGrow = String(bytes / total);
      return piece;
    }));
    this.stack.setAttribute("aria-label", parts.map(([name, bytes]) => `${name} ${share(bytes)}`).join(", "));
    const row = ([name, bytes, kind]) => element("tr", {}, element("th", { scope: "row" }, key(kind, name)), element("td", {}, exact(bytes)), element("td", {}, size(bytes)), element("td", {}, share(bytes)));
    fill(this.parts, parts.map(row), element("tr", { className: "wbm-sum" }, element("th", { scope: "row" }, "together"), element("td", {}, exact(total)), element("td", {}, size(total)), element("td", {}, "100 %")));
  }
}

export default showing(WhatIfView);
