// The server's API: keys, errors in words, and streams. Addresses are relative, so that the page works behind a prefix.

const KEYS = { api: "pellucid.key", admin: "pellucid.adminKey" };

/** What sessionStorage has under a name; null where it is switched off. */
export function recall(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

export function remember(name, text) {
  try {
    if (text === null) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, text);
  } catch {
    // full, or switched off: the tab forgets when it is reloaded
  }
}

export const setKey = (kind, key) => remember(KEYS[kind], key);
const keyFor = (kind) => recall(KEYS[kind]) ?? recall(KEYS.api);

/** An answer that is no success; `message` is for people. `status` is 0 when there was no answer. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const LEADS = {
  0: "The server cannot be reached. Does it still run?",
  401: "The server wants a key.",
  404: "Not found:",
  413: "This is too long for the server:",
  429: "The queue is full.",
  500: "The engine could not finish this:",
  503: "The server takes nothing at the moment:",
  504: "This took too long:",
};

function errorOf(status, body, retryAfter) {
  const told = body?.error?.message ?? "";
  const again = status === 429 && retryAfter ? ` Try again in ${retryAfter} s.` : "";
  const lead = LEADS[status] ?? "";
  const text = status === 429 ? `${lead}${again}` : `${lead} ${told}`.trim();
  return new ApiError(status, text || `The server answered with status ${status}.`, body?.error?.code ?? null);
}

async function ask(path, options, kind) {
  const headers = { ...options.headers };
  const key = keyFor(kind);
  if (key !== null) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, LEADS[0]);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw errorOf(response.status, body, response.headers.get("retry-after"));
}

/** GET as JSON. `kind` says which key: api or admin. */
export async function getJson(path, { kind = "api", signal } = {}) {
  return (await ask(path, { signal }, kind)).json();
}

/** POST, and the events of the answer as they come. Raises ApiError, also for an error inside of the stream. */
export async function* postStream(path, body, signal) {
  const response = await ask(
    path,
    { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal },
    "api",
  );
  for await (const data of eventData(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw errorOf(500, chunk, null);
    yield chunk;
  }
  throw new ApiError(0, "The connection broke before the answer was complete.");
}

async function* eventData(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError" || signal?.aborted) throw error;
    throw new ApiError(0, "The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
