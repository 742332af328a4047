// The line below the conversation: how much of the context is used, what the cache holds, how fast tokens come.

export class Status {
  constructor() {
    this.meter = element("i");
    this.meterBox = element("span", { className: "wbc-meter", role: "meter", "aria-label": "Context used", "aria-valuemin": "0" }, this.meter);
    this.used = element("span");
    this.cache = element("span", { className: "wbc-cache" });
    this.speed = element("span", { className: "wbc-speed" });
    this.element = element("footer", { className: "wbc-status" }, this.meterBox, this.used, this.cache, element("span", { className: "wbc-space" }), this.speed);
  }

  say(text) {
    this.speed.textContent = text;
  }

  /** `stats` of the last reply that has a token; `answering`: whether a reply is on its way, `speed` tokens a second. */
  draw({ context, cache_factor: factor, cache_format: format, cache_held: since }, stats, answering, speed) {
    const used = (stats.prompt_tokens ?? 0) + (stats.tokens ?? 0);
    const share = context ? Math.min(1, used / context) : 0;
    this.meter.style.width = `${100 * share}%`;
    this.meterBox.classList.toggle("wbc-nearly-full", share > 0.9);
    this.meterBox.setAttribute("aria-valuemax", String(context));
    this.meterBox.setAttribute("aria-valuenow", String(used));
    this.used.textContent = context ? `context ${number(used)} of ${number(context)} tokens` : "";
    // figures of a reply are of when it was made: since, the cache may have been converted
    const held = since?.[0] === used && !answering ? since[1] : stats.cache_bytes;
    const packed = format && !["fp32", "bf16"].includes(format);
    this.cache.textContent = held ? `cache ${bytes(held)}${format ? ` in ${format}` : ""}, ${Math.round(100 * (1 - 1 / factor))} % less than MHA with the same heads` : "";
    this.cache.title = held ? `Multi-head attention (MHA) would keep a key and a value of every head: ${bytes(held * factor)} for the same tokens ${packed ? "in bf16" : "at the same precision"}.` : "";
    this.say(!answering ? "" : speed ? `${speed.toFixed(1)} tokens/s` : "reading the prompt \u2026");
  }
}
