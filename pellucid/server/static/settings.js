// What the next request carries besides the conversation.

import { $, el } from "./dom.js";
import { recall, remember } from "./api.js";

const STORE = "pellucid.settings";
const DEFAULTS = { max_tokens: "1024" };

// name, label, help, kind; numbers: least, most, step. The server checks again, and says what is wrong.
const FIELDS = [
  { name: "system", label: "System message", kind: "text", rows: 3, help: "Stands before the conversation." },
  { name: "model", label: "Model", kind: "choice" },
  { name: "temperature", label: "Temperature", min: 0, max: 100, step: 0.1, help: "0 always takes the likeliest token." },
  { name: "max_tokens", label: "Most tokens", min: 1, step: 1, whole: true, help: "Of one answer." },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, help: "Mass of likely tokens kept." },
  { name: "top_k", label: "Top k", min: 0, step: 1, whole: true, help: "0 keeps all." },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, help: "Against the likeliest." },
  { name: "seed", label: "Seed", step: 1, whole: true, help: "Same seed, same answer." },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, help: "Once per token that occurred." },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, help: "For each time it occurred." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 10, step: 0.05, help: "1 is none." },
  { name: "stop", label: "Stop texts", kind: "text", rows: 2, help: "One a line; \\n stands for a new line." },
];

const inputs = new Map();

/** Builds the form from the table. */
export function setUpSettings() {
  const saved = { ...DEFAULTS, ...JSON.parse(recall(STORE) ?? "{}") };
  $("settings-fields").replaceChildren(...FIELDS.map((field) => fieldRow(field, saved[field.name] ?? "")));
  const dialog = $("settings");
  $("open-settings").addEventListener("click", () => dialog.showModal());
  $("close-settings").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  $("settings-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (event.target.reportValidity()) dialog.close();
  });
  $("settings-form").addEventListener("input", save);
  $("reset-settings").addEventListener("click", () => {
    for (const [name, input] of inputs) if (name !== "model") input.value = DEFAULTS[name] ?? "";
    save();
  });
  showCount();
}

export function setModels(names) {
  const choice = inputs.get("model");
  const chosen = choice.value || JSON.parse(recall(STORE) ?? "{}").model;
  choice.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  if (names.includes(chosen)) choice.value = chosen;
}

function fieldRow(field, value) {
  const id = `setting-${field.name}`;
  const help = field.help ? `${id}-help` : undefined;
  const input = inputOf(field, { id, name: field.name, "aria-describedby": help });
  input.value = value;
  inputs.set(field.name, input);
  return el(
    "div",
    { class: field.kind === "text" || field.kind === "choice" ? "field wide" : "field" },
    el("label", { for: id }, field.label),
    input,
    field.help ? el("p", { id: help, class: "hint" }, field.help) : null,
  );
}

function inputOf(field, shared) {
  if (field.kind === "choice") return el("select", shared);
  if (field.kind === "text") return el("textarea", { ...shared, rows: field.rows, spellcheck: "false" });
  const { min, max, step, whole } = field;
  return el("input", { ...shared, type: "number", min, max, step: whole ? step : "any", placeholder: "model’s own", inputmode: "decimal" });
}

function save() {
  remember(STORE, JSON.stringify(Object.fromEntries([...inputs].map(([name, input]) => [name, input.value]))));
  showCount();
}

function showCount() {
  const count = [...inputs].filter(([name, input]) => name !== "model" && input.value !== (DEFAULTS[name] ?? "")).length;
  $("settings-count").hidden = count === 0;
  $("settings-count").textContent = ` ${count}`;
}

/** The text of the system message. */
export const systemMessage = () => inputs.get("system").value.trim();

/** The fields of a request that were filled in. */
export function requestFields() {
  const body = {};
  for (const field of FIELDS) {
    const text = inputs.get(field.name).value;
    if (field.name === "system" || text.trim() === "") continue;
    if (field.name === "stop") body.stop = text.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
    else body[field.name] = field.kind === "choice" ? text : Number(text);
  }
  return body;
}
