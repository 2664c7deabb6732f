// Live updates, and forms without a reload. The server renders the HTML of forms and cards. Without JavaScript the forms still
// work; the lists update on reload.

import { remove, show, startCards } from "./cards.js";
import { announce, base, byId, isBusy, localizeTimes, request, setBusy, UNREACHABLE } from "./common.js";
import { startForm } from "./form.js";
import "./gallery.js";

// ---- event stream, reconnected from the last cursor when it breaks

const connection = byId("connection");
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

// ---- cancel and delete one clip

async function cancelOrDelete(form, button) {
  setBusy(button, true);
  const card = form.closest(".card");
  try {
    const result = await request(form.action, { method: "POST", body: new FormData(form) });
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
  if (!form.dataset.action) return;
  event.preventDefault();
  const button = form.querySelector("[type=submit]");
  if (!isBusy(button)) cancelOrDelete(form, button);
});

localizeTimes(document);
startForm();
startCards();
connect();
