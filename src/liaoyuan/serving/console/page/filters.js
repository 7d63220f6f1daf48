// Which rollouts are wanted: by reward, level, task, flaw and words.

import { element } from "/chat/element.js";
import { say, translate } from "./words.js";

const VERDICTS = ["", "right", "partly", "wrong", "unjudged"];
const TYPING_MS = 250;

export class Filters {
  constructor(page) {
    this.page = page;
    this.verdicts = element("div", { class: "choice", role: "radiogroup", "data-words-label": "verdict" });
    for (const verdict of VERDICTS) {
      const input = element("input", { type: "radio", name: "verdict", value: verdict });
      input.addEventListener("change", () => this.go({ verdict }));
      this.verdicts.append(element("label", { "data-verdict": verdict }, input, element("span")));
    }
    this.selects = Object.fromEntries(["level", "task", "flaw"].map((name) => [name, this.select(name)]));
    this.words = element("input", { type: "search", autocomplete: "off", spellcheck: "false", "data-words-label": "search", "data-words-placeholder": "search" });
    this.words.addEventListener("input", () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.go({ words: this.words.value.trim() }, true), TYPING_MS);
    });
    this.everywhere = element("input", { type: "checkbox" });
    this.everywhere.addEventListener("change", () => this.go({ everywhere: this.everywhere.checked }));
    const all = element("label", { class: "tick", "data-words-title": "searchAllHelp" }, this.everywhere, element("span", { "data-words": "searchAll" }));
    this.told = element("span", { class: "told", role: "status" });
    const labels = Object.entries(this.selects).map(([name, select]) => element("label", { class: "select" }, element("span", { "data-words": name }), select));
    this.root = element("div", { class: "toolbar filters" }, this.verdicts, ...labels, this.words, all, this.told);
    translate(this.root);
  }

  select(name) {
    const made = element("select");
    made.addEventListener("change", () => this.go({ [name]: made.value }));
    return made;
  }

  go(changes, replace = false) {
    this.page.go({ ...changes, group: null, offset: null }, replace);
  }

  /** The arguments that ask for what is wanted. */
  wanted() {
    const { verdict, level, task, flaw, words } = this.page.place;
    return { verdict, level, task, flaw, words };
  }

  /** Show the choices that a step offers; null: leave them as they are. */
  show(found) {
    const { place } = this.page;
    this.root.hidden = false;
    this.everywhere.checked = place.everywhere;
    if (document.activeElement !== this.words) this.words.value = place.words;
    for (const item of this.verdicts.children) {
      const { verdict } = item.dataset;
      const number = found ? (verdict ? found.verdicts[verdict] : found.all) : "";
      item.firstChild.checked = verdict === place.verdict;
      item.hidden = Boolean(found) && verdict !== place.verdict && Boolean(verdict) && !number;
      item.lastChild.replaceChildren(say(verdict || "anyVerdict"), " ", element("b", {}, String(number)));
    }
    for (const select of Object.values(this.selects)) select.parentElement.hidden = !select.options.length;
    if (!found) return this.told.replaceChildren();
    this.options("level", found.levels.map(String), place.level);
    this.options("task", found.tasks, place.task);
    this.options("flaw", found.flaws, place.flaw, [["any", say("flawed")], ["none", say("flawless")]]);
    const said = [];
    if (found.rollouts < found.all) said.push(say("matching", found.rollouts, found.all));
    if (found.unread) said.push(say("unread", found.unread));
    if (!found.whole) said.push(say("torn"));
    this.told.textContent = said.join(" · ");
  }

  options(name, values, chosen, special = []) {
    const select = this.selects[name];
    const all = [["", say("any")], ...(values.length ? special : []), ...values.map((value) => [value, value])];
    if (chosen && !all.some(([value]) => value === chosen)) all.push([chosen, chosen]);
    select.parentElement.hidden = all.length < (special.length ? 2 : 3) && !chosen;
    if (document.activeElement === select) return;
    select.replaceChildren(...all.map(([value, text]) => element("option", { value }, text)));
    select.value = chosen;
  }

  focus() {
    this.words.focus();
    this.words.select();
  }
}
