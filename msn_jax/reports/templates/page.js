"use strict";
(() => {
  const themes = ["system", "light", "dark"];
  const button = document.getElementById("theme");
  const stored = { // a page from disk may have no storage
    get() { try { return localStorage.getItem("theme"); } catch { return null; } },
    set(theme) { try { localStorage.setItem("theme", theme); } catch { /* forgotten with the page */ } },
  };
  let theme = themes.includes(stored.get()) ? stored.get() : "system";
  const apply = () => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    stored.set(theme);
    apply();
  });
  button.hidden = false;
  apply();

  const MILLISECONDS = 150; // of a forward pass
  const reduced = matchMedia("(prefers-reduced-motion: reduce)");
  for (const answer of document.querySelectorAll(".answer")) {
    const find = (selector) => answer.querySelector(selector);
    const runs = [...answer.querySelectorAll(".text i")];
    const lengths = answer.dataset.lengths.split(" ").filter(Boolean).map(Number);
    const ends = [0];
    for (const length of lengths) ends.push(ends[ends.length - 1] + length);
    const total = ends[ends.length - 1];
    const [play, slider, label] = [find(".play"), find("input"), find(".controls output")];
    const [bars, counts] = [answer.querySelectorAll("progress"), answer.querySelectorAll(".race output")];
    let shown = runs.length;
    let timer = null;

    const show = (count) => {
      for (let i = Math.min(shown, count); i < Math.max(shown, count); i++) runs[i].classList.toggle("ahead", i >= count);
      runs[shown - 1]?.classList.remove("now");
      shown = count;
      if (count < runs.length) runs[count - 1]?.classList.add("now");
      slider.value = count;
      label.textContent = `pass ${count} of ${runs.length}`;
      if (!total) return;
      [ends[count], count].forEach((tokens, i) => {
        bars[i].value = tokens / total;
        counts[i].textContent = `${tokens} tokens`;
      });
    };
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "▶";
      play.setAttribute("aria-label", "Play");
    };
    const start = () => {
      if (shown === runs.length) show(0);
      play.textContent = "❚❚";
      play.setAttribute("aria-label", "Pause");
      timer = setInterval(() => {
        show(shown + 1);
        if (shown === runs.length) stop();
      }, MILLISECONDS);
    };
    const step = (count) => {
      stop();
      show(Math.max(0, Math.min(runs.length, count)));
    };
    play.addEventListener("click", () => (timer === null ? start() : stop()));
    find(".back").addEventListener("click", () => step(shown - 1));
    find(".forward").addEventListener("click", () => step(shown + 1));
    slider.addEventListener("input", () => step(Number(slider.value)));
    const limit = () => {
      if (reduced.matches) stop();
      play.hidden = reduced.matches; // the slider and the steps remain
    };
    reduced.addEventListener("change", limit);
    limit();
    find(".controls").hidden = false;
    find(".race").hidden = !total;
    show(shown);
  }
})();
