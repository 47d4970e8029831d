// The form: pictures with labels, the prompt, options. What it makes of them is handed on as `wanted`, see api.js.

import * as api from "./api.js";
import { $, announce, clone, make, say } from "./dom.js";
import { examplesFor } from "./examples.js";
import { colour, labelOf, marked, missing, unknown } from "./words.js";

const PAUSE = 400; // milliseconds without typing after which hints are given
const FIELDS = ["model", "pictures", "prompt", "seed", "n", ...options().map((field) => field.id)];

let models = [];
let modelsCame; // called when there are models: who is faster than they are waits for them
const ready = new Promise((done) => (modelsCame = done));
let pictures = []; // {label, file, url, node}, as they are shown
let sending = false;
let hinting = 0;
let lastExample = -1;

function options() {
  return [...document.querySelectorAll("[data-option]")];
}

const model = () => models.find(({ id }) => id === $("model").value) ?? models[0];

// send: takes what is wanted, resolves once the server has accepted it.
export function start(send) {
  $("add").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => {
    addFiles([...$("files").files]);
    $("files").value = "";
  });
  addEventListener("paste", ({ clipboardData }) => addFiles([...clipboardData.files]));
  takeDrops();
  $("prompt").addEventListener("input", promptChanged);
  $("prompt").addEventListener("blur", () => (caret = [$("prompt").selectionStart, $("prompt").selectionEnd]));
  $("seed").addEventListener("input", () => ($("random").hidden = !$("seed").value));
  $("random").addEventListener("click", () => setSeed(""));
  $("n").addEventListener("input", nameButton);
  $("model").addEventListener("change", modelChanged);
  $("example").addEventListener("click", () => {
    const fitting = examplesFor(model());
    lastExample = (lastExample + 1) % fitting.length;
    fillExample(fitting[lastExample], model().id);
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit(send);
  });
  $("composer").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const named = event.target.matches(".label");
    if (event.ctrlKey || event.metaKey) submit(send);
    else if (named) nextField(event.target).focus();
    if (named || event.ctrlKey || event.metaKey) event.preventDefault();
  });
}

function nextField(label) {
  const labels = pictures.map(({ node }) => node.querySelector(".label"));
  return labels[labels.indexOf(label) + 1] ?? $("prompt");
}

export function setModels(found) {
  const before = $("model").value;
  models = found;
  $("model").replaceChildren(...models.map(({ id }) => make("option", { value: id }, id)));
  if (models.some(({ id }) => id === before)) $("model").value = before;
  $("model-field").hidden = models.length < 2;
  modelChanged();
  modelsCame();
}

function modelChanged() {
  const { concepts: { least, most }, takes_boxes, vocabulary } = model();
  const defaults = { ...model().defaults, ...(takes_boxes && { boxes: "" }) };
  $("pictures-field").hidden = most === 0;
  $("pictures-hint").textContent = least === most ? `${most}` : least ? `${least} to ${most}` : `up to ${most}`;
  for (const field of options()) {
    field.placeholder = defaults[field.id] ?? "";
    field.closest(".field").hidden = !(field.id in defaults) && !field.value;
  }
  $("negative_prompt").placeholder ||= "what should not be seen";
  $("boxes").placeholder = '{"cat": [0.1, 0.2, 0.5, 0.8]}';
  $("labels").replaceChildren(...(vocabulary?.labels ?? []).map((value) => make("option", { value })));
  $("example").hidden = !examplesFor(model()).length;
  showVocabulary(vocabulary);
  picturesChanged();
}

// ---- pictures

async function addFiles(files) {
  if (!files.length) return;
  await ready;
  say($("pictures-error"), "");
  const shown = files.filter(({ type }) => type.startsWith("image/"));
  const room = model().concepts.most - pictures.length;
  for (const file of shown.slice(0, room)) add(labelOf(file.name, model().vocabulary), file);
  const other = files.find((file) => !shown.includes(file));
  if (other) complain("pictures", `${other.name} is not a picture`);
  if (shown.length > room) complain("pictures", `the model ${model().id} takes at most ${model().concepts.most} pictures`);
  picturesChanged();
  pictures.find(({ label }) => !label)?.node.querySelector(".label").focus();
}

function add(label, file) {
  const picture = { label, file, url: URL.createObjectURL(file), node: clone("tile") };
  const { node } = picture;
  const part = (name) => node.querySelector(name);
  part("img").src = picture.url;
  part(".label").value = label;
  part(".label").addEventListener("input", ({ target }) => {
    picture.label = target.value;
    say($("pictures-error"), "");
    promptChanged();
  });
  part(".remove").addEventListener("click", () => {
    const at = pictures.indexOf(picture);
    forget(picture);
    picturesChanged();
    (pictures[Math.min(at, pictures.length - 1)]?.node.querySelector(".remove") ?? $("add")).focus();
    announce("picture removed");
  });
  part(".before").addEventListener("click", () => move(picture, -1, ".before"));
  part(".after").addEventListener("click", () => move(picture, 1, ".after"));
  node.addEventListener("dragstart", ({ dataTransfer }) => {
    dataTransfer.setData("text/x-tile", String(pictures.indexOf(picture)));
    dataTransfer.effectAllowed = "move";
  });
  node.addEventListener("drop", (event) => {
    const from = event.dataTransfer.getData("text/x-tile");
    if (from === "") return;
    event.preventDefault();
    move(pictures[from], pictures.indexOf(picture) - from);
  });
  pictures.push(picture);
}

function forget(picture) {
  URL.revokeObjectURL(picture.url);
  pictures = pictures.filter((other) => other !== picture);
}

function move(picture, by, button) {
  const from = pictures.indexOf(picture);
  pictures.splice(from, 1);
  pictures.splice(from + by, 0, picture);
  picturesChanged();
  if (button) {
    const pressed = picture.node.querySelector(button);
    (pressed.disabled ? picture.node.querySelector(".moves button:enabled") : pressed).focus();
  }
  announce(`picture ${from + by + 1} of ${pictures.length}`);
}

function picturesChanged() {
  const last = pictures.length - 1;
  pictures.forEach(({ label, node }, at) => {
    node.className = `tile ${colour(at)}`;
    const name = label || `picture ${at + 1}`;
    node.querySelector("img").alt = name;
    for (const [part, what] of [
      [".label", `Picture ${at + 1} shows`],
      [".remove", `Remove ${name}`],
      [".before", `Move ${name} forward`],
      [".after", `Move ${name} back`],
    ]) {
      node.querySelector(part).setAttribute("aria-label", what);
    }
    node.querySelector(".before").disabled = at === 0;
    node.querySelector(".after").disabled = at === last;
    node.querySelector(".moves").hidden = last === 0;
    node.querySelector(".label").hidden = !model().prompt_names_pictures;
  });
  const nodes = pictures.map(({ node }) => node);
  if ([...$("pictures").children].some((node, at) => node !== nodes[at]) || nodes.length !== $("pictures").children.length) {
    $("pictures").replaceChildren(...nodes);
  }
  $("add").hidden = pictures.length >= model().concepts.most;
  promptChanged();
}

function takeDrops() {
  const wanted = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (wanted(event)) document.body.classList.add("dropping");
    if (wanted(event) || event.dataTransfer?.types.includes("text/x-tile")) event.preventDefault();
  });
  addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!wanted(event)) return;
    event.preventDefault();
    addFiles([...event.dataTransfer.files]);
  });
}

// ---- the prompt

function promptChanged() {
  const prompt = $("prompt").value;
  $("marks").replaceChildren(...marked(prompt, pictures.map(({ label }) => label)), "\n");
  say($("prompt-error"), "");
  $("prompt").removeAttribute("aria-invalid");
  clearTimeout(hinting);
  hinting = setTimeout(hint, PAUSE);
}

async function hint() {
  await ready;
  const prompt = $("prompt").value;
  const found = [];
  if (prompt.trim()) {
    const labels = model().prompt_names_pictures ? pictures.map(({ label }) => label) : [];
    for (const label of missing(prompt, labels)) {
      const button = make("button", { type: "button", className: "quiet" }, "Add it");
      button.addEventListener("click", () => insert(label));
      found.push(make("li", {}, `“${label}” is not in the prompt, so its picture may not be shown. `, button));
    }
    const strange = unknown(prompt, model().vocabulary).map((word) => `“${word}”`);
    if (strange.length) found.push(make("li", {}, `The model was not taught ${strange.join(", ")}.`));
  }
  const text = (nodes) => nodes.map((node) => node.textContent).join();
  if (text(found) !== text([...$("hints").children])) $("hints").replaceChildren(...found);
}

function showVocabulary(vocabulary) {
  $("words").hidden = !vocabulary;
  if (!vocabulary) return;
  $("words-title").textContent = vocabulary.open ? "Words it was taught; others do, too" : "Words it knows";
  const groups = { ...(vocabulary.labels.length && { things: vocabulary.labels }), ...vocabulary.phrases };
  say($("phrases"), "");
  $("groups").replaceChildren(
    ...Object.entries(groups).map(([name, phrases]) => {
      const button = make("button", { type: "button", className: "chip" }, name[0].toUpperCase() + name.slice(1));
      button.setAttribute("aria-expanded", "false");
      button.setAttribute("aria-controls", "phrases");
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") === "false";
        for (const other of $("groups").children) other.setAttribute("aria-expanded", "false");
        button.setAttribute("aria-expanded", String(open));
        $("phrases").hidden = !open;
        $("phrases").setAttribute("aria-label", name);
        $("phrases").replaceChildren(...phrases.map((phrase) => chip(phrase, name === "backgrounds" ? "," : "")));
      });
      return button;
    }),
  );
}

function chip(phrase, comma) {
  const button = make("button", { type: "button", className: "chip" }, phrase);
  button.addEventListener("click", () => insert(phrase, comma));
  return button;
}

// Puts words into the prompt, where the cursor is, with what must stand between them.
let caret = null; // kept here: a browser may forget it when its field is left

function insert(words, comma = "") {
  const field = $("prompt");
  const [from, to] = caret ?? [field.value.length, field.value.length];
  const before = field.value.slice(0, from).trimEnd();
  const after = field.value.slice(to).trimStart();
  const lead = before && comma && !before.endsWith(comma) ? `${before}${comma}` : before;
  const start = `${lead}${lead ? " " : ""}${words}`;
  field.value = `${start}${after && !/^[.,;:!?]/.test(after) ? " " : ""}${after}`;
  caret = [start.length, start.length];
  field.setSelectionRange(...caret);
  promptChanged();
  announce(`added: ${words}`);
}

// ---- all of it

function setSeed(seed) {
  $("seed").value = seed;
  $("random").hidden = seed === "";
}

function nameButton() {
  const n = Number($("n").value) || 1;
  $("send").textContent = sending ? "Sending…" : n > 1 ? `Make ${n} videos` : "Make video";
}

// Puts what was wanted before into the form. wanted: as of api.create.
export async function fill(wanted) {
  await ready;
  if (wanted.model && models.some(({ id }) => id === wanted.model)) $("model").value = wanted.model;
  pictures.forEach(forget);
  pictures = [];
  for (const { label, file } of wanted.pictures) add(label, file);
  $("prompt").value = wanted.prompt;
  caret = null;
  setSeed(String(wanted.seed ?? ""));
  $("n").value = wanted.n ?? 1;
  for (const field of options()) field.value = written(wanted.options?.[field.id] ?? "");
  if (Object.keys(wanted.options ?? {}).length) $("more").open = true;
  clearComplaints();
  modelChanged();
  nameButton();
}

const written = (value) => (typeof value === "object" ? JSON.stringify(value) : value);

// Whether it is filled in: where the server does not answer, that is said.
export async function fillExample(example, id) {
  clearComplaints();
  const named = example.pictures.map(async ({ label, path }) => ({ label, file: await api.picture(path) }));
  try {
    await fill({ ...example, model: id, pictures: await Promise.all(named) });
  } catch (error) {
    complain(null, error.message);
    return false;
  }
  return true;
}

export async function submit(send) {
  if (sending) return;
  clearComplaints();
  sending = true;
  $("send").setAttribute("aria-busy", "true");
  nameButton();
  try {
    await ready;
    const wanted = read();
    if (wanted) await send(wanted);
  } catch (error) {
    complain(about(error), error.message);
  } finally {
    sending = false;
    $("send").removeAttribute("aria-busy");
    nameButton();
  }
}

// What is wanted; null where something is left out, which is said.
function read() {
  const prompt = $("prompt").value.trim();
  const unnamed = model().reads_labels && pictures.find(({ label }) => !label.trim());
  if (unnamed) {
    complain("pictures", "say what each picture shows, in a word of the prompt", unnamed.node.querySelector(".label"));
  }
  if (!prompt) complain("prompt", "say what happens in the video");
  if (unnamed || !prompt) return null;
  return {
    prompt,
    model: model().id,
    seed: $("seed").value.trim() || api.randomSeed(),
    n: $("n").value || 1,
    options: Object.fromEntries(options().map((field) => [field.id, field.value.trim()])),
    pictures: pictures.map(({ label, file }, at) => ({ label: label.trim() || `picture ${at + 1}`, file })),
  };
}

// The field that an error is about; null: none, or all.
function about({ param }) {
  if (["label", "input_reference", "input_references"].includes(param)) return "pictures";
  return FIELDS.includes(param) ? param : null;
}

// Says what is wrong beside the field, and leads there: to the first of several.
function complain(name, message, field = $(name === "pictures" ? "add" : (name ?? "send"))) {
  const first = !$("composer").querySelector(".error:not([hidden])");
  say($(`${name ?? "form"}-error`), message);
  announce(message);
  if (name && name !== "pictures") field.setAttribute("aria-invalid", "true");
  field.closest("details")?.setAttribute("open", "");
  if (first) field.focus();
}

function clearComplaints() {
  for (const node of $("composer").querySelectorAll(".error")) say(node, "");
  for (const node of $("composer").querySelectorAll("[aria-invalid]")) node.removeAttribute("aria-invalid");
}
