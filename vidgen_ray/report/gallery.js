// The gallery of a run. Only the cards in view are in the document, so that 10,000 shots scroll smoothly. look/clips.js is before it.

const CARD_AREA = 300 * 170, LINE_HEIGHT = 20, GAP = 14, MAX_IN_GRID = 500, MAX_NAME = 40;
const $ = (id) => document.getElementById(id);
const list = $("cards"), grid = $("grid"), filters = $("filters"), detail = $("detail");
let rows = [], shown = [], cards = new Map(), axes = [], opened = null, longName = 0;

const path = (file) => file.split("/").map(encodeURIComponent).join("/");
const worst = (row) => row.likeness ?? 2;
const inOrder = (values) => [...new Set(values)].filter(Boolean).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
const nameOfAxis = (axis) => axis === "lora" ? "LoRA" : axis.replaceAll("_", " ");
const facts = (parts) => parts.flatMap((part) => [element("span", {}, part), " "]);

function setData(data) {
  rows = data.rows;
  // Lines with a matrix of their own are one more axis.
  const swept = rows.filter((row) => row.axes);
  if (new Set(swept.map((row) => row.place)).size > 1) for (const row of swept) row.axes = { line: row.place, ...row.axes };
  axes = [...new Set(swept.flatMap((row) => Object.keys(row.axes)))];
  $("title").textContent = `${data.total.toLocaleString("en")} shots`;
  $("counts").textContent = Object.entries(data.counts).filter(([, n]) => n).map(([status, n]) => `${n.toLocaleString("en")} ${status}`).join(", ")
    + (rows.length < data.total ? `. Showing the first ${rows.length.toLocaleString("en")}; manifest/ lists all.` : "");
  const run = data.run;
  $("run").textContent = run ? [`Run: ${run.total - run.remaining} of ${run.total} shots`, run.phase, run.shots_per_minute && `${run.shots_per_minute.toFixed(1)} shots/min`,
    run.eta_s && `${Math.ceil(run.eta_s[1] / 60)} min left at most`, run.waiting_for].filter(Boolean).join(", ") : "";
  $("films").replaceChildren(...data.films.map((name) => element("a", { href: path(name) }, data.films.length === 1 ? "Film" : name)));
  const own = { status: "status", character: "character", style: "style", lora: "loras" };
  for (const [name, field] of Object.entries(own)) fill(filters.elements[name], "all", axes.includes(name) ? [] : inOrder(rows.flatMap((row) => row[field] ?? [])));
  for (const axis of axes) {
    const name = `axis:${axis}`;
    if (!filters.elements[name]) $("axes").append(element("label", {}, nameOfAxis(axis), element("select", { name })));
    fill(filters.elements[name], "all", valuesOf(axis, rows));
  }
  for (const name of ["rows", "columns"]) fill(filters.elements[name], "–", inOrder(axes), 1, nameOfAxis);
  filter();
}

/** Return the values of an axis of some rows in the order of the script, and numbers by size. */
function valuesOf(axis, some) {
  const values = [...new Set(some.filter((row) => row.axes).sort((a, b) => a.order - b.order).map((row) => row.axes[axis]))].filter(Boolean);
  return values.every((value) => isFinite(value)) ? inOrder(values) : values;
}

/** Set the options of a select, and keep its value. Hides one with fewer options than `least`. */
function fill(select, none, options, least = 2, text = (value) => value) {
  const before = select.value;
  select.replaceChildren(element("option", { value: "" }, none), ...options.map((value) => element("option", { value }, text(value))));
  select.value = options.includes(before) ? before : "";
  select.closest("label").hidden = options.length < least;
}

function filter() {
  const { text, status, character, style, lora, likeness, sort, ...others } = Object.fromEntries(new FormData(filters));
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  shown = rows.filter((row) => {
    const content = `${row.id} ${row.prompt ?? ""} ${row.scene ?? ""}`.toLowerCase();
    return words.every((word) => content.includes(word)) && (!status || row.status === status) && (!character || row.character === character)
      && (!style || row.style === style) && (!lora || row.loras?.includes(lora)) && (!likeness || worst(row) < Number(likeness))
      && axes.every((axis) => !others[`axis:${axis}`] || row.axes?.[axis] === others[`axis:${axis}`]);
  });
  if (sort === "likeness") shown.sort((a, b) => worst(a) - worst(b));
  if (sort === "slow") shown.sort((a, b) => (b.seconds ?? 0) - (a.seconds ?? 0));
  $("shown").textContent = shown.length === rows.length ? "" : `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  longName = Math.max(0, ...shown.map((row, number) => nameOf(number).length));
  for (const card of cards.values()) card.remove();
  cards.clear();
  grid.hidden = !others.rows && !others.columns;
  list.hidden = !grid.hidden;
  if (list.hidden) drawGrid(others.rows, others.columns);
  else draw();
}

// ---- cards

/** Return the width of most clips in units of their height. */
function usualAspect() {
  const counts = new Map();
  for (const { aspect } of shown) if (aspect) counts.set(aspect, (counts.get(aspect) ?? 0) + 1);
  return [...counts].sort(([, a], [, b]) => b - a)[0]?.[0] ?? 16 / 9;
}

function draw() {
  if (list.hidden) return;
  const aspect = usualAspect(), least = Math.max(190, Math.sqrt(CARD_AREA * aspect)), width = list.clientWidth;
  const columns = Math.max(1, Math.floor((width + GAP) / (least + GAP))), cardWidth = (width - (columns - 1) * GAP) / columns;
  const height = Math.min(cardWidth / aspect, window.innerHeight * 0.7), lines = longName * 9 > cardWidth ? 6 : 5, step = height + lines * LINE_HEIGHT + GAP;
  list.style.height = `${Math.ceil(shown.length / columns) * step}px`;
  const top = window.scrollY - list.parentElement.offsetTop;
  const first = Math.max(0, Math.floor(top / step) - 2) * columns, end = Math.ceil((top + window.innerHeight) / step + 2) * columns;
  for (const [number, card] of cards) if (number < first || number >= end) { card.remove(); cards.delete(number); }
  for (let number = first; number < Math.min(end, shown.length); number++) {
    if (!cards.has(number)) { cards.set(number, makeCard(number)); list.append(cards.get(number)); }
    const card = cards.get(number), left = (number % columns) * (cardWidth + GAP), down = Math.floor(number / columns) * step;
    Object.assign(card.style, { left: `${left}px`, top: `${down}px`, width: `${cardWidth}px`, height: `${step - GAP}px` });
    card.querySelector(".open").style.height = `${height}px`;
  }
}

/** Return the id. Of a long one that begins like that of a neighbour, return the part that differs. */
function nameOf(number) {
  const { id } = shown[number];
  const same = ({ id: other } = { id: "" }) => { let end = 0; while (end < id.length && id[end] === other[end]) end++; return end; };
  const begin = id.lastIndexOf("-", Math.max(same(shown[number - 1]), same(shown[number + 1]))) + 1;
  return id.length > MAX_NAME && begin > 0 ? `…${id.slice(begin)}` : id;
}

/** Return the clip or image of a shot, with its name. In a grid, the axes of rows and columns are left out. */
function makeCard(number, hidden = null) {
  const row = shown[number], clip = row.video ?? row.hd_video, still = row.thumbnail ?? row.image;
  const media = !still && !clip ? null
    : clip ? element("video", { src: path(clip), ...still && { poster: path(still) }, loop: "", playsinline: "", preload: "none", "aria-label": row.prompt ?? row.id })
      : element("img", { src: path(still), alt: row.prompt ?? "", decoding: "async" });
  if (media?.matches("video")) media.muted = true;
  const values = Object.entries(row.axes ?? {}).filter(([axis]) => !hidden?.includes(axis)).map(([axis, value]) => `${nameOfAxis(axis)} ${value}`);
  const measures = hidden ? [...(row.facts ?? []).filter((part) => part.includes("likeness")), ...row.seconds ? [`rendered in ${+row.seconds.toFixed(1)} s`] : []] : row.facts;
  const card = element("article", { class: `card ${row.status}`, title: row.id },
    element("div", { class: "screen" }, element("button", { class: "open", type: "button", "aria-label": `Open ${row.id}` }, media ?? element("p", { class: "reason" }, row.failure ?? ""))),
    element("div", { class: "body" }, hidden ? null : element("h2", {}, nameOf(number)),
      values.length ? element("p", { class: "facts" }, ...facts(values)) : hidden ? null : element("p", { class: "prompt faint" }, row.prompt ?? ""),
      measures ? element("p", { class: "facts faint" }, ...facts(measures)) : null));
  card.onclick = () => open(number);
  return card;
}

// ---- grid by the axes of a matrix

const mean = (values) => values.length ? values.reduce((sum, value) => sum + value) / values.length : null;

/** Return a heading with the mean likeness and rendering time of some shots. */
function heading(scope, text, some) {
  const likeness = mean(some.map((row) => row.likeness).filter((value) => value > -1)), seconds = mean(some.map((row) => row.seconds).filter(Boolean));
  const means = [likeness === null ? null : `likeness ${likeness.toFixed(2)}`, seconds === null ? null : `rendered in ${+seconds.toFixed(1)} s`].filter(Boolean);
  return element("th", { scope }, text, " ", some.length > 1 ? element("p", { class: "facts faint", title: `Mean of ${some.length} shots` }, ...facts(means)) : null);
}

function drawGrid(down, across) {
  const numbers = [...shown.keys()].filter((number) => [down, across].every((axis) => !axis || shown[number].axes?.[axis] !== undefined)).slice(0, MAX_IN_GRID);
  const valuesAlong = (axis) => axis ? valuesOf(axis, numbers.map((number) => shown[number])) : [null];
  const along = (axis, value, some) => some.filter((number) => !axis || shown[number].axes[axis] === value);
  const headingOf = (scope, axis, value) => heading(scope, axis ? `${nameOfAxis(axis)} ${value}` : "", along(axis, value, numbers).map((number) => shown[number]));
  const columns = valuesAlong(across), hidden = [down, across, ...axes.filter((axis) => filters.elements[`axis:${axis}`].value)];
  grid.replaceChildren(element("table", {},
    element("thead", {}, element("tr", {}, ...(down ? [element("td")] : []), ...columns.map((value) => headingOf("col", across, value)))),
    element("tbody", {}, ...valuesAlong(down).map((value) => element("tr", {}, ...(down ? [headingOf("row", down, value)] : []),
      ...columns.map((column) => element("td", {}, ...along(across, column, along(down, value, numbers)).map((number) => makeCard(number, hidden)))))))));
}

// ---- one shot

function open(number) {
  opened = number;
  const row = shown[number], clip = row.hd_video ?? row.video, line = $("line");
  $("detail-id").textContent = row.id;
  $("copy").textContent = "Copy as script line";
  line.value = JSON.stringify({ id: row.id, ...row.fields });
  line.hidden = true;
  const media = clip ? element("video", { src: path(clip), controls: "", loop: "", playsinline: "", "aria-label": row.prompt ?? row.id, ...row.image && { poster: path(row.image) } })
    : row.image ? element("img", { src: path(row.image), alt: row.prompt ?? "" }) : null;
  detail.querySelector(".stage").replaceChildren(...[media].filter(Boolean));
  const chain = detail.querySelector(".chain");
  chain.hidden = !row.chain;
  chain.replaceChildren(...(row.chain ?? []).map((file) => {
    const name = file.split("/").pop().replace(".png", "");
    return element("figure", {}, element("a", { href: path(file) }, element("img", { src: path(file), alt: `${name} of ${row.id}`, loading: "lazy" })), element("figcaption", {}, name));
  }));
  const settings = [...row.failure ? [["Failed", row.failure]] : [], ...row.settings ?? []];
  detail.querySelector("dl").replaceChildren(...settings.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", { class: name === "Failed" ? "reason" : "" }, value))));
  for (const button of detail.querySelectorAll("[data-step]")) button.setAttribute("aria-disabled", !shown[number + Number(button.dataset.step)]);
  if (!detail.open) detail.showModal();
  $("detail-id").focus();
  if (media) fit(media, row.aspect ?? 1, "70dvh");
  if (media?.matches("video")) { media.muted = true; if (!reducedMotion.matches) start(media); }
}

$("copy").onclick = async () => {
  try { await navigator.clipboard.writeText($("line").value); $("copy").textContent = "Copied"; }
  catch { $("line").hidden = false; $("line").select(); }
};
browse(detail, (by) => { if (shown[opened + by]) open(opened + by); });
closable(detail);
detail.addEventListener("close", () => { detail.querySelector(".stage").replaceChildren(); opened = null; });
playClips(document.querySelector("main"));
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
