// Puts the page together: who asks, which models there are, the form, the videos and what the server tells of them.

import * as api from "./api.js";
import * as composer from "./composer.js";
import { $, announce, make, say, still } from "./dom.js";
import { examplesFor } from "./examples.js";
import * as videos from "./videos.js";
import * as viewer from "./viewer.js";
import { marked } from "./words.js";

async function send(wanted) {
  const { node } = videos.show(await api.create(wanted));
  announce("sent");
  node.scrollIntoView({ block: "nearest", behavior: still.matches ? "auto" : "smooth" });
}

async function edit(wanted) {
  await composer.fill(wanted);
  $("composer").scrollIntoView({ block: "start", behavior: still.matches ? "auto" : "smooth" });
  $("prompt").focus({ preventScroll: true });
}

// ---- who asks

let asking = null;

// Asks for a key until there is a right one.
function signIn() {
  asking ??= new Promise((done) => {
    $("sign-in").showModal();
    $("sign-in").addEventListener("close", () => done(), { once: true });
  }).finally(() => (asking = null));
  return asking;
}

function startSession() {
  api.whenSignedOut(signIn);
  $("sign-in").addEventListener("cancel", (event) => event.preventDefault()); // there is nothing behind it
  $("sign-in-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await api.sendKey($("key").value.trim());
      $("key").value = "";
      say($("key-error"), "");
      await showAccount();
      $("sign-in").close();
    } catch (error) {
      say($("key-error"), error.message);
      announce(error.message);
      $("key").focus();
    }
  });
  $("sign-out").addEventListener("click", async () => {
    try {
      await api.signOut();
      location.reload();
    } catch (error) {
      say($("banner"), error.message);
    }
  });
}

async function showAccount() {
  const { needed, name } = await api.session();
  $("account").hidden = !needed || name === null;
  $("account-name").textContent = name ?? "";
  return !needed || name !== null;
}

// ---- the start

// Of the first model that has any.
function showExamples(models) {
  const model = models.find((each) => examplesFor(each).length);
  const found = model ? examplesFor(model) : [];
  $("empty-text").textContent = found.length
    ? "Your videos will be here. Begin with one of these, in one click:"
    : "Your videos will be here.";
  $("examples").replaceChildren(
    ...found.map((example) => {
      const pictures = example.pictures.map(({ label, path }) => make("img", { src: path, alt: label }));
      const words = make("span", {}, ...marked(example.prompt, example.pictures.map(({ label }) => label)));
      const button = make(
        "button",
        { type: "button" },
        make("span", { className: "shown" }, ...pictures),
        words,
        make("strong", {}, "Make this video"),
      );
      button.addEventListener("click", async () => {
        if (await composer.fillExample(example, model.id)) await composer.submit(send);
      });
      return make("li", {}, button);
    }),
  );
}

let served = ""; // the models, as they were told last

// When we are connected, and connected again.
async function refresh() {
  try {
    const models = await api.models();
    if (JSON.stringify(models) !== served) {
      served = JSON.stringify(models);
      composer.setModels(models);
      showExamples(models);
    }
    await videos.load();
    say($("banner"), "");
    document.body.classList.add("ready");
  } catch (error) {
    say($("banner"), error.message);
  }
}

async function start() {
  startSession();
  viewer.start();
  composer.start(send);
  videos.start({ send, edit });
  try {
    if (!(await showAccount())) await signIn();
  } catch (error) {
    say($("banner"), error.message);
  }
  api.listen(
    {
      status: (video) => videos.told(video),
      step: videos.step,
      preview: videos.preview,
      queue: videos.places,
      deleted: ({ id }) => videos.drop(id),
    },
    refresh,
    () => say($("banner"), "The server does not answer. Videos that it has accepted are not lost; trying again…"),
  );
}

start();
