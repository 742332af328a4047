// What each pass took, as small lines one beside the other: every pass thin, the mean of the last ones strong.

const SVG = "http://www.w3.org/2000/svg";
const MEAN = 16; // passes
const KEPT = 240; // passes that are drawn
const BOX = { wide: 300, tall: 56, top: 4 };

function shape(tag, properties, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** The next rounder number from `value` on. */
function roomFor(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 1.5, 2, 3, 5, 7, 10].find((step) => step * power >= value * 0.999);
}

class Passes {
  constructor() {
    this.rows = []; // [tokens, needed, near, read, ms]
    this.panels = [
      this.panel("hit rate", (sum) => sum.near / sum.needed, (value) => percent(value), 1),
      this.panel("read, MB a token", (sum) => (sum.read * this.block) / sum.tokens / 1e6, figure),
      this.panel("waited, ms a token", (sum) => sum.ms / sum.tokens, figure),
    ];
    this.empty = element("p", { className: "wbe-note" }, "Nothing has been generated yet.");
    this.element = element("section", { className: "wbe-passes", "aria-label": "The last passes" }, this.empty, ...this.panels.map(({ element }) => element));
  }

  panel(name, value, words, most = null) {
    const now = element("b", {});
    const note = element("span", { className: "wbe-perfect", hidden: true });
    const ends = element("span", { className: "wbe-most", "aria-hidden": "true" });
    const picture = shape("svg", { class: "wbe-lines", role: "img", viewBox: `0 0 ${BOX.wide} ${BOX.tall + 2 * BOX.top}`, preserveAspectRatio: "none" });
    const head = element("div", { className: "wbe-panelhead" }, name, now, ends);
    return { name, value, words, most, now, note, ends, picture, element: element("div", { className: "wbe-panel", hidden: true }, head, picture, note) };
  }

  start(rows, block) {
    this.rows = [];
    this.block = block;
    this.add(rows);
  }

  add(rows) {
    this.rows = [...this.rows, ...rows].slice(-KEPT);
  }

  /** Of the passes of one token, as prompts read far more; of all where there are none such. */
  get shown() {
    const answers = this.rows.filter(([tokens]) => tokens === 1);
    return answers.length ? answers : this.rows;
  }

  sum(rows) {
    const sum = { tokens: 0, needed: 0, near: 0, read: 0, ms: 0 };
    for (const [tokens, needed, near, read, ms] of rows) {
      sum.tokens += tokens;
      sum.needed += needed;
      sum.near += near;
      sum.read += read;
      sum.ms += ms;
    }
    return sum;
  }

  draw(best) {
    const { shown } = this;
    this.empty.hidden = shown.length > 0;
    for (const panel of this.panels) {
      panel.element.hidden = !shown.length;
      if (!shown.length) continue;
      const each = shown.map((row) => panel.value(this.sum([row])));
      const means = shown.map((_, n) => panel.value(this.sum(shown.slice(Math.max(0, n + 1 - MEAN), n + 1))));
      // without the slowest of 50, so that one pass does not flatten all others
      const usual = [...each].sort((a, b) => a - b)[Math.floor(0.98 * (each.length - 1))];
      const most = panel.most ?? roomFor(Math.max(usual, ...means));
      const place = (value, n) => `${((n + 0.5) * BOX.wide) / Math.max(shown.length, 40)},${(BOX.top + BOX.tall * (1 - Math.min(1.05, value / most))).toFixed(1)}`;
      const line = (values, name) => shape("polyline", { class: name, points: values.map(place).join(" ") });
      const children = [0, 1].map((end) => shape("line", { class: "wbe-rule", x1: 0, x2: BOX.wide, y1: BOX.top + BOX.tall * end, y2: BOX.top + BOX.tall * end }));
      children.push(line(each, "wbe-each"), line(means, "wbe-mean"));
      const perfect = panel.most && best;
      if (perfect) {
        const y = BOX.top + BOX.tall * (1 - best[0]);
        children.push(shape("line", { class: "wbe-best", x1: 0, x2: BOX.wide, y1: y, y2: y }));
        panel.note.textContent = `perfect cache, same size: ${percent(best[0])}; this one ${percent(best[1])}, over ${plural(best[2], "pass").replace("passs", "passes")}`;
      }
      panel.note.hidden = !perfect;
      panel.picture.replaceChildren(...children);
      panel.now.textContent = panel.words(means.at(-1));
      panel.ends.textContent = `0 to ${panel.words(most)}`;
      panel.picture.setAttribute("aria-label", `${panel.name}, mean of the last ${Math.min(MEAN, shown.length)} passes: ${panel.words(means.at(-1))}${perfect ? `; ${panel.note.textContent}` : ""}`);
    }
  }
}
