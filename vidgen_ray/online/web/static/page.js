// Live updates, cancellation and deletion. The page sends the requests of the API's clients; the server renders the HTML of cards.

import { remove, show, startCards } from "./cards.js";
import { announce, base, byId, isBusy, localizeTimes, reasonOf, request, setBusy } from "./common.js";
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

async function cancelOrDelete(button) {
  const card = button.closest(".card"), url = `${base}/v1/videos/${card.id}`;
  setBusy(button, true);
  try {
    if ("cancel" in button.dataset) {
      await request(`${url}/cancel`, { method: "POST" });
      button.firstChild.data = "Cancelling";
    } else {
      await request(url, { method: "DELETE" });
      remove(card.id);
      announce(`${card.dataset.title}: deleted`);
    }
  } catch (error) {
    announce(reasonOf(error));
    setBusy(button, false);
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-cancel], [data-delete]");
  if (button && !isBusy(button)) cancelOrDelete(button);
});

localizeTimes(document);
startForm();
startCards();
connect();
