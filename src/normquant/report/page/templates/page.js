"use strict";
const details = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const keyOf = row => row.dataset.key;
const sideOf = row => keyOf(row).split("-")[0];
const copyOf = row => Number(row.closest(".block").dataset.copy || 0);

function make(tag, text, name) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.textContent = text;
  return made;
}

/* ---- what is known of a launch */

function list(panel, heading, buffers) {
  if (!buffers.length) return;
  panel.append(make("h4", heading));
  for (const parts of buffers) {
    const line = make("div", "", "buffer");
    parts.forEach(part => line.append(make("span", part)));
    panel.append(line);
  }
}

const SHOWN = 2;  // source lines; the rest are behind a summary

function source(panel, heading, lines) {
  const known = lines.filter(([place, code]) => place || code);
  if (known.length) panel.append(make("h4", heading));
  const rest = document.createElement("details");
  rest.append(make("summary", `${known.length - SHOWN} more`, "muted"));
  known.forEach(([place, code], n) => {
    const at = make("p", place.replace(/^.*\/(?=[^/]+\/[^/]+$)/, "…/"), "origin");
    at.title = place;
    (n < SHOWN ? panel : rest).append(...(code ? [make("code", code)] : []), at);
  });
  if (known.length > SHOWN) panel.append(rest);
}

function where(shown, copy) {
  const number = `launch ${shown.position + copy * shown.each}`;
  return shown.count > 1 ? `${number}, ${copy + 1} of ${shown.count} alike` : number;
}

function show(row) {
  const report = row.closest(".report");
  const { launches, lines } = details[Number(report.dataset.report)];
  const shown = launches[keyOf(row)];
  const panel = report.querySelector(".panel");
  const close = make("button", "close", "close");
  close.type = "button";
  panel.replaceChildren(close, make("h3", shown.name),
    make("p", `${shown.kind}, ~${shown.time} us, ${where(shown, copyOf(row))}`, "muted"));
  for (const [severity, rule, message, fix] of shown.findings) {
    const found = make("div", "", `finding ${severity}`);
    found.append(make("b", rule), make("p", message), make("p", fix, "muted"));
    panel.append(found);
  }
  source(panel, "generated line", [shown.generated]);
  source(panel, "your lines", shown.origins.map(number => lines[number]));
  list(panel, "reads", shown.reads);
  list(panel, "writes", shown.writes);
  if (shown.aten) panel.append(make("h4", "made of"), make("p", shown.aten));
  light(row);
}

function light(row) {
  const report = row.closest(".report");
  const block = row.closest(".block");
  all(".live", report).forEach(held => held.classList.remove("live"));
  row.classList.add("live");
  all(`.box[data-key="${keyOf(row)}"]`, block).forEach(box => box.classList.add("live"));
  all(`.ribbon[data-ends~="${keyOf(row)}"]`, report).forEach(ribbon => ribbon.classList.add("live"));
}

function keep(row) {
  const report = row.closest(".report");
  release(report);
  row.classList.add("chosen");
  row.setAttribute("aria-current", "true");
  show(row);
  report.querySelector(".panel").classList.add("open");
}

function release(report) {
  all(".chosen, .live", report).forEach(held => {
    held.classList.remove("chosen", "live");
    held.removeAttribute("aria-current");
  });
  report.querySelector(".panel").classList.remove("open");
}

/* ---- moving about */

const seen = row => row.offsetParent !== null;

function step(row, by) {
  const rows = all(".row", row.closest(".canvas")).filter(other => sideOf(other) === sideOf(row) && seen(other));
  const next = rows[rows.indexOf(row) + by];
  if (next) reach(next, "nearest");
}

function across(row, side) {
  const other = row.closest(".block").querySelector(`.side[data-side="${side}"]`);
  const near = other ? all(".row", other).sort((a, b) =>
    Math.abs(a.offsetTop - row.offsetTop) - Math.abs(b.offsetTop - row.offsetTop))[0] : null;
  if (!near) return;
  side_of(row.closest(".report"), side);
  reach(near, "nearest");
}

function reach(row, block) {
  row.focus({ preventScroll: true });
  row.scrollIntoView({ block, inline: "nearest" });
}

function go(report, key) {
  const row = report.querySelector(`.row[data-key="${key}"]`);
  if (!row) return;
  side_of(report, sideOf(row));
  reach(row, "center");
  keep(row);
}

function side_of(report, side) {
  report.querySelector(".view").dataset.side = side;
  all("button[data-side]", report).forEach(button =>
    button.setAttribute("aria-pressed", String(button.dataset.side === String(side))));
}

/* ---- repeated layers */

function unfold(block, open) {
  const report = block.closest(".report");
  const count = Number(block.dataset.count);
  all("[data-fold]", block).forEach(button => button.setAttribute("aria-expanded", String(open)));
  block.classList.toggle("open", open);
  let last = block;
  while (last.nextElementSibling && last.nextElementSibling.dataset.copy) last.nextElementSibling.remove();
  for (let copy = 1; open && copy < count; copy++) {
    const next = block.cloneNode(true);
    next.dataset.copy = copy;
    next.classList.add("later");
    next.classList.toggle("last", copy === count - 1);
    all(".chosen, .live", next).forEach(held => held.classList.remove("chosen", "live"));
    all(".head", next).forEach(head => {
      head.removeAttribute("data-fold");
      head.disabled = true;
      head.replaceChildren(make("b", `${copy + 1} of ${count}`));
    });
    last.after(next);
    last = next;
  }
  all(".head .which", block).forEach(which => { which.textContent = open ? `, 1 of ${count}` : ""; });
  const folds = all("[data-fold]", report);
  const every = report.querySelector("[data-unfold]");
  const opened = folds.every(button => button.getAttribute("aria-expanded") === "true");
  every.setAttribute("aria-expanded", String(opened));
  every.textContent = opened ? "fold all layers" : "unfold all layers";
  search(report);
  fit(report.querySelector(".view"));
}

/* ---- zoom and pan */

const LEAST = 0.15, MOST = 3;

function fit(view) {
  const scale = Number(view.dataset.scale || 1);
  const canvas = view.querySelector(".canvas");
  const sizer = view.querySelector(".sizer");
  canvas.style.width = `${view.clientWidth}px`;
  canvas.style.transform = `scale(${scale})`;
  sizer.style.width = `${view.clientWidth * scale}px`;
  sizer.style.height = `${canvas.offsetHeight * scale}px`;
}

function zoom(view, scale, x = view.clientWidth / 2, y = view.clientHeight / 2) {
  const before = Number(view.dataset.scale || 1);
  const after = Math.min(MOST, Math.max(LEAST, scale));
  const left = (view.scrollLeft + x) / before, top = (view.scrollTop + y) / before;
  view.dataset.scale = after;
  fit(view);
  view.scrollTo(left * after - x, top * after - y);
  view.closest(".report").querySelector('[data-zoom="reset"]').textContent = `${Math.round(100 * after)} %`;
}

function zoom_by(view, what) {
  const scale = Number(view.dataset.scale || 1);
  zoom(view, { in: scale * 1.25, out: scale / 1.25, reset: 1 }[what]);
}

all(".view").forEach(view => {
  const touches = new Map();
  let drag = null, pinch = null;
  view.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const box = view.getBoundingClientRect();
    const scale = Number(view.dataset.scale || 1) * Math.exp(-event.deltaY / 300);
    zoom(view, scale, event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  view.addEventListener("pointerdown", event => {
    if (event.pointerType === "touch") touches.set(event.pointerId, event);
    else if (event.button === 0) drag = { x: event.clientX, y: event.clientY, left: view.scrollLeft, top: view.scrollTop };
    if (touches.size === 2) pinch = { apart: apart(touches), scale: Number(view.dataset.scale || 1) };
  });
  view.addEventListener("pointermove", event => {
    if (touches.has(event.pointerId)) touches.set(event.pointerId, event);
    if (pinch && touches.size === 2) {
      const box = view.getBoundingClientRect();
      const [a, b] = [...touches.values()];
      zoom(view, pinch.scale * apart(touches) / pinch.apart,
        (a.clientX + b.clientX) / 2 - box.left, (a.clientY + b.clientY) / 2 - box.top);
    }
    if (!drag) return;
    const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
    if (!drag.moved && Math.hypot(dx, dy) < 5) return;
    if (!drag.moved) { drag.moved = true; view.classList.add("dragging"); view.setPointerCapture(event.pointerId); }
    view.scrollTo(drag.left - dx, drag.top - dy);
  });
  const end = event => {
    touches.delete(event.pointerId);
    pinch = null;
    drag = null;
    view.classList.remove("dragging");
  };
  view.addEventListener("pointerup", end);
  view.addEventListener("pointercancel", end);
  view.addEventListener("touchmove", event => { if (event.touches.length > 1) event.preventDefault(); }, { passive: false });
  new ResizeObserver(() => fit(view)).observe(view);
});

function apart(touches) {
  const [a, b] = [...touches.values()];
  return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
}

/* ---- search */

const texts = details.map(({ launches, lines }) => Object.fromEntries(Object.entries(launches).map(([key, shown]) =>
  [key, JSON.stringify([Object.values(shown), shown.origins.map(number => lines[number])]).toLowerCase()])));

function search(report) {
  const words = report.querySelector("input[type=search]").value.toLowerCase().split(/\s+/).filter(Boolean);
  const known = texts[Number(report.dataset.report)];
  const fits = key => words.every(word => known[key].includes(word));
  const hits = new Set(Object.keys(known).filter(fits));
  all(".row, .box", report).forEach(shown => {
    shown.classList.toggle("dim", words.length > 0 && !hits.has(keyOf(shown)));
    shown.classList.toggle("hit", words.length > 0 && hits.has(keyOf(shown)));
  });
  const rows = all(".row", report);
  const found = rows.filter(row => row.classList.contains("hit"));
  report.querySelector(".hits").textContent = words.length ? `${found.length} of ${rows.length}` : "";
  return found;
}

function next_hit(report, back) {
  const found = search(report).filter(row => seen(row) || row.closest(".canvas"));
  if (!found.length) return;
  const at = found.indexOf(report.querySelector(".row.chosen"));
  const next = found[(at + (back ? -1 : 1) + (at < 0 && back ? 1 : 0) + found.length) % found.length];
  side_of(report, sideOf(next));
  next.scrollIntoView({ block: "center", inline: "nearest" });
  keep(next);
}

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
