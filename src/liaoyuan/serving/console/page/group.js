// A group of rollouts: its prompt once, then the answers side by side. Everything a model wrote is a text node.

import { element } from "/chat/element.js";
import { placeHash } from "./place.js";
import { short } from "./scale.js";
import { label, say } from "./words.js";

const MARKS = { right: "✓", partly: "◐", wrong: "✗", unjudged: "?" };

/** @param lens {ask(args) -> {text, length}, words} how the rest of a long text is had, and what to mark in it */
export function groupView(group, lens, link) {
  const right = group.samples.filter((sample) => sample.verdict === "right").length;
  const squares = group.samples.map((sample) => element("i", { class: sample.verdict }));
  const facts = [group.task, group.level === null ? "" : `${say("level")} ${group.level}`].filter(Boolean);
  const anchor = element("a", { href: placeHash(link), class: "quiet icon", "aria-label": say("link"), title: say("link") }, "#");
  const head = element("header", {},
    element("div", { class: "question" }, ...textView("question", group, lens)),
    element("div", { class: "about" },
      element("span", { class: "squares", "aria-hidden": "true" }, ...squares), element("span", {}, say("rightOf", right, group.samples.length)),
      ...facts.map((fact) => element("bdi", { class: "fact" }, fact)), anchor),
    group.gold ? element("div", { class: "gold" }, element("span", { class: "tag" }, say("gold")), ...textView("gold", group, lens)) : "");
  const samples = group.samples.map((sample) => sampleView(sample, lens));
  return element("article", { class: "card group", tabindex: "-1", "data-group": group.group, "aria-label": say("rightOf", right, group.samples.length) },
    head, element("div", { class: "samples" }, ...samples), group.left_out ? element("p", { class: "left-out" }, say("leftOut", group.left_out)) : "");
}

function sampleView(sample, lens) {
  const reward = sample.reward === null ? say("noReward") : short(sample.reward);
  const head = element("header", {}, element("b", { class: `verdict ${sample.verdict}` }, `${MARKS[sample.verdict]} ${reward}`));
  if (sample.advantage !== null) {
    const sign = sample.advantage > 0 ? "+" : sample.advantage < 0 ? "−" : "";
    head.append(element("span", { class: "advantage", title: say("advantage") }, `A ${sign}${short(Math.abs(sample.advantage))}`));
  }
  if (sample.tokens !== null) head.append(element("span", { class: "tokens" }, say("tokens", sample.tokens)));
  const made = element("section", { class: `sample ${sample.verdict}${sample.wanted ? "" : " other"}` }, head);
  if (sample.thought) made.append(element("h4", {}, say("thought")), element("div", { class: "thought" }, ...textView("thought", sample, lens)));
  made.append(element("h4", {}, say("answer")), element("div", { class: "answer" }, ...textView("text", sample, lens)));
  const notes = element("div", { class: "notes" });
  if (sample.parsed !== null && sample.parsed !== sample.text.trim()) notes.append(note("parsed", "parsed", sample, lens));
  if (sample.flaw) notes.append(note("flaw", "flaw", sample, lens));
  if (sample.reason && sample.reason !== sample.flaw) notes.append(note("reason", "reason", sample, lens));
  if (notes.children.length) made.append(notes);
  return made;
}

function note(key, name, sample, lens) {
  return element("p", { class: key }, element("span", { class: "tag" }, say(key).toLowerCase()), " ", ...textView(name, sample, lens));
}

/** The text `name` of a rollout, with a button for the rest of a long one. */
function textView(name, from, lens) {
  const text = element("bdi", { class: "written" }, ...marked(from[name], lens.words));
  if (!from[name]) return [element("span", { class: "nothing" }, say("empty"))];
  const length = from.long[name];
  if (!length) return [text];
  const more = element("button", { type: "button", class: "small" });
  label(more, "more", length.toLocaleString("en"));
  let shown = [...from[name]].length; // the server counts characters as Python does
  more.addEventListener("click", async () => {
    const found = await lens.ask({ place: from.place, name, offset: shown }).catch(() => null);
    if (!found) return label(more, "gone");
    text.append(...marked(found.text, lens.words));
    shown += [...found.text].length;
    if (shown >= found.length || !found.text) more.remove();
  });
  return [text, more];
}

/** Text nodes, with what was searched in marks. */
function marked(text, words) {
  if (!words) return [text];
  const [lower, wanted] = [text.toLowerCase(), words.toLowerCase()];
  const parts = [];
  let from = 0;
  for (let at = lower.indexOf(wanted); at >= 0 && parts.length < 1000; at = lower.indexOf(wanted, from)) {
    parts.push(text.slice(from, at), element("mark", {}, text.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  return [...parts, text.slice(from)];
}
