// The gallery of a run. Only the cards in view are in the document, so that 10,000 shots scroll smoothly. look/clips.js is before it.

const CARD_AREA = 300 * 170, LEAST_WIDTH = 238, LINE_HEIGHT = 20, BAR_HEIGHT = 38, GAP = 14, MAX_IN_GRID = 500, MAX_NAME = 40, MAX_COMPARED = 12;
const $ = (id) => document.getElementById(id);
const list = $("cards"), grid = $("grid"), filters = $("filters"), detail = $("detail");
let rows = [], shown = [], cards = new Map(), axes = [], opened = null, compared = null, selected = 0, longName = 0, scores = [], sortedBy = -1, layout = { columns: 1, step: 1 };

const path = (file) => file.split("/").map(encodeURIComponent).join("/");
const worst = (row) => row.likeness ?? 2;
const inOrder = (values) => [...new Set(values)].filter(Boolean).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
const nameOfAxis = (axis) => axis === "lora" ? "LoRA" : axis.replaceAll("_", " ");
const scoreOf = (row, number) => row.scores?.[number] ?? null;
const scoreText = (row, number) => scoreOf(row, number) === null ? null : `${nameOfAxis(scores[number])} ${+scoreOf(row, number).toPrecision(3)}`;
const facts = (parts) => parts.flatMap((part) => [element("span", {}, part), " "]);

function setData(data) {
  rows = data.rows;
  addOwnReviews();
  // Lines with a matrix of their own are one more axis.
  const swept = rows.filter((row) => row.axes);
  if (new Set(swept.map((row) => row.place)).size > 1) for (const row of swept) row.axes = { line: row.place, ...row.axes };
  axes = [...new Set(swept.flatMap((row) => Object.keys(row.axes)))];
  $("title").textContent = `${data.total.toLocaleString("en")} ${data.total === 1 ? "shot" : "shots"}`;
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
  const { sort, faceless } = filters.elements;
  faceless.closest("label").hidden = !faceless.checked && !rows.some((row) => row.no_face);
  if (scores.join() !== data.scores.join()) {
    const before = sort.value;
    scores = data.scores;
    sort.querySelector("optgroup")?.remove();
    if (scores.length) sort.append(element("optgroup", { label: "Scores, lowest first" }, ...scores.map((name) => element("option", { value: `score:${name}` }, nameOfAxis(name)))));
    sort.value = before;
    if (sort.selectedIndex < 0) sort.value = "script";
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
  const { text, status, verdict, stars, character, style, lora, likeness, faceless, below, sort, reversed, ...others } = Object.fromEntries(new FormData(filters));
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  sortedBy = scores.indexOf(sort.replace("score:", ""));
  filters.elements.below.closest("label").hidden = sortedBy < 0;
  shown = rows.filter((row) => {
    const content = `${row.id} ${row.prompt ?? ""} ${row.scene ?? ""} ${row.caption ?? ""} ${row.missing ?? ""}`.toLowerCase();
    return words.every((word) => content.includes(word)) && (!status || row.status === status) && (!character || row.character === character)
      && (!verdict || row.clip && (row.review?.verdict ?? "none") === verdict) && (row.review?.stars ?? 0) >= Number(stars)
      && (!style || row.style === style) && (!lora || row.loras?.includes(lora)) && (!likeness || worst(row) < Number(likeness)) && (!faceless || row.no_face)
      && (sortedBy < 0 || !below || (scoreOf(row, sortedBy) ?? Infinity) < Number(below))
      && axes.every((axis) => !others[`axis:${axis}`] || row.axes?.[axis] === others[`axis:${axis}`]);
  });
  const keyOf = sort === "likeness" ? (row) => row.likeness ?? null : sort === "slow" ? (row) => row.seconds === undefined ? null : -row.seconds
    : (row) => scoreOf(row, sortedBy);
  if (sort === "script" && reversed) shown.reverse();
  if (sort !== "script") {
    const keys = new Map(shown.map((row) => [row, keyOf(row)])), known = shown.filter((row) => keys.get(row) !== null);
    known.sort((a, b) => (keys.get(a) - keys.get(b)) * (reversed ? -1 : 1));
    // Without a value: last.
    shown = [...known, ...shown.filter((row) => keys.get(row) === null)];
  }
  $("shown").textContent = shown.length === rows.length ? "" : `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  longName = Math.max(0, ...shown.map((row, number) => nameOf(number).length));
  for (const card of cards.values()) card.remove();
  cards.clear();
  grid.hidden = !others.rows && !others.columns;
  list.hidden = !grid.hidden;
  if (list.hidden) drawGrid(others.rows, others.columns);
  else draw();
  countReviews();
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
  const aspect = usualAspect(), least = Math.max(LEAST_WIDTH, Math.sqrt(CARD_AREA * aspect)), width = list.clientWidth;
  const columns = Math.max(1, Math.floor((width + GAP) / (least + GAP))), cardWidth = (width - (columns - 1) * GAP) / columns;
  const height = Math.min(cardWidth / aspect, window.innerHeight * 0.7), lines = (longName * 9 > cardWidth ? 6 : 5) + (axes.length > 2) + (sortedBy >= 0) + (scores[sortedBy] === "agrees"), step = height + lines * LINE_HEIGHT + BAR_HEIGHT + GAP;
  layout = { columns, step };
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
  const score = sortedBy < 0 ? null : scoreText(row, sortedBy);
  const missing = scores[sortedBy] === "agrees" && row.missing ? [element("strong", {}, `missing: ${row.missing}`)] : [];
  const card = element("article", { class: `card ${row.status}`, title: row.id, "data-number": number },
    element("div", { class: "screen" }, element("button", { class: "open", type: "button", "aria-label": `Open ${row.id}` }, media ?? element("p", { class: "reason" }, row.failure ?? ""))),
    element("div", { class: "body" }, hidden ? null : element("h2", {}, nameOf(number)),
      values.length ? element("p", { class: "facts" }, ...facts(values)) : hidden ? null : element("p", { class: "prompt faint" }, row.prompt ?? ""),
      measures || score ? element("p", { class: "facts faint" }, ...facts([...score ? [element("strong", {}, score)] : [], ...missing, ...measures ?? []])) : null),
    row.clip ? reviewBar(row, () => { open(number); $("note").focus(); }) : null);
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

// ---- one shot, or several side by side

const current = () => compared ? compared[selected] : shown[opened];

/** Return the clip or image of a shot for the full view. */
function mediaOf(row, clip, attributes) {
  if (clip) return element("video", { src: path(clip), loop: "", playsinline: "", "aria-label": row.prompt ?? row.id, ...attributes, ...row.image && { poster: path(row.image) } });
  return row.image ? element("img", { src: path(row.image), alt: row.prompt ?? "" }) : null;
}

function open(number) {
  commitNote();
  opened = number;
  compared = null;
  const row = shown[number], media = mediaOf(row, row.hd_video ?? row.video, { controls: "" });
  setStage([media]);
  show();
  if (media) fit(media, row.aspect ?? 1, "58dvh");
}

/** Replace what the full view plays. */
function setStage(elements) {
  detail.querySelector(".stage").replaceChildren(...elements.filter(Boolean));
  detail.querySelector(".stage").classList.toggle("compared", compared !== null);
  if (!detail.open) detail.showModal();
  for (const video of detail.querySelectorAll("video")) { video.muted = true; if (!reducedMotion.matches) start(video); }
}

/** Show everything but the clip of the current shot. */
function show() {
  const row = current(), line = $("line");
  $("detail-id").textContent = row.id;
  $("copy").textContent = "Copy as script line";
  line.value = JSON.stringify({ id: row.id, ...row.fields });
  line.hidden = true;
  const chain = detail.querySelector(".chain");
  chain.hidden = !row.chain;
  chain.replaceChildren(...(row.chain ?? []).map((file) => {
    const name = file.split("/").pop().replace(".png", "");
    return element("figure", {}, element("a", { href: path(file) }, element("img", { src: path(file), alt: `${name} of ${row.id}`, loading: "lazy" })), element("figcaption", {}, name));
  }));
  const measured = scores.map((_, number) => scoreText(row, number)).filter(Boolean).join(", ");
  const settings = [...row.failure ? [["Failed", row.failure]] : [], ...row.settings ?? [], ...measured ? [["Scores", measured]] : []];
  detail.querySelector("dl").replaceChildren(...settings.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", { class: name === "Failed" ? "reason" : "" }, value))));
  for (const button of detail.querySelectorAll("[data-step]")) button.setAttribute("aria-disabled", !neighbour(Number(button.dataset.step)));
  $("review").hidden = !row.clip;
  $("compare").setAttribute("aria-pressed", compared !== null);
  $("note").value = row.review?.note ?? "";
  bar.row = row;
  showReviews();
  $("detail-id").focus();
}

const neighbour = (by) => compared ? compared[selected + by] : shown[opened + by];

function step(by) {
  if (!neighbour(by)) return;
  if (!compared) return open(opened + by);
  commitNote();
  selected += by;
  show();
}

/** Show the shots that differ only in their seed side by side, otherwise those with the same prompt; or the current one alone again. */
function compare() {
  const row = current();
  if (compared) {
    commitNote();
    const number = shown.indexOf(row);
    open(number < 0 ? opened : number);
    return;
  }
  const alike = rows.filter((other) => other.clip && (row.siblings === undefined ? other.prompt === row.prompt : other.siblings === row.siblings));
  if (!row.clip || alike.length < 2) return say("No other shot has this prompt.");
  commitNote();
  const first = Math.max(0, Math.min(alike.indexOf(row) - MAX_COMPARED / 2, alike.length - MAX_COMPARED));
  compared = alike.slice(first, first + MAX_COMPARED);
  selected = compared.indexOf(row);
  setStage(compared.map((other, number) => {
    const figure = element("figure", {}, mediaOf(other, other.video ?? other.hd_video, {}), element("figcaption", {}, other.id, element("span", { class: "mark" })));
    figure.row = other;
    figure.onclick = () => step(number - selected);
    return figure;
  }));
  show();
  say(alike.length > compared.length ? `${compared.length} of ${alike.length} shots with this prompt.` : "");
}

// ---- reviews

const OPINION = ["verdict", "stars", "note"], VERDICTS = { accept: "accepted", reject: "rejected" };
const own = new Map(); // clip -> review: those that `vidgen watch` has not stored yet, or all that were made in a page from a disk
const undoable = [];
const data = JSON.parse($("data").textContent), isLive = Boolean(data.refresh_s), STORED = `vidgen reviews of ${location.pathname}`;
let changes = 0, sending = false;

const opinionOf = (row) => Object.fromEntries(OPINION.map((name) => [name, row.review?.[name] ?? null]));
const textOf = ({ review }) => [VERDICTS[review?.verdict], review?.stars && "★".repeat(review.stars)].filter(Boolean).join(" ");

function say(text) { for (const element of document.querySelectorAll(".message")) element.textContent = text; }

/** Give the rows the reviews of this page. */
function addOwnReviews() {
  for (const row of rows) {
    const mine = own.get(row.clip);
    if (mine && (isLive || !row.review || Date.parse(mine.at) > Date.parse(row.review.at))) row.review = mine;
  }
}

/** Change the opinion about a clip, so that it can be undone. */
function review(row, change) {
  const before = opinionOf(row);
  if (OPINION.every((name) => !(name in change) || before[name] === change[name])) return;
  undoable.push([row, before]);
  setReview(row, { ...before, ...change });
}

function setReview({ clip, id, review }, opinion) {
  const at = new Date(Math.max(Date.now(), (Date.parse(review?.at) || 0) + 1)).toISOString();
  own.set(clip, { clip_sha256: clip, id, ...opinion, who: null, at });
  changes++;
  for (const row of rows) if (row.clip === clip) row.review = own.get(clip);
  say("");
  keep();
  if (opened === null && (filters.elements.verdict.value || filters.elements.stars.value !== "0")) filter();
  showReviews();
}

/** Show the reviews of all rows in view. */
function showReviews() {
  for (const each of document.querySelectorAll(".review")) showReview(each);
  for (const figure of detail.querySelectorAll(".compared figure")) {
    figure.setAttribute("aria-current", figure.row === current());
    const mark = figure.querySelector(".mark");
    mark.textContent = textOf(figure.row);
    mark.classList.toggle("bad", figure.row.review?.verdict === "reject");
  }
  countReviews();
}

function countReviews() {
  const clips = rows.filter((row) => row.clip), counts = Object.entries(VERDICTS).map(([verdict, word]) => [clips.filter((row) => row.review?.verdict === verdict).length, word]);
  $("reviews").textContent = counts.some(([n]) => n) ? counts.map(([n, word]) => `${n.toLocaleString("en")} ${word}`).join(", ") : "";
  $("reviews").setAttribute("aria-busy", isLive && own.size > 0);
  $("save").hidden = isLive || !own.size;
}

/** Return the buttons for the review of a row. `onNote` opens its note. */
function reviewBar(row, onNote, isLarge = false) {
  const button = (label, text, name, value) => element("button", { type: "button", class: name, "aria-label": label, title: label, "data-value": value }, isLarge && name !== "stars" ? `${text} ${label}` : text);
  const made = element("div", { class: `review ${isLarge ? "large" : ""}`, role: "group", "aria-label": "Review" },
    button("Accept", "✓", "verdict", "accept"), button("Reject", "✗", "verdict", "reject"),
    onNote ? button("Note", "✎", "note", "") : null,
    element("span", {}, ...[1, 2, 3, 4, 5].map((stars) => button(stars === 1 ? "1 star" : `${stars} stars`, "☆", "stars", stars))));
  made.row = row;
  made.onclick = (event) => {
    event.stopPropagation();
    const pressed = event.target.closest("button"), isSet = pressed?.getAttribute("aria-pressed") === "true";
    if (pressed?.matches(".verdict")) isSet ? review(made.row, { verdict: null }) : decide(made.row, pressed.dataset.value);
    if (pressed?.matches(".stars")) review(made.row, { stars: isSet ? null : Number(pressed.dataset.value) });
    if (pressed?.matches(".note")) onNote();
  };
  showReview(made);
  return made;
}

function showReview(made) {
  const { verdict, stars, note } = opinionOf(made.row);
  for (const button of made.querySelectorAll("button")) {
    const value = button.dataset.value;
    button.setAttribute("aria-pressed", button.matches(".verdict") ? value === verdict : button.matches(".stars") ? Number(value) === stars : note !== null);
    if (button.matches(".stars")) button.textContent = Number(value) <= stars ? "★" : "☆";
    if (button.matches(".note")) button.title = note ?? "Note";
  }
}

/** Set the verdict. In the full view, go to the next clip. */
function decide(row, verdict) {
  commitNote();
  review(row, { verdict });
  if (opened === null) return;
  if (compared) return neighbour(1) ? step(1) : undefined;
  const next = shown.findIndex((other, number) => number > opened && other.clip);
  if (next < 0) say(`${row.id} is ${VERDICTS[verdict]}. It is the last clip.`);
  else open(next);
}

function commitNote() {
  if (opened !== null && current()?.clip) review(current(), { note: $("note").value.trim() && $("note").value || null });
}

function undo() {
  const [row, before] = undoable.pop() ?? [];
  if (!row) return say("Nothing to undo.");
  const same = (other) => other.clip === row.clip, wasOpen = opened !== null;
  setReview(rows.find(same) ?? row, before);
  const number = shown.findIndex(same);
  if (compared?.some(same)) { selected = compared.findIndex(same); show(); }
  else if (wasOpen && number >= 0) { opened = null; open(number); }
  else if (number >= 0) focusCard(number);
  say(`Undone: ${row.id}`);
}

/** Store the reviews: by the server, or in this browser until they are saved as a file. */
async function keep() {
  if (!isLive) {
    try { localStorage.setItem(STORED, JSON.stringify([...own.values()])); }
    catch { say("This browser does not keep reviews: save them before you close the page."); }
    return;
  }
  if (sending) return;
  sending = true;
  try {
    while (own.size) {
      const [[clip, review]] = own, { clip_sha256, verdict, stars, note } = review;
      const response = await fetch("reviews", { method: "POST", keepalive: true, headers: { "Content-Type": "application/json" }, body: JSON.stringify({ clip_sha256, verdict, stars, note }) });
      if (response.status >= 500) throw new Error(await response.text());
      // Rows that were asked for before do not have the review.
      if (own.get(clip) === review) { own.delete(clip); changes++; }
      if (!response.ok) say(`The review of ${review.id} was refused: ${await response.text()}`);
    }
  } catch (error) {
    say(`Not stored yet, trying again: ${own.size === 1 ? "1 review" : `${own.size} reviews`} (${error.message})`);
  } finally { sending = false; countReviews(); }
}

$("save").onclick = () => {
  const link = element("a", { href: URL.createObjectURL(new Blob([JSON.stringify([...own.values()], null, 1)], { type: "application/json" })), download: "reviews.json" });
  link.click();
  URL.revokeObjectURL(link.href);
  say("Saved. Import the file with: vidgen review OUT reviews.json");
};
const bar = reviewBar({}, null, true);
$("undo").before(bar);
$("undo").onclick = undo;
$("compare").onclick = compare;
$("note").addEventListener("change", commitNote);
$("note").addEventListener("keydown", (event) => {
  if (event.isComposing || (event.key !== "Escape" && (event.key !== "Enter" || event.shiftKey))) return;
  event.preventDefault(); // Escape would close the dialog
  commitNote();
  $("detail-id").focus();
});
window.addEventListener("beforeunload", (event) => { commitNote(); if (isLive && own.size) event.preventDefault(); });

// ---- keys

/** Move the focus to a card, which may be out of view. */
function focusCard(number) {
  const find = () => document.querySelector(`main article[data-number="${number}"] .open`);
  if (!find() && !list.hidden) {
    window.scrollTo(0, list.parentElement.offsetTop + Math.floor(number / layout.columns) * layout.step - window.innerHeight / 3);
    draw();
  }
  find()?.focus();
}

/** Return the number of the next card, of one in view if none has the focus. */
function nextCard(number, by) {
  const articles = [...document.querySelectorAll("main article")];
  if (number === null) return articles.filter((card) => card.getBoundingClientRect().top >= 0).map((card) => Number(card.dataset.number)).sort((a, b) => a - b)[0];
  if (!grid.hidden) return Number(articles[articles.findIndex((card) => Number(card.dataset.number) === number) + by]?.dataset.number ?? number);
  return Math.max(0, Math.min(shown.length - 1, number + by));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  const article = document.activeElement?.closest("article"), number = article ? Number(article.dataset.number) : null;
  const isOpen = opened !== null, row = isOpen ? current() : shown[number], key = event.key.toLowerCase();
  const arrow = { arrowleft: -1, arrowright: 1 }[key];
  if (arrow && !isOpen) focusCard(nextCard(number, arrow));
  else if (event.repeat) return;
  else if (key === "u") undo();
  else if (!row?.clip) return;
  else if (key === "a" || key === "r") {
    decide(row, key === "a" ? "accept" : "reject");
    // A filter may have taken the shot away, so that the next one has its number.
    if (!isOpen) focusCard(shown[number] === row ? nextCard(number, 1) : Math.min(number, shown.length - 1));
  } else if (/^[0-5]$/.test(key)) {
    review(row, { stars: Number(key) || null });
    if (!isOpen) focusCard(number);
  } else if (key === "n" || key === "c") {
    if (!isOpen) open(number);
    if (key === "n") $("note").focus();
    else compare();
  } else return;
  event.preventDefault();
});

$("copy").onclick = async () => {
  try { await navigator.clipboard.writeText($("line").value); $("copy").textContent = "Copied"; }
  catch { $("line").hidden = false; $("line").select(); }
};
browse(detail, step);
closable(detail);
detail.addEventListener("close", () => {
  commitNote();
  const row = current(), before = opened;
  detail.querySelector(".stage").replaceChildren();
  opened = compared = null;
  filter();
  focusCard(shown.includes(row) ? shown.indexOf(row) : Math.min(before, shown.length - 1));
});
playClips(document.querySelector("main"));
filters.addEventListener("input", filter);
filters.addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
window.addEventListener("resize", draw);
if (!isLive) try { for (const review of JSON.parse(localStorage.getItem(STORED)) ?? []) own.set(review.clip_sha256, review); } catch { /* Not allowed for files. */ }
setData(data);
// `vidgen watch` serves the page with new rows. A page that was opened from disk does not change.
let lastRows = "";
if (isLive) setInterval(async () => {
  if (own.size) keep();
  try {
    const before = changes, response = await fetch("rows.json"), text = await response.text();
    if (!response.ok || opened !== null || before !== changes || text === lastRows) return;
    lastRows = text;
    const id = document.activeElement?.closest("article")?.title;
    setData(JSON.parse(text));
    document.querySelector(`main article[title="${CSS.escape(id ?? "")}"] .open`)?.focus({ preventScroll: true });
  } catch { /* The watching process has stopped. */ }
}, data.refresh_s * 1000);
