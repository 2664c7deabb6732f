// Shared by all modules of the page: the base path, announcements, requests and busy buttons.

export const base = document.body.dataset.base;
export const byId = (id) => document.getElementById(id);
export const UNREACHABLE = "The server cannot be reached. The request was not sent. Try again later.";

// ---- announcements: a polite live region for screen readers

const announcements = byId("announcements");
let announcing;

export function announce(text) {
  clearTimeout(announcing);
  announcements.textContent = "";
  announcing = setTimeout(() => { announcements.textContent = text; }, 100); // emptied first, so that equal texts are read again
}

// ---- requests

/** Send a request. Returns its JSON. A signed-out browser goes to the sign-in page. */
export async function request(url, options = {}) {
  const response = await fetch(url, { ...options, headers: { Accept: "application/json" } });
  if (response.status === 401) location.assign(`${base}/sign-in`);
  return response.json();
}

/** Fetch a part of the page. Returns its root elements. */
export async function fetchHtml(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${response.status} for ${url}`);
  return parseHtml(await response.text());
}

export function parseHtml(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  localizeTimes(template.content);
  return template.content;
}

export function localizeTimes(root) {
  for (const time of root.querySelectorAll("time"))
    time.textContent = new Date(time.dateTime).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

// aria-disabled instead of disabled, which would lose the focus.
export const setBusy = (button, busy) => button.setAttribute("aria-disabled", busy);
export const isBusy = (button) => button.getAttribute("aria-disabled") === "true";

export const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
export const narrow = matchMedia("(width < 62rem)");
