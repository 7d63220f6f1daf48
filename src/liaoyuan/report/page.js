// Show the language of the browser; the switch changes it for this visit.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("language");
  const show = (language) => {
    root.lang = language;
    button.textContent = language === "zh" ? "English" : "中文";
  };
  button.addEventListener("click", () => show(root.lang === "zh" ? "en" : "zh"));
  show((navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en");
})();
