// The chat page: what the reader does, and what follows from it.

import { fetchAbout, Refusal, renderMarkdown, streamAnswer } from "./api.js";
import { keepTheme, switchTheme } from "./theme.js";
import { announce, AnswerView, exampleView, questionView } from "./view.js";
import { pick, say, switchLanguage, translate } from "./words.js";

const NEAR_END_PX = 80; // so near the end, the page follows the answer

const at = (id) => document.getElementById(id);
const page = Object.fromEntries(
  ["scroll", "welcome", "turns", "composer", "question", "send", "stop", "down", "temperature"].map((id) => [id, at(id)]),
);
let about = null;
let turns = []; // {question, answer, view, questionElement}, oldest first
let running = null; // AbortController of the answer that is being written

function showAbout() {
  translate();
  document.title = about ? `${about.model} · Liaoyuan` : "Liaoyuan";
  if (!about) return;
  at("model").textContent = about.model;
  at("about").textContent = pick(about.about) ?? "";
  at("cannot").textContent = pick(about.cannot) ?? "";
  at("single").hidden = !about.single_turn;
  at("examples").replaceChildren(...about.examples.map((example) => exampleView(pick(example), ask)));
  at("thinking").hidden = !about.thinks;
  if (about.chat) return;
  page.question.placeholder = say("placeholderText");
  at("hello").textContent = say("helloText");
}

async function ask(text) {
  if (running || !about || !text.trim()) return;
  turns.at(-1)?.view.withdraw();
  const turn = { question: text, answer: "", view: new AnswerView(), questionElement: questionView(text) };
  turns.push(turn);
  page.turns.append(turn.questionElement, turn.view.root);
  page.welcome.hidden = true;
  page.question.value = "";
  grow();
  toEnd();
  await answer(turn);
}

async function answer(turn) {
  running = new AbortController();
  showState();
  const { view } = turn;
  let failed = false;
  try {
    await follow(turn, running.signal);
  } catch (error) {
    if (error.name === "AbortError") view.showReason("stopped");
    else failed = showFailure(view, error);
  }
  view.endThought(turn.thoughtTokens);
  const html = turn.answer.trim() ? await renderMarkdown(turn.answer).catch(() => null) : null;
  stayAtEnd(() => {
    view.finish(html, !turn.answer.trim() && !failed && !running.signal.aborted);
    view.offer(turn.answer.trim(), () => again(turn));
  });
  announce("done");
  running = null;
  showState();
  focusQuestion();
}

/** Show the answer as it comes. */
async function follow(turn, signal) {
  const { view } = turn;
  let started = null;
  turn.thoughtTokens = 0;
  for await (const piece of streamAnswer(questionBody(turn), signal)) {
    if (piece.tokens) started ??= { time: performance.now(), tokens: piece.tokens };
    stayAtEnd(() => {
      if (piece.reasoning) view.addThought(piece.reasoning, piece.reasoningTokens);
      if (piece.content && !turn.answer) view.endThought(piece.reasoningTokens);
      if (piece.content) view.addText(piece.content);
      if (piece.tokens) view.showSpeed(piece.tokens, rate(started, piece.tokens));
      if (piece.finish === "length") view.showReason("cutOff");
    });
    turn.answer += piece.content;
    turn.thoughtTokens = piece.reasoningTokens;
  }
}

/** Tokens per second since the first ones came, which leaves out the reading of the question. */
function rate(started, tokens) {
  const seconds = (performance.now() - started.time) / 1000;
  const value = (tokens - started.tokens) / seconds;
  if (seconds < 0.05 || value <= 0) return null;
  return value < 10 ? value.toFixed(1) : Math.round(value);
}

function questionBody(turn) {
  const common = { model: about.model, temperature: Number(page.temperature.value) };
  if (about.max_tokens) common.max_tokens = about.max_tokens;
  if (!about.chat) return { ...common, prompt: turn.question, max_tokens: about.max_tokens ?? 200 };
  const before = about.single_turn ? [] : turns.slice(0, turns.indexOf(turn)).filter((each) => each.answer);
  const messages = before.flatMap((each) => [
    { role: "user", content: each.question },
    { role: "assistant", content: each.answer },
  ]);
  messages.push({ role: "user", content: turn.question });
  const slow = page.composer.elements.thinking.value === "slow";
  return { ...common, messages, chat_template_kwargs: { enable_thinking: slow } };
}

function showFailure(view, error) {
  if (!(error instanceof Refusal)) view.showError("", "unreachable");
  else if (error.status === 429) view.showError("", "busy");
  else if (error.code === "context_length_exceeded" && turns.length > 1) view.showError("", "tooLong");
  else view.showError(error.message);
  return true;
}

async function again(turn) {
  if (running) return;
  const view = new AnswerView();
  turn.view.root.replaceWith(view.root);
  Object.assign(turn, { view, answer: "" });
  await answer(turn);
}

function newChat() {
  running?.abort();
  turns = [];
  page.turns.replaceChildren();
  page.welcome.hidden = false;
  showState();
  focusQuestion();
}

/** Let the reader type on; not where that would raise a keyboard over the page. */
function focusQuestion() {
  if (!matchMedia("(pointer: coarse)").matches) page.question.focus({ preventScroll: true });
}

/** Enable what can be done now. */
function showState() {
  page.send.hidden = running !== null;
  page.stop.hidden = running === null;
  page.send.disabled = !about || !page.question.value.trim();
  at("new-chat").disabled = turns.length === 0;
}

function grow() {
  page.question.style.height = "auto";
  page.question.style.height = `${page.question.scrollHeight}px`;
  showState();
}

function distanceToEnd() {
  const { scrollHeight, scrollTop, clientHeight } = page.scroll;
  return scrollHeight - scrollTop - clientHeight;
}

function toEnd() {
  page.scroll.scrollTop = page.scroll.scrollHeight;
}

/** Change the page; if the reader was at its end, keep them there. */
function stayAtEnd(change) {
  const near = distanceToEnd() < NEAR_END_PX;
  change();
  if (near) toEnd();
}

function showTemperature() {
  at("temperature-value").textContent = Number(page.temperature.value).toFixed(1);
}

function listen() {
  page.composer.addEventListener("submit", (event) => {
    event.preventDefault();
    ask(page.question.value);
  });
  page.question.addEventListener("input", grow);
  page.question.addEventListener("keydown", (event) => {
    // While an input method composes Chinese, Enter chooses a word.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask(page.question.value);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  page.stop.addEventListener("click", () => running?.abort());
  page.scroll.addEventListener("scroll", () => (page.down.hidden = distanceToEnd() < NEAR_END_PX));
  page.down.addEventListener("click", toEnd);
  page.temperature.addEventListener("input", showTemperature);
  at("new-chat").addEventListener("click", newChat);
  at("theme").addEventListener("click", switchTheme);
  at("language").addEventListener("click", () => {
    switchLanguage();
    showAbout();
  });
}

async function begin() {
  keepTheme();
  translate();
  listen();
  try {
    about = await fetchAbout();
    page.temperature.value = about.temperature;
  } catch {
    at("cannot").textContent = say("unreachable");
  }
  showTemperature();
  showAbout();
  grow();
  focusQuestion();
}

begin();
