// What a token could have been: a card beside the hovered or focused token, with its probability before and after
// sampling and the likeliest alternatives; choosing one branches the reply there.
//
// A step is [token, text, probability under the model, probability after sampling, entropy in nats,
// [[token, text, before, after], ...], by hand, ms of its step, bytes in the cache after it]; null is not measured.
// Tokens that only together make a character share one group.

/** Groups of steps that have text, as {from, to, first, last}; steps from `next` on still wait for their character. */
export class Groups {
  constructor() {
    this.list = [];
    this.seen = 0;
    this.next = 0;
    this.text = "";
  }

  add(steps) {
    for (; this.seen < steps.length; this.seen++) {
      const text = steps[this.seen][1];
      if (!text) continue;
      const from = this.text.length;
      this.text += text;
      this.list.push({ from, to: this.text.length, first: this.next, last: this.seen });
      this.next = this.seen + 1;
    }
  }

  /** Index of the group that holds the character at `offset`. */
  at(offset) {
    let low = 0;
    let high = this.list.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.list[middle].to > offset) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

export function percent(value) {
  if (value === null || value === undefined) return "?";
  if (value > 0 && value < 0.001) return "< 0.1 %";
  if (value < 1 && value > 0.999) return "> 99.9 %";
  return `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
}

/** A token as text in which spaces and line breaks can be seen. */
export function visible(text) {
  return text.replace(/ /g, "\u2423").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";
}

/** One card for all replies of a view. `choose(turn key, index, token)` branches; `mayBranch()` says if that is possible;
    `look(turn key, index)` opens the token below the conversation; `more(message, index)` is what else there is to say. */
export class Card {
  constructor(root, choose, mayBranch, look, more) {
    this.look = look;
    this.more = more;
    this.root = root;
    this.choose = choose;
    this.mayBranch = mayBranch;
    this.shown = null;
    this.timer = 0;
    this.box = element("div", { className: "wbc-card", role: "dialog", "aria-label": "Alternatives to this token", hidden: true });
    this.box.addEventListener("pointerenter", () => clearTimeout(this.timer));
    this.box.addEventListener("pointerleave", () => this.hideSoon());
    this.box.addEventListener("focusin", () => clearTimeout(this.timer));
    this.box.addEventListener("focusout", () => this.hideSoon());
    this.box.addEventListener("keydown", (event) => this.onKey(event));
    root.append(this.box);
  }

  /** After a moment, so that a pointer passing over text opens nothing. */
  showSoon(message, group, anchor) {
    clearTimeout(this.timer);
    if (this.shown?.message === message && this.shown.group === group) return;
    this.timer = setTimeout(() => this.show(message, group, anchor), this.shown ? 40 : 120);
  }

  hideSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.hide(), 250);
  }

  hide() {
    clearTimeout(this.timer);
    if (!this.shown) return;
    const { message } = this.shown;
    const hadFocus = this.box.contains(document.activeElement);
    message.mark(null);
    this.shown = null;
    this.box.hidden = true;
    if (hadFocus) message.body.focus({ preventScroll: true });
  }

  show(message, group, anchor) {
    const steps = message.steps.slice(group.first, group.last + 1);
    if (!anchor.isConnected || !steps.length) return;
    this.shown?.message.mark(null);
    this.shown = { message, group, anchor };
    message.mark(group);
    const parts = steps.map((step, offset) => this.describe(message, group.first + offset, step));
    if (steps.length > 1) parts.unshift(element("p", { className: "wbc-note" }, `${steps.length} tokens make this text`));
    this.box.replaceChildren(...parts);
    this.box.hidden = false;
    this.place();
  }

  describe(message, index, step) {
    const [token, text, model, sampled, entropy, alternatives, byHand] = step;
    const own = alternatives.find((alternative) => alternative[0] === token);
    const title = element("div", { className: "wbc-card-title" },
      element("b", {}, visible(text || (own ? own[1] : ""))), element("span", {}, `token ${token}`));
    const facts = [`no. ${index + 1} of the reply`];
    if (byHand) facts.push("put here by you");
    if (entropy !== null) facts.push(`entropy ${entropy.toFixed(2)} nats`);
    if (!own) facts.push(`model ${percent(model)}, sampling ${percent(sampled)}`);
    const lines = [facts.join(" \u00b7 "), ...this.more(message, index)];
    const figures = lines.map((line) => element("div", { className: "wbc-note" }, line));
    const may = this.mayBranch();
    const rows = alternatives.map((alternative) => this.row(message, index, alternative, token, may));
    const head = element("div", { className: "wbc-row wbc-row-head" },
      element("span", {}, may ? "choose another to branch" : "alternatives"), element("span", {}, "model"), element("span", {}, "sampling"));
    const inside = element("button", { className: "wbc-button wbc-text wbc-inside", type: "button" }, "Look inside this token");
    inside.addEventListener("click", () => {
      this.hide();
      this.look(message.key, index);
    });
    return element("section", {}, title, ...figures, head, ...rows, inside);
  }

  row(message, index, [token, text, before, after], chosen, may) {
    const row = element("button", {
      className: token === chosen ? "wbc-row wbc-chosen" : "wbc-row",
      type: "button",
      disabled: token === chosen || !may,
      "aria-label": `${text}: model ${percent(before)}, after sampling ${after ? percent(after) : "cut off"}` +
        (token === chosen ? ", chosen" : ""),
    });
    const bar = element("i", { className: "wbc-bar" });
    bar.style.width = `${Math.max(1, 100 * before)}%`;
    row.append(
      element("span", { className: "wbc-word" }, bar, element("code", {}, visible(text)), token === chosen ? "\u2713" : ""),
      element("span", {}, percent(before)),
      element("span", {}, after ? percent(after) : "cut"),
    );
    row.addEventListener("click", () => {
      this.hide();
      this.choose(message.key, index, token);
    });
    return row;
  }

  /** Below the token, or above it where there is no room; always inside the view, which the notebook clips. */
  place() {
    const anchor = this.shown?.anchor;
    if (!anchor?.isConnected) return;
    const frame = this.root.getBoundingClientRect();
    const token = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const left = Math.max(8, Math.min(token.left - frame.left - 12, frame.width - width - 8));
    const below = token.bottom - frame.top + 4;
    const above = token.top - frame.top - height - 4;
    const top = below + height <= frame.height - 4 || above < 4 ? below : above;
    this.box.style.left = `${left}px`;
    this.box.style.top = `${Math.max(4, Math.min(top, frame.height - height - 4))}px`;
  }

  focus() {
    this.box.querySelector("button:not([disabled])")?.focus();
  }

  onKey(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") this.hide();
    else if (step) {
      const buttons = [...this.box.querySelectorAll("button:not([disabled])")];
      buttons.at((buttons.indexOf(document.activeElement) + step) % buttons.length)?.focus();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
