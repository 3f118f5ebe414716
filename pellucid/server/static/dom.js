// Makes and finds elements. Text is always set as text: nothing in this page parses HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties (`class`, `on…` listeners, attributes) and children (nodes or text). */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Sets a text only where it changed, so that nothing is laid out anew for nothing. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const announcer = { pending: "", timer: 0 };

/** Tells screen readers, in portions of at least a second, so that a stream does not stutter. */
export function announce(text) {
  announcer.pending += text;
  if (announcer.timer) return;
  announcer.timer = setTimeout(() => {
    const said = el("p", {}, announcer.pending);
    announcer.pending = "";
    announcer.timer = 0;
    $("announcer").replaceChildren(said);
  }, 1000);
}

/** 1234.5 -> "1,234.5" with so many decimals. */
export function number(value, decimals = 0) {
  return value.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
}

/** "1 request", "2 requests" */
export function plural(count, word) {
  return `${number(count)} ${word}${count === 1 ? "" : "s"}`;
}

/** Milliseconds with as many decimals as mean something. */
export function milliseconds(value) {
  return number(value, value < 10 ? 2 : value < 100 ? 1 : 0);
}
