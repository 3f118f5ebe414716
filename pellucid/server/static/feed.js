// What the engine does, asked for four times a second while somebody looks.

import { ApiError, getJson } from "./api.js";

const PERIOD_MS = 250;
const SLOWEST_MS = 4000; // between two questions when there is no answer
const MAX_STEPS = 1200;
const MEMORY_S = 60;
const RATE_WINDOW_S = 1;

/** Keeps the newest steps and a minute of figures. `onNews(feed)` after each answer, `onError(error)` after each failure. */
export class Feed {
  constructor({ onNews, onError, isWatched }) {
    Object.assign(this, { onNews, onError, isWatched });
    this.timer = 0;
    this.controller = null;
    this.forget();
    document.addEventListener("visibilitychange", () => this.restart());
  }

  forget() {
    this.model = null;
    this.last = null;
    this.next = null;
    this.steps = []; // with names in place of numbers
    this.samples = []; // {seconds, rate, used, cached, tokens}
    this.failures = 0;
  }

  /** Asks at once when somebody looks, and not at all when nobody does. */
  restart() {
    clearTimeout(this.timer);
    this.controller?.abort();
    if (this.isWatched()) this.ask();
  }

  async ask() {
    const controller = (this.controller = new AbortController());
    try {
      const since = this.next === null ? "" : `?since=${this.next}`;
      this.take(await getJson(`debug/live${since}`, { kind: "admin", signal: controller.signal }));
      this.failures = 0;
    } catch (error) {
      if (controller.signal.aborted) return;
      this.failures += 1;
      this.onError(error);
      if (error instanceof ApiError && (error.status === 401 || error.status === 403)) return;
    }
    if (controller.signal.aborted || !this.isWatched()) return;
    this.timer = setTimeout(() => this.ask(), Math.min(SLOWEST_MS, PERIOD_MS * 2 ** this.failures));
  }

  take(view) {
    const isAnother = this.model !== null && view.model.created !== this.model.created;
    if (isAnother || (this.last && view.stats.steps < this.last.stats.steps)) {
      this.forget(); // the server was started anew: its steps count from 0
      return;
    }
    this.model = view.model;
    this.last = view;
    this.next = view.next;
    this.steps.push(...view.steps.map((step) => named(step, view.ids)));
    this.steps.splice(0, Math.max(0, this.steps.length - MAX_STEPS));
    this.addSample(view);
    this.onNews(this);
  }

  addSample({ seconds, stats }) {
    const samples = this.samples;
    const tokens = stats.generation_tokens;
    const before = samples.find((sample) => seconds - sample.seconds <= RATE_WINDOW_S);
    const rate = before ? (tokens - before.tokens) / Math.max(1e-3, seconds - before.seconds) : 0;
    samples.push({ seconds, rate, tokens, used: stats.used_blocks, cached: stats.cached_blocks });
    while (samples.length && seconds - samples[0].seconds > MEMORY_S) samples.shift();
  }
}

function named(step, ids) {
  const names = (places) => places.map((place) => ids[place]);
  const entries = step.requests.map((place, at) => ({ id: ids[place], tokens: step.tokens[at] }));
  return {
    ...step,
    entries,
    sampled: new Set(names(step.sampled)),
    waiting: names(step.waiting),
    preempted: names(step.preempted),
    finished: names(step.finished),
    total: step.tokens.reduce((sum, tokens) => sum + tokens, 0),
  };
}
