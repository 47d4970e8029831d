// What stands in a prompt: the pictures' labels, and words that a model was not taught.

import { make } from "./dom.js";

const COLOURS = 6; // see style.css

const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
const tidy = (text) => text.trim().replace(/\s+/g, " ");
const hasCase = (text) => text.toLowerCase() !== text.toUpperCase();

// A label as a whole word, except in scripts that may have no spaces between words.
function pattern(label) {
  const inner = escaped(tidy(label)).replaceAll(" ", "\\s+");
  return hasCase(label) ? `(?<![\\p{L}\\p{N}])${inner}(?![\\p{L}\\p{N}])` : inner;
}

// The prompt in pieces [text, label's number or -1], longer labels first.
function pieces(prompt, labels) {
  const named = labels.map((label, number) => [label, number]).filter(([label]) => tidy(label));
  named.sort((a, b) => b[0].length - a[0].length);
  if (!named.length) return prompt ? [[prompt, -1]] : [];
  const every = new RegExp(named.map(([label]) => `(${pattern(label)})`).join("|"), "giu");
  const found = [];
  let at = 0;
  for (const match of prompt.matchAll(every)) {
    if (match.index > at) found.push([prompt.slice(at, match.index), -1]);
    found.push([match[0], named[match.slice(1).findIndex((part) => part !== undefined)][1]]);
    at = match.index + match[0].length;
  }
  if (at < prompt.length) found.push([prompt.slice(at), -1]);
  return found;
}

// The class that gives a picture's colour.
export const colour = (at) => `c${at % COLOURS}`;

// A prompt whose labels are marked in the colours of their pictures.
export const marked = (prompt, labels) =>
  pieces(prompt, labels).map(([text, at]) => (at < 0 ? text : make("mark", { className: colour(at) }, text)));

// Labels that the prompt does not have.
export const missing = (prompt, labels) =>
  labels.map(tidy).filter((label) => label && !new RegExp(pattern(label), "iu").test(prompt));

// Words of the prompt that are in no part of a closed vocabulary.
export function unknown(prompt, vocabulary) {
  if (!vocabulary || vocabulary.open) return [];
  const entries = [...vocabulary.words, ...vocabulary.labels, ...Object.values(vocabulary.phrases).flat()];
  const known = new Set(entries.flatMap((entry) => entry.toLowerCase().split(" ")));
  const words = prompt.split(/\s+/).map((word) => word.replace(/[.,;:!?]+$/, ""));
  return [...new Set(words)].filter((word) => word && !known.has(word.toLowerCase()));
}

// A label out of a file's name, where that says something: cat_2.png is a cat, IMG_0042.jpg is not told.
export function labelOf(fileName, vocabulary) {
  const name = tidy(fileName.replace(/\.[^.]*$/, "").replace(/[_\-\d().]+/g, " ")).toLowerCase();
  if (vocabulary && !vocabulary.open) {
    return name.split(" ").find((word) => vocabulary.labels.includes(word)) ?? "";
  }
  const nothing = /^(img|image|dsc|pxl|photo|picture|screenshot|untitled|unnamed|download|clipboard)/;
  return nothing.test(name) || name.length > 24 ? "" : name;
}
