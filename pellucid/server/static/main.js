// Starts the page: which view is seen, whether the server is well, and the keys.

import { $, el, setText } from "./dom.js";
import { ApiError, getJson, setKey } from "./api.js";
import { setUpChat } from "./chat.js";
import { setUpEngine } from "./engine.js";
import { setModels, setUpSettings } from "./settings.js";

const VIEWS = ["chat", "engine"];
const RETRY_MS = 3000;

function showView() {
  const view = VIEWS.find((name) => location.hash === `#${name}`) ?? VIEWS[0];
  document.body.dataset.view = view;
  for (const name of VIEWS) {
    if (name === view) $(`to-${name}`).setAttribute("aria-current", "page");
    else $(`to-${name}`).removeAttribute("aria-current");
  }
  window.scrollTo(0, 0);
  window.dispatchEvent(new Event("viewchange"));
}

/** Says how the server is; `state` is well, busy or ill. */
function showHealth(state, text) {
  $("health").dataset.state = state;
  setText($("health"), text);
}

async function connect() {
  try {
    const { data } = await getJson("v1/models");
    setModels(data.map((model) => model.id));
    setText($("model-name"), data[0].id);
    document.title = `${data[0].id} · Pellucid`;
    showHealth("well", "ready");
    $("key-dialog").close();
    return true;
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) askForKey();
    else {
      showHealth("ill", error.message);
      setTimeout(connect, RETRY_MS);
    }
    return false;
  }
}

function askForKey() {
  showHealth("busy", "a key is needed");
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

function setUpKeys(onKey) {
  $("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    setKey("api", $("api-key").value.trim());
    if (await connect()) {
      $("message").focus();
      onKey();
    } else setText($("key-why"), "The server does not know this key.");
    $("api-key").value = "";
  });
}

window.addEventListener("hashchange", showView);
setUpSettings();
setUpChat();
showView();
const feed = setUpEngine(showHealth);
setUpKeys(() => feed.restart());
if (await connect()) feed.restart();
if (matchMedia("(min-width: 700px)").matches && !$("key-dialog").open) $("message").focus({ preventScroll: true });
document.body.append(el("span", { id: "is-ready", class: "hidden", hidden: true }));
