// A small part of Markdown, made of DOM nodes. What is not understood stays as it was written; markup is never parsed.
// Links and images stay text: a model's words must not fetch anything, nor lead anywhere unseen.

import { el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^\s*(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const INLINE = /`([^`\n]+)`|\*\*(?=\S)([^*\n]+)\*\*|\*(?=\S)([^*\n]+)\*|__(?=\S)([^_\n]+)__/g;

/** Shows a text that grows: blocks that did not change keep their nodes. Returns a function that takes the whole text. */
export function markdownView(parent) {
  let shown = [];
  return (text) => {
    const blocks = parse(text);
    let same = 0;
    while (same < shown.length && same < blocks.length && shown[same] === blocks[same].key) same += 1;
    while (parent.childNodes.length > same) parent.lastChild.remove();
    for (const block of blocks.slice(same)) parent.append(render(block));
    shown = blocks.map((block) => block.key);
  };
}

/** Blocks: {kind, lines, …, key}; two of the same key look the same. */
export function parse(text) {
  const blocks = [];
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; ) {
    const [block, next] = blockAt(lines, at);
    if (block !== null) blocks.push({ ...block, key: JSON.stringify(block) });
    at = next;
  }
  return blocks;
}

function blockAt(lines, at) {
  const line = lines[at];
  if (line.trim() === "") return [null, at + 1];
  const fence = FENCE.exec(line);
  if (fence) return codeAt(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, lines: [heading[2]] }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule", lines: [] }, at + 1];
  if (QUOTE.test(line)) return takeWhile(lines, at, "quote", (next) => QUOTE.exec(next)?.[1]);
  const item = ITEM.exec(line);
  if (item) return listAt(lines, at, item);
  return takeWhile(lines, at, "paragraph", (next, index) => (index === at || isPlain(next) ? next : undefined));
}

const isPlain = (line) =>
  line.trim() !== "" && ![FENCE, HEADING, RULE, ITEM, QUOTE].some((pattern) => pattern.test(line));

function takeWhile(lines, at, kind, content) {
  const taken = [];
  let next = at;
  for (; next < lines.length; next += 1) {
    const found = content(lines[next], next);
    if (found === undefined) break;
    taken.push(found);
  }
  return [{ kind, lines: taken }, next];
}

function codeAt(lines, at, [, mark, language]) {
  const taken = [];
  let next = at + 1;
  while (next < lines.length && !lines[next].trim().startsWith(mark)) taken.push(lines[next++]);
  return [{ kind: "code", language, lines: taken }, next + 1];
}

function listAt(lines, at, first) {
  const ordered = first[2] !== undefined;
  const items = [];
  let next = at;
  for (; next < lines.length; next += 1) {
    const found = ITEM.exec(lines[next]);
    if (found && (found[2] !== undefined) === ordered) items.push(found[3]);
    else if (items.length && /^\s+\S/.test(lines[next])) items[items.length - 1] += `\n${lines[next].trim()}`;
    else if (!(lines[next].trim() === "" && ITEM.test(lines[next + 1] ?? ""))) break;
    else if ((ITEM.exec(lines[next + 1])[2] !== undefined) !== ordered) break;
  }
  return [{ kind: ordered ? "ordered" : "unordered", start: Number(first[2] ?? 1), lines: items }, next];
}

const RENDERERS = {
  heading: ({ level, lines }) => el(`h${Math.min(6, level + 2)}`, {}, ...inline(lines[0])),
  rule: () => el("hr"),
  quote: ({ lines }) => el("blockquote", {}, ...inline(lines.join("\n"))),
  paragraph: ({ lines }) => el("p", {}, ...inline(lines.join("\n"))),
  ordered: ({ lines, start }) => el("ol", { start }, ...lines.map((line) => el("li", {}, ...inline(line)))),
  unordered: ({ lines }) => el("ul", {}, ...lines.map((line) => el("li", {}, ...inline(line)))),
  code: ({ lines, language }) => codeBlock(lines.join("\n"), language),
};

const render = (block) => RENDERERS[block.kind](block);

function codeBlock(code, language) {
  const copy = el("button", { type: "button", class: "quiet small", onclick: () => copyText(copy, code) }, "Copy");
  return el(
    "div",
    { class: "code" },
    el("div", { class: "code-head" }, el("span", {}, language || "code"), copy),
    el("pre", { tabindex: 0 }, el("code", {}, code)),
  );
}

function inline(text) {
  const nodes = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    nodes.push(text.slice(from, found.index), styled(found));
    from = found.index + found[0].length;
  }
  return [...nodes, text.slice(from)].filter((node) => node !== "");
}

function styled([, code, bold, italic, strong]) {
  if (code !== undefined) return el("code", {}, code);
  return bold !== undefined || strong !== undefined ? el("strong", {}, bold ?? strong) : el("em", {}, italic);
}

/** Copies, and says so on the button. Without a secure context there is no clipboard: the button says that. */
export async function copyText(button, text) {
  const before = button.dataset.label ?? button.textContent;
  button.dataset.label = before;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = copyBySelection(text) ? "Copied" : "Not allowed";
  }
  setTimeout(() => (button.textContent = before), 1500);
}

function copyBySelection(text) {
  const area = el("textarea", { class: "hidden", "aria-hidden": "true" });
  area.value = text;
  const active = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  active?.focus();
  return done;
}
