/* ---- events */

document.addEventListener("click", event => {
  const at = selector => event.target.closest(selector);
  const report = at(".report");
  const button = at("button, a");
  if (at("[data-fold]")) unfold(at(".block"), !at(".block").classList.contains("open"));
  else if (at("[data-unfold]")) {
    const open = at("[data-unfold]").getAttribute("aria-expanded") !== "true";
    all(".block.repeats:not([data-copy])", report).forEach(block => {
      if (block.classList.contains("open") !== open) unfold(block, open);
    });
  } else if (at("[data-zoom]")) zoom_by(report.querySelector(".view"), at("[data-zoom]").dataset.zoom);
  else if (at("button[data-side]")) side_of(report, at("button[data-side]").dataset.side);
  else if (at("[data-to]")) { event.preventDefault(); go(report, at("[data-to]").dataset.to); }
  else if (at(".close")) release(report);
  else if (at(".row")) keep(at(".row"));
  else if (at(".box")) {
    const row = at(".block").querySelector(`.row[data-key="${keyOf(at(".box"))}"]`);
    reach(row, "nearest");
    keep(row);
  } else if (at(".parts [data-key]")) go(report, keyOf(at(".parts [data-key]")));
  else if (at("#theme")) {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  } else if (at("[data-show]")) {
    all("[data-show]").forEach(other => other.setAttribute("aria-pressed", String(other === button)));
    all(".report").forEach(one => { one.hidden = one.dataset.report !== button.dataset.show; });
    all(".report:not([hidden]) .view").forEach(fit);
  }
});

document.addEventListener("focusin", event => {
  const row = event.target.closest(".row");
  if (row) show(row);
});

document.addEventListener("mouseover", event => {
  const over = event.target.closest(".row, .box");
  if (!over || over.closest(".report").querySelector(".chosen")) return;
  show(over.classList.contains("row") ? over : over.closest(".block").querySelector(`.row[data-key="${keyOf(over)}"]`));
});

document.addEventListener("keydown", event => {
  const report = event.target.closest(".report") || document.querySelector(".report:not([hidden])");
  const row = event.target.closest(".row");
  const typing = event.target.matches("input");
  if (typing && event.key === "Enter") { event.preventDefault(); return next_hit(report, event.shiftKey); }
  if (event.key === "Escape") {
    if (typing) { event.target.value = ""; search(report); }
    return release(report);
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); return report.querySelector("input[type=search]").focus(); }
  const scaled = { "+": "in", "=": "in", "-": "out", "0": "reset" }[event.key];
  if (scaled) { event.preventDefault(); return zoom_by(report.querySelector(".view"), scaled); }
  if (!row) return;
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const side = { ArrowLeft: 0, ArrowRight: 1 }[event.key];
  if (by) { event.preventDefault(); step(row, by); }
  if (side !== undefined && String(side) !== sideOf(row)) { event.preventDefault(); across(row, side); }
});

document.addEventListener("input", event => {
  if (event.target.matches("input[type=search]")) search(event.target.closest(".report"));
});
