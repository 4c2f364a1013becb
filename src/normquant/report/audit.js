"use strict";
const details = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const boxes = report => [...report.querySelectorAll(".box")];

function make(tag, text, name) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.textContent = text;
  return made;
}

function list(panel, heading, buffers) {
  if (!buffers.length) return;
  panel.append(make("h4", heading));
  for (const parts of buffers) {
    const row = make("div", "", "buffer");
    parts.forEach(part => row.append(make("span", part)));
    panel.append(row);
  }
}

function choose(box) {
  const report = box.closest(".report");
  const key = box.dataset.launch;
  const shown = details[Number(report.dataset.report)][key];
  release(report);
  box.classList.add("chosen");
  report.querySelectorAll(".edge").forEach(edge =>
    edge.classList.toggle("live", edge.dataset.from === key || edge.dataset.to === key));
  const panel = report.querySelector(".panel");
  panel.replaceChildren(make("h3", shown.name), make("p", `${shown.kind}, ${shown.time}`, "muted"));
  for (const [rule, message, fix] of shown.findings) {
    const found = make("div", "", "finding");
    found.append(make("b", rule), make("p", message), make("p", fix, "muted"));
    panel.append(found);
  }
  list(panel, "reads", shown.reads);
  list(panel, "writes", shown.writes);
  if (shown.aten) panel.append(make("h4", "made of"), make("p", shown.aten));
  if (shown.origins.length) panel.append(make("h4", "from"));
  shown.origins.forEach(line => panel.append(make("p", line, "origin")));
  if (shown.where) panel.append(make("h4", "generated at"), make("p", shown.where));
}

function release(report) {
  report.querySelectorAll(".chosen, .live").forEach(held => held.classList.remove("chosen", "live"));
}

function step(box, by) {
  const all = boxes(box.closest(".report"));
  const next = all[all.indexOf(box) + by];
  if (next) { next.focus(); next.scrollIntoView({ block: "nearest", inline: "nearest" }); }
}

document.querySelectorAll(".box").forEach(box => {
  box.addEventListener("click", () => box.focus());
  box.addEventListener("focus", () => choose(box));
  box.addEventListener("keydown", event => {
    const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (by) { step(box, by); event.preventDefault(); }
    if (event.key === "Escape") { release(box.closest(".report")); box.blur(); }
  });
});

document.querySelectorAll('a[href^="#launch-"]').forEach(link => link.addEventListener("click", event => {
  const box = link.closest(".report").querySelector(`[data-launch="${link.hash.slice(8)}"]`);
  if (!box) return;
  event.preventDefault();
  const folded = box.closest("details");
  if (folded) folded.open = true;
  box.focus();
  box.scrollIntoView({ block: "center", inline: "center" });
}));

document.querySelectorAll("[data-show]").forEach(button => button.addEventListener("click", () => {
  document.querySelectorAll("[data-show]").forEach(other => other.setAttribute("aria-pressed", String(other === button)));
  document.querySelectorAll(".report").forEach(report => { report.hidden = report.dataset.report !== button.dataset.show; });
}));

document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
