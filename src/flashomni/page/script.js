"use strict";
document.documentElement.classList.add("fo-live");

// Two results: which view, where the slider is, which frame.
for (const viewer of document.querySelectorAll(".fo-viewer")) {
  const count = +viewer.dataset.frames, columns = +viewer.dataset.columns;
  const buttons = [...viewer.querySelectorAll(".fo-modes button")];
  const show = (mode) => {
    viewer.dataset.mode = mode;
    for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.mode === mode);
    for (const view of viewer.querySelectorAll("[data-view]")) view.hidden = view.dataset.view !== mode;
  };
  for (const button of buttons) button.addEventListener("click", () => show(button.dataset.mode));
  show("0");

  const pick = viewer.querySelector(".fo-pick"), choices = [...viewer.querySelectorAll(".fo-fast")];
  const choose = () => choices.forEach((each, place) => { each.hidden = place !== pick.selectedIndex; });
  if (pick) { pick.addEventListener("change", choose); choose(); }

  const slider = viewer.querySelector(".fo-slider");
  const split = () => viewer.style.setProperty("--at", slider.value + "%");
  slider.addEventListener("input", split);
  split();

  const scrub = viewer.querySelector(".fo-scrub");
  if (!scrub) continue;
  const play = viewer.querySelector(".fo-play"), out = viewer.querySelector("output");
  let timer = null;
  const seek = (frame) => {
    scrub.value = frame;
    viewer.style.setProperty("--column", frame % columns);
    viewer.style.setProperty("--row", Math.floor(frame / columns));
    out.textContent = `${frame + 1} / ${count}`;
  };
  const run = (on) => {
    clearInterval(timer);
    timer = on ? setInterval(() => seek((+scrub.value + 1) % count), 1000 / +viewer.dataset.rate) : null;
    play.textContent = on ? "❚❚" : "▶";
    play.setAttribute("aria-label", on ? "Pause" : "Play");
  };
  scrub.addEventListener("input", () => { run(false); seek(+scrub.value); });
  play.addEventListener("click", () => run(!timer));
  window.addEventListener("beforeprint", () => run(false));
  seek(0);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) run(true);
}

// Steps: a column is pointed at, or walked to with the arrow keys; the figures of it stand above.
for (const chart of document.querySelectorAll(".fo-timeline")) {
  const data = JSON.parse(chart.querySelector(".fo-data").textContent);
  const readout = chart.querySelector(".fo-readout"), count = data.steps.length;
  const percent = (share) => Math.round(100 * share) + "%";
  const hint = "Point at a step, or walk with the arrow keys.";
  let column = -1, layer = -1;
  const write = () => {
    chart.classList.toggle("fo-on", column >= 0);
    if (column < 0) { readout.textContent = hint; return; }
    chart.style.setProperty("--cursor", (column + 0.5) / count);
    const step = data.steps[column];
    const parts = [`step ${step.step}`, [step.kind, ...step.does].join(", "), step.seconds];
    if (step.error !== null) parts.push(`${step.error} from dense`);
    parts.push(`cache ${step.cache}`);
    if (layer >= 0 && layer < step.kinds.length) {
      const kind = step.kinds[layer];
      parts.push(kind === "bypass" ? `${data.layers[layer]}: cached whole`
        : `${data.layers[layer]}: ${kind}, ${percent(step.executed[layer] ?? 1)} of its FLOPs, ` +
          `${percent(step.q[layer])} of tiles, ${percent(step.kv[layer])} of key blocks`);
    }
    readout.textContent = parts.join(" · ");
  };
  const point = (event) => {
    const plot = event.target.closest(".fo-plot");
    if (!plot) return;
    const box = plot.getBoundingClientRect();
    column = Math.max(0, Math.min(count - 1, Math.floor((event.clientX - box.left) / box.width * count)));
    layer = plot.parentElement.classList.contains("fo-map")
      ? Math.min(data.layers.length - 1, Math.floor((event.clientY - box.top) / box.height * data.layers.length)) : -1;
    write();
  };
  chart.addEventListener("pointermove", point);
  chart.addEventListener("pointerdown", point);
  chart.addEventListener("pointerleave", () => { column = -1; write(); });
  chart.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    column = Math.max(0, Math.min(count - 1, column + move[0]));
    layer = Math.max(-1, Math.min(data.layers.length - 1, layer + move[1]));
    write();
  });
  write();
}
