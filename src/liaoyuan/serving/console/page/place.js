// Where the reader is, as the part of the address after #: every view, choice and filter can be linked to.

export const VIEWS = ["curves", "rollouts", "details"];
const TEXTS = ["verdict", "level", "task", "flaw", "words"]; // filters of rollouts
const NUMBERS = ["step", "group", "offset"];

/** What is shown where the address says nothing. `figures` null: the usual ones; `step` null: the newest. */
export const START = {
  view: "curves", runs: [], axis: "step", smooth: 60, log: false, figures: null, range: null,
  step: null, group: null, offset: null, everywhere: false, verdict: "", level: "", task: "", flaw: "", words: "",
};

/** "#/curves?run=a&run=b" -> {view, runs, …}; what makes no sense is left out. */
export function readPlace(hash) {
  const [path, query] = hash.replace(/^#?\/?/, "").split(/\?(.*)/s);
  const asked = new URLSearchParams(query ?? "");
  const place = { ...START, runs: [...new Set(asked.getAll("run"))] };
  if (VIEWS.includes(path)) place.view = path;
  if (/^(tokens|cpu_seconds|seconds)$/.test(asked.get("axis"))) place.axis = asked.get("axis");
  if (asked.has("smooth")) place.smooth = within(Number(asked.get("smooth")), 0, 99) ?? START.smooth;
  place.log = asked.get("log") === "1";
  place.everywhere = asked.get("everywhere") === "1";
  if (asked.has("figure")) place.figures = asked.getAll("figure").filter(Boolean);
  const [from, to] = (asked.get("range") ?? "").split("~").map(Number);
  if (Number.isFinite(from) && to > from) place.range = [from, to];
  for (const name of TEXTS) place[name] = asked.get(name) ?? "";
  for (const name of NUMBERS) {
    if (/^\d{1,12}$/.test(asked.get(name) ?? "")) place[name] = Number(asked.get(name));
  }
  return place;
}

/** The reverse of `readPlace`; what is as at the start is left out, so that links stay short. */
export function placeHash(place) {
  const said = new URLSearchParams();
  for (const run of place.runs) said.append("run", run);
  if (place.axis !== START.axis) said.set("axis", place.axis);
  if (place.smooth !== START.smooth) said.set("smooth", place.smooth);
  if (place.log) said.set("log", "1");
  if (place.range) said.set("range", place.range.join("~"));
  for (const figure of place.figures?.length === 0 ? [""] : place.figures ?? []) said.append("figure", figure);
  if (place.everywhere) said.set("everywhere", "1");
  for (const name of TEXTS) if (place[name] !== "") said.set(name, place[name]);
  for (const name of NUMBERS) if (place[name] !== null) said.set(name, place[name]);
  const query = said.toString();
  return `#/${place.view}${query ? "?" + query : ""}`;
}

function within(number, low, high) {
  return number >= low && number <= high ? number : null;
}
