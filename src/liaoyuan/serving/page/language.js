// The choice between English and Chinese, and how elements say what the page's table of words has.

const KEY = "liaoyuan.language";
let words = { en: {}, zh: {} };
let language = localStorage.getItem(KEY) ?? preferred();

function preferred() {
  const known = navigator.languages.map((name) => name.slice(0, 2)).find((name) => name in words);
  return known ?? "en";
}

/** Take `table`, {en: {key: words}, zh: …}, for what the page says. */
export function speak(table) {
  words = table;
}

export function count(number, unit) {
  return `${number} ${unit}${number === 1 ? "" : "s"}`;
}

/** The words `key` in the page's language; those that count something take numbers. */
export function say(key, ...numbers) {
  const found = words[language][key];
  return typeof found === "function" ? found(...numbers) : found;
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
