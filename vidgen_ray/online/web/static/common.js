// Shared by all modules of the page: the base path, announcements, requests and busy buttons.

export const base = document.body.dataset.base;
export const byId = (id) => document.getElementById(id);

// ---- announcements: a polite live region for screen readers

const announcements = byId("announcements");
let announcing;

export function announce(text) {
  clearTimeout(announcing);
  announcements.textContent = "";
  announcing = setTimeout(() => { announcements.textContent = text; }, 100); // emptied first, so that equal texts are read again
}

// ---- requests

/** Refused request: why, and the field of the request that caused it. */
class Refused extends Error {
  constructor(response, { message, param }) {
    const text = message.startsWith(`${param}: `) ? message.slice(param.length + 2) : message;
    const wait = response.headers.get("Retry-After");
    super(`${text[0].toUpperCase()}${text.slice(1)}${text.endsWith(".") ? "" : "."}${wait ? ` Try again in ${wait} s.` : ""}`);
    this.param = param;
  }
}

/** Send a request. Returns its JSON. Throws Refused. A signed-out browser goes to the sign-in page. */
export async function request(url, options = {}) {
  const response = await fetch(url, { ...options, headers: { Accept: "application/json", ...options.headers } });
  if (response.status === 401) location.assign(`${base}/sign-in`);
  const content = await response.json();
  if (!response.ok) throw new Refused(response, content.error ?? content);
  return content;
}

/** Return why a request failed, as a sentence. A request without an answer may have arrived. */
export function reasonOf(error) {
  if (error instanceof Refused) return error.message;
  return navigator.onLine ? "The server cannot be reached. It may have received the request; sending it again does not repeat it."
    : "This device is offline. The request was not sent.";
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

export const narrow = matchMedia("(width < 62rem)");
