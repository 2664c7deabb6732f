// The form: submit without a reload, images that are stored when chosen, dropped or pasted, LoRA rows, seed, duration.

import { show } from "./cards.js";
import { announce, base, byId, fetchHtml, isBusy, narrow, parseHtml, request, setBusy, UNREACHABLE } from "./common.js";

const area = document.querySelector(".create-area");
const IMAGE_KINDS = ["image/jpeg", "image/png", "image/webp"];
let uploads = [];
let form;

// ---- submit

function showErrors({ message, errors }) {
  for (const control of form.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
  for (const text of form.querySelectorAll(".error")) { text.textContent = ""; text.hidden = true; }
  const summary = byId("form-error");
  summary.firstElementChild.textContent = message ?? "";
  summary.hidden = !message;
  if (message) summary.scrollIntoView({ block: "nearest" });
  let first = null;
  for (const [name, message] of Object.entries(errors ?? {})) first ??= showError(name, message);
  first?.focus();
}

/** Show the error of a control. Returns the control. */
function showError(name, message) {
  const text = byId(`${name}-error`);
  text.textContent = message;
  text.hidden = false;
  const field = form.elements[name];
  const control = field instanceof RadioNodeList ? field[0] : field;
  control.setAttribute("aria-invalid", "true");
  openFolds(control);
  return control;
}

async function create(button) {
  setBusy(button, true);
  try {
    await Promise.all(uploads);
    const result = await request(form.action, { method: "POST", body: new FormData(form) });
    showErrors(result.jobs ? {} : result);
    if (!result.jobs) return;
    form.elements.submission_id.value = result.submission_id;
    if (result.character) selectCharacter(result.character);
    rememberSeed(result.seed);
    result.jobs.forEach(show);
    const card = byId(result.jobs[0].id);
    if (!card) return announce("Clip completed");
    announce(`${card.dataset.title}: queued`);
    card.scrollIntoView({ block: "nearest", behavior: "smooth" });
  } catch {
    showErrors({ message: UNREACHABLE });
  } finally {
    setBusy(button, false);
  }
}

/** Select a character that was just saved, in place of its photos. */
function selectCharacter({ id, name }) {
  const select = form.elements.character;
  if (![...select.options].some((option) => option.value === id)) select.add(new Option(name, id));
  select.value = id;
  select.parentElement.hidden = false;
  form.elements.save_as.value = "";
  byId("photo-tray").replaceChildren();
}

// ---- images: stored when they are chosen; a photo without a face is refused at once

function addImages(control, files) {
  const images = [...files].filter((file) => IMAGE_KINDS.includes(file.type));
  const input = form.elements[control];
  if (!files.length || !input) return;
  if (!images.length) return void showError(control, `${files[0].name}: choose a JPEG, PNG or WebP image.`);
  byId(`${control}-error`).hidden = true;
  input.removeAttribute("aria-invalid");
  for (const file of control === "image" ? images.slice(0, 1) : images) {
    const upload = store(control, file).finally(() => { uploads = uploads.filter((each) => each !== upload); });
    uploads.push(upload);
  }
}

async function store(control, file) {
  const tray = byId(`${control}-tray`), body = new FormData(), waiting = document.createElement("p");
  waiting.className = "hint";
  waiting.textContent = `Checking ${file.name}`;
  tray.append(waiting);
  body.append("file", file);
  try {
    const result = await request(`${base}/inputs/${control}`, { method: "POST", body });
    if (!result.html) return void showError(control, `${file.name}: ${result.message}`);
    if (control === "image") tray.replaceChildren();
    if (tray.querySelector(`[value="${result.id}"]`)) return; // the same photo again
    tray.append(parseHtml(result.html));
    openFolds(tray); // it may have been pasted or dropped
    if (control === "photo" && form.elements.character) form.elements.character.value = "";
    announce(control === "photo" ? `${file.name}: face found` : `${file.name}: start image set`);
  } catch {
    showError(control, UNREACHABLE);
  } finally {
    waiting.remove();
  }
}

/** Use the image of a clip as start image. */
async function useAsStartImage(button) {
  setBusy(button, true);
  try {
    const response = await fetch(button.dataset.startImage);
    if (!response.ok) return announce("The clip no longer exists.");
    await store("image", new File([await response.blob()], "image.png", { type: "image/png" }));
    reveal(form.elements.image);
  } catch {
    announce(UNREACHABLE);
  } finally {
    setBusy(button, false);
  }
}

const dropTarget = (element) => element?.closest?.("[data-drop]")?.dataset.drop;

document.addEventListener("paste", (event) => {
  const { files, types } = event.clipboardData;
  // Office programs add an image of the text that was copied.
  if (!files.length || (types.includes("text/plain") && event.target.matches("input, textarea"))) return;
  event.preventDefault();
  addImages(dropTarget(document.activeElement) ?? "image", files);
});
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault(); // without this, the browser would open a dropped file
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dragging");
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  addImages(dropTarget(event.target) ?? "image", event.dataTransfer.files);
});

// ---- seed: empty is random; the lock keeps the last one

function rememberSeed(seed) {
  const input = form.elements.seed;
  input.dataset.last = seed;
  input.placeholder = `Random (last: ${seed})`;
}

function setSeed(seed) {
  form.elements.seed.value = seed;
  showSeedLock();
}

function showSeedLock() {
  const locked = form.elements.seed.value !== "";
  byId("lock-seed").setAttribute("aria-pressed", locked);
  byId("lock-seed").textContent = locked ? "Locked" : "Lock";
}

function toggleSeed() {
  const input = form.elements.seed;
  setSeed(input.value === "" ? (input.dataset.last ?? crypto.getRandomValues(new Uint32Array(1))[0]) : "");
}

// ---- small parts

function showDuration() {
  if (!form.elements.num_frames) return;
  // A further pass does not repeat the last frame of the one before.
  const frames = form.elements.num_frames.valueAsNumber;
  const extend = form.elements.extend?.valueAsNumber || 0;
  const seconds = (frames + extend * (frames - 1)) / form.elements.fps.valueAsNumber;
  form.elements.duration.textContent = Number.isFinite(seconds) ? `Duration: ${seconds.toFixed(1).replace(".0", "")} s` : "";
}

/** Show the defaults of the chosen video model, unless the user has changed those of the model before. */
function showClipDefaults() {
  const model = form.elements.video_model;
  for (const input of form.querySelectorAll("[data-defaults]")) {
    const defaults = JSON.parse(input.dataset.defaults);
    if (input.value === String(defaults[model.dataset.shown])) input.value = defaults[model.value];
  }
  model.dataset.shown = model.value;
  showDuration();
}

function addLora(button) {
  const row = form.querySelector(".lora").cloneNode(true);
  row.querySelector("select").value = "";
  row.querySelector("input").value = "1";
  button.before(row);
  row.querySelector("select").focus();
}

/** Open all folds around an element. */
function openFolds(element) {
  for (let fold = element.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
}

/** Scroll the form to a control and focus it. */
function reveal(control) {
  openFolds(control);
  control.focus({ preventScroll: true });
  control.scrollIntoView({ block: "center", behavior: "smooth" });
}

/** Replace the form by one that the server has filled in: with an example prompt, or like an existing clip. */
async function loadForm(link) {
  const query = new URL(link.href).search;
  const folds = [...form.querySelectorAll("details")].map((fold) => fold.open);
  area.querySelector("form").replaceWith(await fetchHtml(`${base}/form${query}`));
  startForm();
  form.querySelectorAll("details").forEach((fold, number) => { fold.open = folds[number]; });
  byId("form-body").scrollTop = 0;
  form.elements.prompt.focus({ preventScroll: true });
  form.scrollIntoView({ block: "nearest", behavior: "smooth" });
  announce("Form filled in");
}

document.addEventListener("click", (event) => {
  const target = event.target.closest("button, a");
  if (!target || isBusy(target)) return;
  if (target.id === "lock-seed") toggleSeed();
  else if (target.id === "add-lora") addLora(target);
  else if (target.dataset.seed) { setSeed(target.dataset.seed); reveal(form.elements.seed); }
  else if (target.dataset.startImage) useAsStartImage(target);
  else if ("form" in target.dataset && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    loadForm(target).catch(() => location.assign(target.href));
  }
});

export function startForm() {
  form = byId("create");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const button = form.querySelector("[type=submit]");
    if (!isBusy(button)) create(button);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  form.addEventListener("input", showDuration);
  if (form.elements.video_model) {
    form.elements.video_model.dataset.shown = form.elements.video_model.value;
    form.elements.video_model.addEventListener("change", showClipDefaults);
  }
  form.elements.seed.addEventListener("input", showSeedLock);
  for (const control of ["image", "photo"])
    form.elements[control]?.addEventListener("change", (event) => {
      addImages(control, event.target.files);
      event.target.value = ""; // sent by its id
    });
  if (narrow.matches) form.querySelector(".settings-fold").open = Boolean(form.querySelector(".settings-fold [aria-invalid]"));
  showDuration();
  showSeedLock();
}
