// The step timeline: a column for each scheduler step, a row for each request. Below: tokens and time of each step.

import { $, milliseconds, number, plural } from "./dom.js";
import { FONT, inspectable, palette } from "./inspect.js";

const WIDTHS = [2, 3, 4, 6, 9, 14]; // pixels of a step
const [MIN_ROWS, MAX_ROWS] = [8, 32];
const ROW_HEIGHTS = [4, 22];
const TOP = { band: 4, lanes: 18 };
const TRACK = { height: 34, gap: 18 };
const AXIS = 4;

export class Timeline {
  /** `isOwn(id)`: whether this tab started the request. */
  constructor(host, isOwn) {
    this.isOwn = isOwn;
    this.steps = [];
    this.rows = new Map(); // request -> row, while it is seen
    this.begun = new Set(); // requests that have had a token: what they compute from then on is decoding
    this.width = 2;
    this.held = []; // what is seen while somebody looks at a place: it stands still
    this.view = inspectable(host, this);
    $("zoom-in").addEventListener("click", () => this.zoom(1));
    $("zoom-out").addEventListener("click", () => this.zoom(-1));
    window.addEventListener("schemechange", () => this.draw());
    this.zoom(0);
  }

  zoom(change) {
    this.width = Math.min(WIDTHS.length - 1, Math.max(0, this.width + change));
    $("zoom-in").disabled = this.width === WIDTHS.length - 1;
    $("zoom-out").disabled = this.width === 0;
    this.draw();
  }

  /** New steps stand at the end of `steps`, which is the feed's own list. */
  update(steps) {
    this.steps = steps;
    for (const step of steps) this.settle(step);
    this.draw();
  }

  /** Says of each entry whether it was prefill or decode, once. */
  settle(step) {
    if (step.settled) return;
    step.settled = true;
    for (const id of step.preempted) this.begun.delete(id); // all of it is computed again
    for (const entry of step.entries) {
      entry.isPrefill = step.kind === "prefill" || (step.kind === "mixed" && !this.isDecoding(step, entry));
      if (step.sampled.has(entry.id)) this.begun.add(entry.id);
    }
    for (const id of step.finished) this.begun.delete(id);
  }

  isDecoding(step, entry) {
    return this.begun.has(entry.id) || (entry.tokens === 1 && step.sampled.has(entry.id));
  }

  // ---- geometry ----------------------------------------------------------------------------------------------------

  get gutter() {
    return this.view.width < 480 ? 52 : 84;
  }

  get lanesHeight() {
    return this.view.height - TOP.lanes - 2 * (TRACK.height + TRACK.gap) - AXIS;
  }

  /** The steps in sight. */
  get seen() {
    const size = Math.max(1, Math.floor((this.view.width - this.gutter) / WIDTHS[this.width]));
    return (this.place === null ? this.steps : this.held).slice(-size);
  }

  get place() {
    return this.view?.place() ?? null;
  }

  rowHeight(rows) {
    return Math.max(ROW_HEIGHTS[0], Math.min(ROW_HEIGHTS[1], Math.floor(this.lanesHeight / rows)));
  }

  /** Rows keep their request while one of its steps is in sight. */
  assignRows(seen) {
    const inSight = new Set();
    for (const step of seen) {
      for (const { id } of step.entries) inSight.add(id);
      for (const id of step.waiting) inSight.add(id);
    }
    for (const id of this.rows.keys()) if (!inSight.has(id)) this.rows.delete(id);
    if (Math.max(0, ...this.rows.values()) >= MIN_ROWS && this.rows.size <= MIN_ROWS / 2) this.rows.clear();
    const taken = new Set(this.rows.values());
    let free = 0;
    for (const id of inSight) {
      if (this.rows.has(id)) continue;
      while (taken.has(free)) free += 1;
      if (free >= MAX_ROWS) break;
      this.rows.set(id, free);
      taken.add(free);
    }
    return Math.max(MIN_ROWS, ...[...taken].map((row) => row + 1));
  }

  // ---- looking at one place ----------------------------------------------------------------------------------------

  locate(x, y) {
    const seen = this.seen;
    const at = Math.floor((x - this.firstX(seen)) / WIDTHS[this.width]);
    if (at < 0 || at >= seen.length) return null;
    const row = Math.floor((y - TOP.lanes) / this.rowHeight(this.numRows));
    return this.hold({ step: seen[at], row: row >= 0 && row < this.numRows ? row : -1 });
  }

  move(place, dx, dy) {
    const seen = this.seen;
    if (!seen.length) return null;
    if (place === null) return this.hold({ step: seen.at(-1), row: -1 });
    const at = seen.indexOf(place.step) + dx;
    const row = Math.max(-1, Math.min(this.numRows - 1, place.row + dy));
    return this.hold({ step: seen[Math.max(0, Math.min(seen.length - 1, at))], row });
  }

  hold(place) {
    if (this.place === null) this.held = [...this.seen];
    return place;
  }

  describe({ step, row }) {
    const id = [...this.rows].find(([, taken]) => taken === row)?.[0];
    const entry = step.entries.find((one) => one.id === id);
    const lines = [
      `Step ${number(step.step)}, ${step.kind}`,
      `${plural(step.entries.length, "request")}, ${plural(step.total, "token")}`,
      `${milliseconds(step.execute_ms)} ms, and ${milliseconds(step.schedule_ms + step.output_ms)} ms around it`,
      `${plural(step.used_blocks, "block")} in use`,
    ];
    if (step.num_waiting) lines.push(`${number(step.num_waiting)} waiting`);
    if (step.prefix_hits) lines.push(`${plural(step.prefix_hits, "prefix hit")}`);
    if (step.preempted.length) lines.push(`preempted: ${step.preempted.map(short).join(", ")}`);
    if (entry) lines.push(`${this.label(id)}: ${entry.isPrefill ? "prefill" : "decode"}, ${plural(entry.tokens, "token")}`);
    else if (id && step.waiting.includes(id)) lines.push(`${this.label(id)}: waits`);
    if (id && step.finished.includes(id)) lines.push(`${this.label(id)}: ended`);
    return lines;
  }

  anchor({ step, row }) {
    const seen = this.seen;
    const x = this.firstX(seen) + seen.indexOf(step) * WIDTHS[this.width];
    return { x, y: TOP.lanes + Math.max(0, row) * this.rowHeight(this.numRows) };
  }

  label(id) {
    return this.isOwn(id) ? `yours ${short(id)}` : short(id);
  }

  firstX(seen) {
    return this.view.width - seen.length * WIDTHS[this.width];
  }

  // ---- drawing -----------------------------------------------------------------------------------------------------

  draw() {
    const { view } = this;
    if (!view?.width) return;
    const { context } = view;
    const colours = palette();
    const seen = this.seen;
    this.numRows = this.assignRows(seen);
    context.clearRect(0, 0, view.width, view.height);
    context.font = FONT;
    context.textBaseline = "middle";
    this.drawLanes(context, colours, seen);
    this.drawTracks(context, colours, seen);
    this.drawPlace(context, colours, seen);
  }

  drawLanes(context, colours, seen) {
    const size = WIDTHS[this.width];
    const height = this.rowHeight(this.numRows);
    const firstX = this.firstX(seen);
    this.drawRowLabels(context, colours, height);
    seen.forEach((step, at) => {
      const x = firstX + at * size;
      context.fillStyle = colours[step.kind] ?? colours.line;
      context.fillRect(x, TOP.band, size, 6);
      this.drawWaiting(context, colours, step, x, height);
      this.drawEntries(context, colours, step, x, height);
      this.drawPreempted(context, colours, step, x, height);
    });
  }

  drawRowLabels(context, colours, height) {
    context.textAlign = "left";
    const widest = this.gutter - 8;
    this.word(context, colours.muted, "kind", 0, TOP.band + 3, widest);
    for (let row = 0; row < this.numRows; row += 1) {
      context.fillStyle = colours.line;
      context.fillRect(this.gutter, TOP.lanes + (row + 1) * height - 1, this.view.width - this.gutter, 1);
    }
    if (height < 10) return;
    for (const [id, row] of this.rows) {
      const own = this.isOwn(id);
      const text = own && this.gutter > 60 ? `● ${short(id)}` : short(id);
      this.word(context, own ? colours.decode : colours.muted, text, 0, TOP.lanes + (row + 0.5) * height, widest);
    }
  }

  word(context, colour, text, x, y, widest) {
    context.fillStyle = colour;
    context.fillText(text, x, y, widest);
  }

  drawWaiting(context, colours, step, x, height) {
    if (step.step % 2) return; // dashes
    context.fillStyle = colours.waiting;
    for (const id of step.waiting) {
      const row = this.rows.get(id);
      if (row !== undefined) context.fillRect(x, TOP.lanes + Math.floor((row + 0.5) * height), WIDTHS[this.width], 1.5);
    }
  }

  drawEntries(context, colours, step, x, height) {
    const size = WIDTHS[this.width];
    const wide = size > 3 ? size - 1 : size;
    for (const { id, isPrefill } of step.entries) {
      const row = this.rows.get(id);
      if (row === undefined) continue;
      const y = TOP.lanes + row * height;
      const inset = isPrefill ? 1 : Math.max(1, Math.round(height * 0.28));
      context.fillStyle = isPrefill ? colours.prefill : colours.decode;
      context.fillRect(x, y + inset, wide, Math.max(1.5, height - 1 - 2 * inset));
      if (step.finished.includes(id)) {
        context.fillStyle = colours.ink;
        context.fillRect(x + wide - 1, y + 1, 1.5, height - 3);
      }
    }
  }

  drawPreempted(context, colours, step, x, height) {
    for (const id of step.preempted) {
      const row = this.rows.get(id);
      if (row === undefined) continue;
      const centre = TOP.lanes + (row + 0.5) * height;
      const arm = Math.max(2.5, Math.min(4.5, height / 3));
      context.strokeStyle = colours.danger;
      context.lineWidth = 2;
      context.beginPath();
      context.moveTo(x - arm, centre - arm);
      context.lineTo(x + arm, centre + arm);
      context.moveTo(x + arm, centre - arm);
      context.lineTo(x - arm, centre + arm);
      context.stroke();
    }
  }

  drawTracks(context, colours, seen) {
    const top = TOP.lanes + this.lanesHeight + TRACK.gap;
    const tracks = [
      ["tokens", (step) => step.total, (value) => number(value)],
      ["ms", (step) => step.execute_ms, milliseconds],
    ];
    tracks.forEach(([name, valueOf, spell], at) => {
      this.drawTrack(context, colours, seen, top + at * (TRACK.height + TRACK.gap), name, valueOf, spell);
    });
  }

  /** Heights are logarithmic: a prompt of a thousand tokens stands beside decodes of one. */
  drawTrack(context, colours, seen, top, name, valueOf, spell) {
    const size = WIDTHS[this.width];
    const values = seen.map(valueOf);
    const most = Math.max(1, ...values);
    const firstX = this.firstX(seen);
    context.fillStyle = colours.line;
    context.fillRect(this.gutter, top + TRACK.height, this.view.width - this.gutter, 1);
    seen.forEach((step, at) => {
      const height = (Math.log1p(values[at]) / Math.log1p(most)) * TRACK.height;
      context.fillStyle = colours[step.kind] ?? colours.muted;
      context.fillRect(firstX + at * size, top + TRACK.height - height, size > 3 ? size - 1 : size, height);
    });
    context.textAlign = "left";
    this.word(context, colours.muted, name, 0, top + TRACK.height - 6, this.gutter - 8);
    if (seen.length) this.word(context, colours.muted, `≤ ${spell(most)}`, 0, top + TRACK.height - 20, this.gutter - 8);
  }

  drawPlace(context, colours, seen) {
    if (this.place === null) return;
    const at = seen.indexOf(this.place.step);
    if (at < 0) return;
    const x = this.firstX(seen) + at * WIDTHS[this.width];
    context.strokeStyle = colours.ink;
    context.lineWidth = 1;
    context.strokeRect(x - 0.5, TOP.band - 2.5, WIDTHS[this.width] + 1, this.view.height - TOP.band - 1);
  }
}

/** The end of a request's id: what tells it from others. */
export const short = (id) => (id.length > 9 ? id.replace(/^page-/, "").slice(-8) : id);
