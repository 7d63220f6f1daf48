// Every word that the page says, in English and Chinese, and the choice between them.

const WORDS = {
  en: {
    name: "Liaoyuan",
    newChat: "New chat",
    theme: "Light or dark",
    otherLanguage: "中文",
    switchLanguage: "切换到中文",
    hello: "What would you like to ask?",
    helloText: "Begin, and the model goes on",
    examples: "Questions that this model can answer",
    conversation: "Conversation",
    question: "Your question",
    placeholder: "Ask a question…",
    placeholderText: "The beginning of a text…",
    thinking: "How to answer",
    slow: "Think first",
    fast: "Quick answer",
    slowHelp: "Slow: the model writes down its thoughts before it answers",
    fastHelp: "Fast: the model answers without thinking",
    temperature: "Temperature",
    temperatureHelp: "0 always says the most probable; higher is more varied",
    send: "Send",
    stop: "Stop",
    down: "To the newest message",
    note: "Written by an AI. It makes mistakes: check what matters.",
    you: "You",
    copy: "Copy",
    copied: "Copied",
    again: "Try again",
    thinkingNow: (tokens) => `Thinking… ${count(tokens, "token")}`,
    thought: (tokens) => `Thought for ${count(tokens, "token")}`,
    speed: (tokens, rate) => `${rate} tokens/s · ${count(tokens, "token")}`,
    tokens: (tokens) => count(tokens, "token"),
    stopped: "stopped",
    cutOff: "ended at the length limit",
    empty: "(The model said nothing.)",
    done: "The answer is complete.",
    unreachable: "The server cannot be reached. Is it still running?",
    key: "This server asks for an API key:",
    busy: "The server is busy with other questions. Try again in a moment.",
    tooLong: "This conversation has grown longer than the model can read. Start a new chat.",
    single: "This model takes each question by itself; it does not see the earlier ones.",
  },
  zh: {
    name: "燎原",
    newChat: "新对话",
    theme: "浅色或深色",
    otherLanguage: "English",
    switchLanguage: "Switch to English",
    hello: "想问点什么？",
    helloText: "你写开头，模型接着写",
    examples: "此模型能回答的问题",
    conversation: "对话",
    question: "你的问题",
    placeholder: "输入问题…",
    placeholderText: "写个开头…",
    thinking: "回答方式",
    slow: "先思考",
    fast: "直接答",
    slowHelp: "慢思考：模型先写下思路，再作答",
    fastHelp: "快思考：模型不经思考，直接作答",
    temperature: "温度",
    temperatureHelp: "为 0 时总取最可能的词；越高越多样",
    send: "发送",
    stop: "停止",
    down: "回到最新消息",
    note: "内容由 AI 生成，可能有误，重要内容请自行核实。",
    you: "你",
    copy: "复制",
    copied: "已复制",
    again: "重试",
    thinkingNow: (tokens) => `思考中… ${tokens} 个词元`,
    thought: (tokens) => `思考了 ${tokens} 个词元`,
    speed: (tokens, rate) => `${rate} 词元/秒 · ${tokens} 个词元`,
    tokens: (tokens) => `${tokens} 个词元`,
    stopped: "已停止",
    cutOff: "达到长度上限",
    empty: "（模型没有输出内容。）",
    done: "回答完毕。",
    unreachable: "无法连接服务器，它还在运行吗？",
    key: "此服务器需要 API 密钥：",
    busy: "服务器正忙，请稍后再试。",
    tooLong: "对话已超出模型能读的长度，请开始新对话。",
    single: "此模型逐题作答，看不到之前的问题。",
  },
};

const KEY = "liaoyuan.language";
let language = localStorage.getItem(KEY) ?? preferred();

function preferred() {
  const known = navigator.languages.map((name) => name.slice(0, 2)).find((name) => name in WORDS);
  return known ?? "en";
}

function count(number, unit) {
  return `${number} ${unit}${number === 1 ? "" : "s"}`;
}

/** The words `key` in the page's language; those that count something take numbers. */
export function say(key, ...numbers) {
  const words = WORDS[language][key];
  return typeof words === "function" ? words(...numbers) : words;
}

/** The text of a {en, zh} pair in the page's language, or in the other where that is empty. */
export function pick(pair) {
  return pair[language] || pair.en || pair.zh;
}

export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem(KEY, language);
}

/** Say everything that `data-words…` attributes under `root` name. */
export function translate(root = document) {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const element of root.querySelectorAll("[data-words]")) {
    element.textContent = say(element.dataset.words, ...JSON.parse(element.dataset.numbers ?? "[]"));
  }
  for (const [name, attribute] of [["wordsLabel", "aria-label"], ["wordsTitle", "title"], ["wordsPlaceholder", "placeholder"]]) {
    const selector = `[data-${name.replace(/[A-Z]/, (letter) => "-" + letter.toLowerCase())}]`;
    for (const element of root.querySelectorAll(selector)) {
      element.setAttribute(attribute, say(element.dataset[name]));
      if (attribute === "aria-label" && element.tagName === "BUTTON") element.title = say(element.dataset[name]);
    }
  }
}

/** Make `element` say `key`, now and after a switch of language. */
export function label(element, key, ...numbers) {
  element.dataset.words = key;
  element.dataset.numbers = JSON.stringify(numbers);
  element.textContent = say(key, ...numbers);
}
