// What pages do beyond showing: live rows and state, keys, progress, streaming. Everything is rendered by the server,
// and every page works without this. Text of others is only ever set as text, never parsed as HTML by hand.

const page = document.body.dataset.page;
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

const fetched = async (url, options) => {
  const answer = await fetch(url, options);
  return [answer, new DOMParser().parseFromString(await answer.text(), "text/html")];
};

// Live: what the service tells by GET /events.

const trouble = (text) => {
  const banner = $("#trouble");
  if (banner) [banner.textContent, banner.hidden] = [text, !text];
};

const ready = (good, text) => {
  const dot = $("#ready");
  if (!dot) return;
  dot.classList.toggle("good", good);
  dot.classList.toggle("bad", !good);
  $("#ready-text").textContent = text;
};

const FOLLOW_AGAIN_MS = 5000;
const RELOADED = ["problem", "ledger", "edit", "health"]; // when the service is well again; nobody types there
let unwell = false;

const follow = () => {
  const events = new EventSource("/events");
  events.addEventListener("revision", (event) => {
    const told = JSON.parse(event.data);
    const shown = $("#revision");
    if (!shown || shown.textContent === String(told.revision)) return;
    shown.textContent = told.revision;
    if ($("#active")) $("#active").textContent = told.active_edits;
    if (page in refreshed) refresh();
  });
  events.addEventListener("health", (event) => {
    const told = JSON.parse(event.data);
    const wrong = Object.entries(told.checks).filter(([, state]) => state !== "ok");
    ready(!wrong.length, wrong.length ? "not ready" : "ready");
    trouble(wrong.map(([part, state]) => `${part}: ${state}`).join("; "));
    if (wrong.length) unwell = true;
    else if (unwell && RELOADED.includes(page)) location.reload();
  });
  events.addEventListener("step", (event) => showStep(JSON.parse(event.data)));
  events.onerror = async () => {
    ready(false, "connection lost");
    if (events.readyState !== EventSource.CLOSED) return; // it tries again by itself
    const session = await fetch("/session").catch(() => null);
    if (session?.status === 401) return trouble("Your session is over. Sign in again to see what goes on.");
    setTimeout(follow, FOLLOW_AGAIN_MS);
  };
};

const replaceMain = async () => {
  const [answer, other] = await fetched(location.href);
  const main = $("main", other);
  if (!answer.ok || !main) return;
  $("#main").replaceChildren(...main.childNodes);
  enhance();
};

// Ledger: rows that are there stay where they are, rows that arrive come above them.

const refreshLedger = async () => {
  const [answer, other] = await fetched(location.href);
  const theirs = $("table#edits", other), ours = $("table#edits");
  if (!answer.ok) return;
  if (!theirs || !ours) return replaceMain();
  const body = $("tbody", ours), rows = $$("tbody tr", theirs);
  const known = new Set(rows.map((row) => row.id));
  const full = rows.length >= Number(ours.dataset.limit);
  const oldest = Math.min(...rows.map((row) => Number(row.dataset.revision)));
  let place = body.firstElementChild;
  for (const row of rows) {
    const mine = document.getElementById(row.id);
    if (!mine) {
      row.classList.add("arrived");
      body.insertBefore(row, place);
    } else {
      row.classList.toggle("selected", mine.classList.contains("selected"));
      const focused = mine.contains(document.activeElement);
      if (mine.outerHTML !== row.outerHTML) mine.replaceWith(row);
      if (focused) $("a", row)?.focus({ preventScroll: true });
      place = document.getElementById(row.id).nextElementSibling;
    }
  }
  for (const row of $$("tr", body)) {
    const beyond = full && Number(row.dataset.revision) < oldest;
    if (!known.has(row.id) && !beyond) row.remove();
  }
};

// One at a time, and once more at the end if there was news meanwhile: what is older never replaces what is newer.
const refreshed = { ledger: refreshLedger, health: replaceMain };
let refreshing = false, news = false;

const refresh = async () => {
  news = true;
  if (refreshing) return;
  refreshing = true;
  while (news) {
    news = false;
    await refreshed[page]().catch(() => {}); // the state of the connection is shown
  }
  refreshing = false;
};

// Keys. They act alone, so they can be switched off, and never where somebody types.

const select = (step) => {
  const rows = $$("table#edits tbody tr");
  if (!rows.length) return;
  const now = rows.findIndex((row) => row.classList.contains("selected"));
  const next = rows[now < 0 ? 0 : Math.min(Math.max(now + step, 0), rows.length - 1)];
  rows.forEach((row) => row.classList.toggle("selected", row === next));
  $("a", next).focus();
  next.scrollIntoView({ block: "nearest" });
};

const help = $("#help");
const keys = {
  j: () => select(1),
  k: () => select(-1),
  "/": () => ($("#search") ? $("#search").focus() : location.assign("/")),
  n: () => location.assign("/ui/new"),
  "?": () => (help.open ? help.close() : help.showModal()),
};

const listen = () => {
  const on = $("#keys-on"), button = $("#help-button");
  on.checked = localStorage.getItem("keys") !== "off";
  on.addEventListener("change", () => localStorage.setItem("keys", on.checked ? "on" : "off"));
  button.hidden = false;
  button.addEventListener("click", () => help.showModal());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !on.checked || !keys[event.key]) return;
    if (event.target.closest("input, textarea, select") || (help.open && event.key !== "?")) return;
    event.preventDefault();
    keys[event.key]();
  });
};

// Forms: sent in place, so that what was typed is not lost, and the steps can be shown meanwhile.

let request = null;

const showStep = ({ request_id: id, step, state, ms }) => {
  const list = $("#progress ol");
  if (!list || !request || id !== request) return;
  let item = $$("li", list).find((each) => each.dataset.step === step);
  if (!item) {
    item = list.appendChild(document.createElement("li"));
    item.dataset.step = step;
  }
  item.className = state;
  item.textContent = ms === null || ms === undefined ? step : `${step} ${Math.round(ms)} ms`;
};

const currentToken = async (form) => {
  const session = await fetch("/session");
  if (!session.ok) return false;
  form.elements.csrf_token.value = (await session.json()).csrf_token ?? "";
  return true;
};

const SIGNED_OUT = "Your session is over. Sign in again in another tab, then press the button once more: what you typed is kept here.";

const submit = async (event) => {
  const form = event.target;
  if (!("progress" in form.dataset)) return;
  event.preventDefault();
  const progress = $("#progress");
  const buttons = $$("button", form);
  request = crypto.randomUUID();
  const sent = new URLSearchParams(new FormData(form, event.submitter));
  if (progress) {
    $("ol", progress).replaceChildren();
    progress.hidden = false;
    progress.scrollIntoView({ block: "nearest" });
  }
  buttons.forEach((button) => (button.disabled = true));
  try {
    if (!(await currentToken(form))) return trouble(SIGNED_OUT);
    sent.set("csrf_token", form.elements.csrf_token.value);
    const headers = { "X-Request-ID": request };
    const answer = await fetch(form.getAttribute("action"), { method: "POST", body: sent, headers });
    if (answer.redirected) return location.assign(answer.url);
    const other = new DOMParser().parseFromString(await answer.text(), "text/html");
    const main = $("main", other);
    if (!main) return trouble(`The service answered ${answer.status}. Nothing is known of what became of it: look at the ledger before you try again.`);
    $("#main").replaceChildren(...main.childNodes);
    enhance();
    window.scrollTo(0, 0);
    ($("#preview-title") ?? $("#problem-title") ?? $("#main")).focus({ preventScroll: true });
  } catch {
    trouble("The service cannot be reached. What you typed is still here; look at the ledger before you try again.");
  } finally {
    request = null;
    if (progress) progress.hidden = true;
    buttons.forEach((button) => (button.disabled = false));
  }
};

// Playground: both answers as they are made, then which tokens the edits made more or less probable.

const MARKED_FROM = 0.1;
let stream = null;

const mark = async (prompt, view) => {
  const place = $(`#said-${view}`);
  const continuation = place.textContent.replace(/\uFFFD+$/, ""); // a character that was cut off has no token
  if (!continuation) return;
  const headers = { "Content-Type": "application/json", "X-CSRF-Token": $("#play").elements.csrf_token.value };
  const body = JSON.stringify({ prompt, continuation });
  const answer = await fetch("/score", { method: "POST", headers, body });
  if (!answer.ok) return;
  const pieces = (await answer.json()).tokens.map((token) => {
    const [base, live] = [Math.exp(token.base), Math.exp(token.live)];
    if (Math.abs(live - base) < MARKED_FROM) return token.token;
    const piece = document.createElement(live > base ? "ins" : "del");
    if (live < base) piece.className = "less";
    piece.title = `base ${(100 * base).toFixed(1)} %, live ${(100 * live).toFixed(1)} %`;
    piece.textContent = token.token;
    return piece;
  });
  if (pieces.every((piece) => typeof piece !== "string" || !piece.includes("\uFFFD"))) place.replaceChildren(...pieces);
};

const generate = async (event) => {
  event.preventDefault();
  const form = event.target, answers = $("#answers"), stop = $("#stop");
  const given = new FormData(form);
  const body = { prompt: given.get("prompt"), view: "both", stream: true };
  for (const name of ["max_new_tokens", "temperature", "seed"]) if (given.get(name)) body[name] = Number(given.get(name));
  stream?.abort();
  stream = new AbortController();
  const own = stream;
  answers.setAttribute("aria-busy", "true");
  stop.hidden = false;
  $("#play-problem").replaceChildren();
  for (const view of ["base", "live"]) $(`#said-${view}`).textContent = "";
  const failed = (problem) => {
    const said = document.createElement("p");
    said.className = "banner bad";
    said.setAttribute("role", "alert");
    said.textContent = problem.detail;
    $("#play-problem").replaceChildren(said);
  };
  try {
    if (!(await currentToken(form))) return failed({ detail: SIGNED_OUT });
    const headers = { "Content-Type": "application/json", "X-CSRF-Token": form.elements.csrf_token.value };
    const answer = await fetch("/generate", { method: "POST", headers, body: JSON.stringify(body), signal: own.signal });
    if (!answer.ok) return failed(await answer.json());
    for await (const [name, data] of told(answer.body)) {
      if (name === "token") $(`#said-${data.view}`).textContent += data.text;
      if (name === "error") return failed(data);
      if (name === "done") $("#said-revision").textContent = `revision ${data.revision}`;
    }
    await Promise.all(["base", "live"].map((view) => mark(body.prompt, view)));
  } catch (error) {
    if (error.name !== "AbortError") failed({ detail: "The service cannot be reached." });
  } finally {
    if (own === stream) {
      stop.hidden = true;
      answers.setAttribute("aria-busy", "false");
    }
  }
};

// The events of a stream that is answered to a POST, which EventSource cannot ask for.
async function* told(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const field = (name) => block.split("\n").find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      if (field("event")) yield [field("event"), JSON.parse(field("data"))];
    }
  }
}

// What has to be done again whenever a part of a page was replaced.
const enhance = () => {
  for (const button of $$(".copy[hidden]")) {
    if (!navigator.clipboard) break;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText($("code", button.parentElement).textContent);
      button.textContent = "Copied";
    });
  }
};

enhance();
if (document.body.dataset.signedIn === "yes") {
  listen();
  follow();
}
document.addEventListener("submit", submit);
if ($("#play")) {
  $("#play").addEventListener("submit", generate);
  $("#stop").addEventListener("click", () => stream?.abort());
}
