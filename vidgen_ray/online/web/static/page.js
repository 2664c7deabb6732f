// Live updates, cancellation and deletion. The page sends the requests of the API's clients; the server renders the HTML of cards.

import { refreshQueue, remove, show, startCards } from "./cards.js";
import { announce, base, byId, isBusy, localizeTimes, reasonOf, request, setBusy } from "./common.js";
import { deleteCards, forget } from "./deletion.js";
import { startForm } from "./form.js";
import "./gallery.js";

// ---- event stream, reconnected from the last cursor when it breaks

const connection = byId("connection");
const MIN_RETRY_MS = 500, MAX_RETRY_MS = 10000;
/** Time without a connection after which the page says so. One failure is normal, e.g. when a replica stops. */
const AWAY_MS = 1500;
/** Pause between two looks at the batches while their lines change all the time. */
const LINES_MS = 1000;
let cursor = document.body.dataset.cursor;
let retryMs = MIN_RETRY_MS, awayTimer;

/** Say that the server is away, unless the stream opens in time. A process that has stopped may leave connections unanswered. */
function expectConnection() {
  awayTimer ??= setTimeout(() => {
    connection.textContent = navigator.onLine
      ? "The server cannot be reached. Accepted jobs are kept. Reconnecting."
      : "This device is offline. Accepted jobs are kept.";
    connection.hidden = false;
  }, AWAY_MS);
}

function connect() {
  expectConnection();
  const stream = new EventSource(`${base}/events?since=${encodeURIComponent(cursor)}`);
  stream.addEventListener("open", () => {
    clearTimeout(awayTimer);
    awayTimer = undefined;
    retryMs = MIN_RETRY_MS;
    connection.hidden = true;
    refreshQueue();
  });
  stream.addEventListener("changes", (event) => {
    const { jobs, deleted, has_lines: hasLines } = JSON.parse(event.data);
    cursor = event.lastEventId;
    jobs.forEach(show);
    deleted.forEach(forget);
    deleted.forEach(remove);
    if (hasLines) refreshQueue(LINES_MS);
  });
  stream.addEventListener("signed-out", () => { stream.close(); location.assign(`${base}/sign-in`); });
  stream.addEventListener("error", () => {
    stream.close();
    expectConnection();
    setTimeout(connect, retryMs);
    retryMs = Math.min(retryMs * 1.7, MAX_RETRY_MS);
  });
}

// ---- cancel a job or a batch, delete a clip

async function cancel(button, url) {
  setBusy(button, true);
  try {
    await request(`${url}/cancel`, { method: "POST" });
    if ("cancel" in button.dataset) button.firstChild.data = "Cancelling";
    refreshQueue();
  } catch (error) {
    announce(reasonOf(error));
    setBusy(button, false);
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-cancel], [data-cancel-batch], [data-delete]");
  if (!button || isBusy(button)) return;
  const card = button.closest(".card");
  if ("delete" in button.dataset) deleteCards([card], `Deleted: ${card.dataset.title}`);
  else cancel(button, `${base}/v1/${"cancel" in button.dataset ? "videos" : "batches"}/${card.id}`);
});

localizeTimes(document);
startForm();
startCards();
connect();
