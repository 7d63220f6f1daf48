// The list of runs: what each is, how far it is, and which of them are looked at.

import { element } from "/chat/element.js";
import { short } from "./scale.js";
import { pick, say } from "./words.js";

const MARKS = { running: "●", stopped: "❚❚", ended: "✓" };

/** @param {object} page {place, colour(name), go(changes)} */
export function runViews(runs, page) {
  return runs.map((run) => runView(run, page));
}

function runView(run, page) {
  const chosen = page.place.runs.includes(run.name);
  const box = element("input", { type: "checkbox", "aria-label": say("compare", run.shown), "data-run": run.name });
  box.checked = chosen;
  box.addEventListener("change", () => {
    const others = page.place.runs.filter((name) => name !== run.name);
    page.go({ runs: box.checked ? [...others, run.name] : others });
  });
  const name = element("button", { type: "button", class: "run-name", title: run.shown, "data-run": run.name }, element("bdi", {}, run.shown));
  name.addEventListener("click", () => page.go({ runs: [run.name], range: null, step: null, group: null, offset: null }));
  const item = element("li", { class: chosen ? `run chosen c${page.colour(run.name)}` : "run" },
    element("label", { class: "mark" }, box, element("i", {})), name, facts(run), bar(run));
  return item;
}

function facts(run) {
  const state = element("span", { class: `state ${run.state}` }, element("i", { "aria-hidden": "true" }, MARKS[run.state]), say(run.state));
  const made = element("p", { class: "facts" }, state, element("span", {}, say(run.kind)), element("span", {}, say("steps", run.done, run.total)));
  const main = run.last[0];
  if (main) made.append(element("span", {}, `${pick(main.title)} ${short(main.value, main.percent)}`));
  const { error, warning } = run.findings;
  if (error) made.append(element("span", { class: "badge error" }, say("errors", error)));
  if (warning) made.append(element("span", { class: "badge warning" }, say("warnings", warning)));
  return made;
}

function bar(run) {
  const made = element("progress", { max: run.total || 1, value: Math.min(run.done, run.total || 1), "aria-label": say("steps", run.done, run.total) });
  made.hidden = !run.total || run.state === "ended";
  return made;
}
