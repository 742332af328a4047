// What tints a token, wherever tokens are shown: the hue of an expert, the ends of a scale, words for a number.

// Okabe and Ito's colours, told apart by every eye; each stands for a group of experts
const HUES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999"];
const COSTS = ["ms", "cache_bytes"]; // blue, where how sure the model was is orange

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let power = 0;
  while (value >= 1024 && power < 3) (value /= 1024), power++;
  return `${value >= 100 || power === 0 ? Math.round(value) : value.toFixed(1)} ${units[power]}`;
}

/** The next rounder number, so that a scale does not move with every token. */
function rounded(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 1.5, 2, 3, 5, 7, 10].find((step) => step * power >= value * 0.999);
}

/** [value without tint, value with full tint] of a colour; an open end is what 98 % of the `known` values stay below. */
function scaleOf({ name, clear, full }, known) {
  const unit = name === "cache_bytes" ? 1024 : 1;
  const open = clear === null || full === null;
  const most = open ? unit * rounded(known.sort((a, b) => a - b)[Math.floor(0.98 * (known.length - 1))] / unit) : 0;
  return [clear ?? most, full ?? most];
}

/** Share of full tint, 0 to 1. */
function shareOf(value, [clear, full], power) {
  const [at, low, high] = [value, clear, full].map((each) => Math.sign(each) * Math.abs(each) ** power);
  return Math.min(1, Math.max(0, (at - low) / (high - low)));
}

function inWords(value, name) {
  if (Number.isNaN(value)) return "not measured";
  if (name === "cache_bytes") return bytes(value);
  if (name === "margin" && value < 0) return "forced";
  const unit = { surprise: " nats", entropy: " nats", ms: " ms" }[name] ?? "";
  const size = Math.abs(value);
  if (name === "ms") return `${Number(value.toPrecision(3))}${unit}`;
  if (size < 0.001) return `${size !== 0 && size < 0.0001 ? "<0.0001" : Number(size.toPrecision(2))}${unit}`;
  return `${Number(value.toFixed(3))}${unit}`;
}

/** The two ends of a scale in words. */
function endsOf({ name, clear, full }, ends) {
  return [clear, full].map((end, n) => `${end === null ? "\u2265 " : ""}${inWords(ends[n], name)}`);
}

/** Experts come in up to eight bands of their own hue: the groups of the model, where it has some. */
function bandOf(expert, { experts, groups }) {
  const size = groups > 1 ? experts / groups : Math.ceil(experts / Math.min(8, experts));
  const number = Math.floor(expert / size);
  return { number, size, hue: HUES[number % HUES.length], strength: 22 + Math.round((33 * (expert % size)) / Math.max(1, size - 1)) };
}

/** A legend of the bands: one element each, named with `prefix` in its classes. */
function bandsOf(facts, prefix) {
  if (!facts.experts) return [];
  const { size } = bandOf(0, facts);
  return Array.from({ length: Math.ceil(facts.experts / size) }, (_, n) => {
    const last = Math.min(facts.experts, (n + 1) * size) - 1;
    const swatch = element("i", { className: `${prefix}-swatch` });
    swatch.style.background = HUES[n % HUES.length];
    return element("span", { className: `${prefix}-band`, title: facts.groups > 1 ? `group ${n}` : "" }, swatch, `${n * size}\u2013${last}`);
  });
}
