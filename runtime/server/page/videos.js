// The videos: a card each, the newest first, changed as the server tells.

import * as api from "./api.js";
import { $, announce, clone, make, say, still } from "./dom.js";
import { view } from "./viewer.js";
import { colour, marked } from "./words.js";

const SURE = 4000; // milliseconds in which a second press deletes
const SMALL = 256; // pixels of a side below which pictures are enlarged with their pixels seen
const STATES = {
  // in the order in which a video has them
  queued: "Waiting",
  in_progress: "Being made",
  completed: "Done",
  failed: "Failed",
  cancelled: "Cancelled",
  expired: "Expired",
};

const cards = new Map(); // by id: {video, node, kind of media shown}
const ORDER = Object.keys(STATES);
const active = ({ status }) => status === "queued" || status === "in_progress";
// Finished, and its files are gone: so is what it was made of.
const gone = (video) => !active(video) && video.expires_at === null;

let wants; // {send, edit}, given by `start`
let hasMore = false;

// send: takes what is wanted (see api.js); edit: puts it into the form.
export function start(given) {
  wants = given;
  $("older").addEventListener("click", async () => {
    const last = [...cards.values()].at(-1);
    await load(last.video.id).catch((error) => announce(error.message));
  });
}

// Asks for the newest videos, or those before one, and shows them.
export async function load(after) {
  const { data, has_more: more } = await api.list(after);
  if (!after) {
    const listed = new Set(data.map(({ id }) => id));
    const oldest = data.at(-1)?.created_at ?? 0;
    for (const [id, { video }] of cards) {
      if (!listed.has(id) && (video.created_at > oldest || !more)) drop(id);
    }
  }
  if (after || cards.size <= data.length) hasMore = more;
  data.forEach((video, at) => show(video, at ? data[at - 1].id : after));
  showWhole();
}

// Shows a video; after: the id of the one that it stands behind, if it is new here. What was answered may have been
// overtaken by what was told since: such an answer changes nothing.
export function show(video, after) {
  const card = cards.get(video.id);
  if (card && ORDER.indexOf(video.status) < ORDER.indexOf(card.video.status)) return card;
  return told(video, after);
}

// Shows what the stream tells, which is always the last word.
export function told(video, after) {
  let card = cards.get(video.id);
  if (!card) {
    card = { video, node: clone("card"), shown: null };
    fillCard(card);
    if (after && cards.has(after)) cards.get(after).node.after(card.node);
    else $("videos").prepend(card.node);
    cards.set(video.id, card);
    sortCards();
  } else if (card.video.status !== video.status) {
    if (!active(video) || video.status === "in_progress") announce(`${STATES[video.status]}: ${video.prompt}`);
  }
  card.video = video;
  render(card);
  showWhole();
  return card;
}

export function drop(id) {
  const card = cards.get(id);
  if (!card) return;
  const next = card.node.nextElementSibling ?? card.node.previousElementSibling;
  const focused = card.node.contains(document.activeElement);
  watcher.unobserve(card.node);
  card.node.remove();
  cards.delete(id);
  if (focused) (next?.querySelector(".actions button:not([hidden])") ?? $("videos-title")).focus();
  showWhole();
}

export function step({ id, ...progress }) {
  const card = cards.get(id);
  if (!card || !active(card.video)) return;
  Object.assign(card.video, progress);
  renderState(card);
}

export function places(found) {
  for (const [id, place] of Object.entries(found)) {
    const card = cards.get(id);
    if (card?.video.status !== "queued") continue;
    card.video.queue_position = place;
    renderState(card);
  }
}

// A sharper picture of a video that is being made, laid over the one before.
export async function preview({ id, url }) {
  const card = cards.get(id);
  if (!card) return;
  const picture = make("img", { src: url, alt: "", className: "preview" });
  try {
    await picture.decode();
  } catch {
    return; // it is finished, and has better
  }
  if (card.video.status !== "in_progress") return;
  const samples = card.node.querySelector(".samples");
  const before = [...samples.querySelectorAll(".preview, .waiting")];
  samples.append(picture);
  setTimeout(() => before.forEach((node) => node.remove()), still.matches ? 0 : 300);
}

// The cards in the order in which they are shown, which is how Map keeps them for "older".
function sortCards() {
  const byNode = new Map([...cards].map(([id, card]) => [card.node, [id, card]]));
  cards.clear();
  for (const node of $("videos").children) cards.set(...byNode.get(node));
}

function showWhole() {
  const busy = [...cards.values()].filter(({ video }) => active(video)).length;
  document.title = busy ? `(${busy}) ConceptMaster` : "ConceptMaster";
  $("empty").hidden = cards.size > 0;
  $("older").hidden = !hasMore || !cards.size;
}

// ---- a card

function fillCard(card) {
  const { node, video } = card;
  const on = (part, action) =>
    node.querySelector(part).addEventListener("click", ({ currentTarget }) => act(card, currentTarget, action));
  const [width, height] = (video.size ?? "1x1").split("x").map(Number);
  node.querySelector(".media").style.aspectRatio = `${width} / ${height}`;
  node.classList.toggle("small", Math.min(width, height) < SMALL);
  node.querySelector(".words").replaceChildren(...marked(video.prompt, video.labels));
  on(".cancel", async () => show(await api.cancel(video.id)));
  on(".retry", async () => wants.send(await wanted(card.video, card.video.seed)));
  on(".reseed", async () => wants.send(await wanted(card.video, api.randomSeed())));
  on(".edit", async () => wants.edit(await wanted(card.video, card.video.seed)));
  on(".delete", (button) => removeIfSure(card, button));
  node.querySelector(".pause").addEventListener("click", () => {
    node.classList.toggle("paused");
    playOrPause(node, true);
  });
  watcher.observe(node);
}

async function act(card, button, action) {
  if (card.busy) return;
  const error = card.node.querySelector(".error");
  card.busy = true;
  try {
    await action(button);
    if (card.video.status !== "failed") say(error, "");
  } catch (problem) {
    if (problem.status === 404) drop(card.video.id);
    else say(error, problem.message);
  } finally {
    card.busy = false;
  }
}

// What a video was made of, to be asked for again.
async function wanted(video, seed) {
  const pictures = gone(video) ? [] : video.labels.map(async (label, at) => ({
    label,
    file: await api.picture(api.reference(video.id, at)),
  }));
  const { prompt, model, n, options } = video;
  return { prompt, model, seed, n, options, pictures: await Promise.all(pictures) };
}

async function removeIfSure({ video }, button) {
  if (button.classList.contains("sure")) {
    await api.remove(video.id);
    announce("deleted");
    drop(video.id);
    return;
  }
  button.classList.add("sure");
  button.append("Really delete?");
  button.setAttribute("aria-label", "Really delete?");
  announce("press again to delete");
  setTimeout(() => {
    button.classList.remove("sure");
    button.lastChild.remove();
    button.setAttribute("aria-label", "Delete");
  }, SURE);
}

function render(card) {
  const { video, node } = card;
  const part = (name) => node.querySelector(name);
  const focused = node.querySelector(".actions :focus");
  node.dataset.id = video.id;
  node.dataset.status = video.status;
  renderState(card);
  renderReferences(card);
  const list = part(".warnings");
  list.hidden = !video.warnings.length;
  list.replaceChildren(...video.warnings.map((warning) => make("li", {}, warning)));
  say(part(".error"), video.error?.message ?? "");
  const there = { completed: !gone(video) && video.status === "completed", active: active(video), ended: !active(video) };
  for (const [name, shown] of [
    [".cancel", there.active],
    [".retry", there.ended && !gone(video) && video.status !== "completed"],
    [".reseed", there.completed],
    [".edit", there.ended],
    [".download", there.completed],
    [".delete", there.ended],
  ]) {
    part(name).hidden = !shown;
  }
  if (focused?.hidden) node.querySelector(".actions > :not([hidden])").focus();
  part(".download").href = there.completed ? api.content(video.id, "video", 0) : "";
  part(".download").download = `${video.id}.mp4`;
  const kind = there.completed ? "videos" : there.active ? video.status : "nothing";
  if (card.shown !== kind) renderMedia(card, kind);
}

function renderState({ video, node }) {
  const part = (name) => node.querySelector(name);
  const { status, queue_position: place, step: done, steps } = video;
  const texts = {
    queued: place ? `Waiting: ${place} before it` : "Waiting: it is next",
    in_progress: done ? `Step ${done} of ${steps}` : "Starting",
    expired: "Its files have expired",
  };
  part(".state-text").textContent = texts[status] ?? STATES[status];
  const seconds = Object.values(video.timings).reduce((sum, value) => sum + value, 0);
  const facts = [`seed ${video.seed}`, `${Math.round(steps / video.n)} steps`, seconds ? `${seconds.toFixed(1)} s` : null];
  part(".facts").replaceChildren(facts.filter(Boolean).join(" · "), " · ", when(video.created_at));
  const bar = part("progress");
  bar.hidden = !active(video);
  bar.setAttribute("aria-label", "progress");
  if (status === "in_progress" && done) Object.assign(bar, { max: steps, value: done });
  else bar.removeAttribute("value");
}

function renderReferences({ video, node }) {
  const list = node.querySelector(".references");
  const shown = gone(video) ? 0 : video.labels.length;
  if (list.childElementCount === shown) return;
  list.replaceChildren(
    ...video.labels.slice(0, shown).map((label, at) =>
      make("li", { className: colour(at) }, make("img", { src: api.reference(video.id, at), alt: "", loading: "lazy" }), label),
    ),
  );
}

function renderMedia(card, kind) {
  const { video, node } = card;
  const samples = node.querySelector(".samples");
  const before = [...samples.children];
  card.shown = kind;
  node.querySelector(".pause").hidden = kind !== "videos";
  if (kind === "in_progress" && before.length) return; // what waited goes on until there is a preview
  samples.classList.toggle("several", kind === "videos" && video.n > 1);
  if (kind === "videos") {
    const made = Array.from({ length: video.n }, (_, index) => sample(video, index));
    samples.append(...made);
    const first = made[0].firstElementChild;
    const swap = () => before.forEach((old) => old.remove());
    if (before.length && video.n === 1) first.addEventListener("loadeddata", swap, { once: true });
    else swap();
    playOrPause(node);
    return;
  }
  const pictures = gone(video) ? [] : video.labels.map((_, at) => make("img", { src: api.reference(video.id, at), alt: "" }));
  samples.replaceChildren(make("div", { className: "waiting" }, ...pictures));
}

function sample(video, index) {
  const clip = make("video", {
    src: api.content(video.id, "video", index),
    poster: api.content(video.id, "thumbnail", index),
    loop: true,
    muted: true,
    playsInline: true,
    preload: "none",
  });
  const name = video.n > 1 ? `Open video ${index + 1} of ${video.n}` : "Open the video";
  const button = make("button", { type: "button", className: "sample" }, clip);
  button.setAttribute("aria-label", `${name}: ${video.prompt}`);
  button.addEventListener("click", () => view(video, index));
  return button;
}

// Only what is seen plays, and where people want less motion, only what they ask for.
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    target.classList.toggle("seen", isIntersecting);
    playOrPause(target);
  }
});

function playOrPause(node, asked = false) {
  if (still.matches && !asked && !node.classList.contains("started")) node.classList.add("paused", "started");
  const plays = node.classList.contains("seen") && !node.classList.contains("paused");
  for (const clip of node.querySelectorAll("video")) {
    if (plays) clip.play().catch(() => {}); // it was paused or removed in the meantime
    else clip.pause();
  }
  const paused = node.classList.contains("paused");
  const button = node.querySelector(".pause");
  button.setAttribute("aria-label", paused ? "Play" : "Pause");
  button.querySelector("use").setAttribute("href", paused ? "#i-play" : "#i-pause");
}

function when(seconds) {
  const date = new Date(seconds * 1000);
  const today = date.toDateString() === new Date().toDateString();
  const style = today ? { timeStyle: "short" } : { dateStyle: "medium" };
  const text = new Intl.DateTimeFormat(undefined, style).format(date);
  return make("time", { dateTime: date.toISOString(), title: date.toLocaleString() }, text);
}
