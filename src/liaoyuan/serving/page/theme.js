// Light or dark: the reader's system says, until he switches.

const THEME = "liaoyuan.theme";

export function switchTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const shown = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  setTheme(shown === "dark" ? "light" : "dark");
}

/** Show the theme to which the reader switched before. */
export function keepTheme() {
  setTheme(localStorage.getItem(THEME));
}

function setTheme(theme) {
  if (!theme) return;
  document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME, theme);
}
