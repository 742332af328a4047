// What views of the kernel's numbers share: elements, words for numbers, and a half of the wire.

/** The element `tag` with properties, and children that are elements or plain text; null children are left out. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  fill(made, ...children);
  return made;
}

/** `node` with these children in place of those it had. */
export function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

/** What stands in the place of a part that nobody recorded. */
export const missing = (part, how) => element("p", { className: "wbv-missing" }, element("b", {}, `${part} not recorded`), ` ${how}`);

/** A token as text in which spaces and line breaks can be seen. */
export function visible(text) {
  return text.replace(/ /g, "\u2423").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";
}

export function percent(value) {
  if (value === null || value === undefined) return "?";
  if (value === 0) return "0 %";
  if (value > 0 && value < 0.001) return "< 0.1 %";
  if (value < 1 && value > 0.999) return "> 99.9 %";
  return `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
}

/** A number as the eye reads it, with two to three digits. */
export function figure(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "?";
  const size = Math.abs(value);
  const decimals = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : size >= 0.01 ? 3 : 4;
  const text = size === 0 ? "0" : size < 0.001 ? size.toExponential(0) : size.toFixed(decimals);
  return value < 0 ? `\u2212${text}` : text;
}

export const plural = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** The page's half of a view. A subclass has `build()`, `draw()`, and an `on_<kind>` for each message it understands. */
export class View {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.id = Math.random().toString(36).slice(2);
    this.frame = 0;
    this.ended = new AbortController();
    this.notice = element("div", { className: "wbv-error", role: "alert", hidden: true });
    this.said = element("div", { className: "wbv-hidden", role: "status" });
    this.build();
    this.onMessage = (message, buffers) => this.hear(message, buffers ?? []);
    model.on("msg:custom", this.onMessage);
    this.ask();
  }

  tell = (message) => this.model.send({ ...message, view: this.id });

  /** Asks for everything, again and again until it comes: a page that was just loaded may lose a message. */
  ask(patience = 1000) {
    this.tell({ kind: "ready" });
    clearTimeout(this.asking);
    this.asking = setTimeout(() => this.ask(Math.min(2 * patience, 30000)), patience);
  }

  hear(message, buffers) {
    if (message.kind === "show") {
      if (message.view && message.view !== this.id) return;
      clearTimeout(this.asking);
      this.notice.hidden = true;
    }
    this[`on_${message.kind}`]?.(message, buffers);
  }

  on_notice({ text }) {
    this.notice.textContent = text;
    this.notice.hidden = false;
    this.drawSoon();
  }

  announce(text) {
    this.said.textContent = text;
  }

  drawSoon() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
    });
  }

  close() {
    this.model.off("msg:custom", this.onMessage);
    this.ended.abort();
    cancelAnimationFrame(this.frame);
    clearTimeout(this.asking);
  }
}

/** What anywidget calls: one view per place where the widget is shown. */
export const showing = (Kind) => ({
  render({ model, el }) {
    const root = element("div");
    el.append(root);
    const view = new Kind(model, root);
    return () => view.close();
  },
});
