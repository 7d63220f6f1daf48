// The view of rollouts: a step of a run, its groups one under another, the answers of a group side by side.

import { element } from "/chat/element.js";
import { ask } from "./api.js";
import { Filters } from "./filters.js";
import { groupView } from "./group.js";
import { shape } from "./shape.js";
import { label, say, translate } from "./words.js";

const GROUPS = 8; // that are shown at once

export class RolloutsView {
  /** @param {object} page {place, runs, chosen(), colour(name), go(changes)} */
  constructor(page) {
    this.page = page;
    this.root = element("section", { class: "rollouts" });
    this.filters = new Filters(page);
    this.said = element("p", { class: "empty" });
    this.list = element("div", { class: "groups" });
    this.hits = element("ol", { class: "hits" });
    this.root.append(this.stepper(), this.filters.root, this.said, this.hits, this.list, this.pager());
    translate(this.root);
  }

  stepper() {
    const press = (key, path, by) => {
      const picture = shape("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, shape("path", { d: path }));
      const made = element("button", { type: "button", class: "quiet icon", "data-words-label": key }, picture);
      made.addEventListener("click", () => this.move(by));
      return made;
    };
    this.run = element("select", { "data-words-label": "ofRun" });
    this.run.addEventListener("change", () => {
      const others = this.page.place.runs.filter((name) => name !== this.run.value);
      this.page.go({ runs: [this.run.value, ...others], step: null, group: null, offset: null });
    });
    this.slider = element("input", { type: "range", min: 0, step: 1, "data-words-label": "step" });
    this.slider.addEventListener("input", () => this.goTo(this.steps[this.slider.value], true));
    this.number = element("input", { type: "number", min: 0, "data-words-label": "step" });
    this.number.addEventListener("change", () => this.goTo(this.closest(Number(this.number.value))));
    this.newest = element("button", { type: "button", class: "plain", "data-words": "newest", "data-words-title": "newestHelp" });
    this.newest.addEventListener("click", () => this.page.go({ step: null, group: null, offset: null }));
    return element("div", { class: "toolbar stepper" }, this.run,
      element("span", { class: "spoken-label", "data-words": "step" }), press("previous", "M15 5l-7 7 7 7", -1), this.number,
      press("next", "M9 5l7 7-7 7", 1), this.slider, this.newest);
  }

  pager() {
    const button = (key, by) => {
      const made = element("button", { type: "button", class: "plain", "data-words": key });
      made.addEventListener("click", () => this.turn(by));
      return made;
    };
    this.earlier = button("earlier", -1);
    this.later = button("later", 1);
    this.where = element("span", { class: "where", role: "status" });
    this.pages = element("div", { class: "pager", hidden: "" }, this.earlier, this.where, this.later);
    return this.pages;
  }

  async show() {
    const runs = this.page.runs.filter((run) => run.rollouts);
    const chosen = this.page.chosen();
    const run = chosen.find((each) => each.rollouts) ?? (this.page.place.runs.length ? null : runs[0]);
    this.offer(runs, run);
    if (!run) return this.say(this.page.isGone() ? "gone" : "noRollouts");
    this.steps = (await ask("steps", { run: run.name })).steps;
    if (!this.steps.length) return this.say("noRollouts");
    const { place } = this.page;
    const step = place.step === null ? this.steps.at(-1) : this.closest(place.step);
    this.at = this.steps.indexOf(step);
    this.showStep(step);
    this.running?.abort();
    this.running = new AbortController();
    if (place.everywhere) return this.search(run, this.running.signal);
    const args = { run: run.name, step, ...this.filters.wanted(), limit: GROUPS, group: place.group, offset: place.offset };
    this.draw(run, await ask("rollouts", args, this.running.signal));
  }

  /** Follow the newest step while it is looked at; an older one does not change. */
  async refresh() {
    const run = this.page.chosen().find((each) => each.rollouts);
    if (!run) return this.show();
    if (this.page.place.everywhere) return;
    const reading = this.root.contains(document.activeElement) && document.activeElement.closest(".group, .toolbar");
    if (this.page.place.step === null && !reading) return this.show();
    this.steps = (await ask("steps", { run: run.name })).steps;
    if (this.steps.length) this.slider.max = this.steps.length - 1;
  }

  offer(runs, run) {
    const names = runs.map((each) => element("option", { value: each.name }, each.shown));
    if (!run) names.unshift(element("option", { value: "" }, "–"));
    this.run.replaceChildren(...names);
    this.run.value = run?.name ?? "";
  }

  showStep(step) {
    this.slider.max = this.steps.length - 1;
    this.slider.value = this.at;
    this.slider.setAttribute("aria-valuetext", String(step));
    this.number.value = step;
    this.newest.setAttribute("aria-pressed", String(this.page.place.step === null));
  }

  draw(run, found) {
    this.found = found;
    this.filters.show(found);
    this.hits.replaceChildren();
    this.said.hidden = found.groups.length > 0;
    if (!found.groups.length) label(this.said, "nothing");
    const lens = { ask: (args) => ask("text", { run: run.name, step: found.step, ...args }), words: this.page.place.words };
    const groups = found.groups.map((group) => groupView(group, lens, this.linkTo(found.step, group.group)));
    this.list.replaceChildren(...groups);
    this.pages.hidden = found.matching <= GROUPS;
    this.where.textContent = say("shownGroups", found.offset + 1, found.offset + found.groups.length, found.matching);
    this.earlier.disabled = found.offset === 0;
    this.later.disabled = found.offset + GROUPS >= found.matching;
    this.list.querySelector(`[data-group="${this.page.place.group}"]`)?.focus();
  }

  linkTo(step, group) {
    return { ...this.page.place, step, group, offset: null, view: "rollouts" };
  }

  say(key) {
    label(this.said, key);
    this.said.hidden = false;
    this.list.replaceChildren();
    this.hits.replaceChildren();
    this.pages.hidden = true;
    this.found = null;
    this.steps = [];
    this.filters.root.hidden = true;
  }

  /** Search all steps, a stretch at a time, until there is enough to show. */
  async search(run, signal, begin = 0) {
    const wanted = this.filters.wanted();
    this.filters.show(null);
    if (!begin) this.hits.replaceChildren();
    this.list.replaceChildren();
    this.pages.hidden = true;
    let next = begin;
    const shown = this.hits.querySelectorAll(".hit").length;
    while (next !== null && this.hits.querySelectorAll(".hit").length - shown < 50) {
      const found = await ask("search", { run: run.name, begin: next, ...wanted }, signal);
      next = found.next;
      this.hits.append(...found.hits.map((hit) => this.hitView(hit)));
      this.said.hidden = false;
      label(this.said, "hits", this.hits.querySelectorAll(".hit").length, next !== null);
    }
    if (next === null) return;
    const on = element("button", { type: "button", class: "plain" });
    label(on, "searchOn", next);
    on.addEventListener("click", () => {
      on.parentElement.remove();
      this.search(run, signal, next);
    });
    this.hits.append(element("li", {}, on));
  }

  hitView(hit) {
    const made = element("button", { type: "button", class: "hit" },
      element("span", { class: `verdict ${hit.verdict}` }, say(hit.verdict)), element("span", { class: "unit" }, say("atStep", hit.step)),
      element("span", { class: "excerpt", dir: "auto" }, hit.excerpt));
    made.addEventListener("click", () => this.page.go({ everywhere: false, step: hit.step, group: hit.group, offset: null }));
    return element("li", {}, made);
  }

  closest(step) {
    return this.steps.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best), this.steps[0]);
  }

  goTo(step, replace = false) {
    if (step !== undefined) this.page.go({ step, group: null, offset: null, everywhere: false }, replace);
  }

  move(by) {
    if (this.steps?.length) this.goTo(this.steps[Math.max(0, Math.min(this.steps.length - 1, this.at + by))]);
  }

  async turn(by) {
    if (!this.found) return false;
    const offset = this.found.offset + by * GROUPS;
    if (offset < 0 || offset >= this.found.matching) return false;
    this.page.go({ offset, group: null, step: this.found.step });
    return true;
  }

  /** Keys: steps by the arrows, groups by j and k, search by /. */
  press(event) {
    if (event.key === "/") this.filters.focus();
    else if (event.key === "Escape") document.activeElement.blur();
    else if (event.key === "ArrowLeft" || event.key === "ArrowRight") this.move(event.key === "ArrowLeft" ? -1 : 1);
    else if (event.key === "j" || event.key === "k") this.walk(event.key === "j" ? 1 : -1);
    else return false;
    return true;
  }

  walk(by) {
    const groups = [...this.list.children];
    const now = groups.indexOf(document.activeElement.closest?.(".group"));
    const to = now < 0 ? (by > 0 ? 0 : groups.length - 1) : now + by;
    if (!groups[to]) return this.turn(by);
    groups[to].focus({ preventScroll: true });
    groups[to].scrollIntoView({ block: "start", behavior: "smooth" });
  }
}
