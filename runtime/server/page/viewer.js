// A video large, with its contact sheet and downloads.

import { content } from "./api.js";
import { $, still } from "./dom.js";
import { marked } from "./words.js";

let video = null;
let index = 0;

export function start() {
  $("viewer-close").addEventListener("click", () => $("viewer").close());
  $("viewer-before").addEventListener("click", () => show(index - 1));
  $("viewer-next").addEventListener("click", () => show(index + 1));
  $("viewer").addEventListener("close", () => $("viewer-video").removeAttribute("src"));
  $("viewer").addEventListener("click", ({ target }) => {
    if (target === $("viewer")) target.close(); // beside it
  });
}

export function view(shown, at) {
  video = shown;
  show(at);
  $("viewer").showModal();
}

function show(at) {
  index = (at + video.n) % video.n;
  const ending = video.n > 1 ? `-${index}` : "";
  $("viewer-title").replaceChildren(...marked(video.prompt, video.labels));
  $("viewer-video").style.aspectRatio = video.size?.replace("x", " / ") ?? "";
  $("viewer-video").src = content(video.id, "video", index);
  $("viewer-video").autoplay = !still.matches;
  $("viewer-picture").src = content(video.id, "spritesheet", index);
  $("viewer-picture").alt = `contact sheet: the pictures and the frames of “${video.prompt}”`;
  $("viewer-download").href = content(video.id, "video", index);
  $("viewer-download").download = `${video.id}${ending}.mp4`;
  $("viewer-sheet").href = content(video.id, "spritesheet", index);
  $("viewer-sheet").download = `${video.id}${ending}-sheet.png`;
  $("viewer-before").hidden = $("viewer-next").hidden = video.n === 1;
  const stages = Object.entries(video.timings).map(([stage, seconds]) => `${stage} ${seconds.toFixed(2)} s`);
  const which = video.n > 1 ? [`video ${index + 1} of ${video.n}`] : [];
  $("viewer-facts").textContent = [...which, `seed ${BigInt(video.seed) + BigInt(index)}`, video.model, video.size, ...stages].join(" · ");
}
