// Live updates, and forms without a reload. The server renders all HTML. Without JavaScript the forms still work; the lists
// update on reload.

const base = document.body.dataset.base;
const queue = document.getElementById("queue");
const clips = document.getElementById("clips");
const onFirstPage = document.body.dataset.firstPage === "yes";

// ---- announcements: a polite live region for screen readers

const announcements = document.getElementById("announcements");
let announcing;

function announce(text) {
  clearTimeout(announcing);
  announcements.textContent = "";
  announcing = setTimeout(() => { announcements.textContent = text; }, 100); // emptied first, so that equal texts are read again
}

const STATE_NAMES = { in_progress: "in progress", completed: "completed", failed: "failed", cancelled: "cancelled" };

// ---- cards

function parseCard(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  const card = template.content.firstElementChild;
  localizeTimes(card);
  return card;
}

function localizeTimes(root) {
  for (const time of root.querySelectorAll("time"))
    time.textContent = new Date(time.dateTime).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

/** Update a job's card: in place while its state is unchanged, else with a new card, in the other list when the job has ended. */
function show(job) {
  const old = document.getElementById(job.id);
  if (old && job.version < old.dataset.version) return; // the event stream was faster than this response
  if (old?.dataset.state === job.state) {
    if (job.live === null) return;
    old.dataset.version = job.version;
    old.querySelector("progress").value = job.percent;
    old.querySelector(".live").innerHTML = job.live;
    return;
  }
  const card = parseCard(job.card);
  const hadFocus = old?.contains(document.activeElement);
  if (job.live === null) {
    old?.remove();
    if (onFirstPage) clips.prepend(card);
  } else if (old) old.replaceWith(card);
  else queue.append(card);
  if (hadFocus) (card.isConnected ? card.querySelector("h3") : document.getElementById("queue-heading")).focus({ preventScroll: true });
  if (old && STATE_NAMES[job.state]) announce(`${card.dataset.title}: ${STATE_NAMES[job.state]}`);
}

function remove(id) {
  const card = document.getElementById(id);
  if (!card) return;
  const list = card.parentElement;
  const next = card.nextElementSibling ?? card.previousElementSibling;
  const hadFocus = card.contains(document.activeElement);
  card.remove();
  if (hadFocus) (next?.querySelector("h3") ?? list.closest("section").querySelector("h2")).focus({ preventScroll: true });
}

// ---- event stream, reconnected from the last cursor when it breaks

const connection = document.getElementById("connection");
const MIN_RETRY_MS = 500, MAX_RETRY_MS = 10000;
let cursor = document.body.dataset.cursor;
let retryMs = MIN_RETRY_MS;

function connect() {
  const stream = new EventSource(`${base}/events?since=${encodeURIComponent(cursor)}`);
  stream.addEventListener("open", () => {
    retryMs = MIN_RETRY_MS;
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
    // One failure is normal, e.g. when a replica stops. The second one in a row is shown.
    if (retryMs > MIN_RETRY_MS && connection.hidden) {
      connection.textContent = "The server cannot be reached. Accepted jobs are kept. Reconnecting.";
      connection.hidden = false;
    }
    setTimeout(connect, retryMs);
    retryMs = Math.min(retryMs * 1.7, MAX_RETRY_MS);
  });
}

// ---- forms

async function send(form) {
  const response = await fetch(form.action, { method: "POST", body: new FormData(form), headers: { Accept: "application/json" } });
  if (response.status === 401) location.assign(`${base}/sign-in`);
  return response.json();
}

function showErrors(form, { message, errors }) {
  for (const control of form.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
  for (const text of form.querySelectorAll(".error")) { text.textContent = ""; text.hidden = true; }
  const summary = document.getElementById("form-error");
  summary.firstElementChild.textContent = message ?? "";
  summary.hidden = !message;
  let first = null;
  for (const [name, message] of Object.entries(errors ?? {})) {
    const text = document.getElementById(`${name}-error`);
    text.textContent = message;
    text.hidden = false;
    const field = form.elements[name];
    const control = field instanceof RadioNodeList ? field[0] : field;
    control.setAttribute("aria-invalid", "true");
    const details = control.closest("details");
    if (details) details.open = true;
    first ??= control;
  }
  first?.focus();
}

const UNREACHABLE = "The server cannot be reached. The request was not sent. Try again later.";

// aria-disabled instead of disabled, which would lose the focus.
const setBusy = (button, busy) => button.setAttribute("aria-disabled", busy);
const isBusy = (button) => button.getAttribute("aria-disabled") === "true";

async function create(form, button) {
  try {
    const result = await send(form);
    showErrors(form, result.job ? {} : result);
    if (!result.job) return;
    form.elements.submission_id.value = result.submission_id;
    if (result.character) selectCharacter(form, result.character);
    show(result.job);
    const card = document.getElementById(result.job.id);
    if (!card) return announce("Clip completed");
    announce(`${card.dataset.title}: queued`);
    card.scrollIntoView({ block: "nearest", behavior: "smooth" });
  } catch {
    showErrors(form, { message: UNREACHABLE });
  } finally {
    setBusy(button, false);
  }
}

/** Select a character that was just saved, in place of its photos. */
function selectCharacter(form, { id, name }) {
  const select = form.elements.character;
  if (![...select.options].some((option) => option.value === id)) select.add(new Option(name, id));
  select.value = id;
  select.parentElement.hidden = false;
  form.elements.save_as.value = form.elements.photo.value = "";
  form.elements.photo.dispatchEvent(new Event("change"));
}

async function cancelOrDelete(form, button) {
  const card = form.closest(".card");
  try {
    const result = await send(form);
    if (result.deleted) {
      remove(card.id);
      announce(`${card.dataset.title}: deleted`);
    } else if (result.job) {
      button.firstChild.data = "Cancelling";
      show(result.job);
      return;
    } else announce(result.message);
  } catch {
    announce(UNREACHABLE);
  }
  setBusy(button, false);
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.id !== "create" && !form.dataset.action) return;
  event.preventDefault();
  const button = form.querySelector("[type=submit]");
  if (isBusy(button)) return;
  setBusy(button, true);
  form.id === "create" ? create(form, button) : cancelOrDelete(form, button);
});

// ---- form: previews of photos, duration of the clip

const createForm = document.getElementById("create");
const previews = document.getElementById("previews");

createForm.elements.photo?.addEventListener("change", () => {
  for (const image of previews.children) URL.revokeObjectURL(image.src);
  previews.replaceChildren(...[...createForm.elements.photo.files].map((file) => {
    const image = new Image();
    image.src = URL.createObjectURL(file);
    image.alt = file.name;
    return image;
  }));
  previews.hidden = !previews.childElementCount;
});

function showDuration() {
  const frames = createForm.elements.num_frames.valueAsNumber, fps = createForm.elements.fps.valueAsNumber;
  const seconds = frames / fps;
  createForm.elements.duration.textContent = Number.isFinite(seconds) ? `Duration: ${seconds.toFixed(1).replace(".0", "")} s` : "";
}
createForm.addEventListener("input", showDuration);
showDuration();

localizeTimes(document);
connect();
