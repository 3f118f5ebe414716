// Areas over the last minute: values of each answer of the engine, by its own clock.

import { FONT, inspectable, palette } from "./inspect.js";

const SPANS_S = [15, 60]; // it grows with what is known
const PAD = { top: 12, bottom: 16 };

/** series: [{colour, value(sample)}], stacked from below. top(samples): the upper end. describe(sample) -> [lines]. */
export class AreaChart {
  constructor(host, { series, top, describe, spell }) {
    Object.assign(this, { series, topOf: top, describeSample: describe, spell });
    this.samples = [];
    this.held = null; // the samples as they were when somebody began to look
    this.view = inspectable(host, this);
    window.addEventListener("schemechange", () => this.draw());
  }

  update(samples) {
    this.samples = samples;
    this.draw();
  }

  get shown() {
    return this.view.place() === null ? this.samples : this.held;
  }

  get span() {
    const samples = this.shown;
    const known = samples.length ? samples.at(-1).seconds - samples[0].seconds : 0;
    return Math.min(SPANS_S[1], Math.max(SPANS_S[0], known));
  }

  x(sample) {
    return this.view.width * (1 - (this.shown.at(-1).seconds - sample.seconds) / this.span);
  }

  y(value, top) {
    const height = this.view.height - PAD.top - PAD.bottom;
    return PAD.top + height * (1 - Math.min(1, value / top));
  }

  hold(sample) {
    if (this.view.place() === null) this.held = [...this.samples];
    return sample;
  }

  locate(x) {
    const samples = this.shown;
    if (!samples.length) return null;
    const distance = (sample) => Math.abs(this.x(sample) - x);
    return this.hold(samples.reduce((best, sample) => (distance(sample) < distance(best) ? sample : best)));
  }

  move(place, dx) {
    const samples = this.shown;
    if (!samples.length) return null;
    const at = place === null ? samples.length - 1 : samples.indexOf(place) + dx;
    return this.hold(samples[Math.max(0, Math.min(samples.length - 1, at))]);
  }

  describe(sample) {
    const ago = this.shown.at(-1).seconds - sample.seconds;
    return [...this.describeSample(sample), ago < 0.1 ? "now" : `${ago.toFixed(1)} s ago`];
  }

  anchor(sample) {
    return { x: this.x(sample), y: PAD.top };
  }

  draw() {
    const { view } = this;
    if (!view?.width) return;
    const { context } = view;
    const colours = palette();
    const samples = this.shown;
    const top = this.topOf(samples);
    context.clearRect(0, 0, view.width, view.height);
    this.drawFrame(context, colours, top);
    if (samples.length < 2) return;
    let below = () => 0;
    for (const { colour, value } of this.series) {
      const under = below;
      const upper = (sample) => under(sample) + value(sample);
      this.drawArea(context, colours[colour], samples, under, upper, top);
      below = upper;
    }
    this.drawPlace(context, colours);
  }

  drawFrame(context, colours, top) {
    const { width, height } = this.view;
    context.font = FONT;
    context.fillStyle = colours.line;
    context.fillRect(0, height - PAD.bottom, width, 1);
    context.fillRect(0, PAD.top, width, 1);
    context.fillStyle = colours.muted;
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.fillText(`${Math.round(this.span)} s ago`, 0, height - 6);
    context.fillText(this.spell(top), 0, 5);
    context.textAlign = "right";
    context.fillText("now", width, height - 6);
  }

  drawArea(context, colour, samples, under, upper, top) {
    context.beginPath();
    samples.forEach((sample) => context.lineTo(this.x(sample), this.y(upper(sample), top)));
    for (const sample of [...samples].reverse()) context.lineTo(this.x(sample), this.y(under(sample), top));
    context.closePath();
    context.globalAlpha = 0.28;
    context.fillStyle = colour;
    context.fill();
    context.globalAlpha = 1;
    context.beginPath();
    samples.forEach((sample) => context.lineTo(this.x(sample), this.y(upper(sample), top)));
    context.strokeStyle = colour;
    context.lineWidth = 1.75;
    context.lineJoin = "round";
    context.stroke();
  }

  drawPlace(context, colours) {
    const place = this.view.place();
    if (place === null) return;
    context.fillStyle = colours.ink;
    context.fillRect(this.x(place) - 0.5, PAD.top, 1, this.view.height - PAD.top - PAD.bottom);
  }
}

/** The next of 1, 2, 5, 10, … that is at least `value`: the upper end of a chart. */
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, value)));
  return power * ([1, 2, 5, 10].find((digit) => digit * power >= value) ?? 10);
}
