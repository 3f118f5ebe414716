// The live view: figures, timeline, charts, queue, and one sentence that says what the engine does.

import { $, el, milliseconds, number, plural, setText } from "./dom.js";
import { postStream, setKey } from "./api.js";
import { AreaChart, roundUp } from "./charts.js";
import { newRequestId, ownRequests } from "./chat.js";
import { Feed } from "./feed.js";
import { Timeline, short } from "./timeline.js";

const NEWEST = 24; // rows of the table, and steps that a mean is taken over
const TABLE_PERIOD_MS = 1000;
const BURST = ["lighthouse", "river", "clock", "moon", "violin", "train", "garden", "north wind"];
const BURST_TOKENS = 96;

let isPaused = false;
let drawn = {};

/** Starts the view; gives its feed. `showHealth(state, text)` is told how the server is. */
export function setUpEngine(showHealth) {
  const feed = new Feed({
    isWatched: () => !isPaused && document.visibilityState === "visible" && $("engine").getClientRects().length > 0,
    onNews: (news) => {
      showAdmin(null);
      showHealth(news.last.draining ? "busy" : "well", news.last.draining ? "shutting down" : "ready");
      show(news);
    },
    onError: (error) => {
      if (error.status === 401 || error.status === 403) showAdmin(error);
      else {
        showHealth("ill", error.message);
        setText($("engine-says"), error.message);
      }
    },
  });
  drawn = {
    timeline: new Timeline($("timeline"), isOwn),
    rate: new AreaChart($("rate-chart"), {
      series: [{ colour: "decode", value: (sample) => sample.rate }],
      top: (samples) => roundUp(Math.max(10, ...samples.map((sample) => sample.rate))),
      spell: (top) => `${number(top)} tokens/s`,
      describe: (sample) => [`${number(sample.rate)} tokens/s`],
    }),
    kv: new AreaChart($("kv-chart"), {
      series: [
        { colour: "decode", value: (sample) => sample.used },
        { colour: "cached", value: (sample) => sample.cached },
      ],
      top: () => feed.model?.num_blocks ?? 1,
      spell: (top) => plural(top, "block"),
      describe: (sample) => [`${plural(sample.used, "block")} in use`, `${number(sample.cached)} cached`],
    }),
  };
  window.addEventListener("viewchange", () => feed.restart());
  window.addEventListener("resize", () => feed.restart());
  $("pause").addEventListener("click", () => pause(feed));
  $("burst").addEventListener("click", burst);
  $("steps-details").addEventListener("toggle", () => showTable(feed.steps, true));
  $("admin-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey("admin", $("admin-key").value.trim());
    $("admin-key").value = "";
    feed.restart();
  });
  return feed;
}

/** Requests of this tab, those of several prompts included. */
const isOwn = (id) => ownRequests.has(id) || ownRequests.has(id.replace(/-\d+$/, ""));

function pause(feed) {
  isPaused = !isPaused;
  $("pause").setAttribute("aria-pressed", String(isPaused));
  setText($("pause"), isPaused ? "Go on" : "Pause");
  feed.restart();
}

function showAdmin(error) {
  $("admin-form").hidden = error === null;
  $("live").classList.toggle("is-off", error !== null);
  if (error === null) return;
  $("admin-fields").hidden = error.status === 403;
  setText($("engine-says"), "The engine is not shown.");
  setText(
    $("admin-why"),
    error.status === 403
      ? "The live view is off: this server has API keys and was started without --admin-key."
      : "The live view shows what all requests do, so it needs the admin key of this server.",
  );
}

function show(feed) {
  const { last, steps, samples } = feed;
  setText($("engine-says"), sentence(feed));
  showTiles(feed);
  drawn.timeline.update(steps);
  drawn.rate.update(samples);
  drawn.kv.update(samples);
  const { used_blocks: used, cached_blocks: cached } = last.stats;
  setText($("rate-figure"), `${number(samples.at(-1).rate)} tokens/s`);
  setText($("kv-figure"), `${number(used)} in use · ${number(cached)} cached · ${number(feed.model.num_blocks)} in all`);
  showQueue(last);
  showTable(steps);
}

/** What a person would say who looks at the engine. */
function sentence({ last, steps, model }) {
  const { running, waiting } = last.stats;
  if (!running && !waiting) {
    const made = last.stats.generation_tokens;
    return made ? `Idle. ${plural(made, "token")} made since the start.` : "Idle. Nothing was asked yet.";
  }
  const step = steps.at(-1);
  const prefills = step?.entries.filter((entry) => entry.isPrefill) ?? [];
  const decodes = (step?.entries.length ?? 0) - prefills.length;
  const parts = [];
  if (decodes) parts.push(`decoding ${plural(decodes, "request")}`);
  if (prefills.length) {
    const tokens = prefills.reduce((sum, entry) => sum + entry.tokens, 0);
    parts.push(`reading ${plural(prefills.length, "prompt")} (${plural(tokens, "token")})`);
  }
  const doing = parts.join(" and ") || `${running} of ${model.max_num_seqs} places taken`;
  const why = waiting && last.queue.length ? `: ${last.queue[0].reason}` : "";
  return `${doing[0].toUpperCase()}${doing.slice(1)}.${waiting ? ` ${number(waiting)} waiting${why}.` : ""}`;
}

function showTiles({ last, steps, samples, model }) {
  const { stats } = last;
  setText($("tile-rate"), number(samples.at(-1).rate));
  setText($("tile-rate-sub"), `${number(stats.generation_tokens)} made`);
  setText($("tile-running"), number(stats.running));
  setText($("tile-running-sub"), `of ${number(model.max_num_seqs)}`);
  setText($("tile-waiting"), number(stats.waiting));
  setText($("tile-waiting-sub"), plural(stats.preemptions, "preemption"));
  const newest = steps.slice(-NEWEST);
  const mean = newest.reduce((sum, step) => sum + step.execute_ms, 0) / Math.max(1, newest.length);
  setText($("tile-step"), newest.length ? milliseconds(mean) : "–");
}

function showQueue({ stats, queue }) {
  setText($("queue-figure"), stats.waiting ? plural(stats.waiting, "request") : "");
  const rows = queue.map(({ id, reason }) => [short(id), reason, isOwn(id)]);
  if (stats.waiting > queue.length) rows.push(["…", `${plural(stats.waiting - queue.length, "more request")}`, false]);
  if (!rows.length) rows.push(["", "Nobody waits.", false]);
  const list = $("queue");
  const key = JSON.stringify(rows);
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(
    ...rows.map(([id, reason, own]) =>
      el("li", { class: own ? "own" : undefined }, id ? el("code", {}, id) : null, el("span", {}, reason)),
    ),
  );
}

let tableAt = 0;
function showTable(steps, always = false) {
  if (!$("steps-details").open || (!always && performance.now() - tableAt < TABLE_PERIOD_MS)) return;
  tableAt = performance.now();
  const names = (ids) => ids.map(short).join(", ") || "–";
  const rows = steps.slice(-NEWEST).reverse().map((step) => {
    const requests = step.entries.map(({ id, tokens }) => `${short(id)}: ${tokens}`).join(", ");
    const cells = [step.kind, requests, number(step.num_waiting), names(step.preempted), names(step.finished)];
    cells.push(number(step.used_blocks), milliseconds(step.execute_ms));
    return el("tr", {}, el("th", { scope: "row" }, number(step.step)), ...cells.map((text) => el("td", {}, text)));
  });
  $("steps-body").replaceChildren(...rows);
}

let bursting = null;

/** Eight short stories at once: what batching looks like. Their texts are not shown. A second press ends them. */
async function burst() {
  if (bursting) {
    bursting.abort();
    return;
  }
  const { signal } = (bursting = new AbortController());
  setText($("burst"), "Stop the 8");
  const body = {
    prompt: BURST.map((subject) => `Once upon a time, the ${subject} began to speak.`),
    max_tokens: BURST_TOKENS,
    stream: true,
    request_id: newRequestId(),
  };
  try {
    // One stream for all: browsers open few connections to a server, and the view needs one.
    for await (const chunk of postStream("v1/completions", body, signal)) void chunk;
  } catch (error) {
    if (error.name !== "AbortError") setText($("engine-says"), error.message);
  }
  bursting = null;
  setText($("burst"), "Send 8 at once");
}
