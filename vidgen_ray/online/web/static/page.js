// Live updates and forms without a reload. Everything here also works without this file, only less smoothly: the server
// writes all of the markup, the script puts it where it belongs.

const base = document.body.dataset.base;
const queue = document.getElementById("queue");
const clips = document.getElementById("clips");
const onFirstPage = document.body.dataset.firstPage === "yes";

// ---- telling: one polite region, so that a screen reader hears what changes while focus is elsewhere

const news = document.getElementById("news");
let telling;

function tell(text) {
  clearTimeout(telling);
  news.textContent = "";
  telling = setTimeout(() => { news.textContent = text; }, 100); // a region that is emptied first is read again
}

const TOLD = { in_progress: "being made", completed: "is done", failed: "has failed", cancelled: "was cancelled" };

// ---- cards

function parsed(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  const card = template.content.firstElementChild;
  localise(card);
  return card;
}

function localise(root) {
  for (const time of root.querySelectorAll("time"))
    time.textContent = new Date(time.dateTime).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

/** Brings one job up to date: in place while its state stays, as a new card in the other list when it ends. */
function show(job) {
  const old = document.getElementById(job.id);
  if (old && job.version < old.dataset.version) return; // an answer that the stream has overtaken
  if (old?.dataset.state === job.state) {
    if (job.live === null) return;
    old.dataset.version = job.version;
    old.querySelector("progress").value = job.percent;
    old.querySelector(".live").innerHTML = job.live;
    return;
  }
  const card = parsed(job.card);
  const focused = old?.contains(document.activeElement);
  if (job.live === null) {
    old?.remove();
    if (onFirstPage) clips.prepend(card);
  } else if (old) old.replaceWith(card);
  else queue.append(card);
  if (focused) (card.isConnected ? card.querySelector("h3") : document.getElementById("queue-heading")).focus({ preventScroll: true });
  if (old && TOLD[job.state]) tell(`${card.dataset.title}: ${TOLD[job.state]}`);
}

function remove(id) {
  const card = document.getElementById(id);
  if (!card) return;
  const list = card.parentElement;
  const next = card.nextElementSibling ?? card.previousElementSibling;
  const focused = card.contains(document.activeElement);
  card.remove();
  if (focused) (next?.querySelector("h3") ?? list.closest("section").querySelector("h2")).focus({ preventScroll: true });
}

// ---- the stream: a new one whenever it breaks, from the place where the last one ended

const connection = document.getElementById("connection");
const FIRST_WAIT_MS = 500, LONGEST_WAIT_MS = 10000;
let cursor = document.body.dataset.cursor;
let waitMs = FIRST_WAIT_MS;

function listen() {
  const stream = new EventSource(`${base}/events?since=${encodeURIComponent(cursor)}`);
  stream.addEventListener("open", () => {
    waitMs = FIRST_WAIT_MS;
    connection.hidden = true;
  });
  stream.addEventListener("changes", (event) => {
    const { jobs, deleted } = JSON.parse(event.data);
    cursor = event.lastEventId;
    jobs.forEach(show);
    deleted.forEach(remove);
  });
  stream.addEventListener("signed-out", () => { stream.close(); location.assign(`${base}/sign-in`); });
  stream.addEventListener("error", () => {
    stream.close();
    // A stream may end for a good reason, as when one of several servers goes; only the second failure in a row is told.
    if (waitMs > FIRST_WAIT_MS && connection.hidden) {
      connection.textContent = "The server cannot be reached. What it accepted is kept; this page goes on by itself.";
      connection.hidden = false;
    }
    setTimeout(listen, waitMs);
    waitMs = Math.min(waitMs * 1.7, LONGEST_WAIT_MS);
  });
}

// ---- forms

async function send(form) {
  const answer = await fetch(form.action, { method: "POST", body: new FormData(form), headers: { Accept: "application/json" } });
  if (answer.status === 401) location.assign(`${base}/sign-in`);
  return answer.json();
}

function showErrors(form, { message, errors }) {
  for (const shown of form.querySelectorAll("[aria-invalid]")) shown.removeAttribute("aria-invalid");
  for (const place of form.querySelectorAll(".error")) { place.textContent = ""; place.hidden = true; }
  const summary = document.getElementById("form-error");
  summary.firstElementChild.textContent = message ?? "";
  summary.hidden = !message;
  let first = null;
  for (const [name, text] of Object.entries(errors ?? {})) {
    const place = document.getElementById(`${name}-error`);
    place.textContent = text;
    place.hidden = false;
    const field = form.elements[name];
    const control = field instanceof RadioNodeList ? field[0] : field;
    control.setAttribute("aria-invalid", "true");
    const folded = control.closest("details");
    if (folded) folded.open = true;
    first ??= control;
  }
  first?.focus();
}

const UNREACHABLE = "The server cannot be reached. Nothing was sent; try again in a moment.";

// A button at work keeps the focus, which a disabled one would lose.
const setBusy = (button, busy) => button.setAttribute("aria-disabled", busy);
const isBusy = (button) => button.getAttribute("aria-disabled") === "true";

async function create(form, button) {
  try {
    const answer = await send(form);
    showErrors(form, answer.job ? {} : answer);
    if (!answer.job) return;
    form.elements.once.value = answer.once;
    if (answer.character) choose(form, answer.character);
    show(answer.job);
    const card = document.getElementById(answer.job.id);
    if (!card) return tell("The clip is done");
    tell(`${card.dataset.title}: accepted`);
    card.scrollIntoView({ block: "nearest", behavior: "smooth" });
  } catch {
    showErrors(form, { message: UNREACHABLE });
  } finally {
    setBusy(button, false);
  }
}

/** A person who was saved just now takes the place of the photos. */
function choose(form, { id, name }) {
  const select = form.elements.character;
  if (![...select.options].some((option) => option.value === id)) select.add(new Option(name, id));
  select.value = id;
  select.parentElement.hidden = false;
  form.elements.save_as.value = form.elements.photo.value = "";
  form.elements.photo.dispatchEvent(new Event("change"));
}

async function act(form, button) {
  const card = form.closest(".card");
  try {
    const answer = await send(form);
    if (answer.deleted) {
      remove(card.id);
      tell(`${card.dataset.title}: deleted`);
    } else if (answer.job) {
      button.firstChild.data = "Stopping";
      show(answer.job);
      return;
    } else tell(answer.message);
  } catch {
    tell(UNREACHABLE);
  }
  setBusy(button, false);
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.id !== "make" && !form.dataset.action) return;
  event.preventDefault();
  const button = form.querySelector("[type=submit]");
  if (isBusy(button)) return;
  setBusy(button, true);
  form.id === "make" ? create(form, button) : act(form, button);
});

// ---- small helps in the form

const make = document.getElementById("make");
const previews = document.getElementById("previews");

make.elements.photo?.addEventListener("change", () => {
  for (const image of previews.children) URL.revokeObjectURL(image.src);
  previews.replaceChildren(...[...make.elements.photo.files].map((file) => {
    const image = new Image();
    image.src = URL.createObjectURL(file);
    image.alt = file.name;
    return image;
  }));
  previews.hidden = !previews.childElementCount;
});

function tellDuration() {
  const frames = make.elements.num_frames.valueAsNumber, fps = make.elements.fps.valueAsNumber;
  const seconds = frames / fps;
  make.elements.duration.textContent = Number.isFinite(seconds) ? `A clip of ${seconds.toFixed(1).replace(".0", "")} s` : "";
}
make.addEventListener("input", tellDuration);
tellDuration();

localise(document);
listen();
