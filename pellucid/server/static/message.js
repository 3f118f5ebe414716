// One message of the conversation as the page shows it.

import { el, milliseconds, number, plural, setText } from "./dom.js";
import { copyText, markdownView } from "./markdown.js";

const FINISHES = {
  stop: "complete",
  length: "cut at its length",
  stopped: "stopped",
};

/** {node, growing(), done(), setLast(flag)} of a message; `actions`: edit(text), regenerate(), isRunning(). */
export function messageView(message, actions) {
  return message.role === "user" ? userView(message, actions) : answerView(message, actions);
}

function userView(message, actions) {
  const body = el("div", { class: "said" }, message.content);
  const copy = el("button", { type: "button", class: "quiet small", onclick: () => copyText(copy, message.content) }, "Copy");
  const change = el("button", { type: "button", class: "quiet small", onclick: () => openEditor() }, "Edit");
  const foot = el("footer", { class: "message-foot" }, change, copy);
  const node = el("article", { class: "message user", "aria-label": "You" }, body, foot);

  function openEditor() {
    if (actions.isRunning()) return;
    const box = el("textarea", { "aria-label": "Edit your message", rows: Math.min(8, message.content.split("\n").length + 1) });
    box.value = message.content;
    const close = () => {
      editor.replaceWith(body);
      foot.hidden = false;
      change.focus();
    };
    const submit = () => {
      if (box.value.trim() === "") return;
      actions.edit(box.value);
      document.getElementById("message").focus();
    };
    const editor = el(
      "div",
      { class: "editor" },
      box,
      el(
        "div",
        { class: "editor-foot" },
        el("button", { type: "button", class: "quiet", onclick: close }, "Cancel"),
        el("button", { type: "button", class: "primary", onclick: submit }, "Send anew"),
      ),
    );
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        submit();
      }
    });
    body.replaceWith(editor);
    foot.hidden = true;
    box.focus();
  }
  return { node, growing() {}, done() {}, setLast() {} };
}

function answerView(message, actions) {
  const thoughts = el("div", { class: "thoughts" });
  const summary = el("summary", {}, "Thoughts");
  const folded = el("details", { class: "reasoning", hidden: true }, summary, thoughts);
  const body = el("div", { class: "text" });
  const problem = el("p", { class: "problem", role: "alert", hidden: true });
  const figures = el("p", { class: "figures" });
  const copy = el("button", { type: "button", class: "quiet small", onclick: () => copyText(copy, message.content) }, "Copy");
  const again = el("button", { type: "button", class: "quiet small again", onclick: actions.regenerate }, "Regenerate");
  const foot = el("footer", { class: "message-foot" }, figures, copy, again);
  const node = el("article", { class: "message assistant is-growing", "aria-label": "Answer" }, folded, body, problem, foot);
  const show = markdownView(body);
  let frame = 0;
  foot.classList.add("is-growing");

  function draw() {
    frame = 0;
    show(message.content);
    if (message.reasoning) {
      folded.hidden = false;
      setText(summary, message.content ? "Thoughts" : "Thinking…");
      setText(thoughts, message.reasoning);
    }
    setText(figures, describe(message.figures));
  }
  return {
    node,
    growing() {
      frame ||= requestAnimationFrame(draw);
    },
    done() {
      cancelAnimationFrame(frame);
      draw();
      node.classList.remove("is-growing");
      foot.classList.remove("is-growing");
      problem.hidden = !message.error;
      setText(problem, message.error ?? "");
      setText(again, message.error ? "Try again" : "Regenerate");
    },
    setLast(isLast) {
      again.hidden = !isLast;
    },
  };
}

/** "31 prompt tokens (16 cached) · 45 tokens · 92.1 tokens/s · first after 38 ms · complete" */
function describe(figures) {
  if (!figures) return "";
  const { usage, began, first, last, firstTokens, finish } = figures;
  const parts = [];
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${number(usage.prompt_tokens)} prompt${cached ? ` (${number(cached)} cached)` : ""}`);
    parts.push(plural(usage.completion_tokens, "token"));
    const later = usage.completion_tokens - firstTokens;
    if (later > 0 && last > first) parts.push(`${number((later / (last - first)) * 1000, 1)} tokens/s`);
  }
  if (first !== null && first !== undefined) parts.push(`first after ${milliseconds(first - began)} ms`);
  if (finish) parts.push(FINISHES[finish] ?? finish);
  return parts.join(" · ");
}
