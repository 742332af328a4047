"""One widget alone in a page, joined to its half in Python by hand: no JupyterLab, and nothing happens by itself."""

import base64
import json

OPEN = """async ([source, style]) => {
  document.head.innerHTML = "";
  document.body.innerHTML = "";
  document.head.append(Object.assign(document.createElement("style"), { textContent: style }));
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  const widget = (await import(url)).default;
  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer;
  window.listeners = new Set();
  window.sent = [];
  window.tell = (message, buffers) =>
    window.listeners.forEach((listener) => listener(message, buffers.map((each) => new DataView(bytes(each)))));
  const model = {
    on: (_, listener) => window.listeners.add(listener),
    off: (_, listener) => window.listeners.delete(listener),
    send: (message) => window.sent.push(message),
  };
  const el = document.body.appendChild(document.createElement("div"));
  window.close_view = widget.render({ model, el });
}"""
FRAME = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


class Alone:
    """What `widget` sends is shown at once; what the page says reaches it with `settle`."""

    def __init__(self, page, widget, monkeypatch):
        self.page, self.widget, self.heard = page, widget, 0
        monkeypatch.setattr(type(widget), "send", lambda _, message, buffers=None: self.tell(message, buffers))
        page.goto("about:blank")
        page.evaluate(OPEN, [widget._esm, widget._css])

    def tell(self, message, buffers=None):
        packed = [base64.b64encode(each).decode() for each in buffers or []]
        self.page.evaluate(
            "([message, buffers]) => window.tell(message, buffers)", [json.loads(json.dumps(message)), packed]
        )
        self.page.evaluate(FRAME)

    def sent(self, kind):
        return [message for message in self.page.evaluate("window.sent") if message["kind"] == kind]

    def settle(self):
        """Until neither half has anything left to say."""
        while len(said := self.page.evaluate("window.sent")) > self.heard:
            for message in said[self.heard :]:
                self.heard += 1
                self.widget._handle_custom_msg(message, [])
        self.page.evaluate(FRAME)
