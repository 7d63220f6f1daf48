// The view of curves: runs drawn over each other, a chart for each figure.

import { element } from "/chat/element.js";
import { ask } from "./api.js";
import { Chart } from "./chart.js";
import { bounds } from "./scale.js";
import { label, pick, say, translate } from "./words.js";

const AXES = ["step", "tokens", "cpu_seconds", "seconds"];
const FIRST = 12; // charts that are shown where nobody chose and none is usual
const NEAR = 400; // pixels beyond the window within which a chart is drawn already

export class CurvesView {
  /** @param {object} page {place, runs, colour(name), go(changes)} */
  constructor(page) {
    this.page = page;
    this.charts = new Map();
    this.details = new Map(); // run -> {version, figures, axes}
    this.root = element("section", { class: "curves" });
    this.root.append(this.toolbar(), (this.said = element("p", { class: "empty" })), (this.grid = element("div", { class: "grid" })));
    translate(this.root);
  }

  toolbar() {
    this.axis = element("div", { class: "choice", role: "radiogroup", "data-words-label": "over" });
    for (const axis of AXES) {
      const input = element("input", { type: "radio", name: "axis", value: axis });
      input.addEventListener("change", () => this.page.go({ axis, range: null }));
      this.axis.append(element("label", {}, input, element("span", { "data-words": `axis_${axis}` })));
    }
    this.smooth = element("input", { type: "range", min: 0, max: 99, step: 1, id: "smooth" });
    this.smooth.addEventListener("input", () => this.page.go({ smooth: Number(this.smooth.value) }, true));
    this.smoothSaid = element("output", { for: "smooth" });
    this.log = element("input", { type: "checkbox" });
    this.log.addEventListener("change", () => this.page.go({ log: this.log.checked }));
    this.menu = element("div", { class: "menu" });
    const menu = element("details", { class: "pick" }, element("summary", { class: "plain", "data-words": "figures" }), this.menu);
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      menu.open = false;
      menu.firstChild.focus();
    });
    document.addEventListener("pointerdown", (event) => {
      if (!menu.contains(event.target)) menu.open = false;
    });
    this.whole = element("button", { type: "button", class: "plain", "data-words": "whole", hidden: "" });
    this.whole.addEventListener("click", () => this.page.go({ range: null }));
    return element("div", { class: "toolbar" }, this.axis,
      element("label", { class: "slide" }, element("span", { "data-words": "smoothing" }), this.smooth, this.smoothSaid),
      element("label", { class: "tick" }, this.log, element("span", { "data-words": "log" })),
      menu, this.whole, element("span", { class: "hint", "data-words": "zoomHelp" }));
  }

  async show() {
    const { place } = this.page;
    for (const input of this.axis.querySelectorAll("input")) input.checked = input.value === place.axis;
    this.smooth.value = place.smooth;
    this.smoothSaid.textContent = place.smooth ? (place.smooth / 100).toFixed(2) : "0";
    this.log.checked = place.log;
    this.whole.hidden = !place.range;
    await this.refresh();
  }

  /** Ask for what has changed, and draw. */
  async refresh() {
    const { place } = this.page;
    const runs = this.page.chosen();
    if (!runs.length) return this.say(this.page.isGone() ? "gone" : "choose");
    await Promise.all(runs.map((run) => this.learn(run)));
    const axes = new Set(runs.flatMap((run) => this.details.get(run.name).axes));
    for (const choice of this.axis.children) choice.hidden = !axes.has(choice.firstChild.value) && choice.firstChild.value !== place.axis;
    const figures = this.figures(runs);
    const wanted = figures.filter((figure) => this.isWanted(figure, figures));
    this.offer(figures, wanted);
    if (!figures.length) return this.say("noCurves");
    const names = wanted.map((figure) => figure.name);
    const asked = { run: runs.map((run) => run.name), figure: names, axis: place.axis };
    const key = JSON.stringify([asked, runs.map((run) => run.version)]);
    if (key !== this.key && names.length) {
      const { curves } = await ask("curves", asked);
      this.key = key;
      this.curves = curves;
    }
    if (names.length && !Object.values(this.curves).some((each) => Object.keys(each).length)) return this.say("noAxis");
    this.said.hidden = true;
    this.draw(wanted, runs);
  }

  say(key) {
    label(this.said, key);
    this.said.hidden = false;
    this.grid.replaceChildren();
    this.charts.clear();
  }

  async learn(run) {
    const version = String(run.version);
    if (this.details.get(run.name)?.version === version) return;
    const found = await ask("run", { run: run.name }).catch(() => ({ figures: [], axes: [] }));
    this.details.set(run.name, { version, ...found });
  }

  figures(runs) {
    const found = new Map();
    for (const run of runs) for (const figure of this.details.get(run.name).figures) found.set(figure.name, figure);
    return [...found.values()];
  }

  isWanted(figure, figures) {
    const { figures: chosen } = this.page.place;
    if (chosen) return chosen.includes(figure.name);
    return figures.some((each) => each.usual) ? figure.usual : figures.indexOf(figure) < FIRST;
  }

  offer(figures, wanted) {
    const key = JSON.stringify([figures.map((figure) => figure.name), wanted.map((figure) => figure.name), document.documentElement.lang]);
    if (key === this.offered) return;
    this.offered = key;
    const items = figures.map((figure) => {
      const box = element("input", { type: "checkbox", value: figure.name });
      box.checked = wanted.includes(figure);
      box.addEventListener("change", () => {
        const names = [...this.menu.querySelectorAll("input:checked")].map((each) => each.value);
        this.page.go({ figures: names });
      });
      return element("label", { class: "tick" }, box, element("span", {}, pick(figure.title)));
    });
    const usual = element("button", { type: "button", class: "small" }, say("usual"));
    usual.addEventListener("click", () => this.page.go({ figures: null }));
    const all = element("button", { type: "button", class: "small" }, say("all"));
    all.addEventListener("click", () => this.page.go({ figures: figures.map((figure) => figure.name) }));
    const at = this.menu.querySelector(":focus")?.value;
    this.menu.replaceChildren(element("p", {}, usual, all), ...items);
    this.menu.querySelector(`input[value="${CSS.escape(at ?? "")}"]`)?.focus();
  }

  draw(wanted, runs) {
    const { place } = this.page;
    const ends = (name) => Object.values(this.curves[name] ?? {}).flatMap(([x]) => [x[0], x.at(-1)]);
    const shown = [];
    for (const figure of wanted) {
      const lines = runs.flatMap((run) => {
        const curve = this.curves[run.name]?.[figure.name];
        return curve ? [{ name: run.name, shown: run.shown, colour: this.page.colour(run.name), x: curve[0], y: curve[1] }] : [];
      });
      if (!lines.length) continue;
      if (!this.charts.has(figure.name)) this.charts.set(figure.name, this.newChart());
      const chart = this.charts.get(figure.name);
      const texts = { ...figure, title: pick(figure.title), unit: figure.unit ? pick(figure.unit) : "" };
      const range = place.range ?? bounds(lines.flatMap((line) => ends(line.name))); // so that its charts agree
      chart.show(texts, lines, { smooth: place.smooth, log: place.log, range, axis: place.axis });
      shown.push(chart.root);
    }
    const now = [...this.grid.children];
    if (now.length !== shown.length || now.some((each, index) => each !== shown[index])) this.grid.replaceChildren(...shown);
  }

  newChart() {
    return new Chart({
      pointed: (x) => {
        for (const chart of this.charts.values()) {
          const { top, bottom } = chart.root.getBoundingClientRect();
          if (bottom > -NEAR && top < innerHeight + NEAR) chart.point(x);
        }
      },
      zoomed: (range) => this.page.go({ range: range.map((each) => Number(each.toPrecision(6))) }),
    });
  }
}
