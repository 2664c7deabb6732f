// Deletion of clips with undo: cards disappear at once, the requests are sent after a pause, or when the page is left.

import { announce, base, byId, reasonOf, request } from "./common.js";

const UNDO_MS = 8000;
const toast = byId("toast"), undo = byId("undo");
/** Cards that are deleted and can be brought back: id -> card and the comment in its place. */
let pending = new Map();
let timer, after;

const urlOf = (id) => `${base}/v1/videos/${id}`;

/** Hide cards and delete their jobs soon. Earlier ones are deleted now. `text`: what the message says. */
export function deleteCards(cards, text) {
  sendPending();
  const last = cards.at(-1);
  after = [last.nextElementSibling, last.previousElementSibling].find((each) => each && !cards.includes(each));
  for (const card of cards) {
    const place = document.createComment("");
    card.replaceWith(place);
    pending.set(card.id, { card, place });
  }
  byId("toast-text").textContent = text;
  toast.hidden = false;
  undo.focus({ preventScroll: true });
  timer = setTimeout(sendPending, UNDO_MS);
}

/** Take cards that are being deleted out of a part of the page that was loaded again. */
export function hidePending() {
  for (const id of pending.keys()) byId(id)?.remove();
}

/** Forget a card whose job was deleted elsewhere: it cannot be brought back. */
export function forget(id) {
  if (pending.delete(id) && !pending.size) hideToast();
}

function hideToast() {
  clearTimeout(timer);
  if (toast.contains(document.activeElement)) focusNext();
  toast.hidden = true;
}

const focusNext = () => ((after?.isConnected && after.querySelector("h3")) || byId("gallery-heading")).focus({ preventScroll: true });

/** Show a card again, where it was. */
function restore({ card, place }) {
  if (byId(card.id)) return;
  if (place.isConnected) place.replaceWith(card);
  else byId("clips").prepend(card);
}

async function sendPending() {
  const sent = pending;
  pending = new Map();
  hideToast();
  for (const [id, entry] of sent) {
    try {
      await request(urlOf(id), { method: "DELETE" });
      entry.place.remove();
    } catch (error) {
      restore(entry);
      announce(reasonOf(error));
    }
  }
}

function undoDeletion() {
  const entries = [...pending.values()];
  pending = new Map();
  hideToast();
  entries.forEach(restore);
  entries[0]?.card.querySelector("h3")?.focus({ preventScroll: true });
  announce("Not deleted");
}

undo.addEventListener("click", undoDeletion);
// The answer cannot be waited for.
addEventListener("pagehide", () => {
  for (const id of pending.keys()) fetch(urlOf(id), { method: "DELETE", keepalive: true });
  pending = new Map();
});
