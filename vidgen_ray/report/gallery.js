"use strict";
// Only the cards in view are in the document, so that 10,000 shots scroll smoothly.
const CARD_WIDTH = 300, CARD_HEIGHT = 266, GAP = 14;
const $ = (id) => document.getElementById(id);
const grid = $("grid"), filters = $("filters"), detail = $("detail");
let rows = [], shown = [], cards = new Map(), opened = null;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const path = (file) => file.split("/").map(encodeURIComponent).join("/");
const worst = (row) => row.likeness ?? 2;

function setData(data) {
  rows = data.rows;
  $("title").textContent = `${data.total.toLocaleString("en")} shots`;
  $("counts").textContent = Object.entries(data.counts).filter(([, n]) => n).map(([status, n]) => `${n.toLocaleString("en")} ${status}`).join(", ")
    + (rows.length < data.total ? `. Showing the first ${rows.length.toLocaleString("en")}; manifest/ lists all.` : "");
  const run = data.run;
  $("run").textContent = run ? [`Run: ${run.total - run.remaining} of ${run.total} shots`, run.phase, run.shots_per_minute && `${run.shots_per_minute.toFixed(1)} shots/min`,
    run.eta_s && `${Math.ceil(run.eta_s[1] / 60)} min left at most`, run.waiting_for].filter(Boolean).join(", ") : "";
  $("films").replaceChildren(...data.films.map((name) => element("a", { href: path(name) }, data.films.length === 1 ? "Film" : name)));
  fill("status", new Set(rows.map((row) => row.status)));
  fill("character", new Set(rows.map((row) => row.character)));
  fill("style", new Set(rows.map((row) => row.style)));
  fill("lora", new Set(rows.flatMap((row) => row.loras ?? [])));
  filter();
}

function fill(name, values) {
  const select = filters.elements[name], before = select.value;
  const options = [...values].filter(Boolean).sort();
  select.replaceChildren(element("option", { value: "" }, "all"), ...options.map((value) => element("option", { value }, value)));
  select.value = options.includes(before) ? before : "";
  select.closest("label").hidden = options.length === 0;
}

function filter() {
  const { text, status, character, style, lora, likeness, sort } = Object.fromEntries(new FormData(filters));
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  shown = rows.filter((row) => {
    const content = `${row.id} ${row.prompt ?? ""} ${row.scene ?? ""}`.toLowerCase();
    return words.every((word) => content.includes(word)) && (!status || row.status === status) && (!character || row.character === character)
      && (!style || row.style === style) && (!lora || row.loras?.includes(lora)) && (!likeness || worst(row) < Number(likeness));
  });
  if (sort === "likeness") shown.sort((a, b) => worst(a) - worst(b));
  if (sort === "slow") shown.sort((a, b) => (b.seconds ?? 0) - (a.seconds ?? 0));
  $("shown").textContent = shown.length === rows.length ? "" : `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  for (const card of cards.values()) card.remove();
  cards.clear();
  draw();
}

function draw() {
  const width = grid.clientWidth, columns = Math.max(1, Math.floor((width + GAP) / (CARD_WIDTH + GAP)));
  const cardWidth = (width - (columns - 1) * GAP) / columns, step = CARD_HEIGHT + GAP;
  grid.style.height = `${Math.ceil(shown.length / columns) * step}px`;
  const top = window.scrollY - grid.offsetTop;
  const first = Math.max(0, Math.floor(top / step) - 2) * columns, end = Math.ceil((top + window.innerHeight) / step + 2) * columns;
  for (const [number, card] of cards) if (number < first || number >= end) { card.remove(); cards.delete(number); }
  for (let number = first; number < Math.min(end, shown.length); number++) {
    if (!cards.has(number)) { cards.set(number, makeCard(number)); grid.append(cards.get(number)); }
    Object.assign(cards.get(number).style, { left: `${(number % columns) * (cardWidth + GAP)}px`, top: `${Math.floor(number / columns) * step}px`,
      width: `${cardWidth}px`, height: `${CARD_HEIGHT}px` });
  }
}

function makeCard(number) {
  const row = shown[number], image = row.thumbnail ?? row.image;
  const view = element("div", { class: "view" }, image ? element("img", { src: path(image), alt: row.prompt ?? "", decoding: "async" })
    : null);
  const text = element("div", { class: "text" }, element("div", { class: row.status === "failed" ? "id failed" : "id" }, row.id),
    element("div", { class: "prompt" }, row.failure ?? row.prompt ?? ""));
  const button = element("button", { type: "button", "aria-label": `Open ${row.id}` }, view, text);
  button.onclick = () => open(number);
  const clip = row.video ?? row.hd_video;
  const play = () => {
    if (!clip || view.querySelector("video")) return;
    const video = element("video", { src: path(clip), loop: "", playsinline: "" });
    video.muted = true;
    view.append(video);
    video.play().catch(() => video.remove());
  };
  const stop = () => view.querySelector("video")?.remove();
  button.onpointerenter = button.onfocus = play;
  button.onpointerleave = button.onblur = stop;
  return element("article", {}, button);
}

function scriptLine(row) {
  return JSON.stringify({ id: row.id, ...row.fields });
}

function open(number) {
  opened = number;
  const row = shown[number], clip = row.hd_video ?? row.video;
  const button = (label, action, disabled = false) => { const made = element("button", { type: "button" }, label); made.onclick = action; made.disabled = disabled; return made; };
  const copy = button("Copy as script line", async () => {
    try { await navigator.clipboard.writeText(scriptLine(row)); copy.textContent = "Copied"; }
    catch { line.hidden = false; line.select(); }
  });
  const line = element("textarea", { readonly: "", rows: 4, style: "width:100%", "aria-label": "Script line" });
  line.value = scriptLine(row);
  line.hidden = true;
  const facts = { prompt: row.prompt, failure: row.failure, scene: row.scene, character: row.character, style: row.style, LoRA: row.loras?.join(", "), line: row.line && `${row.script}, line ${row.line}`,
    size: row.width && `${row.width}×${row.height}${row.num_frames ? `, ${row.num_frames} frames at ${row.fps} fps` : ""}`, seconds: row.seconds?.toFixed(1),
    likeness: row.likeness_text };
  const settings = Object.entries(row.fields ?? {}).filter(([name]) => !["prompt", "id", "metadata", "width", "height", "num_frames", "fps"].includes(name));
  const list = element("dl");
  for (const [name, value] of [...Object.entries(facts), ...settings]) {
    if (value === undefined || value === null || value === "" || value === false) continue;
    list.append(element("dt", {}, name), element("dd", { class: name === "failure" ? "failed" : "" }, typeof value === "string" ? value : JSON.stringify(value)));
  }
  const chain = element("div", { class: "chain", tabindex: 0, role: "group", "aria-label": "Images of the stages" }, ...(row.chain ?? []).map((file) => {
    const name = file.split("/").pop().replace(".png", "");
    return element("figure", {}, element("a", { href: path(file) }, element("img", { src: path(file), alt: `${name} of ${row.id}`, loading: "lazy" })), element("figcaption", {}, name));
  }));
  const video = clip ? element("video", { src: path(clip), controls: "", loop: "", playsinline: "", poster: row.image && path(row.image) }) : null;
  if (video) video.muted = true;
  detail.replaceChildren(
    element("div", { class: "bar" }, element("h2", { id: "detail-id" }, row.id),
      element("div", {}, button("Previous", () => open(number - 1), number === 0), button("Next", () => open(number + 1), number === shown.length - 1), copy, button("Close", () => detail.close()))),
    line, ...[video ?? (row.image ? element("img", { class: "still", src: path(row.image), alt: row.prompt ?? "" }) : null), row.chain ? chain : null, list].filter(Boolean));
  if (!detail.open) detail.showModal();
  video?.play().catch(() => {});
}

detail.addEventListener("close", () => { detail.replaceChildren(); opened = null; });
detail.addEventListener("keydown", (event) => {
  if (event.target.closest("video, textarea")) return;
  if (event.key === "ArrowRight" && opened < shown.length - 1) open(opened + 1);
  if (event.key === "ArrowLeft" && opened > 0) open(opened - 1);
});
filters.addEventListener("input", filter);
filters.addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
window.addEventListener("resize", draw);
const data = JSON.parse($("data").textContent);
setData(data);
// `vidgen watch` serves the page with new rows. A page that was opened from disk does not change.
if (data.refresh_s) setInterval(async () => {
  try {
    const response = await fetch("rows.json");
    if (response.ok && opened === null) setData(await response.json());
  } catch { /* The watching process has stopped. */ }
}, data.refresh_s * 1000);
