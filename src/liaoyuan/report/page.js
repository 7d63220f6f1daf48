// Show the language of the browser; the switch changes it for this visit, in which the page may be loaded anew.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("language");
  const kept = (language) => {
    try { // a browser may keep nothing for a page that is a file
      if (language) sessionStorage.setItem("language", language);
      return sessionStorage.getItem("language");
    } catch { return null; }
  };
  const show = (language) => {
    root.lang = language;
    button.textContent = language === "zh" ? "English" : "中文";
  };
  button.addEventListener("click", () => show(root.lang === "zh" ? "en" : "zh") || kept(root.lang));
  show(kept() ?? ((navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en"));
})();
