// One figure of several runs as curves: raw ones faint, smoothed ones over them, values where the reader points.

import { element } from "/chat/element.js";
import { bounds, logTicks, nearest, short, smoothed, ticks } from "./scale.js";
import { shape } from "./shape.js";
import { say } from "./words.js";

const FRAME = { left: 52, right: 12, top: 10, bottom: 26 };
const FEWEST = 24; // points of a curve that is smoothed
const DRAG = 6; // pixels, less is a click

export class Chart {
  /** @param {{pointed: (x: number|null) => void, zoomed: (range: number[]) => void}} listener */
  constructor(listener) {
    this.listener = listener;
    this.title = element("h3");
    this.unit = element("span", { class: "unit" });
    this.size = element("button", { type: "button", class: "quiet icon", "data-words-label": "larger" }, shape("svg",
      { viewBox: "0 0 24 24", "aria-hidden": "true" }, shape("path", { d: "M14 4h6v6M20 4l-7 7M10 20H4v-6M4 20l7-7" })));
    this.size.setAttribute("aria-label", say("larger"));
    this.legend = element("ul", { class: "legend" });
    this.svg = shape("svg", { class: "plot", role: "img", tabindex: "0" });
    this.root = element("article", { class: "card chart" },
      element("header", {}, this.title, this.unit, this.size), this.legend, this.svg);
    this.lines = [];
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  /**
   * @param {object} figure {name, title, unit, percent} with its texts picked
   * @param {{name: string, colour: number, x: number[], y: number[]}[]} lines
   * @param {{smooth: number, log: boolean, range: number[], axis: string}} look
   */
  show(figure, lines, look) {
    this.figure = figure;
    this.look = look;
    this.title.textContent = figure.title;
    this.unit.textContent = figure.unit;
    this.lines = lines.map((line) => {
      const soft = look.smooth > 0 && line.y.length >= FEWEST;
      return { ...line, soft: soft ? smoothed(line.y, look.smooth / 100) : null };
    });
    const items = this.lines.map((line) => {
      line.value = element("b");
      return element("li", {}, element("i", { class: `swatch c${line.colour}` }), element("span", {}, line.shown), line.value);
    });
    this.legend.replaceChildren(...items);
    const last = this.lines.map((line) => `${line.shown}: ${this.text(this.height(line).at(-1))}`).join(", ");
    this.svg.setAttribute("aria-label", say("chart", this.figure.title, last));
    this.draw();
    this.point(null);
  }

  draw() {
    const [width, height] = [this.svg.clientWidth, this.svg.clientHeight];
    if (!this.figure || !width) return;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.scale(width, height);
    this.cursor = shape("g", { class: "cursor" });
    this.svg.replaceChildren(this.axes(width, height), ...this.curves(width, height), this.cursor);
    if (this.at !== undefined) this.point(this.at);
  }

  /** Find which part is shown and how it lies on the picture. */
  scale(width, height) {
    const [left, right] = this.look.range;
    const inside = this.lines.flatMap((line) => line.y.filter((_, place) => line.x[place] >= left && line.x[place] <= right));
    let [low, high] = bounds(inside);
    this.log = this.look.log && inside.length > 0 && low > 0;
    const bend = this.log ? Math.log10 : (value) => value;
    const margin = (bend(high) - bend(low)) * 0.06;
    this.limits = { left, right, low, high };
    const bottom = bend(low) - margin;
    const span = bend(high) + margin - bottom;
    this.toX = (x) => FRAME.left + ((x - left) / (right - left || 1)) * (width - FRAME.left - FRAME.right);
    this.toY = (y) => height - FRAME.bottom - ((bend(y) - bottom) / (span || 1)) * (height - FRAME.top - FRAME.bottom);
    this.fromX = (x) => left + ((x - FRAME.left) / (width - FRAME.left - FRAME.right)) * (right - left);
  }

  axes(width, height) {
    const { left, right, low, high } = this.limits;
    const made = shape("g", { class: "axes" });
    for (const y of this.log ? logTicks(low, high) : ticks(low, high, height > 260 ? 7 : 4)) {
      const at = this.toY(y);
      made.append(shape("line", { x1: FRAME.left, x2: width - FRAME.right, y1: at, y2: at }));
      made.append(shape("text", { x: FRAME.left - 8, y: at, class: "y" }, this.text(y)));
    }
    const places = ticks(left, right, Math.max(2, Math.min(7, width / 90)));
    for (const x of places.filter((x) => this.look.axis !== "step" || Number.isInteger(x))) {
      const side = this.toX(x) > width - 24 ? "x end" : "x";
      made.append(shape("text", { x: side === "x" ? this.toX(x) : width - FRAME.right, y: height - 6, class: side }, short(x)));
    }
    return made;
  }

  curves(width, height) {
    const clip = `clip-${this.figure.name.replace(/[^\w]/g, "-")}`;
    const frame = { x: FRAME.left, y: 0, width: Math.max(0, width - FRAME.left - FRAME.right + 2), height: height - FRAME.bottom + 4 };
    const inside = shape("g", { "clip-path": `url(#${clip})` });
    for (const line of this.lines) {
      if (line.soft) inside.append(this.path(line, line.y, "raw"));
    }
    for (const line of this.lines) {
      inside.append(this.path(line, this.height(line), "line"));
      if (line.x.length < FEWEST) {
        const dots = line.x.map((x, place) => shape("circle", { cx: this.toX(x), cy: this.toY(line.y[place]), r: 2.5 }));
        inside.append(shape("g", { class: `dots c${line.colour}` }, ...dots));
      }
    }
    return [shape("clipPath", { id: clip }, shape("rect", frame)), inside];
  }

  path(line, values, kind) {
    const points = line.x.map((x, place) => `${this.toX(x).toFixed(1)} ${this.toY(values[place]).toFixed(1)}`);
    return shape("path", { class: `${kind} c${line.colour}`, d: `M${points.join("L")}` });
  }

  height(line) {
    return line.soft ?? line.y;
  }

  text(value) {
    return value === undefined ? "–" : short(value, this.figure.percent);
  }

  /** Show the values at `x`, or the last ones if null. */
  point(x) {
    this.at = x;
    if (!this.cursor) return;
    this.cursor.replaceChildren();
    for (const line of this.lines) {
      const place = x === null ? line.x.length - 1 : nearest(line.x, x);
      line.value.textContent = this.text(this.height(line)[place]);
      if (x === null || place < 0) continue;
      const at = [this.toX(line.x[place]), this.toY(this.height(line)[place])];
      this.cursor.append(shape("circle", { cx: at[0], cy: at[1], r: 4, class: `c${line.colour}` }));
    }
    if (x === null || x < this.limits.left || x > this.limits.right) return;
    const [at, bottom] = [this.toX(x), this.svg.clientHeight - FRAME.bottom];
    const left = at > this.svg.clientWidth - 60;
    this.cursor.prepend(shape("line", { x1: at, x2: at, y1: FRAME.top, y2: bottom }));
    this.cursor.append(shape("text", { x: at + (left ? -6 : 6), y: FRAME.top + 8, class: left ? "end" : "" }, short(x)));
  }

  listen() {
    this.size.addEventListener("click", () => this.root.classList.toggle("large"));
    this.svg.addEventListener("pointerleave", () => this.from === undefined && this.listener.pointed(null));
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.pointerType === "touch") return;
      this.from = this.place(event);
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointermove", (event) => {
      this.listener.pointed(this.snapped(this.fromX?.(this.place(event))));
      if (this.from !== undefined) this.select(this.place(event));
    });
    this.svg.addEventListener("pointerup", (event) => {
      const [from, to] = [this.from, this.place(event)].sort((a, b) => a - b);
      if (this.from !== undefined && to - from >= DRAG) this.listener.zoomed([this.fromX(from), this.fromX(to)]);
      this.from = undefined;
    });
    this.svg.addEventListener("keydown", (event) => this.walk(event));
    this.svg.addEventListener("blur", () => this.listener.pointed(null));
  }

  place(event) {
    return event.clientX - this.svg.getBoundingClientRect().left;
  }

  select(to) {
    const [left, right] = [Math.min(this.from, to), Math.max(this.from, to)];
    const frame = { x: left, width: right - left, y: FRAME.top, height: this.svg.clientHeight - FRAME.top - FRAME.bottom };
    this.cursor.append(shape("rect", { ...frame, class: "chosen" }));
  }

  /** The x of the longest curve nearest to `x`. */
  snapped(x) {
    const longest = this.longest();
    return x === undefined || !longest ? null : longest.x[nearest(longest.x, x)];
  }

  longest() {
    return this.lines.reduce((best, line) => (line.x.length > (best?.x.length ?? 0) ? line : best), null);
  }

  walk(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    const longest = this.longest();
    if (by === undefined || !longest) return;
    event.preventDefault();
    event.stopPropagation();
    const now = this.at === null || this.at === undefined ? longest.x.length - 1 : nearest(longest.x, this.at);
    const to = Math.max(0, Math.min(longest.x.length - 1, now + by));
    this.listener.pointed(longest.x[to]);
    const values = this.lines.map((line) => `${line.shown} ${line.value.textContent}`).join(", ");
    document.getElementById("spoken").textContent = `${short(longest.x[to])}: ${values}`;
  }
}
