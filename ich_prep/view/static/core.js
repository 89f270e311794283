// The namespace of the page, what is shown at the moment, and the helpers that make elements.
"use strict";

const ICH = {
  about: null, // of the dataset
  list: null, // of volumes, by column
  source: null, // where data come from: a server, or files
  state: {
    line: -1, // of the volume shown
    volume: null,
    slice: 0, // among all slices of the volume, those without pixels too
    mode: "single", // or "windows", "planes"
    window: null, // {name, center, width, channel}
    tool: "scroll", // what a drag does: "scroll", "window", "pan"
    view: { zoom: 1, x: 0, y: 0 },
    point: null, // [column, row] at which the reformats cut; null: the center
    heat: false, // class activation maps
    classIndex: 0, // of the class that n, p and g refer to
  },
  listeners: new Map(),
};

ICH.on = (name, listener) => {
  if (!ICH.listeners.has(name)) ICH.listeners.set(name, []);
  ICH.listeners.get(name).push(listener);
};

ICH.emit = (name, value) => {
  for (const listener of ICH.listeners.get(name) ?? []) listener(value);
};

ICH.clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// Text is only ever set as text, never as HTML. Control and direction characters are made visible.
ICH.plain = (value) =>
  String(value ?? "").replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g, (character) =>
    `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );

ICH.element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined) continue;
    made.append(child instanceof Node ? child : ICH.plain(child));
  }
  return made;
};

ICH.byId = (id) => document.getElementById(id);

ICH.words = (name) => ICH.plain(name).replaceAll("_", " ");

ICH.number = (value, digits = 2) =>
  typeof value === "number" ? value.toLocaleString("en", { maximumFractionDigits: digits }) : ICH.plain(value);

let toastTimer = 0;
ICH.toast = (message, kind = "") => {
  const toast = ICH.byId("toast");
  toast.textContent = ICH.plain(message);
  toast.className = `shown ${kind}`;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => toast.classList.remove("shown"), kind === "error" ? 8000 : 2500);
};

// Draw at most once per frame, however many events ask for it.
let drawing = false;
ICH.redraw = () => {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    ICH.emit("draw");
  });
};
