// Markdown as far as a chat needs it. Blocks are ranges of the source, so a growing text redraws only its last blocks,
// and model text only ever becomes text nodes: `leaf(parent, from, to)` adds the source between two offsets.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])([ \t]+)/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** The element `tag` with properties, and children that are elements or plain text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Lines of text[start:] as {from, to, text}, where to is before the line break. */
function linesOf(text, start) {
  const lines = [];
  for (let from = start; from < text.length; ) {
    const end = text.indexOf("\n", from);
    const to = end < 0 ? text.length : end;
    lines.push({ from, to, text: text.slice(from, to) });
    from = to + 1;
  }
  return lines;
}

function isTable(lines, at) {
  return lines[at].text.includes("|") && at + 1 < lines.length && lines[at + 1].text.includes("-") &&
    TABLE_RULE.test(lines[at + 1].text);
}

function startsBlock(lines, at) {
  const { text } = lines[at];
  return FENCE.test(text) || HEADING.test(text) || RULE.test(text) || ITEM.test(text) || QUOTE.test(text) ||
    isTable(lines, at);
}

/** The blocks of text[start:], where start begins a block. Only the last two can change when the text grows. */
export function parseBlocks(text, start) {
  const lines = linesOf(text, start);
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const first = at;
    const line = lines[at++];
    const from = line.from;
    let match;
    if (!line.text.trim()) {
      blocks.push({ kind: "blank", from });
    } else if ((match = FENCE.exec(line.text))) {
      const close = new RegExp(`^ {0,3}${match[1][0]}{${match[1].length},}\\s*$`);
      while (at < lines.length && !close.test(lines[at].text)) at++;
      const inner = Math.min(line.to + 1, text.length);
      blocks.push({ kind: "code", from, language: match[2], inner, end: at > first + 1 ? lines[at - 1].to : inner });
      at++;
    } else if ((match = HEADING.exec(line.text))) {
      blocks.push({ kind: "heading", from, level: match[1].length, inner: from + match[0].length, end: line.to });
    } else if (RULE.test(line.text)) {
      blocks.push({ kind: "rule", from });
    } else if (isTable(lines, first)) {
      at++;
      while (at < lines.length && lines[at].text.includes("|")) at++;
      blocks.push({ kind: "table", from, rows: [lines[first], ...lines.slice(first + 2, at)] });
    } else if (ITEM.test(line.text)) {
      while (at < lines.length && (ITEM.test(lines[at].text) || /^\s+\S/.test(lines[at].text))) at++;
      blocks.push({ kind: "list", from, items: itemsOf(lines.slice(first, at)) });
    } else if (QUOTE.test(line.text)) {
      while (at < lines.length && QUOTE.test(lines[at].text)) at++;
      const rows = lines.slice(first, at);
      blocks.push({ kind: "quote", from, rows: rows.map((row) => ({ ...row, from: row.from + QUOTE.exec(row.text)[0].length })) });
    } else {
      while (at < lines.length && lines[at].text.trim() && !startsBlock(lines, at)) at++;
      blocks.push({ kind: "paragraph", from, inner: from, end: lines[at - 1].to });
    }
  }
  return blocks;
}

function itemsOf(lines) {
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line.text);
    if (match) {
      const number = /^\d/.test(match[2]) ? parseInt(match[2], 10) : null;
      items.push({ indent: match[1].length, number, ranges: [[line.from + match[0].length, line.to]] });
    } else {
      items.at(-1).ranges.push([line.from + line.text.search(/\S/), line.to]);
    }
  }
  return items;
}

/** The element of one block. */
export function drawBlock(block, text, leaf) {
  if (block.kind === "code") return drawCode(block, text, leaf);
  if (block.kind === "table") return drawTable(block, text, leaf);
  if (block.kind === "list") return drawList(block.items, text, leaf);
  if (block.kind === "rule") return element("hr");
  if (block.kind === "blank") return element("span", { className: "wbc-blank" });
  if (block.kind === "quote") {
    const quote = element("blockquote");
    block.rows.forEach((row, index) => {
      if (index) quote.append("\n");
      drawInline(quote, text, row.from, row.to, leaf);
    });
    return quote;
  }
  const made = element(block.kind === "heading" ? `h${block.level}` : "p");
  drawInline(made, text, block.inner, block.end, leaf);
  return made;
}

function drawCode(block, text, leaf) {
  const code = element("code");
  leaf(code, block.inner, block.end);
  const source = text.slice(block.inner, block.end);
  const button = element("button", { className: "wbc-copy-code", type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copyText(source)) ? "Copied" : "Select and copy by hand";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  const bar = element("div", { className: "wbc-code-bar" }, element("span", {}, block.language || "code"), button);
  return element("div", { className: "wbc-code" }, bar, element("pre", {}, code));
}

function drawTable(block, text, leaf) {
  const table = element("table");
  block.rows.forEach((row, index) => {
    const line = element("tr");
    for (const [from, to] of cellsOf(row)) {
      const cell = element(index ? "td" : "th");
      drawInline(cell, text, from, to, leaf);
      line.append(cell);
    }
    table.append(line);
  });
  return element("div", { className: "wbc-table" }, table);
}

function cellsOf(row) {
  const cells = [];
  let from = row.text.search(/\S/);
  if (row.text[from] === "|") from++;
  const end = row.text.trimEnd().replace(/\|$/, "").length;
  while (from <= end) {
    const bar = row.text.indexOf("|", from);
    const to = bar < 0 || bar > end ? end : bar;
    const cell = row.text.slice(from, to);
    const left = from + (cell.length - cell.trimStart().length);
    cells.push([row.from + left, row.from + Math.max(left, from + cell.trimEnd().length)]);
    from = to + 1;
  }
  return cells;
}

function drawList(items, text, leaf) {
  const open = [];
  for (const item of items) {
    while (open.length > 1 && item.indent < open.at(-1).indent) open.pop();
    if (!open.length || item.indent > open.at(-1).indent + 1) {
      const list = element(item.number === null ? "ul" : "ol");
      if (item.number !== null) list.start = item.number;
      if (open.length) open.at(-1).list.lastElementChild.append(list);
      open.push({ indent: item.indent, list });
    }
    const made = element("li");
    item.ranges.forEach(([from, to], index) => {
      if (index) made.append("\n");
      drawInline(made, text, from, to, leaf);
    });
    open.at(-1).list.append(made);
  }
  return open[0].list;
}

const MARKS = [["`", "code"], ["**", "strong"], ["__", "strong"], ["*", "em"], ["_", "em"]];

function drawInline(parent, text, from, to, leaf) {
  let plain = from;
  for (let at = from; at < to; ) {
    const [mark, tag] = MARKS.find(([mark]) => text.startsWith(mark, at)) ?? [];
    const close = mark ? findClose(text, at, to, mark) : -1;
    if (close < 0) {
      at += mark ? mark.length : 1;
      continue;
    }
    if (at > plain) leaf(parent, plain, at);
    const made = element(tag);
    if (tag === "code") leaf(made, at + 1, close);
    else drawInline(made, text, at + mark.length, close, leaf);
    parent.append(made);
    plain = at = close + mark.length;
  }
  if (to > plain) leaf(parent, plain, to);
}

/** Where the mark at `at` closes, or -1. A single * or _ inside a word or a sum (2*3*4) is not a mark. */
function findClose(text, at, to, mark) {
  const start = at + mark.length;
  if (mark === "`") {
    const close = text.indexOf("`", start);
    return close > start && close < to ? close : -1;
  }
  const word = /[\p{L}\p{N}]/u;
  if (/\s/.test(text[start] ?? " ") || (mark !== "**" && at > 0 && word.test(text[at - 1]))) return -1;
  for (let close = text.indexOf(mark, start + 1); close >= 0 && close + mark.length <= to; close = text.indexOf(mark, close + 1)) {
    const after = text[close + mark.length] ?? " ";
    if (/\s/.test(text[close - 1]) || (mark !== "**" && word.test(after)) || after === mark[0]) continue;
    return close;
  }
  return -1;
}

/** True if the text is now on the clipboard. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = element("textarea", { value: text, className: "wbc-hidden" });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
