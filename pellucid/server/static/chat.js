// The conversation: what was said, the answer on its way, and what can be done with each message.

import { $, announce, el } from "./dom.js";
import { postStream, recall, remember } from "./api.js";
import { messageView } from "./message.js";
import { requestFields, systemMessage } from "./settings.js";

const STORE = "pellucid.chat";
const STARTERS = [
  "Explain in two sentences what a KV cache is.",
  "Write a haiku about the sea.",
  "Tell me a short story about a lighthouse.",
];
const NEAR_END = 48; // pixels from the end that still count as being there

/** Requests that this tab started: the live view marks them. */
export const ownRequests = new Set();

export const newRequestId = () => {
  const id = `page-${Math.random().toString(36).slice(2, 10)}`;
  ownRequests.add(id);
  return id;
};

let messages = []; // {role, content, reasoning?, figures?, error?}
let views = [];
let running = null; // {controller, view, message}

export function setUpChat() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send($("message").value);
  });
  $("message").addEventListener("keydown", onKey);
  $("message").addEventListener("input", fitMessage);
  $("stop").addEventListener("click", stop);
  $("new-chat").addEventListener("click", newChat);
  $("to-newest").addEventListener("click", () => scrollToEnd(true));
  $("log").addEventListener("scroll", () => ($("to-newest").hidden = isAtEnd()));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
  });
  $("starters").append(
    ...STARTERS.map((text) => el("li", {}, el("button", { type: "button", onclick: () => send(text) }, text))),
  );
  restore();
}

function onKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
}

function send(text) {
  if (running || text.trim() === "") return;
  $("message").value = "";
  fitMessage();
  add({ role: "user", content: text });
  answer();
}

/** Asks for an answer to the conversation as it stands. */
async function answer() {
  const message = { role: "assistant", content: "", reasoning: "" };
  const context = contextOf(messages); // without the answer to come
  const view = add(message);
  const controller = new AbortController();
  running = { controller, view };
  setBusy(true);
  const figures = { began: performance.now(), first: null, last: null, usage: null, finish: null };
  message.figures = figures;
  try {
    for await (const chunk of postStream("v1/chat/completions", bodyOf(context), controller.signal)) {
      take(chunk, message, figures);
      view.growing();
      if (isFollowing()) scrollToEnd();
    }
  } catch (error) {
    if (error.name === "AbortError") figures.finish = "stopped";
    else message.error = error.message ?? String(error);
  }
  running = null;
  view.done();
  setBusy(false);
  announce(message.error ?? (figures.finish === "stopped" ? " Stopped." : " End of the answer."));
  keep();
  if (following) scrollToEnd();
}

function bodyOf(context) {
  return {
    messages: context,
    ...requestFields(),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    request_id: newRequestId(),
  };
}

function contextOf(said) {
  const system = systemMessage();
  const told = said.filter((message) => message.role === "user" || message.content !== "");
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...told.map(({ role, content }) => ({ role, content })),
  ];
}

function take(chunk, message, figures) {
  if (chunk.usage) figures.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const text = choice.delta?.content ?? "";
  const thought = choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? "";
  if (text || thought) {
    figures.last = performance.now();
    figures.first ??= figures.last;
    figures.firstTokens ??= chunk.usage?.completion_tokens ?? 1;
  }
  message.content += text;
  message.reasoning += thought;
  if (choice.finish_reason) figures.finish = choice.stop_reason === "abort" ? "stopped" : choice.finish_reason;
  announceSentence(text);
}

let unsaid = "";
function announceSentence(text) {
  unsaid += text;
  const end = Math.max(...[".", "!", "?", "\n"].map((mark) => unsaid.lastIndexOf(mark)));
  if (end < 0) return;
  announce(unsaid.slice(0, end + 1));
  unsaid = unsaid.slice(end + 1);
}

function stop() {
  running?.controller.abort(); // the server ends a request whose reader leaves
  $("message").focus();
}

/** Adds a message and shows it. */
function add(message) {
  messages.push(message);
  const view = messageView(message, {
    edit: (text) => edit(message, text),
    regenerate: () => regenerate(message),
    isRunning: () => running !== null,
  });
  views.push(view);
  $("log").append(view.node);
  $("welcome").hidden = true;
  markLast();
  scrollToEnd(true);
  return view;
}

function edit(message, text) {
  cutFrom(messages.indexOf(message));
  send(text);
}

function regenerate(message) {
  if (running) return;
  cutFrom(messages.indexOf(message));
  answer();
  $("message").focus(); // the button that had the focus is gone
}

function cutFrom(index) {
  messages = messages.slice(0, index);
  for (const view of views.splice(index)) view.node.remove();
  markLast();
}

/** Only the last answer can be made anew. */
function markLast() {
  views.forEach((view, index) => view.setLast(index === views.length - 1));
}

function newChat() {
  running?.controller.abort();
  cutFrom(0);
  keep();
  $("welcome").hidden = false;
  $("message").focus();
}

function setBusy(busy) {
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("log").setAttribute("aria-busy", String(busy));
  unsaid = "";
}

// ---- scrolling ---------------------------------------------------------------------------------------------------

let following = true;

function isAtEnd() {
  const log = $("log");
  following = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END;
  return following;
}

const isFollowing = () => following;

function scrollToEnd(always = false) {
  if (always) following = true;
  const log = $("log");
  requestAnimationFrame(() => (log.scrollTop = log.scrollHeight));
}

function fitMessage() {
  const box = $("message");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 220)}px`;
}

// ---- the tab's memory --------------------------------------------------------------------------------------------

function keep() {
  remember(STORE, messages.length ? JSON.stringify(messages) : null);
}

function restore() {
  try {
    for (const message of JSON.parse(recall(STORE) ?? "[]")) add(message).done();
  } catch {
    newChat(); // what was kept is not ours
  }
}
