// Looking at one place of a drawing, with a pointer or with the arrow keys: a box with words beside it, and a voice.

import { el, setText } from "./dom.js";

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], PageUp: [-10, 0], PageDown: [10, 0] };

/**
 * Adds a canvas to `host` and makes it inspectable.
 * plot: {locate(x, y) -> place | null, move(place | null, dx, dy) -> place | null, describe(place) -> [lines], anchor(place) -> {x, y}, draw()}
 * Returns {canvas, context, width, height, place(), clear()}.
 */
export function inspectable(host, plot) {
  const canvas = el("canvas", { "aria-hidden": "true" });
  const box = el("div", { class: "tip", hidden: true });
  const voice = el("div", { class: "hidden", role: "status" });
  host.append(canvas, box, voice);
  host.tabIndex = 0;
  host.setAttribute("role", "application");
  let place = null;

  const view = {
    canvas,
    context: canvas.getContext("2d"),
    width: 0,
    height: 0,
    place: () => place,
    clear: () => set(null),
  };

  function set(next, speak = false) {
    place = next;
    box.hidden = place === null;
    if (place !== null) {
      const lines = plot.describe(place);
      box.replaceChildren(...lines.map((line, at) => el(at ? "p" : "b", {}, line)));
      put(box, plot.anchor(place));
      if (speak) setText(voice, lines.join(". "));
    }
    plot.draw();
  }

  function put(node, { x, y }) {
    const wide = node.offsetWidth;
    const left = x + 14 + wide > view.width ? Math.max(0, x - wide - 14) : x + 14;
    node.style.transform = `translate(${Math.round(left)}px, ${Math.round(Math.max(0, y - 8))}px)`;
  }

  host.addEventListener("pointermove", (event) => {
    const edge = canvas.getBoundingClientRect();
    set(plot.locate(event.clientX - edge.left, event.clientY - edge.top));
  });
  host.addEventListener("pointerleave", () => set(null));
  host.addEventListener("blur", () => set(null));
  host.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && place !== null) {
      event.stopPropagation();
      set(null);
    }
    const move = MOVES[event.key];
    if (!move) return;
    event.preventDefault();
    set(plot.move(place, ...move), true);
  });

  new ResizeObserver(() => {
    const ratio = window.devicePixelRatio || 1;
    view.width = host.clientWidth;
    view.height = host.clientHeight;
    canvas.width = Math.round(view.width * ratio);
    canvas.height = Math.round(view.height * ratio);
    view.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    plot.draw();
  }).observe(host);
  return view;
}

let colours = null;
const NAMES = ["ink", "muted", "line", "surface", "prefill", "decode", "mixed", "waiting", "danger", "cached", "accent-soft"];

/** The colours of the style sheet, read once for each scheme. */
export function palette() {
  if (colours === null) {
    const style = getComputedStyle(document.documentElement);
    colours = Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }
  return colours;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  colours = null;
  window.dispatchEvent(new Event("schemechange"));
});

export const FONT = "11px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
