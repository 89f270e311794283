// Starts the page: opening volumes, moving through slices, windows, keyboard, tabs, help.
"use strict";

const KEPT_VOLUMES = 3; // whose pixels stay in memory
const opened = new Map(); // line -> Pixels, the latest last

ICH.open = async (line, row = null) => {
  if (line < 0) return;
  let volume;
  ICH.state.line = line;
  try {
    volume = await ICH.source.volume(line);
  } catch (error) {
    ICH.toast(error.message, "error");
    return;
  }
  if (ICH.state.line !== line) return; // another was opened meanwhile
  const pixels = opened.get(line) ?? new ICH.Pixels(line, volume.ok);
  opened.delete(line);
  opened.set(line, pixels);
  for (const [other, held] of opened) {
    if (other !== line) held.stop();
    if (opened.size > KEPT_VOLUMES && other !== line) opened.delete(other);
  }
  pixels.stopped = false;
  pixels.failed.clear(); // try again
  volume.pixels = pixels;
  volume.where = new ICH.Geometry(volume);
  ICH.state.volume = volume;
  ICH.state.view = { zoom: 1, x: 0, y: 0 };
  ICH.state.point = null;
  document.body.classList.remove("empty");
  const asked = row === null ? -1 : volume.slices.row.indexOf(row);
  ICH.buildPanes();
  ICH.emit("opened");
  ICH.go(asked >= 0 ? asked : firstSlice(volume), true);
};

// The slice to begin with: of the worst error, else the middle one of those that are positive, else the middle.
const firstSlice = (volume) => {
  const count = volume.slices.row.length;
  const { classes } = ICH.about;
  if (volume.probabilities) {
    const apart = volume.ok.map((_, index) =>
      Math.max(0, ...classes.map((name) => {
        const [label, probability] = [volume.labels[name][index], volume.probabilities[name][index]];
        return label === null || probability === null ? 0 : Math.abs(label - probability);
      })),
    );
    const worst = Math.max(...apart);
    if (worst >= 0.5) return apart.indexOf(worst);
  }
  const positive = volume.ok.map((_, index) => index).filter((index) => classes.some((name) => volume.labels[name][index] === 1));
  return positive.length ? positive[positive.length >> 1] : count >> 1;
};

ICH.go = (index, always = false) => {
  const { volume } = ICH.state;
  if (!volume) return;
  const slice = ICH.clamp(index, 0, volume.slices.row.length - 1);
  if (slice === ICH.state.slice && !always) return;
  ICH.state.slice = slice;
  volume.pixels.want(slice);
  ICH.byId("slice-number").textContent = `${slice + 1} / ${volume.slices.row.length}`;
  ICH.emit("slice");
  ICH.redraw();
};

ICH.movePoint = (axis, step) => {
  const point = [...ICH.point()];
  point[axis] = ICH.clamp(point[axis] + step, 0, ICH.about.size - 1);
  ICH.state.point = point;
  ICH.redraw();
};

ICH.zoom = (factor) => {
  const { view } = ICH.state;
  const zoom = ICH.clamp(view.zoom * factor, 1, 16);
  const ratio = zoom / view.zoom;
  ICH.state.view = zoom === 1 ? { zoom: 1, x: 0, y: 0 } : { zoom, x: view.x * ratio, y: view.y * ratio };
  ICH.redraw();
};

ICH.pan = (x, y) => {
  const { view } = ICH.state;
  const limit = view.zoom / 2;
  view.x = ICH.clamp(view.x + x, -limit, limit);
  view.y = ICH.clamp(view.y + y, -limit, limit);
  ICH.redraw();
};

// --- windows ----------------------------------------------------------------------------------------------------------

let presets = [];

const buildPresets = () => {
  const own = ICH.about.windows.map((window, k) => ({ ...window, channel: ICH.about.store === "hu" ? 0 : k }));
  const names = new Set(own.map((window) => window.name));
  const more = ICH.about.store === "hu" ? ICH.about.presets.filter((preset) => !names.has(preset.name)) : [];
  presets = [...own, ...more.map((preset) => ({ ...preset, channel: 0 }))];
  ICH.state.window = presets[0];
};

ICH.chooseWindow = (window) => {
  ICH.state.window = window;
  if (ICH.state.mode === "windows") ICH.chooseMode("single");
  showToolbar();
  ICH.redraw();
};

// To the right: wider; down: a lower center, so brighter.
ICH.dragWindow = (right, down) => {
  if (ICH.about.store !== "hu") {
    ICH.toast("This dataset stores windows, not HU: choose a window instead.");
    return;
  }
  if (ICH.state.mode === "windows") return;
  const { center, width } = ICH.state.window;
  const speed = Math.max(width / 250, 0.5);
  ICH.state.window = {
    name: "free", channel: 0,
    center: Math.round(ICH.clamp(center - down * speed, -1024, 3071)),
    width: Math.round(ICH.clamp(width + right * speed, 1, 4096)),
  };
  showToolbar();
  ICH.redraw();
};

ICH.nextWindow = (step) => {
  const now = presets.findIndex((preset) => preset.name === ICH.state.window.name);
  ICH.chooseWindow(presets[(now + step + presets.length) % presets.length]);
};

ICH.chooseMode = (mode) => {
  ICH.state.mode = mode === ICH.state.mode ? "single" : mode;
  ICH.buildPanes();
  showToolbar();
};

ICH.chooseTool = (tool) => {
  ICH.state.tool = tool;
  ICH.byId("stage").dataset.tool = tool;
  showToolbar();
};

ICH.chooseClass = (index) => {
  ICH.state.classIndex = index;
  ICH.emit("slice");
  ICH.redraw();
  ICH.toast(`n and p look for ${ICH.words(ICH.about.classes[index])}.`);
};

ICH.toggleHeat = () => {
  if (!ICH.about.explained) {
    ICH.toast("No class activation maps: write them with `ich-train explain RUN`, then open with --run.");
    return;
  }
  ICH.state.heat = !ICH.state.heat;
  if (ICH.state.heat && !ICH.state.volume?.explained?.[ICH.state.slice]) ICH.toast("This slice has no map.");
  showToolbar();
  ICH.redraw();
};

// --- toolbar ----------------------------------------------------------------------------------------------------------

const toggle = (text, title, pressed, onclick) =>
  ICH.element("button", { title, "aria-pressed": String(pressed), onclick }, text);

const showToolbar = () => {
  const { window, mode, tool, heat } = ICH.state;
  const focused = document.activeElement?.dataset?.key;
  const group = (label, ...buttons) => ICH.element("div", { class: "group", role: "group", "aria-label": label }, buttons);
  const chosen = (preset) => mode !== "windows" && window.name === preset.name;
  const free = window.name === "free" ? ICH.element("span", { class: "free" }, `${window.center}/${window.width} HU`) : null;
  ICH.byId("toolbar").replaceChildren(
    group("Window", ...presets.map((preset) =>
      toggle(ICH.words(preset.name), `${preset.center}/${preset.width} HU (w: next)`, chosen(preset), () => ICH.chooseWindow(preset)),
    ), free),
    group(
      "Layout",
      toggle("3 windows", "Three windows side by side (t)", mode === "windows", () => ICH.chooseMode("windows")),
      toggle("3 planes", "Axial, sagittal and coronal (m)", mode === "planes", () => ICH.chooseMode("planes")),
    ),
    group(
      "Drag",
      ...["scroll", ...(ICH.about.store === "hu" ? ["window"] : []), "pan"].map((name) =>
        toggle(name, `What a drag does (d: next). Right button or Shift: window; Ctrl: pan`, tool === name, () => ICH.chooseTool(name)),
      ),
    ),
    ...(ICH.about.explained ? [group("Map", toggle("Grad-CAM", "Class activation map of the chosen class (g)", heat, ICH.toggleHeat))] : []),
    ICH.element("output", { id: "slice-number", title: "Slice" }, ICH.state.volume ? `${ICH.state.slice + 1} / ${ICH.state.volume.slices.row.length}` : ""),
  );
  [...ICH.byId("toolbar").querySelectorAll("button")].forEach((button, index) => {
    button.dataset.key = index;
    if (String(index) === focused) button.focus();
  });
};

// --- tabs, help, keyboard ---------------------------------------------------------------------------------------------

ICH.tab = (name) => {
  document.body.dataset.tab = name;
  for (const button of document.querySelectorAll("[role=tab]")) {
    button.setAttribute("aria-selected", String(button.dataset.tab === name));
  }
  if (name === "quarantine") ICH.showQuarantine();
  else ICH.redraw();
};

const KEYS = [
  ["↓ ↑ or → ←", "next, previous slice"], ["PageDown PageUp", "ten slices"], ["Home End", "first, last slice"],
  ["] [", "next, previous volume"], ["n p", "next, previous positive slice of the chosen class"], ["e Shift+E", "next, previous prediction error"],
  ["c Shift+C", "choose the next, previous class"], ["w Shift+W", "next, previous window"], ["t", "three windows side by side"],
  ["m", "three planes: axial, sagittal, coronal"], ["d", "what a drag does: scroll, window, pan"], ["g", "Grad-CAM of the chosen class"],
  ["+ − 0", "zoom in, out, fit"], ["1 … 9", "mark this class: positive, or negative if it is positive"],
  ["Shift+1 … 9", "mark this class unknown"], ["u", "undo the last mark"], ["o", "go to the note"], ["/", "go to the search field"],
  ["l", "go to the list of volumes"], ["i q", "images, quarantine"], ["?", "this help"], ["Esc", "back to the images"],
];

const buildHelp = () => {
  const rows = KEYS.map(([keys, what]) => ICH.element(
    "tr", {}, ICH.element("th", { scope: "row" }, keys.split(" ").map((key) => (/^(or|…)$/.test(key) ? ` ${key} ` : ICH.element("kbd", {}, key)))),
    ICH.element("td", {}, what),
  ));
  const help = ICH.byId("help");
  help.replaceChildren(
    ICH.element("h2", { id: "help-title" }, "Keys"),
    ICH.element("table", {}, ICH.element("tbody", {}, rows)),
    ICH.element("p", { class: "muted" }, "Mouse: the wheel moves through the slices, Ctrl and wheel zooms. Drag with the right button or Shift to change the window, with Ctrl to pan. In three planes, a click moves the cuts."),
    ICH.element("button", { onclick: () => help.close(), autofocus: true }, "Close"),
  );
  ICH.byId("help-button").addEventListener("click", () => help.showModal());
};

const tools = () => ["scroll", ...(ICH.about.store === "hu" ? ["window"] : []), "pan"];

const ACTIONS = {
  ArrowDown: () => ICH.go(ICH.state.slice + 1), ArrowRight: () => ICH.go(ICH.state.slice + 1),
  ArrowUp: () => ICH.go(ICH.state.slice - 1), ArrowLeft: () => ICH.go(ICH.state.slice - 1),
  PageDown: () => ICH.go(ICH.state.slice + 10), PageUp: () => ICH.go(ICH.state.slice - 10),
  Home: () => ICH.go(0), End: () => ICH.go(Infinity),
  "]": () => ICH.nextVolume(1), "[": () => ICH.nextVolume(-1),
  n: () => ICH.nextPositive(1), p: () => ICH.nextPositive(-1), N: () => ICH.nextPositive(-1),
  e: () => ICH.nextError(1), E: () => ICH.nextError(-1),
  c: () => ICH.chooseClass((ICH.state.classIndex + 1) % ICH.about.classes.length),
  C: () => ICH.chooseClass((ICH.state.classIndex - 1 + ICH.about.classes.length) % ICH.about.classes.length),
  w: () => ICH.nextWindow(1), W: () => ICH.nextWindow(-1),
  t: () => ICH.chooseMode("windows"), m: () => ICH.chooseMode("planes"),
  d: () => ICH.chooseTool(tools()[(tools().indexOf(ICH.state.tool) + 1) % tools().length]),
  g: () => ICH.toggleHeat(), u: () => ICH.undoMark(),
  "+": () => ICH.zoom(1.25), "=": () => ICH.zoom(1.25), "-": () => ICH.zoom(0.8), 0: () => ICH.zoom(0),
  o: () => ICH.byId("note")?.focus(), l: () => { ICH.tab(narrow() ? "volumes" : "viewer"); ICH.byId("list-box").focus(); },
  "/": () => { ICH.tab(narrow() ? "volumes" : "viewer"); ICH.byId("filter-text").focus(); },
  i: () => ICH.tab("viewer"), q: () => ICH.tab("quarantine"), "?": () => ICH.byId("help").showModal(),
  Escape: () => { ICH.tab("viewer"); ICH.byId("stage").focus(); },
};

// What works while the images are hidden: a slice that is not seen must not be marked.
const ELSEWHERE = new Set(["l", "/", "i", "q", "?", "Escape"]);

const narrow = () => matchMedia("(max-width: 60rem)").matches;

const pressed = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !ICH.about || ICH.byId("help").open) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (typing && event.key !== "Escape") return;
  if (document.body.dataset.tab !== "viewer" && !ELSEWHERE.has(event.key)) return;
  const digit = /^Digit([1-9])$/.exec(event.code);
  if (digit) {
    ICH.mark(Number(digit[1]) - 1, event.shiftKey);
    event.preventDefault();
    return;
  }
  const inTable = event.target.closest?.("#details");
  if (inTable && /^(Arrow|Page|Home|End)/.test(event.key)) return; // these scroll there
  const action = ACTIONS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
};

// --- start ------------------------------------------------------------------------------------------------------------

const start = async () => {
  const token = new URLSearchParams(location.search).get("token");
  ICH.source = ICH.StaticSource.arrived.has("about") ? new ICH.StaticSource() : new ICH.ServerSource(token ?? "");
  let marks = [];
  try {
    [ICH.about, ICH.list, marks] = await Promise.all([ICH.source.about(), ICH.source.volumes(), ICH.source.corrections()]);
  } catch (error) {
    ICH.toast(error.message, "error");
    return;
  }
  ICH.marks = new ICH.Marks(marks);
  document.title = `${ICH.plain(ICH.about.name)} – ich-prep view`;
  ICH.byId("title").textContent = ICH.plain(ICH.about.name);
  ICH.byId("subtitle").textContent = [
    `${ICH.number(ICH.about.slices)} slices, ${ICH.number(ICH.about.volumes)} volumes`,
    ICH.about.store === "hu" ? "HU" : "windows",
    ICH.about.run ? `run ${ICH.plain(ICH.about.run)}` : null,
  ].filter(Boolean).join(" · ");
  ICH.byId("tab-quarantine").textContent = `Quarantine ${ICH.number(ICH.about.quarantined)}`;
  buildPresets();
  ICH.buildFilters();
  ICH.buildStrip();
  ICH.buildMarks();
  buildHelp();
  showToolbar();
  ICH.chooseTool("scroll");
  for (const button of document.querySelectorAll("[role=tab]")) button.addEventListener("click", () => ICH.tab(button.dataset.tab));
  document.addEventListener("keydown", pressed);
  ICH.tab("viewer");
  ICH.filter();
  await ICH.open(ICH.firstVolume());
  ICH.byId("stage").focus({ preventScroll: true });
};

start();
