// The server's public API, as any other client sees it.

import { say } from "./words.js";

const KEY = "liaoyuan.key"; // kept until the tab is closed

/** A refusal in the server's own words; `code` is OpenAI's name of it. */
export class Refusal extends Error {
  constructor(status, error) {
    super(error?.message ?? `HTTP ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

export async function fetchAbout() {
  const response = await fetchWithKey("/page/about");
  if (!response.ok) throw new Refusal(response.status, null);
  return response.json();
}

/** Markdown -> sanitised HTML, made by the server. */
export async function renderMarkdown(text) {
  const response = await post("/page/render", { text });
  return (await response.json()).html;
}

/**
 * Yield {reasoning, content, tokens, finish} as the answer comes; `tokens` and `reasoningTokens` count it so far.
 * @param {object} question {messages} for a conversation, {prompt} for a text to continue
 * @param {AbortSignal} signal leaving stops the answer on the server too
 */
export async function* streamAnswer(question, signal) {
  const path = question.messages ? "/v1/chat/completions" : "/v1/completions";
  const body = { ...question, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  const response = await post(path, body, signal);
  for await (const data of serverEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(500, chunk.error);
    const choice = chunk.choices[0];
    yield {
      reasoning: choice?.delta?.reasoning_content ?? "",
      content: choice?.delta?.content ?? choice?.text ?? "",
      tokens: chunk.usage.completion_tokens,
      reasoningTokens: chunk.usage.completion_tokens_details?.reasoning_tokens ?? 0,
      finish: choice?.finish_reason ?? null,
    };
  }
}

async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetchWithKey(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) {
    const reply = await response.json().catch(() => null);
    throw new Refusal(response.status, reply?.error);
  }
  return response;
}

/** fetch, with an API key if the server asks for one: then so does the page, until the key is right or none is given. */
async function fetchWithKey(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key ? { ...options.headers, Authorization: `Bearer ${key}` } : options.headers;
    const response = await fetch(path, { ...options, headers });
    if (response.status !== 401) return response;
    const given = window.prompt(say("key"));
    if (!given) return response;
    sessionStorage.setItem(KEY, given.replace(/[^!-~]/g, "")); // a header carries no other characters
  }
}

/** Yield the data of each server-sent event of a byte stream. */
async function* serverEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        if (event.startsWith("data: ")) yield event.slice("data: ".length);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
