// What views of routing share: arrays that grow with an answer, colours for both themes, a tip, a shared selection.

/** A typed array of `width` numbers a token; writing from a token on takes back what stood there. */
class Grown {
  constructor(Type, width) {
    this.width = width;
    this.held = new Type(64 * width);
  }

  write(start, values) {
    const stop = start * this.width + values.length;
    if (stop > this.held.length) {
      const held = new this.held.constructor(Math.max(stop, 2 * this.held.length));
      held.set(this.held.subarray(0, start * this.width));
      this.held = held;
    }
    this.held.set(values, start * this.width);
  }

  row = (token) => this.held.subarray(token * this.width, (token + 1) * this.width);
}

/** The numbers in a buffer of a message. Copied, because those on the wire are not aligned. */
const numbers = (Type, view) => new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));

// One hue each, light to dark (ColorBrewer's Blues), and for dark pages dark to light: more is always more contrast.
const RAMPS = {
  light: [[214, 230, 244], [146, 195, 222], [66, 146, 198], [8, 81, 156], [8, 38, 84]],
  dark: [[28, 52, 82], [30, 88, 140], [52, 132, 196], [118, 182, 230], [214, 236, 255]],
};

/** Colours that suit the page around `root`, in which `quiet` is an element of softer text. */
class Palette {
  constructor(root, quiet) {
    const { color, backgroundColor } = getComputedStyle(root);
    const [red, green, blue] = parts(backgroundColor);
    this.dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128;
    this.ink = color;
    this.soft = getComputedStyle(quiet).color;
    this.accent = "#e69f00";
    this.forced = "#d55e00";
    this.stops = RAMPS[this.dark ? "dark" : "light"];
    this.cell = this.dark ? "rgb(255 255 255 / 6%)" : "rgb(0 0 0 / 4.5%)";
    this.kept = this.dark ? "rgb(255 255 255 / 15%)" : "rgb(0 0 0 / 11%)";
    this.line = this.dark ? "rgb(255 255 255 / 22%)" : "rgb(0 0 0 / 20%)";
    this.band = this.dark ? "rgb(230 159 0 / 14%)" : "rgb(230 159 0 / 12%)";
  }

  rgb(share) {
    const place = Math.min(1, Math.max(0, share)) * (this.stops.length - 1);
    const low = Math.min(Math.floor(place), this.stops.length - 2);
    return this.stops[low].map((part, n) => Math.round(part + (this.stops[low + 1][n] - part) * (place - low)));
  }

  /** From 0, the least, to 1. */
  ramp = (share) => `rgb(${this.rgb(share).join(" ")})`;

  /** Black or white, whichever is read on `ramp(share)`. */
  on(share) {
    const [red, green, blue] = this.rgb(share);
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#0b1520" : "#ffffff";
  }

  get gradient() {
    return `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map(this.ramp).join(", ")})`;
  }
}

/** Red, green and blue of a computed colour, 0 to 255; white where it is transparent. */
function parts(colour) {
  const found = (colour.match(/[\d.]+/g) ?? []).map(Number);
  if (found.length < 3 || found[3] === 0) return [255, 255, 255];
  return colour.startsWith("color(") ? found.slice(0, 3).map((part) => 255 * part) : found;
}

/** A card beside the pointer. Lines are text, the first one is the heading. */
class Tip {
  constructor(root) {
    this.root = root;
    this.box = element("div", { className: "wbr-tip", hidden: true, "aria-hidden": "true" });
    root.append(this.box);
  }

  show(event, [head, ...lines]) {
    this.box.replaceChildren(element("b", {}, head), ...lines.map((line) => element("div", {}, line)));
    this.box.hidden = false;
    const frame = this.root.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const right = event.clientX - frame.left + 14;
    const left = right + width > frame.width - 6 ? event.clientX - frame.left - width - 10 : right;
    const top = Math.min(event.clientY - frame.top + 14, frame.height - height - 6);
    this.box.style.left = `${Math.max(6, left)}px`;
    this.box.style.top = `${Math.max(6, top)}px`;
  }

  hide() {
    this.box.hidden = true;
  }
}

/** A number that came in 8 bits as two significant digits; an `exact` one from 0.1 on with three decimals. */
function short(value, exact = false) {
  if (Number.isNaN(value)) return "\u2013";
  const size = Math.abs(value);
  if (size !== 0 && size < 0.0001) return "<0.0001";
  const text = exact && size >= 0.1 ? value.toFixed(3) : value.toLocaleString("en", { maximumSignificantDigits: size >= 10 ? 3 : 2 });
  return text.replace("-", "\u2212");
}

const number = (value) => value.toLocaleString("en");

/** A View that shares token, layer and expert with others through three traits, and redraws when it is seen again. */
class LiveView extends View {
  constructor(model, root) {
    super(model, root);
    this.known = false;
    this.traits = ["token", "layer", "expert", ...this.ownTraits];
    this.onTrait = () => this.drawSoon();
    for (const name of this.traits) model.on(`change:${name}`, this.onTrait);
    this.watchers = [
      new ResizeObserver(() => this.drawSoon()),
      new IntersectionObserver(() => this.drawSoon()),
      new MutationObserver(() => this.drawSoon()),
    ];
    this.watchers[0].observe(root);
    this.watchers[1].observe(root);
    this.watchers[2].observe(document.body, { attributes: true, attributeFilter: ["class", "data-jp-theme-light", "data-jp-theme-name"] });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", this.onTrait, { signal: this.ended.signal });
    // the keys used here are no shortcuts of the notebook around it
    root.setAttribute("data-lm-suppress-shortcuts", "true");
    root.addEventListener("keydown", (event) => {
      this.tip.hide();
      if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
    }, { signal: this.ended.signal });
  }

  get = (name) => this.model.get(name);

  /** Tells Python, and through it every linked view, what is looked at now. */
  set(changes) {
    for (const [name, value] of Object.entries(changes)) this.model.set(name, value);
    this.model.save_changes();
    this.drawSoon();
  }

  close() {
    super.close();
    for (const name of this.traits) this.model.off(`change:${name}`, this.onTrait);
    for (const watcher of this.watchers) watcher.disconnect();
  }
}
