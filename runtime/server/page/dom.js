// Small helpers for what is on the page.

export const $ = (id) => document.getElementById(id);

export const still = matchMedia("(prefers-reduced-motion: reduce)");

// A copy of the first element of a <template>.
export const clone = (id) => $(id).content.firstElementChild.cloneNode(true);

// An element with properties and children: make("p", {className: "hint"}, "text").
export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Text in a node that is only there when it says something.
export function say(node, text) {
  node.textContent = text;
  node.hidden = !text;
}

// To people who hear the page.
export function announce(text) {
  $("said").textContent = text;
}
