// The turns of the conversation as elements. Only text nodes, but for the sanitised HTML that the server made.

import { element } from "./element.js";
import { label, say } from "./words.js";

export function questionView(text) {
  return element("li", { class: "turn asked" }, element("div", { class: "bubble", dir: "auto" }, text));
}

/** One answer on the page: it grows while it streams, and is rendered when it is whole. */
export class AnswerView {
  constructor() {
    this.summary = element("summary");
    this.thought = element("div", { class: "thought", dir: "auto" });
    this.fold = element("details", { class: "fold", hidden: "" }, this.summary, this.thought);
    this.text = element("div", { class: "text growing", dir: "auto" });
    this.meta = element("div", { class: "meta" });
    this.root = element("li", { class: "turn answered", "aria-busy": "true" }, this.fold, this.text, this.meta);
    this.waiting = element("span", { class: "waiting", "aria-hidden": "true" }, element("i"), element("i"), element("i"));
    this.text.append(this.waiting);
  }

  addThought(text, tokens) {
    this.waiting.remove();
    if (this.fold.hidden) {
      this.fold.hidden = false;
      this.fold.open = true; // shows its last lines while it grows
      this.fold.classList.add("open-thought");
    }
    this.thought.append(text);
    this.thought.scrollTop = this.thought.scrollHeight;
    this.thought.classList.toggle("full", this.thought.scrollTop > 0);
    label(this.summary, "thinkingNow", tokens);
  }

  addText(text) {
    this.waiting.remove();
    this.text.append(text);
  }

  /** End the thought: fold it away and say how long it was. */
  endThought(tokens) {
    if (!this.fold.classList.contains("open-thought")) return;
    this.fold.classList.remove("open-thought");
    this.fold.open = false;
    label(this.summary, "thought", tokens);
  }

  showSpeed(tokens, rate) {
    this.speed ??= this.meta.appendChild(element("span", { class: "speed" }));
    if (rate) label(this.speed, "speed", tokens, rate);
    else label(this.speed, "tokens", tokens);
  }

  showReason(key) {
    label(this.meta.appendChild(element("span", { class: "reason" })), key);
  }

  showError(message, key) {
    this.waiting.remove();
    const said = element("p", { class: "error", role: "alert" }, message);
    if (key) label(said, key);
    this.text.after(said);
  }

  /** @param {string|null} html sanitised by the server; null leaves the plain text */
  finish(html, empty) {
    this.waiting.remove();
    if (html !== null) this.text.innerHTML = html;
    this.text.classList.toggle("growing", html === null);
    for (const table of this.text.querySelectorAll("table")) {
      const frame = element("div", { class: "wide", tabindex: "0" });
      table.replaceWith(frame);
      frame.append(table);
    }
    for (const link of this.text.querySelectorAll("a")) link.target = "_blank";
    if (empty) label(this.text.appendChild(element("p", { class: "empty" })), "empty");
    this.root.setAttribute("aria-busy", "false");
  }

  /** Offer what may be done with a finished answer. */
  offer(answer, again) {
    if (answer && navigator.clipboard) this.meta.append(copyButton(answer));
    const retry = element("button", { type: "button", class: "small again" });
    label(retry, "again");
    retry.addEventListener("click", again);
    this.meta.append(retry);
  }

  withdraw() {
    this.meta.querySelector(".again")?.remove();
  }
}

function copyButton(text) {
  const button = element("button", { type: "button", class: "small" });
  label(button, "copy");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    label(button, "copied");
    setTimeout(() => label(button, "copy"), 1500);
  });
  return button;
}

export function exampleView(text, ask) {
  const button = element("button", { type: "button", class: "example", dir: "auto" }, text);
  button.addEventListener("click", () => ask(text));
  return element("li", {}, button);
}

export function announce(key) {
  document.getElementById("spoken").textContent = say(key);
}
