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
