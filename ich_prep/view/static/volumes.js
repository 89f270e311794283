// The list of volumes: filters, order, and only as many elements as fit on the screen.
"use strict";

const LINE_HEIGHT = 54; // as in the style
const FIELDS = {}; // the form's controls by name

let shownLines = []; // indices into the list, filtered and ordered
let matching = null; // of the filter: index -> number of slices; null: no filter

const columns = () => ICH.list.columns;
const lineOf = (index) => ICH.list.lines?.[index] ?? index; // static pages have some volumes only

const distinct = (values) => [...new Set(values.filter((value) => value !== null))].sort();

const control = (name, label, options) => {
  const select = ICH.element("select", { id: `filter-${name}`, name }, options.map(([value, text]) => ICH.element("option", { value }, text)));
  FIELDS[name] = select;
  select.addEventListener("change", () => ICH.filter());
  return ICH.element("label", { class: "field" }, ICH.element("span", {}, label), select);
};

const choices = (values, words = ICH.words) => [["", "any"], ...values.map((value) => [value, words(value)])];

ICH.buildFilters = () => {
  const { classes } = ICH.about;
  const labels = classes.flatMap((name) => [
    [`${name}=1`, `${ICH.words(name)}`], [`${name}=0`, `no ${ICH.words(name)}`], [`${name}=`, `${ICH.words(name)} unknown`],
  ]);
  const search = ICH.element("input", { id: "filter-text", type: "search", placeholder: "UID, patient or number", oninput: () => ICH.filter() });
  FIELDS.text = search;
  const where = ICH.element("input", {
    id: "filter-where", type: "text", spellcheck: "false", placeholder: "slice_spacing_mm < 6 and subdural == 1", "aria-describedby": "where-error",
  });
  FIELDS.where = where;
  const { status, flag } = ICH.list.words;
  const orders = [["stored", "as stored"], ["positive", "positives first"], ...(ICH.about.run ? [["errors", "errors first"]] : [])];
  const fields = [
    ["label", "Label", [["", "any"], ...labels]],
    ["fold", "Fold", choices(distinct(columns().fold), String)],
    ["subset", "Subset", choices(distinct(columns().subset))],
    ["scan", "Scan type", choices(distinct(columns().scan_type))],
    ["status", "Status", choices(status)],
    ["flag", "Flag", choices([...flag].sort())],
    ...(ICH.about.run ? [["error", "Error", [["", "any"], ["any", "any error"], ["fp", "false positive"], ["fn", "false negative"]]]] : []),
    ["order", "Order", orders],
  ].filter(([, , options]) => options.length > 1);
  ICH.byId("filters").replaceChildren(
    ICH.element("label", { class: "field wide" }, ICH.element("span", {}, "Find"), search),
    ICH.element("label", { class: "field wide", hidden: ICH.about.static === true }, ICH.element("span", {}, "Filter"), where),
    ICH.element("p", { id: "where-error", class: "error", role: "alert" }),
    ...fields.map(([name, label, options]) => control(name, label, options)),
    ICH.element("button", { type: "reset", class: "quiet" }, "Reset"),
  );
  if (ICH.about.run) FIELDS.order.value = "errors";
  const form = ICH.byId("filters");
  form.addEventListener("submit", (event) => { event.preventDefault(); applyWhere(); });
  where.addEventListener("change", applyWhere);
  form.addEventListener("reset", () => setTimeout(applyWhere));
};

const applyWhere = async () => {
  const text = FIELDS.where.value.trim();
  const problem = ICH.byId("where-error");
  problem.textContent = "";
  matching = null;
  if (text) {
    try {
      const found = await ICH.source.where(text);
      matching = new Map(found.lines.map((line, k) => [line, found.counts[k]]));
    } catch (error) {
      problem.textContent = ICH.plain(error.message.split("\n")[0]);
    }
  }
  ICH.filter();
};

// Whether a volume passes each filter that is set.
const passes = (index) => {
  const { labels, fold, subset, scan_type: scan, statuses, flags, false_positive: fp, false_negative: fn } = columns();
  const chosen = (name) => FIELDS[name]?.value ?? "";
  if (matching && !matching.has(index)) return false;
  if (chosen("label")) {
    const at = chosen("label").lastIndexOf("=");
    const wanted = chosen("label").slice(at + 1);
    if (String(labels[chosen("label").slice(0, at)][index] ?? "") !== wanted) return false;
  }
  if (chosen("fold") && String(fold[index]) !== chosen("fold")) return false;
  if (chosen("subset") && subset[index] !== chosen("subset")) return false;
  if (chosen("scan") && scan[index] !== chosen("scan")) return false;
  if (chosen("status") && !statuses[index].includes(ICH.list.words.status.indexOf(chosen("status")))) return false;
  if (chosen("flag") && !flags[index].includes(ICH.list.words.flag.indexOf(chosen("flag")))) return false;
  const wrong = { any: () => fp[index] + fn[index], fp: () => fp[index], fn: () => fn[index] }[chosen("error")];
  if (wrong && !wrong()) return false;
  const text = FIELDS.text.value.trim().toLowerCase();
  if (!text) return true;
  const { series_row: row, series_instance_uid: uid, patient_id: patient } = columns();
  return String(row[index]) === text || `${uid[index]} ${patient[index]}`.toLowerCase().includes(text);
};

const isPositive = (index) => Object.values(columns().labels).some((values) => values[index] === 1);

ICH.filter = () => {
  const all = columns().series_row.length;
  shownLines = [];
  for (let index = 0; index < all; index += 1) if (passes(index)) shownLines.push(index);
  const order = FIELDS.order?.value;
  if (order === "errors") shownLines.sort((a, b) => columns().worst[b] - columns().worst[a] || a - b);
  if (order === "positive") shownLines.sort((a, b) => isPositive(b) - isPositive(a) || a - b);
  const slices = matching ? `, ${ICH.number(shownLines.reduce((sum, index) => sum + matching.get(index), 0))} matching slices` : "";
  ICH.byId("list-count").textContent = `${ICH.number(shownLines.length)} of ${ICH.number(all)} volumes${slices}`;
  ICH.byId("list-box").scrollTop = 0;
  drawList();
};

const describeLine = (index, place) => {
  const list = columns();
  const positive = ICH.about.classes.filter((name) => list.labels[name][index] === 1);
  const missing = list.n_slices[index] - list.n_ok[index];
  const facts = [
    `${list.n_slices[index]} slices`, list.subset[index], list.fold[index] === null ? null : `fold ${list.fold[index]}`, list.scan_type[index],
    missing ? `${missing} without pixels` : null,
    matching ? `${matching.get(index)} match` : null,
  ];
  const wrong = list.worst ? [list.false_positive[index], list.false_negative[index]] : [0, 0];
  const line = lineOf(index);
  return ICH.element(
    "div",
    {
      class: "volume", role: "option", id: `volume-${line}`, style: null, "aria-selected": String(line === ICH.state.line),
      "aria-setsize": shownLines.length, "aria-posinset": place + 1, onclick: () => { ICH.tab("viewer"); ICH.open(line); },
    },
    ICH.element("b", {}, `${list.series_row[index]}`),
    ICH.element("span", { class: "uid", title: ICH.plain(list.series_instance_uid[index]) }, list.patient_id[index] ?? "", " · ", list.series_instance_uid[index] ?? ""),
    ICH.element("span", { class: "facts" }, facts.filter(Boolean).map(ICH.plain).join(" · ")),
    ICH.element(
      "span", { class: "tags" },
      positive.map((name) => ICH.element("i", { class: "tag positive" }, ICH.words(name))),
      wrong[0] ? ICH.element("i", { class: "tag wrong", title: "false positives" }, `FP ${wrong[0]}`) : null,
      wrong[1] ? ICH.element("i", { class: "tag wrong", title: "false negatives" }, `FN ${wrong[1]}`) : null,
    ),
  );
};

const drawList = () => {
  const box = ICH.byId("list-box");
  const first = Math.max(Math.floor(box.scrollTop / LINE_HEIGHT) - 4, 0);
  const last = Math.min(first + Math.ceil((box.clientHeight || 600) / LINE_HEIGHT) + 8, shownLines.length);
  const rows = ICH.byId("list-rows");
  rows.style.height = `${shownLines.length * LINE_HEIGHT}px`;
  const made = [];
  for (let place = first; place < last; place += 1) {
    const line = describeLine(shownLines[place], place);
    line.style.top = `${place * LINE_HEIGHT}px`;
    made.push(line);
  }
  rows.replaceChildren(...made);
  if (ICH.byId(`volume-${ICH.state.line}`)) box.setAttribute("aria-activedescendant", `volume-${ICH.state.line}`);
  else box.removeAttribute("aria-activedescendant");
};

// Open the next or previous volume of the list.
ICH.nextVolume = (step) => {
  if (!shownLines.length) return;
  const now = shownLines.findIndex((index) => lineOf(index) === ICH.state.line);
  const place = now < 0 ? 0 : ICH.clamp(now + step, 0, shownLines.length - 1);
  ICH.open(lineOf(shownLines[place]));
};

ICH.firstVolume = () => (shownLines.length ? lineOf(shownLines[0]) : -1);

ICH.on("opened", () => {
  const place = shownLines.findIndex((index) => lineOf(index) === ICH.state.line);
  const box = ICH.byId("list-box");
  if (place >= 0) {
    const top = place * LINE_HEIGHT;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + LINE_HEIGHT > box.scrollTop + box.clientHeight) box.scrollTop = top + LINE_HEIGHT - box.clientHeight;
  }
  drawList();
});

ICH.byId("list-box").addEventListener("scroll", drawList);
ICH.byId("list-box").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  ICH.nextVolume(step);
});
new ResizeObserver(() => ICH.list && drawList()).observe(ICH.byId("list-box"));
