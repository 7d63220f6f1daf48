// The view of details: what the doctor found in each chosen run, its result, its config.

import { element } from "/chat/element.js";
import { ask } from "./api.js";
import { short } from "./scale.js";
import { label, say } from "./words.js";

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

function result(found) {
  const names = Object.keys(found);
  if (!names.length) return element("p", { class: "quiet-line" }, say("noResult"));
  const tables = names.filter((name) => rows(found[name]).length).map((name) => table(name, found[name]));
  const facts = names.filter((name) => !rows(found[name]).length && !Array.isArray(found[name]));
  const list = facts.map((name) => element("div", {}, element("dt", {}, words(name)), element("dd", {}, text(found[name]))));
  return element("div", { class: "results" }, ...tables, facts.length ? element("dl", { class: "facts-list" }, ...list) : "");
}

/** The members of an object that are measured alike, each with its figures: [name, {figure: value}]. */
function rows(value) {
  if (!isObject(value) || "mean" in value) return [];
  return Object.entries(value).filter(([, inner]) => isObject(inner) && !("mean" in inner) && Object.keys(inner).length);
}

function table(name, value) {
  const lines = rows(value);
  const columns = [...new Set(lines.flatMap(([, inner]) => Object.keys(inner)))].slice(0, 12);
  const head = element("tr", {}, element("th", { scope: "col" }, words(name)), ...columns.map((column) => element("th", { scope: "col" }, words(column))));
  const body = lines.map(([row, inner]) => element("tr", {}, element("th", { scope: "row" }, words(row)), ...columns.map((column) => element("td", {}, text(inner[column])))));
  return element("div", { class: "wide", tabindex: "0" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
}

function text(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") return Number.isInteger(value) ? value.toLocaleString("en") : short(value);
  if (!isObject(value)) return String(value);
  if ("mean" in value) return `${short(value.mean)} (${short(value.low)} – ${short(value.high)})`;
  return Object.entries(value).map(([name, inner]) => `${words(name)} ${text(inner)}`).join(", ");
}

const words = (name) => name.replaceAll("_", " ");
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
