// The grid: layers down, experts across, on one canvas as large as what can be seen of it.

const LEFT = 62;
const RIGHT = 104;
const TOP = 32;
const FONT = "system-ui, sans-serif";

/** Where every cell is, in CSS pixels from the corner of the whole grid. */
class Layout {
  constructor(width, facts, ratio) {
    const { experts, groups, layers } = facts;
    this.size = experts / groups;
    this.gap = groups > 1 ? (experts > 100 ? 4 : 6) : 0;
    const free = width - LEFT - RIGHT - this.gap * (groups - 1);
    this.cell = Math.max(4, Math.min(26, Math.floor((free / experts) * ratio) / ratio));
    this.tall = Math.max(9, Math.min(24, this.cell)) + (layers.length <= 12 ? 4 : 0);
    this.space = this.cell >= 9 ? 2 : 1;
    this.right = LEFT + experts * this.cell + this.gap * (groups - 1);
    this.width = this.right + RIGHT;
    this.height = TOP + layers.length * this.tall + 6;
    this.rows = layers.length;
    this.experts = experts;
  }

  x = (expert) => LEFT + expert * this.cell + Math.floor(expert / this.size) * this.gap;
  y = (row) => TOP + 2 + row * this.tall;

  /** {row, expert} at a place; expert -1 beside the cells, null outside the rows. */
  at(x, y) {
    const row = Math.floor((y - TOP - 2) / this.tall);
    if (row < 0 || row >= this.rows) return null;
    const group = Math.floor((x - LEFT) / (this.size * this.cell + this.gap));
    const expert = group * this.size + Math.floor((x - LEFT - group * (this.size * this.cell + this.gap)) / this.cell);
    const inside = group >= 0 && expert < Math.min(this.experts, (group + 1) * this.size);
    return { row, expert: inside ? expert : -1 };
  }
}

/** The grid as an element. What it draws is a `picture`: {facts, cursor, selected, hover: {row, expert} with -1 for none,
 * sideHead, at(row, expert) -> {share: 0 to 1 | null, rank: number | null, forced}, side(row) -> {share, text} for the bar
 * beside the row, keptIn(row) -> a Set of groups | null}. */
class Grid {
  constructor(open) {
    this.canvas = element("canvas", { className: "wbr-canvas", role: "img" });
    this.room = element("div", { className: "wbr-room" }, this.canvas);
    this.element = element("div", { className: "wbr-grid", tabIndex: 0, role: "application", "aria-roledescription": "grid of experts" }, this.room);
    this.element.addEventListener("scroll", open);
  }

  measure(facts) {
    const ratio = devicePixelRatio || 1;
    const width = this.element.clientWidth;
    this.layout = new Layout(width, facts, ratio);
    this.room.style.width = `${Math.max(this.layout.width, 0)}px`;
    this.room.style.height = `${this.layout.height}px`;
    const across = Math.min(width, this.layout.width);
    const down = Math.min(this.element.clientHeight, this.layout.height);
    for (const [name, size] of [["width", across], ["height", down]]) {
      if (this.canvas[name] !== Math.round(size * ratio)) this.canvas[name] = Math.round(size * ratio);
      this.canvas.style[name] = `${size}px`;
    }
    this.across = across;
    this.down = down;
    return width > 0;
  }

  /** {row, expert} under the pointer, or null. */
  under(event) {
    const frame = this.canvas.getBoundingClientRect();
    const x = event.clientX - frame.left;
    const y = event.clientY - frame.top;
    if (!this.layout || y < TOP || x > this.across || y > this.down) return null;
    const cell = this.layout.at(x + this.element.scrollLeft, y + this.element.scrollTop);
    if (!cell) return null;
    return x < LEFT || x > this.across - RIGHT ? { row: cell.row, expert: -1 } : cell;
  }

  reveal(row) {
    if (!this.layout) return;
    const { scrollTop, clientHeight } = this.element;
    const y = this.layout.y(row);
    if (y - TOP < scrollTop) this.element.scrollTop = y - TOP;
    else if (y + this.layout.tall > scrollTop + clientHeight) this.element.scrollTop = y + this.layout.tall - clientHeight;
  }

  draw(picture, palette) {
    if (!this.measure(picture.facts)) return;
    const pen = this.canvas.getContext("2d");
    const ratio = devicePixelRatio || 1;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, this.across, this.down);
    const { scrollLeft: dx, scrollTop: dy } = this.element;
    const part = (x, y, width, height, draw) => {
      pen.save();
      pen.beginPath();
      pen.rect(x, y, width, height);
      pen.clip();
      draw();
      pen.restore();
    };
    Object.assign(this, { pen, palette, picture });
    const middle = this.across - LEFT - RIGHT;
    const first = Math.max(0, Math.floor(dy / this.layout.tall));
    const last = Math.min(this.layout.rows - 1, Math.floor((dy + this.down - TOP) / this.layout.tall));
    this.shown = [first, last];
    part(0, TOP, this.across, this.down - TOP, () => this.bands(dy));
    part(LEFT - 2, TOP - 2, middle + 4, this.down - TOP + 2, () => this.cells(-dx, -dy));
    part(LEFT, 0, middle, TOP, () => this.heading(-dx));
    part(0, TOP, LEFT, this.down - TOP, () => this.labels(-dy));
    part(this.across - RIGHT, 0, RIGHT, this.down, () => this.sides(this.across - RIGHT + 14, -dy));
  }

  bands(dy) {
    const { pen, palette, picture, layout } = this;
    if (picture.selected.row < 0) return;
    pen.fillStyle = palette.band;
    pen.fillRect(0, layout.y(picture.selected.row) - dy - 1, this.across, layout.tall);
  }

  heading(dx) {
    const { pen, palette, picture, layout } = this;
    const { groups, experts } = picture.facts;
    pen.font = `11px ${FONT}`;
    pen.fillStyle = palette.soft;
    pen.textBaseline = "alphabetic";
    if (groups > 1) {
      const wide = layout.size * layout.cell;
      for (let group = 0; group < groups; group++) {
        const x = layout.x(group * layout.size) + dx;
        pen.fillText(wide > 64 ? `group ${group}` : String(group), x, 14);
        pen.fillStyle = palette.line;
        pen.fillRect(x, 20, wide - layout.space, 2);
        pen.fillStyle = palette.soft;
      }
      return;
    }
    const every = layout.cell >= 20 ? 1 : layout.cell >= 10 ? 4 : 10;
    pen.textAlign = "center";
    for (let expert = 0; expert < experts; expert += every) pen.fillText(String(expert), layout.x(expert) + dx + (layout.cell - layout.space) / 2, 22);
    pen.textAlign = "left";
  }

  labels(dy) {
    const { pen, palette, picture, layout } = this;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const every = Math.ceil(12 / layout.tall);
    for (let row = this.shown[0]; row <= this.shown[1]; row++) {
      const strong = row === picture.selected.row || row === picture.cursor.row;
      if (row % every && !strong) continue;
      pen.font = `${strong ? "600 " : ""}11px ${FONT}`;
      pen.fillStyle = strong ? palette.ink : palette.soft;
      pen.fillText(`layer ${picture.facts.layers[row]}`, LEFT - 10, layout.y(row) + dy + (layout.tall - layout.space) / 2);
    }
    pen.textAlign = "left";
  }

  cells(dx, dy) {
    const { pen, palette, picture, layout } = this;
    const wide = layout.cell - layout.space;
    const high = layout.tall - layout.space - (layout.rows <= 12 ? 2 : 0);
    this.ranked = wide >= 9;
    this.outlined = wide >= 6;
    const round = layout.cell >= 12 ? 3 : layout.cell >= 8 ? 1.5 : 0;
    const box = (row, expert) => {
      pen.beginPath();
      pen.roundRect(layout.x(expert) + dx, layout.y(row) + dy, wide, high, round);
    };
    for (let row = this.shown[0]; row <= this.shown[1]; row++) {
      const kept = picture.keptIn(row);
      for (let expert = 0; expert < layout.experts; expert++) {
        box(row, expert);
        const { share, rank, forced } = picture.at(row, expert);
        if (share === null) {
          pen.fillStyle = kept?.has(Math.floor(expert / layout.size)) ? palette.kept : palette.cell;
          pen.fill();
        } else if (share === 0) {
          pen.strokeStyle = palette.line;
          pen.lineWidth = 1;
          if (this.outlined) pen.stroke();
        } else {
          pen.fillStyle = palette.ramp(share);
          pen.fill();
          if (forced) {
            pen.strokeStyle = palette.forced;
            pen.lineWidth = 2;
            pen.stroke();
          }
          if (rank !== null && this.ranked) {
            pen.font = `600 ${wide >= 18 ? 12 : wide >= 12 ? 9 : 8}px ${FONT}`;
            pen.textAlign = "center";
            pen.textBaseline = "middle";
            pen.fillStyle = palette.on(share);
            pen.fillText(String(rank + 1), layout.x(expert) + dx + wide / 2, layout.y(row) + dy + high / 2 + 0.5);
            pen.textAlign = "left";
          }
        }
      }
    }
    const frame = ({ row, expert }, colour, width, dash) => {
      if (row < 0 || expert < 0) return;
      pen.beginPath();
      pen.roundRect(layout.x(expert) + dx - 1.5, layout.y(row) + dy - 1.5, wide + 3, high + 3, round + 1.5);
      pen.setLineDash(dash);
      pen.lineWidth = width;
      pen.strokeStyle = colour;
      pen.stroke();
      pen.setLineDash([]);
    };
    if (picture.hover) frame(picture.hover, palette.soft, 1.5, []);
    frame(picture.selected, palette.accent, 2.5, []);
    frame(picture.cursor, palette.ink, 1.5, [3, 2]);
  }

  sides(x, dy) {
    const { pen, palette, picture, layout } = this;
    pen.font = `11px ${FONT}`;
    pen.textBaseline = "alphabetic";
    pen.fillStyle = palette.soft;
    pen.fillText(picture.sideHead, x, picture.facts.groups > 1 ? 14 : 22);
    pen.beginPath();
    pen.rect(x - 14, TOP, RIGHT, this.down - TOP);
    pen.clip();
    pen.textBaseline = "middle";
    const every = Math.ceil(11 / layout.tall);
    for (let row = this.shown[0]; row <= this.shown[1]; row++) {
      const { share, text } = picture.side(row);
      const y = layout.y(row) + dy + (layout.tall - layout.space) / 2;
      const bar = Math.min(8, layout.tall - 4);
      if (share !== null) {
        pen.fillStyle = palette.cell;
        pen.fillRect(x, y - bar / 2, 36, bar);
        pen.fillStyle = palette.accent;
        pen.fillRect(x, y - bar / 2, Math.max(1, 36 * Math.min(1, share)), bar);
      }
      if (row % every && row !== picture.selected.row) continue;
      pen.fillStyle = palette.soft;
      pen.fillText(text, x + 42, y + 0.5);
    }
  }
}
