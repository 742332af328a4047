// One turn as it is seen: text drawn once and then appended to, its figures, its versions, its buttons.

const ENDINGS = {
  eos: "ended by itself",
  stop: "ended at a stop string",
  length: "reached the token limit",
  context: "the context is full",
  stopped: "stopped by you",
};
const CONTINUES = ["stopped", "length", "error"];

const ICONS = {
  copy: "M5.5 5.5V3.2c0-.7.5-1.2 1.2-1.2h6.1c.7 0 1.2.5 1.2 1.2v6.1c0 .7-.5 1.2-1.2 1.2h-2.3M3.2 5.5h6.1c.7 0 1.2.5 1.2 1.2v6.1c0 .7-.5 1.2-1.2 1.2H3.2c-.7 0-1.2-.5-1.2-1.2V6.7c0-.7.5-1.2 1.2-1.2z",
  regenerate: "M13.5 8a5.5 5.5 0 1 1-1.7-4M13.5 1.5V5H10",
  edit: "M3 13l.6-2.8 7.3-7.3a1.4 1.4 0 0 1 2 0l.2.2a1.4 1.4 0 0 1 0 2L5.8 12.4 3 13z",
  continue: "M2.5 3v10L8 8 2.5 3zM8.5 3v10L14 8 8.500 3z",
  previous: "M10 3L5 8l5 5",
  next: "M6 3l5 5-5 5",
  send: "M8 13.500V3M3.500 7L8 2.500 12.500 7",
  stop: "M4 4h8v8H4z",
  new: "M8 3v10M3 8h10",
  export: "M8 2v8M4.500 6.500L8 10l3.500-3.500M2.500 13.500h11",
  import: "M8 10V2M4.500 5.500L8 2l3.500 3.500M2.500 13.500h11",
};

/** A button with an icon; its label is read out and shown as a tip, or written beside it when `shown`. */
export function iconButton(icon, label, action, shown = false) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[icon]);
  svg.append(path);
  const button = element("button", { className: `wbc-button wbc-${icon}`, type: "button", title: label, "aria-label": label }, svg);
  if (shown) button.append(element("span", {}, label));
  button.addEventListener("click", action);
  return button;
}

const number = (value) => value.toLocaleString("en");

const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** `tell` sends a verb to the kernel; `card` shows alternatives; `view.busy` and `view.raw` are read, not kept. */
export class Message {
  constructor(turn, name, view) {
    this.key = turn.key;
    this.view = view;
    this.isReply = turn.role === "assistant";
    this.body = element("div", { className: "wbc-body" });
    this.tail = element("span", { className: "wbc-tail" });
    this.problem = element("div", { className: "wbc-error", role: "alert", hidden: true });
    this.figures = element("span", { className: "wbc-figures" });
    this.actions = element("div", { className: "wbc-actions" });
    this.element = element("article", { className: this.isReply ? "wbc-turn wbc-reply" : "wbc-turn wbc-user", "aria-label": `${name} said` },
      element("div", { className: "wbc-name" }, name), this.body, this.problem, this.actions);
    this.build();
    this.set(turn);
    if (this.isReply) this.listen();
  }

  build() {
    const { tell } = this.view;
    this.versions = element("span", { className: "wbc-versions", role: "group", "aria-label": "Versions", hidden: true });
    const copy = iconButton("copy", "Copy", async () => {
      this.view.announce((await copyText(this.text)) ? "Copied" : "Copying is not allowed here");
    });
    this.actions.append(this.versions, copy);
    if (this.isReply) {
      this.again = iconButton("regenerate", "Regenerate", () => tell({ kind: "regenerate", turn: this.key }));
      this.more = iconButton("continue", "Continue this reply", () => tell({ kind: "continue", turn: this.key }));
      this.actions.append(this.again, this.more, this.figures);
      this.body.tabIndex = 0;
      this.body.setAttribute("role", "group");
      this.body.setAttribute("aria-label", "Reply. Left and right arrows go through its tokens, down goes to the alternatives, Enter opens the token.");
    } else {
      this.again = iconButton("edit", "Edit and send again", () => this.edit());
      this.actions.append(this.again);
    }
  }

  get text() {
    return this.isReply ? this.groups.text : this.said;
  }

  set(turn) {
    this.finish = turn.finish;
    this.error = turn.error;
    this.stats = turn.stats ?? {};
    if (this.isReply) {
      this.steps = [];
      this.readings = new Readings();
      this.groups = new Groups();
      this.ending = null;
      this.clear();
      this.append(0, turn.steps);
    } else {
      this.said = turn.text;
      this.body.replaceChildren(turn.text);
    }
  }

  /** Steps from number `from` on; some may be known already. False if some are missing before them. */
  append(from, steps) {
    if (from > this.steps.length) return false;
    this.steps.push(...steps.slice(this.steps.length - from));
    this.groups.add(this.steps);
    return true;
  }

  clear() {
    this.blocks = [];
    this.drawn = 0;
    this.spans = []; // in the token view, one a group
    this.painted = { key: "", to: 0 };
    this.body.replaceChildren(this.tail);
  }

  /** Brings the screen up to date: only the last two blocks are drawn again, or in the token view nothing. */
  draw() {
    const live = this.view.answering === this.key;
    if (this.isReply) {
      const { text } = this.groups;
      if (this.view.raw) this.drawTokens(text);
      else this.drawBlocks(text);
      this.drawTail(live);
      this.drawFigures(live);
      if (this.view.card.shown?.message === this) this.mark(this.view.card.shown.group);
      if (this.view.looked.turn === this.key) this.view.looked.mark(this);
    }
    this.body.classList.toggle("wbc-raw", this.isReply && this.view.raw);
    this.element.classList.toggle("wbc-live", live);
    this.problem.hidden = !this.error;
    this.problem.textContent = this.error ?? "";
    this.again.disabled = this.view.busy;
    if (this.more) {
      this.more.hidden = live || !CONTINUES.includes(this.finish);
      this.more.disabled = this.view.busy;
    }
    for (const button of this.versions.querySelectorAll("button")) button.disabled = this.view.busy || !button.dataset.turn;
  }

  drawBlocks(text) {
    // the last block may still join the one before it: a line "-" becomes an item of the list above
    const open = this.blocks.splice(-2);
    for (const block of open) block.element.remove();
    const leaf = (parent, from, to) => this.leaf(parent, from, to);
    for (const block of parseBlocks(text, open.length ? open[0].from : 0)) {
      const made = drawBlock(block, text, leaf);
      this.body.insertBefore(made, this.tail);
      this.blocks.push({ from: block.from, element: made });
    }
  }

  drawTokens(text) {
    if (text.length > this.drawn) this.leaf(this.body, this.drawn, text.length, this.tail);
    this.drawn = text.length;
  }

  leaf(parent, from, to, before = null) {
    for (let index = this.groups.at(from); from < to; index++) {
      const group = this.groups.list[index];
      const end = Math.min(group.to, to);
      const made = element("span", { className: "wbc-token" }, this.groups.text.slice(from, end));
      made.dataset.group = index;
      if (this.view.raw) this.spans.push(made);
      if (this.steps[group.last][6]) made.classList.add("wbc-by-hand");
      parent.insertBefore(made, before);
      from = end;
    }
  }

  drawTail(live) {
    const ended = (this.hasEnd = !live && this.finish === "eos" && this.steps.length > 0);
    this.tail.className = live ? "wbc-tail wbc-cursor" : ended ? "wbc-tail wbc-token wbc-end" : "wbc-tail";
    this.tail.textContent = ended ? "end" : "";
    if (ended) this.tail.dataset.group = "end";
    if (!live && !this.steps.length && !this.error) {
      this.tail.className = "wbc-tail wbc-note";
      this.tail.textContent = "Stopped before the first token.";
    }
  }

  drawFigures(live) {
    const { prompt_tokens, reused_tokens, prefill_seconds, tokens, tokens_per_second, seed } = this.stats;
    const parts = [];
    if (live && !this.steps.length) parts.push("reading the prompt \u2026");
    if (tokens) parts.push(count(tokens, "token"));
    if (tokens_per_second) parts.push(`${tokens_per_second.toFixed(1)} tokens/s`);
    if (prompt_tokens && prefill_seconds) {
      const reused = reused_tokens ? `, ${reused_tokens.toLocaleString("en")} of them from the cache` : "";
      parts.push(`prompt of ${count(prompt_tokens, "token")}${reused}, read in ${prefill_seconds.toFixed(2)} s`);
    }
    if (!live && ENDINGS[this.finish]) parts.push(ENDINGS[this.finish]);
    if (!live && tokens) parts.push(`seed ${seed}`);
    this.figures.textContent = parts.join(" \u00b7 ");
  }

  /** Which of its versions this is: [index, count, key before or null, key after or null]. */
  place([index, total, before, after]) {
    this.versions.hidden = total < 2;
    const go = (turn) => () => this.view.tell({ kind: "select", turn });
    const arrows = [iconButton("previous", "Previous version", go(before)), iconButton("next", "Next version", go(after))];
    [before, after].forEach((key, side) => (arrows[side].dataset.turn = key ?? ""));
    this.versions.replaceChildren(arrows[0], `${index + 1}/${total}`, arrows[1]);
  }

  edit() {
    const area = element("textarea", { className: "wbc-input", value: this.said, rows: 3, "aria-label": "Edit your message" });
    const close = () => {
      this.body.replaceChildren(this.said);
      this.again.focus();
    };
    const send = () => {
      const text = area.value.trim();
      close();
      if (text) this.view.tell({ kind: "edit", turn: this.key, text });
    };
    area.addEventListener("keydown", (event) => {
      if (event.isComposing || (event.key !== "Escape" && (event.key !== "Enter" || event.shiftKey))) return;
      event.preventDefault();
      event.stopPropagation();
      if (event.key === "Enter") send();
      else close();
    });
    const row = element("div", { className: "wbc-edit-row" });
    for (const [label, action] of [["Cancel", close], ["Send", send]]) {
      const button = element("button", { className: "wbc-button wbc-text", type: "button" }, label);
      button.addEventListener("click", action);
      row.append(button);
    }
    this.body.replaceChildren(area, row);
    area.focus();
  }

  listen() {
    const { card } = this.view;
    const groupOf = (target) => {
      const token = target.closest?.(".wbc-token");
      return token ? [this.group(token.dataset.group), token] : null;
    };
    this.body.addEventListener("pointerover", (event) => {
      const found = groupOf(event.target);
      if (found) card.showSoon(this, ...found);
      else card.hideSoon();
    });
    this.body.addEventListener("pointerleave", () => card.hideSoon());
    this.body.addEventListener("click", (event) => {
      const found = groupOf(event.target);
      if (!found || String(getSelection())) return;
      if (this.view.exploring) this.view.looked.choose(this, found[0]);
      else card.show(this, ...found);
    });
    this.body.addEventListener("keydown", (event) => this.onKey(event));
    this.body.addEventListener("blur", () => card.hideSoon());
  }

  group(name) {
    if (name === "end") return this.ending ??= { first: this.steps.length - 1, last: this.steps.length - 1, end: true };
    return this.groups.list[Number(name)];
  }

  onKey(event) {
    const tokens = [...this.body.querySelectorAll(".wbc-token")];
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const { card } = this.view;
    if (step && tokens.length) {
      const at = tokens.findIndex((token) => token.classList.contains("wbc-marked"));
      const token = tokens[Math.max(0, Math.min(tokens.length - 1, at < 0 ? (step > 0 ? 0 : tokens.length - 1) : at + step))];
      token.scrollIntoView({ block: "nearest" });
      card.show(this, this.group(token.dataset.group), token);
    } else if (event.key === "Enter" && event.target === this.body) this.enter();
    else if (event.key === "ArrowDown" && event.target === this.body && card.shown?.message === this) card.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** The marked token in the explorer, where that is open; there already, or else, its alternatives. */
  enter() {
    const { card, exploring, looked } = this.view;
    const shown = card.shown?.message === this ? card.shown.group : null;
    if (shown && exploring && !looked.holds(this, shown)) looked.choose(this, shown);
    else card.focus();
  }

  mark(group) {
    for (const token of this.body.querySelectorAll(".wbc-marked")) token.classList.remove("wbc-marked");
    if (!group) return;
    const name = group.end ? "end" : String(this.groups.list.indexOf(group));
    for (const token of this.body.querySelectorAll(`.wbc-token[data-group="${name}"]`)) token.classList.add("wbc-marked");
  }
}
