// The view of details: what the doctor found in each chosen run, its result, its config.

import { element } from "/chat/element.js";
import { ask } from "./api.js";
import { label, pick, say } from "./words.js";

const SIGNS = { error: "✗", warning: "!", note: "·" };

export class DetailsView {
  constructor(page) {
    this.page = page;
    this.root = element("section", { class: "details" });
  }

  async show() {
    const runs = this.page.chosen();
    if (!runs.length) {
      const said = element("p", { class: "empty" });
      label(said, this.page.isGone() ? "gone" : "choose");
      return this.root.replaceChildren(said);
    }
    const found = await Promise.all(runs.map((run) => ask("run", { run: run.name })));
    const open = new Set([...this.root.querySelectorAll("details[open]")].map((each) => each.dataset.run));
    this.root.replaceChildren(...found.map((details, place) => this.one(runs[place], details, open)));
  }

  refresh() {
    return this.show();
  }

  one(run, details, open) {
    const steps = `${say(run.kind)} · ${say("steps", run.done, run.total)} · ${say(run.state)}`;
    const config = element("details", { class: "fold-away", "data-run": run.name }, element("summary", {}, say("config")), element("pre", { dir: "auto" }, details.config));
    config.open = open.has(run.name);
    return element("article", { class: "card run-details" },
      element("header", {}, element("i", { class: `swatch c${this.page.colour(run.name)}` }), element("h2", {}, element("bdi", {}, run.shown)), element("span", { class: "unit" }, steps)),
      element("h3", {}, say("findings")), findings(details.findings),
      element("h3", {}, say("result")), result(details.result),
      details.config ? config : "");
  }
}

function findings(found) {
  if (!found.length) return element("p", { class: "quiet-line" }, say("noFindings"));
  const items = found.map((each) => {
    const when = each.times > 1 ? say("atSteps", each.first, each.last, each.times) : say("atStep", each.first);
    return element("li", { class: `finding ${each.severity}` },
      element("b", {}, `${SIGNS[each.severity]} ${say(each.severity)}`),
      element("div", {}, element("p", {}, each.what || each.name), element("p", { class: "do" }, each.do), element("small", {}, when)));
  });
  return element("ul", { class: "findings" }, ...items);
}

function result({ tables, facts }) {
  if (!tables.length && !facts.length) return element("p", { class: "quiet-line" }, say("noResult"));
  const list = facts.map(({ name, value }) => element("div", {}, element("dt", {}, pick(name)), element("dd", {}, value)));
  return element("div", { class: "results" }, ...tables.map(table), facts.length ? element("dl", { class: "facts-list" }, ...list) : "");
}

function table({ title, columns, rows }) {
  const cell = (tag, scope, words) => element(tag, { scope }, pick(words));
  const head = element("tr", {}, cell("th", "col", title), ...columns.map((column) => cell("th", "col", column)));
  const body = rows.map(({ name, figures }) => element("tr", {}, cell("th", "row", name), ...figures.map(figureView)));
  return element("div", { class: "wide", tabindex: "0", "aria-label": pick(title) }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
}

function figureView({ value, interval }) {
  const made = element("td", {}, value);
  if (interval) made.append(element("small", {}, say("between", ...interval)));
  return made;
}
