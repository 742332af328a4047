// The token that the explorer below the conversation looks at: marked in its reply, and moved from there too.

export class Looked {
  constructor(view) {
    this.view = view;
    this.turn = null;
    this.index = null;
  }

  holds(message, { first, last }) {
    return message.key === this.turn && first <= this.index && this.index <= last;
  }

  /** The reader chose a token here. */
  choose(message, group) {
    this.set(message.key, group.last);
    this.view.tell({ kind: "look", turn: message.key, index: group.last });
    this.view.announce(`Token ${group.last + 1} of the reply is opened below`);
  }

  /** Another token is looked at; null: none. */
  set(turn, index) {
    if (turn === this.turn && index === this.index) return;
    const before = this.view.messages.get(this.turn);
    [this.turn, this.index] = [turn, index];
    if (before) this.mark(before);
    const message = this.view.messages.get(turn);
    const token = message && this.mark(message);
    if (token) this.reveal(token);
  }

  /** Marks it, if it is one of `message`, which was drawn anew. */
  mark(message) {
    for (const token of message.body.querySelectorAll(".wbc-looked")) {
      token.classList.remove("wbc-looked");
      token.removeAttribute("aria-current");
    }
    if (message.key !== this.turn) return null;
    const place = message.groups.list.findIndex(({ last }) => last >= this.index);
    const tokens = message.body.querySelectorAll(`.wbc-token[data-group="${place < 0 ? "end" : place}"]`);
    for (const token of tokens) {
      token.classList.add("wbc-looked");
      token.setAttribute("aria-current", "true");
    }
    return tokens[0] ?? null;
  }

  /** Scrolls the conversation, never the page around it. */
  reveal(token) {
    const { log } = this.view;
    const [frame, box] = [log, token].map((each) => each.getBoundingClientRect());
    if (log.hidden || (box.top >= frame.top && box.bottom <= frame.bottom)) return;
    this.view.follow = false;
    log.scrollTop += box.top - frame.top - (frame.height - box.height) / 2;
  }
}
