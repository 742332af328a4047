// Two texts token beside token, one above the other, wrapped as text is; a thin line below says how much they share.

const UNKNOWN = 255;

/** `move(row)` is told of a click or an arrow key. `overlap(row)` is 0 to 1, or null where a side has not read it. */
export class Pairs {
  constructor(move, overlap) {
    this.move = move;
    this.overlap = overlap;
    this.cells = [];
    this.prefix = `wbs-${Math.random().toString(36).slice(2)}`;
    this.element = element("div", { className: "wbs-pairs", role: "listbox", tabIndex: 0, "aria-orientation": "horizontal" });
    this.element.addEventListener("click", (event) => {
      const cell = event.target.closest("[data-row]");
      if (cell) this.move(Number(cell.dataset.row));
    });
  }

  /** Everything anew; rows before `from` are left out. */
  build(data, from) {
    const { texts, same, labels, summary } = data;
    this.from = from;
    this.data = data;
    this.element.setAttribute("aria-label", `${labels[0]} above, ${labels[1]} below, token beside token. Left and right arrows move in both, N goes to the next difference.`);
    const parts = [];
    this.cells = texts[0].map((text, row) => {
      const other = texts[1][row];
      const cell = element("span", { className: this.kind(row), role: "option", "data-row": row, id: `${this.prefix}-${row}`, "aria-label": this.words(row), "aria-selected": "false" },
        this.piece(text, "wbs-a"), this.piece(other, "wbs-b"), element("i", { className: "wbs-share" }));
      if (row < from) return cell;
      if (row === summary.first) parts.push(element("span", { className: "wbs-fork", role: "presentation" }, "here they part"));
      parts.push(cell);
      const ends = [text, other].filter((each) => each !== null);
      if (ends.some((each) => each.includes("\n"))) parts.push(element("span", { className: "wbs-break", role: "presentation" }));
      return cell;
    });
    fill(this.element, parts);
    this.shade();
  }

  kind(row) {
    const { same, prompt } = this.data;
    return `wbs-cell${same[row] ? " wbs-same" : " wbs-other"}${row < prompt ? " wbs-prompt" : ""}`;
  }

  piece(text, kind) {
    if (text === null) return element("span", { className: `wbs-piece ${kind} wbs-none` }, "\u00a0");
    return element("span", { className: `wbs-piece ${kind}` }, text.replace(/\n/g, "\u21b5") || "\u200b");
  }

  words(row) {
    const { texts, same, labels, positions } = this.data;
    const name = (text) => (text === null ? "nothing" : visible(text));
    const shared = this.overlap(row);
    const share = shared === null ? "" : `, routing overlap ${percent(shared)}`;
    const text = same[row] ? name(texts[0][row]) : `${labels[0]}: ${name(texts[0][row])}, ${labels[1]}: ${name(texts[1][row])}`;
    return `Position ${positions[row]}: ${text}${share}`;
  }

  /** The line under each token: the less of the routing is shared, the thicker and the stronger. */
  shade() {
    this.cells.forEach((cell, row) => {
      const shared = this.overlap(row);
      const line = cell.lastChild;
      line.className = shared === null ? "wbs-share wbs-unread" : "wbs-share";
      line.style.setProperty("--apart", String(shared === null ? 0 : 1 - shared));
      cell.setAttribute("aria-label", this.words(row));
    });
  }

  mark(row) {
    this.element.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    const cell = this.cells[row];
    if (!cell?.isConnected) {
      this.element.removeAttribute("aria-activedescendant");
      return;
    }
    cell.setAttribute("aria-selected", "true");
    this.element.setAttribute("aria-activedescendant", cell.id);
    const { scrollTop, clientHeight } = this.element;
    const top = cell.offsetTop;
    if (top < scrollTop) this.element.scrollTop = top - 8;
    else if (top + cell.offsetHeight > scrollTop + clientHeight) this.element.scrollTop = top + cell.offsetHeight - clientHeight + 8;
  }
}
