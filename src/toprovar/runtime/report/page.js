"use strict";
(() => {
  const all = (selector, from = document) => Array.from(from.querySelectorAll(selector));

  // Light, dark, or what the system says.
  const root = document.documentElement;
  const remember = (value) => { try { localStorage.setItem("theme", value); } catch { /* a page from a file may not store */ } };
  try { const theme = localStorage.getItem("theme"); if (theme) root.dataset.theme = theme; } catch { /* as above */ }
  document.getElementById("theme").addEventListener("click", () => {
    const dark = (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    root.dataset.theme = dark ? "light" : "dark";
    remember(root.dataset.theme);
  });

  // One tooltip for everything with data-tip: pointer, keyboard focus, tap.
  const tip = document.getElementById("tip");
  const show = (target) => {
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const at = target.getBoundingClientRect(), box = tip.getBoundingClientRect(), edge = 8;
    const left = Math.min(Math.max(edge, at.left + at.width / 2 - box.width / 2), innerWidth - box.width - edge);
    const above = at.top - box.height - edge;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > edge ? above : Math.min(at.bottom + edge, innerHeight - box.height - edge)}px`;
  };
  const hide = () => { tip.hidden = true; };
  const tipped = (event) => event.target instanceof Element && event.target.closest("[data-tip]");
  for (const name of ["pointerover", "focusin", "click"]) {
    document.addEventListener(name, (event) => { const target = tipped(event); if (target && target.dataset.tip) show(target); else hide(); });
  }
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // What is chosen in a row of controls: buttons of a group, or a select.
  const chosen = (controls) => all(":scope > .choice", controls).map((choice) => {
    const select = choice.querySelector("select");
    return select ? select.value : choice.querySelector('[aria-pressed="true"]').dataset.value;
  }).join("|");
  const onChoice = (controls, apply) => {
    controls.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-value]");
      if (!button) return;
      for (const other of all("button", button.parentElement)) other.setAttribute("aria-pressed", String(other === button));
      apply(chosen(controls));
    });
    controls.addEventListener("change", () => apply(chosen(controls)));
    apply(chosen(controls));
  };

  for (const box of all(".switch")) {
    const blocks = all(":scope > [data-when]", box), empty = box.querySelector(":scope > [data-empty]");
    onChoice(box.querySelector(":scope > .controls"), (key) => {
      for (const block of blocks) block.hidden = block.dataset.when !== key;
      empty.hidden = blocks.some((block) => !block.hidden);
    });
  }

  // The scatter plot: every layout was computed beforehand; here marks only move.
  for (const box of all(".trade")) {
    const layouts = JSON.parse(box.querySelector(".layouts").textContent), plot = box.querySelector(".plot");
    const ticks = (kind, edge, list) => list.map(([place, text]) => {
      const span = document.createElement("span");
      span.className = kind; span.style[edge] = `${place}%`; span.textContent = text;
      return span;
    });
    onChoice(box.querySelector(".controls"), (key) => {
      const layout = layouts[key] || { marks: {}, xt: [], yt: [], front: "", series: "", x: "", y: "", note: "Not measured for this choice." };
      for (const mark of all(".mark", plot)) {
        const [xbar, ybar] = [mark.previousElementSibling.previousElementSibling, mark.previousElementSibling];
        const place = layout.marks[mark.dataset.key];
        for (const part of [mark, xbar, ybar]) part.hidden = !place;
        if (!place) continue;
        const [x, y, xLow, xHigh, yLow, yHigh, side, text] = place;
        mark.style.left = `${x}%`; mark.style.bottom = `${y}%`; mark.dataset.tip = text; mark.setAttribute("aria-label", text);
        mark.className = mark.className.replace(/ [rltbn]$/, "") + ` ${side}`;
        xbar.style.left = `${xLow}%`; xbar.style.width = `${xHigh - xLow}%`; xbar.style.bottom = `${y}%`;
        ybar.style.left = `${x}%`; ybar.style.bottom = `${yLow}%`; ybar.style.height = `${yHigh - yLow}%`;
      }
      plot.querySelector(".front").setAttribute("d", layout.front);
      plot.querySelector(".series").setAttribute("d", layout.series);
      plot.querySelector(".xticks").replaceChildren(...ticks("xt", "left", layout.xt));
      plot.querySelector(".yticks").replaceChildren(...ticks("yt", "bottom", layout.yt));
      box.querySelector(".xtitle").textContent = layout.x;
      box.querySelector(".ytitle").textContent = layout.y;
      box.querySelector(".note").textContent = layout.note;
    });
    const tick = box.querySelector("[data-ablations]");
    if (tick) tick.addEventListener("change", () => box.classList.toggle("all", tick.checked));
  }

  // Entropy maps: the chosen one is laid over the picture.
  for (const viewer of all(".viewer")) {
    const overlay = viewer.querySelector(".overlay"), caption = viewer.querySelector(".caption");
    viewer.addEventListener("click", (event) => {
      const button = event.target.closest("[data-map]");
      if (!button) return;
      for (const other of all("[data-map]", viewer)) other.setAttribute("aria-pressed", String(other === button));
      overlay.src = button.querySelector("img").src;
      overlay.alt = caption.textContent = button.dataset.tip;
    });
    const fade = viewer.querySelector("[data-fade]");
    const apply = () => { overlay.style.opacity = 1 - fade.value / 100; };
    fade.addEventListener("input", apply);
    apply();
  }

  // Tables sort by a column: numbers by size, the rest by letters.
  for (const head of all("thead th")) {
    head.addEventListener("click", () => {
      const table = head.closest("table"), column = Array.from(head.parentElement.children).indexOf(head);
      const up = head.getAttribute("aria-sort") === "descending";
      for (const other of all("th", head.parentElement)) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.children[column].textContent.trim();
      const number = (text) => (text === "" ? NaN : parseFloat(text.replace(/,/g, "")));
      const order = (a, b) => {
        const [x, y] = [number(value(a)), number(value(b))];
        if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
        const less = Number.isNaN(x) ? value(b).localeCompare(value(a)) : y - x;
        return up ? -less : less;
      };
      const body = table.tBodies[0];
      body.append(...Array.from(body.rows).sort(order));
    });
  }
})();
