// Cards of jobs and rows of batches: replace, move and remove them; previews, elapsed times, places in the queue, and the budget.

import { announce, base, byId, narrow, parseHtml, request } from "./common.js";

const queue = byId("queue"), batches = byId("batches"), queueFold = byId("queue-fold");
const STATE_NAMES = { in_progress: "in progress", completed: "completed", failed: "failed", cancelled: "cancelled" };

/** Update a job's card: in place while its state is unchanged, else with a new card, in the other list when the job has ended. */
export function show(job) {
  const old = byId(job.id);
  if (old && job.version < old.dataset.version) return; // the event stream was faster than this response
  if (old?.dataset.state === job.state) {
    if (job.live === null) return;
    old.dataset.version = job.version;
    old.querySelector("progress").value = job.percent;
    old.classList.toggle("compact", !job.has_begun);
    old.querySelector(".elapsed")?.toggleAttribute("hidden", !job.has_begun);
    old.querySelector(".live").innerHTML = job.live;
    showElapsed();
    showPreview(old, job.preview);
    return;
  }
  if (!job.card) return;
  const card = parseHtml(job.card).firstElementChild;
  const hadFocus = old?.contains(document.activeElement);
  if (job.live === null) {
    old?.remove();
    const clips = byId("clips");
    if (clips.dataset.live === "yes") clips.prepend(card);
  } else if (old) old.replaceWith(card);
  else queue.append(card);
  if (hadFocus) (card.isConnected ? card.querySelector("h3") : byId("gallery-heading")).focus({ preventScroll: true });
  if (old && STATE_NAMES[job.state]) announce(`${card.dataset.title}: ${STATE_NAMES[job.state]}`);
  card.dispatchEvent(new CustomEvent("card-added", { bubbles: true }));
  showElapsed();
  showPreview(card, job.preview);
  showCounts();
  refreshQueue(SOON_MS);
}

/** Show how much the queue has, also while it is folded. */
function showCounts() {
  const waiting = queue.querySelectorAll(".compact").length, running = queue.childElementCount - waiting;
  const open = batches.querySelectorAll("[data-open]").length;
  const parts = [[running, "running"], [waiting, "waiting"], [open, open === 1 ? "batch" : "batches"]];
  byId("queue-counts").textContent = parts.filter(([number]) => number).map(([number, name]) => `${number} ${name}`).join(", ");
}

// ---- batches

/** Show these batches and no others. */
function showBatches(rows) {
  for (const item of [...batches.children]) if (!rows.some((row) => row.id === item.id)) item.remove();
  rows.forEach((row, place) => {
    const old = byId(row.id);
    if (old?.dataset.state === row.state) {
      old.querySelector(".status").textContent = row.status;
      old.querySelector("progress")?.setAttribute("value", row.percent);
      return;
    }
    const item = parseHtml(row.html).firstElementChild;
    const hadFocus = old?.contains(document.activeElement);
    old?.remove();
    batches.insertBefore(item, batches.children[place] ?? null);
    if (hadFocus) item.querySelector("h3").focus({ preventScroll: true });
    if (old && "open" in old.dataset && !("open" in item.dataset)) announce(`${item.dataset.title}: ${row.status}`);
  });
}

/** Remove a card of a job that was deleted, here or elsewhere. */
export function remove(id) {
  const card = byId(id);
  if (!card) return;
  const next = card.nextElementSibling ?? card.previousElementSibling;
  const hadFocus = card.contains(document.activeElement);
  card.remove();
  if (hadFocus) (next?.querySelector("h3") ?? byId("gallery-heading")).focus({ preventScroll: true });
  showCounts();
}

// ---- preview of a running job: the newest result of its finished stages

async function showPreview(card, stage) {
  const box = card.querySelector(".preview");
  if (!box || !stage || box.dataset.stage === stage) return;
  box.dataset.stage = stage;
  try {
    const response = await fetch(box.dataset.src);
    if (response.status !== 200) throw new Error(response.status);
    const image = new Image();
    image.alt = `Preview of ${card.dataset.title}`;
    image.src = URL.createObjectURL(await response.blob());
    await image.decode();
    for (const before of box.children) URL.revokeObjectURL(before.src);
    box.replaceChildren(image);
    box.hidden = false;
  } catch {
    delete box.dataset.stage; // the next update tries again
  }
}

// ---- elapsed time, by the clock of the server

const clockOffset = document.body.dataset.now - Date.now() / 1000;

function showElapsed() {
  for (const text of document.querySelectorAll(".elapsed:not([hidden])")) {
    const seconds = Math.max(0, Math.floor(Date.now() / 1000 + clockOffset - text.dataset.since));
    text.textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")} elapsed`;
  }
}

// ---- place in the queue and time left: they change without an event

const QUEUE_MS = 3000, SOON_MS = 200;
let refreshing, refreshAt = Infinity;

/** Load the queue after a pause, or earlier if that was asked for before. */
export function refreshQueue(delay = SOON_MS) {
  const at = Date.now() + (document.hidden ? 5 * delay : delay);
  if (at >= refreshAt) return;
  refreshAt = at;
  clearTimeout(refreshing);
  refreshing = setTimeout(loadQueue, at - Date.now());
}

async function loadQueue() {
  refreshAt = Infinity;
  try {
    const { jobs, batches: rows, budget } = await request(`${base}/queue`);
    for (const job of jobs) {
      show(job);
      const estimate = byId(job.id)?.querySelector(".estimate");
      if (estimate) estimate.textContent = job.estimate;
    }
    showBatches(rows);
    byId("budget").textContent = budget;
  } catch { /* the event stream reports that the server is away */ }
  showCounts();
  if (queue.childElementCount || batches.querySelector("[data-open]")) refreshQueue(QUEUE_MS);
}

export function startCards() {
  for (const card of queue.children) showPreview(card, card.dataset.preview);
  if (narrow.matches) queueFold.open = false;
  queueFold.dataset.ready = "";
  showCounts();
  showElapsed();
  setInterval(showElapsed, 1000);
  refreshQueue(0);
}
