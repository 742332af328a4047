// The chat view. It keeps no history of its own: the kernel sends the visible path once, then only what is new.

const ROLES = { system: "system", user: "you", assistant: "reply", template: "format", tool: "tool" };

class ChatView {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.id = Math.random().toString(36).slice(2);
    this.messages = new Map();
    this.path = [];
    this.answering = null;
    this.draft = null; // what was sent and not yet seen by the kernel
    this.raw = false;
    this.follow = true;
    this.dirty = new Set();
    this.frame = 0;
    this.facts = { model: "model", context: 0, cache_factor: 0 };
    this.ended = new AbortController();
    this.build();
    this.onMessage = (message) => this[`on_${message.kind}`]?.(message);
    model.on("msg:custom", this.onMessage);
    this.ask();
  }

  /** Asks for everything visible, again and again until it comes: a page that was just loaded may lose a message. */
  ask(patience = 1000) {
    this.known = false;
    this.tell({ kind: "ready", view: this.id });
    clearTimeout(this.asking);
    this.asking = setTimeout(() => this.ask(Math.min(2 * patience, 30000)), patience);
  }

  close() {
    this.model.off("msg:custom", this.onMessage);
    this.ended.abort();
    cancelAnimationFrame(this.frame);
    clearTimeout(this.patience);
    clearTimeout(this.asking);
    this.card.hide();
  }

  tell = (message) => this.model.send(message);

  get busy() {
    return this.answering !== null || this.draft !== null || Boolean(this.closed);
  }

  build() {
    this.card = new Card(this.root, (turn, index, token) => this.tell({ kind: "branch", turn, index, token }), () => !this.busy,
      (turn, index) => this.tell({ kind: "look", turn, index }), (message, index) => this.tint.describe(message, index));
    this.tint = new Tint(this);
    this.looked = new Looked(this);
    this.title = element("strong", { className: "wbc-title" });
    this.tokensToggle = this.toggle("Tokens", "Show the tokens of the replies, tinted by a number of each", (on) => this.showTokens(on));
    this.promptToggle = this.toggle("Prompt", "Show the exact prompt, special tokens included", (on) => this.showPrompt(on));
    this.expertsToggle = this.toggle("Experts", "Show where each token went: experts, margins, edits", (on) => this.tell({ kind: "explore", on }));
    this.memoryToggle = this.toggle("Memory", "Show what the cache holds and in which format, and memory over time", (on) => this.tell({ kind: "explore", of: "memory", on }));
    this.file = element("input", { type: "file", accept: ".json,application/json", hidden: true });
    this.file.addEventListener("change", () => this.importFile());
    this.newButton = iconButton("new", "New conversation", () => this.tell({ kind: "clear" }));
    this.importButton = iconButton("import", "Import a conversation", () => this.file.click());
    this.head = element("header", { className: "wbc-head" }, this.title, element("span", { className: "wbc-space" }),
      this.tokensToggle, this.promptToggle, this.expertsToggle, this.memoryToggle, element("span", { className: "wbc-gap" }), this.newButton,
      iconButton("export", "Export this conversation", () => this.tell({ kind: "export" })), this.importButton, this.file);
    this.notice = element("div", { className: "wbc-error wbc-notice", role: "alert", hidden: true });
    this.empty = element("div", { className: "wbc-empty" });
    this.log = element("div", { className: "wbc-log", role: "log", tabIndex: -1, "aria-live": "polite", "aria-label": "Conversation" }, this.empty);
    this.log.addEventListener("scroll", () => this.onScroll());
    this.latest = element("button", { className: "wbc-latest", type: "button", hidden: true }, "\u2193 latest");
    this.latest.addEventListener("click", () => this.toEnd());
    this.prompt = element("div", { className: "wbc-prompt", tabIndex: 0, role: "region", "aria-label": "Prompt", hidden: true });
    this.input = element("textarea", { className: "wbc-input", rows: 1, "aria-label": "Message", placeholder: "Write a message" });
    this.input.addEventListener("input", () => this.drawInput());
    this.button = iconButton("send", "Send", (event) => this.press(event), true);
    this.button.classList.add("wbc-go");
    this.bar = element("div", { className: "wbc-bar-input" }, this.input, this.button);
    this.status = new Status();
    this.said = element("div", { className: "wbc-hidden", role: "status" });
    this.root.classList.add("wbc");
    this.root.append(this.head, this.notice, this.tint.element, element("div", { className: "wbc-main" }, this.log, this.latest, this.prompt), this.bar, this.status.element, this.said);
    const { signal } = this.ended;
    this.root.addEventListener("keydown", (event) => this.onKey(event), { signal });
    addEventListener("resize", () => this.card.hide(), { signal });
    this.drawInput();
  }

  toggle(label, title, action) {
    const button = element("button", { className: "wbc-button wbc-text", type: "button", title, "aria-pressed": "false" }, label);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      action(on);
    });
    return button;
  }

  // What the kernel says

  on_path({ path, turns, answering, facts, fresh, view, readings }) {
    if ((view && view !== this.id) || !(fresh || this.known)) return;
    clearTimeout(this.asking);
    this.known = true;
    if (fresh) {
      this.card.hide();
      this.messages.clear();
      this.looked.set(null, null);
    }
    Object.assign(this.facts, facts);
    this.tint.offer();
    this.answering = answering;
    this.draft = null;
    for (const turn of turns) {
      const known = this.messages.get(turn.key);
      if (known) known.set(turn);
      else this.messages.set(turn.key, new Message(turn, turn.role === "user" ? "You" : this.facts.model, this));
    }
    if (path.some(([key]) => !this.messages.has(key))) {
      this.ask();
      return;
    }
    this.path = path.map(([key]) => this.messages.get(key));
    this.path.forEach((message, index) => message.place(path[index].slice(1)));
    this.log.replaceChildren(this.empty, ...this.path.map((message) => message.element));
    if (answering !== null) this.follow = true;
    this.notice.hidden = true;
    if (fresh) this.tint.ask(true);
    else this.tint.take(readings ?? []);
    this.drawAll();
  }

  on_steps({ turn, from, steps, stats, readings }) {
    const message = this.messages.get(turn);
    if (!message || !this.known) return;
    if (!message.append(from, steps)) {
      this.ask();
      return;
    }
    Object.assign(message.stats, stats);
    this.tint.take(readings ?? []);
    this.drawSoon(message);
  }

  on_readings({ readings }) {
    this.tint.take(readings);
    this.tint.draw();
  }

  on_looked({ turn, index }) {
    this.looked.set(turn, index);
  }

  on_done({ turn, finish, error, stats }) {
    const message = this.messages.get(turn);
    this.answering = null;
    this.stopping = false;
    if (message) Object.assign(message, { finish, error, stats: { ...message.stats, ...stats } });
    this.announce(error ? "The reply failed" : finish === "stopped" ? "Stopped" : "The reply is complete");
    this.drawAll();
    this.askForPrompt();
  }

  on_notice({ text, draft }) {
    this.notice.textContent = text;
    this.notice.hidden = false;
    if (draft && !this.input.value) this.input.value = draft;
    this.draft = null;
    this.drawInput();
  }

  on_exploring({ on, of = "experts" }) {
    this[`${of}Toggle`].setAttribute("aria-pressed", String(on));
  }

  get exploring() {
    return this.expertsToggle.getAttribute("aria-pressed") === "true";
  }

  on_prompt({ parts, tokens }) {
    const pieces = parts.map(([role, text, special]) => element("span", { className: `wbc-part wbc-role-${role}${special ? " wbc-special" : ""}`, title: ROLES[role] ?? role }, text));
    const roles = [...new Set(parts.map(([role]) => role))];
    const legend = element("div", { className: "wbc-note" }, `${number(tokens)} tokens, exactly as the model reads them: `,
      ...roles.map((role) => element("span", { className: `wbc-part wbc-role-${role}` }, ROLES[role] ?? role)));
    this.prompt.replaceChildren(legend, element("pre", {}, ...pieces));
  }

  on_export({ name, text }) {
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    element("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  on_closed({ text }) {
    this.closed = text;
    this.answering = null;
    this.on_notice({ text });
    this.drawAll();
  }

  // What the reader does

  press(event) {
    if (event.detail > 1) return; // the second half of a double click on Send must not stop the reply
    if (this.answering !== null || this.draft !== null) this.stop();
    else this.send();
  }

  send() {
    const text = this.input.value.trim();
    if (!text || this.busy) return;
    this.draft = text;
    this.input.value = "";
    this.notice.hidden = true;
    this.follow = true;
    this.tell({ kind: "send", text });
    clearTimeout(this.patience);
    this.patience = setTimeout(() => {
      if (this.draft !== null) this.status.say("waiting for the kernel: it is busy, or was restarted (then run the cell again)");
    }, 1500);
    this.announce("Sent");
    this.drawInput();
  }

  stop() {
    this.stopping = true;
    this.tell({ kind: "stop" });
    this.drawInput();
  }

  async importFile() {
    const [file] = this.file.files;
    this.file.value = "";
    if (file) this.tell({ kind: "import", text: await file.text() });
  }

  showTokens(on) {
    this.raw = on;
    this.tint.show(on);
    this.card.hide();
    for (const message of this.messages.values()) if (message.isReply) message.clear();
    this.drawAll();
  }

  showPrompt(on) {
    this.prompt.hidden = !on;
    this.log.hidden = on;
    this.card.hide();
    this.askForPrompt();
    this.drawAll();
  }

  askForPrompt() {
    if (!this.prompt.hidden) this.tell({ kind: "prompt" });
  }

  onKey(event) {
    if (event.key === "Escape" && this.card.shown) this.card.hide();
    else if (event.key === "Escape" && this.busy) this.stop();
    else if (event.key === "Enter" && event.target === this.input && !event.shiftKey && !event.isComposing && event.keyCode !== 229) this.send();
    else {
      // plain keys are typed here, not shortcuts of the notebook around us
      if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  onScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.log;
    this.follow = scrollHeight - scrollTop - clientHeight < 40;
    this.latest.hidden = this.follow || this.log.hidden;
    this.card.place();
  }

  toEnd() {
    this.follow = true;
    this.log.scrollTop = this.log.scrollHeight;
  }

  announce(text) {
    this.said.textContent = text;
  }

  // Drawing

  drawSoon(message) {
    this.dirty.add(message);
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      for (const each of this.dirty) each.draw();
      this.dirty.clear();
      this.tint.draw();
      this.drawStatus();
      this.scroll();
    });
  }

  drawAll() {
    for (const message of this.path) message.draw();
    this.tint.draw();
    this.title.textContent = this.facts.model;
    this.empty.hidden = this.path.length > 0;
    this.empty.textContent = `Say something to ${this.facts.model}. Then hover a word of the answer to see what else it could have been.`;
    this.log.setAttribute("aria-busy", String(this.answering !== null));
    this.newButton.disabled = this.busy || !this.path.length;
    this.importButton.disabled = this.busy;
    this.drawInput();
    this.drawStatus();
    this.scroll();
  }

  drawInput() {
    const busy = this.answering !== null || this.draft !== null;
    const face = busy ? "stop" : "send";
    const label = busy ? (this.stopping ? "Stopping \u2026" : "Stop") : "Send";
    if (!busy) this.stopping = false;
    this.button.querySelector("path").setAttribute("d", ICONS[face]);
    this.button.querySelector("span").textContent = label;
    this.button.title = busy ? "Stop (Escape)" : "Send (Enter); Shift+Enter starts a new line";
    this.button.setAttribute("aria-label", label);
    this.button.classList.toggle("wbc-halt", busy);
    this.button.disabled = Boolean(this.closed) || (!busy && !this.input.value.trim());
    this.input.disabled = Boolean(this.closed);
    this.input.style.height = "auto";
    this.input.style.height = `${Math.min(160, this.input.scrollHeight + 2)}px`;
  }

  drawStatus() {
    const stats = this.path.findLast((message) => message.stats.tokens)?.stats ?? {};
    this.status.draw(this.facts, stats, this.answering !== null, this.messages.get(this.answering)?.stats.tokens_per_second);
  }

  scroll() {
    if (this.follow && !this.card.shown) this.log.scrollTop = this.log.scrollHeight;
  }
}

export default {
  render({ model, el }) {
    const root = element("div");
    el.append(root);
    const view = new ChatView(model, root);
    return () => view.close();
  },
};
