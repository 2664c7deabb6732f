// The gallery: search, pages, favourites, selection, clips that play under the pointer, full view and comparison.

import { browse, closable, element, fit, playClips, reducedMotion, start, togglePlayback } from "./clips.js";
import { announce, base, byId, fetchHtml, isBusy, reasonOf, setBusy } from "./common.js";
import { deleteCards, hidePending } from "./deletion.js";

const content = byId("gallery-content");
const search = byId("search");
const selection = byId("selection");

// ---- search and pages

let loads = 0, searching;

/** Replace the gallery. Returns false if that failed, or if another page was asked for meanwhile. */
async function load(query) {
  clearTimeout(searching);
  const number = ++loads;
  try {
    const html = await fetchHtml(`${base}/clips?${query}`);
    if (number !== loads) return false;
    content.replaceChildren(html);
    hidePending();
    showFavourites();
    showSelection();
    return true;
  } catch (error) {
    announce(reasonOf(error));
    return false;
  }
}

async function runSearch() {
  favouritesButton.setAttribute("aria-pressed", false);
  const text = search.elements.q.value.trim();
  const query = new URLSearchParams(text ? { q: text } : {});
  history.replaceState(null, "", `${base}/${text ? `?${query}` : ""}`);
  if (await load(query) && text) announce(`${byId("clips").childElementCount} clips found`);
}

search.addEventListener("submit", (event) => { event.preventDefault(); runSearch(); });
search.addEventListener("input", () => { clearTimeout(searching); searching = setTimeout(runSearch, 250); });

async function openPage(link) {
  const query = new URL(link.href).searchParams;
  if (!query.has("q")) search.elements.q.value = "";
  if (!await load(query)) return;
  history.replaceState(null, "", link.href);
  byId("gallery-heading").focus({ preventScroll: true });
  byId("gallery").scrollIntoView({ block: "start" });
}

// ---- favourites: kept in this browser

const favouritesButton = byId("favourites");
const STORAGE = `vidgen-favourites${base}`;
const favourites = () => JSON.parse(localStorage.getItem(STORAGE) ?? "[]");

function showFavourites() {
  const ids = new Set(favourites());
  for (const star of document.querySelectorAll(".star")) star.setAttribute("aria-pressed", ids.has(star.closest(".card").id));
}

function toggleFavourite(star) {
  const id = star.closest(".card").id;
  const others = favourites().filter((each) => each !== id);
  localStorage.setItem(STORAGE, JSON.stringify(star.getAttribute("aria-pressed") === "true" ? others : [id, ...others].slice(0, 100)));
  showFavourites();
}

async function toggleFavouritesPage() {
  const on = favouritesButton.getAttribute("aria-pressed") !== "true";
  favouritesButton.setAttribute("aria-pressed", on);
  search.elements.q.value = "";
  const query = new URLSearchParams([["favourites", ""], ...favourites().map((id) => ["id", id])]);
  await load(on ? query : "");
}

// ---- selection, bulk download and bulk deletion

const selectedCards = () => [...content.querySelectorAll(".pick:checked")].map((box) => box.closest(".card"));

function showSelection() {
  const cards = selectedCards(), clips = cards.filter((card) => card.dataset.state === "completed");
  byId("selected-count").textContent = `${cards.length} selected`;
  setBusy(byId("compare-selected"), cards.length !== 2 || clips.length !== 2);
  setBusy(selection.querySelector("[type=submit]"), !clips.length);
}

content.addEventListener("change", (event) => { if (event.target.matches(".pick")) showSelection(); });
new MutationObserver(showSelection).observe(content, { childList: true, subtree: true });

function clearSelection() {
  for (const box of content.querySelectorAll(".pick:checked")) box.checked = false;
  showSelection();
  byId("gallery-heading").focus({ preventScroll: true });
}

function deleteSelected() {
  const cards = selectedCards();
  for (const card of cards) card.querySelector(".pick").checked = false;
  deleteCards(cards, `Deleted: ${cards.length === 1 ? cards[0].dataset.title : `${cards.length} clips`}`);
}

selection.addEventListener("submit", (event) => { if (isBusy(event.submitter)) event.preventDefault(); });

// ---- full view

const viewer = byId("viewer");
let current = null;

/** Return a player or an image of a card's file. */
function mediaOf(card, options) {
  const link = card.querySelector(".open"), clip = link.querySelector("video");
  const media = element(clip ? "video" : "img", { src: link.href });
  if (clip) Object.assign(media, { autoplay: !reducedMotion.matches, loop: true, muted: true, playsInline: true, poster: clip.poster, ...options });
  media.setAttribute(clip ? "aria-label" : "alt", card.dataset.title);
  return media;
}

const badge = () => element("span", { class: "badge" }, "AI-generated");
const openCards = () => [...content.querySelectorAll(".card:has(.open)")];

function openViewer(card) {
  current = card.id;
  byId("viewer-title").textContent = card.dataset.title;
  byId("viewer-facts").replaceChildren(...card.querySelector(".facts").cloneNode(true).children);
  const media = mediaOf(card, { controls: true }), { width, height } = card.querySelector(".open").firstElementChild.attributes;
  fit(media, width.value / height.value, "(100dvh - 13rem)");
  viewer.querySelector(".stage").replaceChildren(media, badge());
  const cards = openCards(), place = cards.indexOf(card);
  for (const button of viewer.querySelectorAll("[data-step]")) setBusy(button, !cards[place + +button.dataset.step]);
  if (!viewer.open) viewer.showModal();
  byId("viewer-title").focus();
}

function step(by) {
  const cards = openCards(), place = cards.findIndex((card) => card.id === current);
  if (place >= 0 && cards[place + by]) openViewer(cards[place + by]);
}

browse(viewer, step);
viewer.addEventListener("close", () => {
  viewer.querySelector(".stage").replaceChildren();
  byId(current)?.querySelector(".open")?.focus();
});

// ---- comparison

const compare = byId("compare");
const comparePlay = byId("compare-play");
const settingsOf = (card) => new Map([...card.querySelectorAll("dl > div")].map((row) => [row.children[0].textContent, row.children[1].textContent.trim()]));

function openComparison() {
  const cards = selectedCards(), [left, right] = cards.map(settingsOf);
  left.set("Prompt", cards[0].dataset.title);
  right.set("Prompt", cards[1].dataset.title);
  compare.querySelector(".sides").replaceChildren(...cards.map((card) =>
    element("figure", {}, mediaOf(card, { autoplay: false }), badge(), element("figcaption", {}, card.dataset.title))));
  const names = [...new Set([...left.keys(), ...right.keys()])].filter((name) => left.get(name) !== right.get(name) && name !== "ID");
  compare.querySelector("tbody").replaceChildren(...names.map((name) =>
    element("tr", {}, element("th", { scope: "row" }, name), ...[left, right].map((values) => element("td", {}, values.get(name) ?? "–")))));
  const videos = [...compare.querySelectorAll("video")];
  comparePlay.hidden = !videos.length;
  videos[0]?.addEventListener("play", () => { comparePlay.textContent = "Pause"; });
  videos[0]?.addEventListener("pause", () => { comparePlay.textContent = "Play"; });
  // Both start again together, so that they stay in step.
  for (const video of videos) video.loop = false;
  for (const video of videos) video.addEventListener("ended", () => {
    if (videos.every((each) => each.ended)) for (const each of videos) { each.currentTime = 0; start(each); }
  });
  compare.showModal();
  byId("compare-title").focus();
  if (reducedMotion.matches) comparePlay.textContent = "Play";
  else togglePlayback(videos);
}

comparePlay.addEventListener("click", () => togglePlayback(compare.querySelectorAll("video")));
compare.addEventListener("close", () => { compare.querySelector(".sides").replaceChildren(); byId("compare-selected").focus(); });

for (const dialog of [viewer, compare]) closable(dialog);
playClips(content);

document.addEventListener("click", (event) => {
  const target = event.target.closest("button, a");
  if (!target || isBusy(target)) return;
  if (target === favouritesButton) toggleFavouritesPage();
  else if (target.matches(".star")) toggleFavourite(target);
  else if (target.id === "clear-selection") clearSelection();
  else if (target.id === "delete-selected") deleteSelected();
  else if (target.id === "compare-selected") openComparison();
  else if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  else if (target.matches(".open")) { event.preventDefault(); openViewer(target.closest(".card")); }
  else if ("page" in target.dataset) { event.preventDefault(); openPage(target); }
});

document.addEventListener("card-added", showFavourites);
showFavourites();
showSelection();
