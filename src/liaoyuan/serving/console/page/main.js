// The console: where the reader is, what it follows from there, and what is looked up as runs go on.

import { element } from "/chat/element.js";
import { keepTheme, switchTheme } from "/chat/theme.js";
import { ask, Refusal } from "./api.js";
import { CurvesView } from "./curves.js";
import { DetailsView } from "./details.js";
import { placeHash, readPlace, VIEWS } from "./place.js";
import { RolloutsView } from "./rollouts.js";
import { runViews } from "./runs.js";
import { label, say, switchLanguage, translate } from "./words.js";

const LOOK_MS = 3000; // between two looks at what the runs have written
const COLOURS = 8;
const NARROW = matchMedia("(max-width: 56rem)");
const at = (id) => document.getElementById(id);

const page = {
  place: readPlace(location.hash),
  runs: [],
  colours: new Map(),

  /** Go where `changes` say; `replace` leaves no step in the history, for sliders and typing. */
  go(changes, replace = false) {
    this.place = { ...this.place, ...changes };
    history[replace ? "replaceState" : "pushState"](null, "", placeHash(this.place));
    show();
  },

  /** The chosen runs that are there. */
  chosen() {
    return this.place.runs.map((name) => this.runs.find((run) => run.name === name)).filter(Boolean);
  },

  /** Whether runs were chosen of which none is there. */
  isGone() {
    return this.place.runs.length > 0 && !this.chosen().length;
  },

  /** A run keeps its colour for as long as it is chosen. */
  colour(name) {
    return (this.colours.get(name) ?? 0) % COLOURS;
  },
};
const views = { curves: new CurvesView(page), rollouts: new RolloutsView(page), details: new DetailsView(page) };
let asked = 0; // the newest question; an answer to an older one comes too late

function paint() {
  for (const name of page.colours.keys()) if (!page.place.runs.includes(name)) page.colours.delete(name);
  for (const name of page.place.runs) {
    if (page.colours.has(name)) continue;
    const taken = new Set(page.colours.values());
    let free = 0;
    while (taken.has(free)) free++;
    page.colours.set(name, free);
  }
}

async function show() {
  paint();
  showRuns();
  for (const tab of at("tabs").children) {
    tab.href = placeHash({ ...page.place, view: tab.dataset.view });
    if (tab.dataset.view === page.place.view) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  const view = views[page.place.view];
  if (at("view").firstChild !== view.root) at("view").replaceChildren(view.root);
  document.title = `${page.chosen().map((run) => run.shown).join(", ") || say(page.place.view)} · ${say("name")}`;
  await guarded(() => view.show());
}

function showRuns() {
  const wanted = at("run-filter").value.trim().toLowerCase();
  const found = page.runs.filter((run) => run.shown.toLowerCase().includes(wanted));
  const focused = document.activeElement?.dataset?.run;
  const kind = document.activeElement?.tagName;
  at("runs").replaceChildren(...runViews(found, page));
  if (focused !== undefined) at("runs").querySelector(`${kind}[data-run="${CSS.escape(focused)}"]`)?.focus();
  if (!found.length) at("runs").append(element("li", { class: "empty" }, say(page.runs.length ? "noMatch" : "noRuns")));
  at("run-count").textContent = page.runs.length;
}

/** Do `work`; say what went wrong, and be silent about an answer that comes too late. */
async function guarded(work) {
  const mine = ++asked;
  try {
    await work();
    if (mine === asked) at("view").querySelector(".trouble")?.remove();
  } catch (error) {
    if (error.name === "AbortError" || mine !== asked) return;
    const said = element("p", { class: "trouble", role: "alert" }, error instanceof Refusal && error.status ? error.message : "");
    if (!(error instanceof Refusal)) throw error;
    if (!error.status) label(said, "unreachable");
    at("view").querySelector(".trouble")?.remove();
    at("view").prepend(said);
  }
}

async function look() {
  await guarded(async () => {
    const { runs, folder } = await ask("runs");
    page.runs = runs;
    at("folder").textContent = folder;
    if (!page.place.runs.length && runs.length && !location.hash) {
      page.place = { ...page.place, runs: [runs[0].name] };
      history.replaceState(null, "", placeHash(page.place));
    }
  });
}

const isLive = () => at("live").getAttribute("aria-pressed") === "true";

async function follow() {
  if (isLive() && !document.hidden) {
    const before = JSON.stringify(page.runs);
    await look();
    if (JSON.stringify(page.runs) !== before) {
      paint();
      showRuns();
      await guarded(() => views[page.place.view].refresh());
    }
  }
  setTimeout(follow, LOOK_MS);
}

function press(event) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox";
  if (event.ctrlKey || event.metaKey || event.altKey || at("keys").open) return;
  if (typing && event.key !== "Escape") return;
  if (event.key === "?") at("keys").showModal();
  else if (/^[1-3]$/.test(event.key)) page.go({ view: VIEWS[Number(event.key) - 1] });
  else if (!views[page.place.view].press?.(event)) return;
  event.preventDefault();
}

function listen() {
  addEventListener("hashchange", () => {
    page.place = readPlace(location.hash);
    show();
  });
  document.addEventListener("keydown", press);
  document.addEventListener("visibilitychange", () => !document.hidden && isLive() && look().then(show));
  at("run-filter").addEventListener("input", showRuns);
  at("live").addEventListener("click", () => at("live").setAttribute("aria-pressed", String(!isLive())));
  at("help").addEventListener("click", () => at("keys").showModal());
  at("theme").addEventListener("click", switchTheme);
  at("language").addEventListener("click", () => {
    switchLanguage();
    translate();
    for (const view of Object.values(views)) translate(view.root);
    show();
  });
  const fold = () => (at("drawer").open = !NARROW.matches);
  NARROW.addEventListener("change", fold);
  fold();
}

async function begin() {
  keepTheme();
  translate();
  listen();
  await look();
  await show();
  setTimeout(follow, LOOK_MS);
}

begin();
