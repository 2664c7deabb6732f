// Job cards: replace, move and remove them; previews of running jobs, elapsed times, and the place in the queue.

import { announce, base, byId, parseHtml, request } from "./common.js";

const queue = byId("queue");
const STATE_NAMES = { in_progress: "in progress", completed: "completed", failed: "failed", cancelled: "cancelled" };

/** Update a job's card: in place while its state is unchanged, else with a new card, in the other list when the job has ended. */
export function show(job) {
  const old = byId(job.id);
  if (old && job.version < old.dataset.version) return; // the event stream was faster than this response
  if (old?.dataset.state === job.state) {
    if (job.live === null) return;
    old.dataset.version = job.version;
    old.querySelector("progress").value = job.percent;
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
  refreshQueue(200);
}

export function remove(id) {
  const card = byId(id);
  if (!card) return;
  const next = card.nextElementSibling ?? card.previousElementSibling;
  const hadFocus = card.contains(document.activeElement);
  card.remove();
  if (hadFocus) (next?.querySelector("h3") ?? byId("gallery-heading")).focus({ preventScroll: true });
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
  for (const text of document.querySelectorAll(".elapsed")) {
    const seconds = Math.max(0, Math.floor(Date.now() / 1000 + clockOffset - text.dataset.since));
    text.textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")} elapsed`;
  }
}

// ---- place in the queue and time left: they change without an event

const QUEUE_MS = 3000;
let refreshing;

function refreshQueue(delay = QUEUE_MS) {
  clearTimeout(refreshing);
  if (queue.childElementCount) refreshing = setTimeout(loadQueue, document.hidden ? 5 * delay : delay);
}

async function loadQueue() {
  try {
    for (const job of (await request(`${base}/queue`)).jobs) {
      show(job);
      const estimate = byId(job.id)?.querySelector(".estimate");
      if (estimate) estimate.textContent = job.estimate;
    }
  } catch { /* the event stream reports that the server is away */ }
  refreshQueue();
}

export function startCards() {
  for (const card of queue.children) showPreview(card, card.dataset.preview);
  showElapsed();
  setInterval(showElapsed, 1000);
  refreshQueue(0);
}
