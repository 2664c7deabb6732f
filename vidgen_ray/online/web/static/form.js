// The form: builds the body of `POST /v1/videos`, fills itself with the settings of a job; images, LoRA rows, seed, duration.

import { announce, base, byId, isBusy, narrow, parseHtml, reasonOf, request, setBusy } from "./common.js";

const IMAGE_KINDS = ["image/jpeg", "image/png", "image/webp"];
/** Controls that differ from the field of their name. The others are sent as they are. */
const OWN = ["generate_video", "input_reference", "face_image", "lora", "lora_weight", "save_as", "scale", "size", "style_prompt"];
/** Field of the API -> control. */
const CONTROLS = { consent: "consent.basis", face_image: "photo", height: "size", input_reference: "image", style: "style_prompt", width: "size" };
const form = byId("create");
let uploads = [];
let sent = {};
/** The last request that was accepted, and when. */
let accepted = {};
const REPEAT_MS = 1000;

// ---- request

const isClip = () => form.elements.generate_video.value === "true";
const checkedIds = (name) => [...form.querySelectorAll(`[name=${name}]:checked`)].map((box) => box.value);
const valueAt = (fields, name) => name.split(".").reduce((value, part) => value?.[part], fields);

function setAt(fields, name, value) {
  const parts = name.split("."), last = parts.pop();
  parts.reduce((nested, part) => nested[part] ??= {}, fields)[last] = value;
}

/** Return the body of the request. Empty and hidden controls are omitted. */
function requestBody() {
  const clip = isClip(), photos = checkedIds("face_image"), [image] = checkedIds("input_reference");
  const body = { generate_video: clip };
  for (const [name, value] of new FormData(form)) {
    const control = form.elements[name];
    const unused = (!clip && control.closest?.(".only-clip")) || (!photos.length && control.closest?.(".only-with-photo"));
    if (OWN.includes(name) || !value.trim() || unused) continue;
    setAt(body, name, control.type === "number" ? Number(value) : value);
  }
  const { size, scale, style_prompt: style } = form.elements;
  // An image of the default size is as large as the models draw.
  body.size = !clip && size.selectedIndex === 0 ? "auto" : size.value;
  if (clip && scale?.value === "none") body.upscale = false;
  else if (clip && scale?.value) body.scale = Number(scale.value);
  // The API refuses `style` in fast mode.
  if (style?.value.trim()) Object.assign(body, body.mode === "fast" ? { style: style.value } : { use_hunyuan_style: true, style_prompt: style.value });
  if (image) body.input_reference = { file_id: image };
  if (photos.length) body.face_image = photos;
  const loras = [...form.querySelectorAll(".lora")].map((row) => ({ name: row.children[0].value, scale: row.children[1].valueAsNumber }));
  if (loras.some((lora) => lora.name)) body.lora = loras.filter((lora) => lora.name);
  return body;
}

async function create(button) {
  setBusy(button, true);
  try {
    await Promise.all(uploads);
    clearErrors();
    if (checkedIds("face_image").length && form.elements.save_as.value.trim()) await saveCharacter();
    const body = JSON.stringify(requestBody());
    // A key that was pressed twice while the server was slow.
    if (accepted.body === body && Date.now() - accepted.at < REPEAT_MS) return announce("Already accepted");
    // The same key until it succeeds: a request whose response was lost creates its jobs once.
    if (sent.body !== body) sent = { body, key: crypto.getRandomValues(new Uint32Array(4)).join("-") };
    const headers = { "Content-Type": "application/json", "Idempotency-Key": sent.key };
    const video = await request(`${base}/v1/videos`, { method: "POST", body, headers });
    sent = {};
    accepted = { body, at: Date.now() };
    rememberSeed(video.seed);
    if (video.status === "completed") announce("Clip completed");
    else follow(video.id);
  } catch (error) {
    showRefusal(error);
  } finally {
    setBusy(button, false);
  }
}

/** Scroll to the card of a new job. The event stream brings the card. */
function follow(id) {
  const card = byId(id);
  if (!card) return document.addEventListener("card-added", () => follow(id), { once: true });
  announce(`${card.dataset.title}: queued`);
  card.scrollIntoView({ block: "nearest", behavior: "smooth" });
}

/** Save the photos as a character, and select it in their place. */
async function saveCharacter() {
  const body = new FormData(), photos = checkedIds("face_image"), { character: select, save_as: name } = form.elements;
  const { consent } = requestBody();
  body.append("name", name.value);
  for (const id of photos) body.append("image", id);
  if (consent) body.append("consent", JSON.stringify(consent));
  try {
    const character = await request(`${base}/v1/videos/characters`, { method: "POST", body });
    let option = [...select.options].find((each) => each.value === character.id);
    if (!option) select.add(option = new Option(character.name, character.id));
    option.dataset.photos = character.photos.join(" ");
    select.value = character.id;
    select.parentElement.hidden = false;
    name.value = "";
    byId("photo-tray").replaceChildren();
  } catch (error) {
    error.param = { name: "save_as", image: "face_image" }[error.param] ?? error.param;
    throw error;
  }
}

// ---- errors

function clearErrors() {
  for (const control of form.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
  for (const text of form.querySelectorAll(".error, #form-error")) text.hidden = true;
}

/** Show why a request was refused: at the control of its field, or above the form. */
function showRefusal(error) {
  const { param } = error, first = param?.split(".")[0];
  const name = [CONTROLS[param], param, CONTROLS[first], first].find((each) => each && byId(`${each}-error`));
  const photos = checkedIds("face_image").length;
  const text = param === "consent" && photos ? "Choose why this face may be used, and name the person." : reasonOf(error);
  const control = name && showError(name, text);
  if (control?.checkVisibility()) {
    control.focus({ preventScroll: true });
    // With its message, which is below it.
    return (control.closest(".field, .segments") ?? control).scrollIntoView({ block: "center" });
  }
  const summary = byId("form-error");
  summary.firstElementChild.textContent = text;
  summary.hidden = false;
  summary.scrollIntoView({ block: "nearest" });
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

// ---- images: stored when they are chosen; a photo without a face is refused at once

function addImages(control, files) {
  const images = [...files].filter((file) => IMAGE_KINDS.includes(file.type));
  const input = form.elements[control];
  if (!files.length || !input) return;
  if (!images.length) return void showError(control, `${files[0].name}: choose a JPEG, PNG or WebP image.`);
  byId(`${control}-error`).hidden = true;
  input.removeAttribute("aria-invalid");
  for (const file of control === "image" ? images.slice(0, 1) : images) store(control, file);
}

async function store(control, file) {
  const body = new FormData();
  body.append("file", file);
  if (control === "photo" && !checkedIds("face_image").length && form.elements.face_index) form.elements.face_index.value = "";
  const stored = await addToTray(control, file.name, request(`${base}/v1/files`, { method: "POST", body }));
  if (!stored) return;
  openFolds(byId(`${control}-tray`)); // it may have been pasted or dropped
  if (control === "photo" && form.elements.character) form.elements.character.value = "";
  announce(control === "photo" ? `${file.name}: face found` : `${file.name}: start image set`);
}

/** Show an upload in the form, with the faces of a photo. Returns whether that succeeded. */
async function addToTray(control, name, upload) {
  const tray = byId(`${control}-tray`), waiting = document.createElement("p");
  waiting.className = "hint";
  waiting.textContent = `Checking ${name}`;
  tray.append(waiting);
  const image = upload.then(async ({ id }) => ({ id, ...await request(`${base}/inputs/${id}/${control}`) }));
  const finished = image.catch(() => {});
  uploads.push(finished);
  try {
    const { id, html } = await image;
    if (!waiting.isConnected) return false; // the form was filled in meanwhile
    if (control === "image") tray.replaceChildren();
    if (!tray.querySelector(`[value="${id}"]`)) tray.append(parseHtml(html)); // else the same photo again
    showFace();
    return true;
  } catch (error) {
    showError(control, `${name}: ${reasonOf(error)}`);
    return false;
  } finally {
    waiting.remove();
    uploads = uploads.filter((each) => each !== finished);
  }
}

/** Mark the face that is used of the first photo. The field `face_index` is empty for the largest one. */
function showFace() {
  const photo = form.querySelector("#photo-tray .form-image"), index = form.elements.face_index?.value;
  for (const button of photo?.querySelectorAll("button[data-face]") ?? []) {
    const chosen = index ? button.dataset.face === index : "largest" in button.dataset;
    button.setAttribute("aria-pressed", chosen);
    photo.querySelector(`rect[data-face="${button.dataset.face}"]`).classList.toggle("chosen", chosen);
  }
}

function chooseFace(target) {
  const button = target.closest(".form-image").querySelector(`button[data-face="${target.dataset.face}"]`);
  if (!button?.checkVisibility() || !form.elements.face_index) return;
  form.elements.face_index.value = "largest" in button.dataset ? "" : button.dataset.face;
  showFace();
}

/** Use the image of a clip as start image. */
async function useAsStartImage(button) {
  setBusy(button, true);
  try {
    const response = await fetch(button.dataset.startImage);
    if (!response.ok) return announce("The clip no longer exists.");
    await store("image", new File([await response.blob()], "image.png", { type: "image/png" }));
    reveal(form.elements.image);
  } catch (error) {
    announce(reasonOf(error));
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

/** Fill the form: with an example prompt, or with the settings of a job and a new seed, to repeat the job or to continue it. */
async function fill(query) {
  const continued = query.get("continue"), id = query.get("like") ?? continued;
  try {
    if (id) {
      const [{ shot }, video] = await Promise.all(["shots", "videos"].map((kind) => request(`${base}/v1/${kind}/${id}`)));
      resetForm();
      setValues(shot, video, continued ?? shot.continue_from);
    } else {
      resetForm();
      form.elements.prompt.value = query.get("prompt");
    }
  } catch (error) {
    return announce(reasonOf(error));
  }
  showDerived();
  byId("form-body").scrollTop = 0;
  form.elements.prompt.focus({ preventScroll: true });
  form.scrollIntoView({ block: "nearest", behavior: "smooth" });
  announce("Form filled in");
}

function resetForm() {
  form.reset();
  clearErrors();
  for (const row of [...form.querySelectorAll(".lora")].slice(1)) row.remove();
  for (const tray of form.querySelectorAll(".tray")) tray.replaceChildren();
}

/** Return the text of a field's value in its control. */
function textOf(value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value !== "object" ? String(value) : value.length ? JSON.stringify(value) : "";
}

/** Show the fields of a shot. `video` has the size of its file. `continued` is the job whose last frame it starts with. */
function setValues(shot, video, continued) {
  const { elements } = form, basis = elements["consent.basis"];
  // The consent of the example photos has a basis that the form does not offer, and is not needed.
  if (![...basis?.options ?? []].some((option) => option.value === shot.consent?.basis)) delete shot.consent;
  for (const control of elements) {
    const value = OWN.includes(control.name) || control.name === "seed" ? undefined : valueAt(shot, control.name);
    if (value === undefined) continue;
    if (control.type === "radio") control.checked = control.value === value;
    else if (textOf(value) !== control.dataset.default) control.value = textOf(value);
  }
  elements.generate_video.value = String(shot.generate_video);
  if (elements.style_prompt) elements.style_prompt.value = (shot.use_hunyuan_style && shot.style_prompt) || "";
  if (![...elements.size.options].some((option) => option.value === video.size))
    elements.size.add(new Option(`${video.size.replace("x", " × ")}, as in that clip`, video.size));
  elements.size.value = video.size;
  if (elements.scale) elements.scale.value = video.hd_size ? video.scale : shot.generate_video && !shot.upscale_video ? "none" : "";
  (shot.lora ?? []).forEach(({ name, scale }, number) => {
    if (number) addLora(byId("add-lora"));
    const row = [...form.querySelectorAll(".lora")].at(-1);
    row.children[0].value = name;
    row.children[1].value = scale;
  });
  const photos = shot.face_image ?? [], character = elements.character;
  const saved = [...character?.options ?? []].find((option) => photos.length && option.dataset.photos === photos.join(" "));
  if (saved) character.value = saved.value;
  else for (const photo of photos) addToTray("photo", "the photo", Promise.resolve({ id: photo }));
  if (continued) showLastFrame(continued);
  else if (shot.image) addToTray("image", "the image", Promise.resolve({ id: shot.image }));
}

/** Show that the clip starts with the last frame of another one, unless that one was deleted. */
async function showLastFrame(id) {
  const tray = byId("image-tray"), item = byId("last-frame").content.cloneNode(true);
  try {
    const { shot } = await request(`${base}/v1/shots/${id}`);
    const title = shot.prompt.replaceAll(/\s+/g, " ").trim();
    item.querySelector("input").value = id;
    item.querySelector("span span").textContent = title.length > 60 ? `${title.slice(0, 60)}…` : title;
    tray.replaceChildren(item);
  } catch (error) {
    showError("image", reasonOf(error));
  }
}

document.addEventListener("click", (event) => {
  const target = event.target.closest("button, a, [data-face]");
  if (!target || isBusy(target)) return;
  if (target.dataset.face) chooseFace(target);
  else if (target.id === "lock-seed") toggleSeed();
  else if (target.id === "add-lora") addLora(target);
  else if (target.dataset.seed) { setSeed(target.dataset.seed); reveal(form.elements.seed); }
  else if (target.dataset.startImage) useAsStartImage(target);
  else if ("form" in target.dataset && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    fill(new URL(target.href).searchParams);
  }
});

/** Update the parts of the form that follow from the values of its controls. */
function showDerived() {
  if (form.elements.video_model) form.elements.video_model.dataset.shown = form.elements.video_model.value;
  showDuration();
  showSeedLock();
}

export function startForm() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const button = form.querySelector("[type=submit]");
    if (!isBusy(button)) create(button);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (!event.repeat) form.requestSubmit();
    }
  });
  form.addEventListener("input", () => { showDuration(); showFace(); });
  form.elements.video_model?.addEventListener("change", showClipDefaults);
  form.elements.seed.addEventListener("input", showSeedLock);
  for (const control of ["image", "photo"])
    form.elements[control]?.addEventListener("change", (event) => {
      addImages(control, event.target.files);
      event.target.value = ""; // sent by its id
    });
  if (narrow.matches) form.querySelector(".settings-fold").open = false;
  showDerived();
  const query = new URLSearchParams(location.search);
  if (["like", "continue", "prompt"].some((name) => query.has(name))) fill(query);
}
