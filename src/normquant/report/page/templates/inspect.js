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
