// The panel beside the images: labels of the slice, marks of a reader, facts about slice and volume.
"use strict";

ICH.Marks = class {
  constructor(all) {
    this.latest = new Map();
    this.undo = [];
    for (const mark of all) this.latest.set(`${mark.row}/${mark.class}`, mark);
  }

  of(row, name) {
    return this.latest.get(`${row}/${name}`);
  }

  add(mark) {
    this.latest.set(`${mark.row}/${mark.class}`, mark);
  }

  get count() {
    return this.latest.size;
  }
};

const LABEL_WORDS = new Map([[1, "positive"], [0, "negative"], [null, "unknown"]]);
let noteField = null;
let readerField = null;

const readerName = () => {
  try {
    return localStorage.getItem("ich-reader") ?? "";
  } catch {
    return ""; // storage may be switched off
  }
};

ICH.buildMarks = () => {
  noteField = ICH.element("input", { id: "note", type: "text", maxlength: 1000, placeholder: "goes with the next mark" });
  readerField = ICH.element("input", { id: "reader", type: "text", maxlength: 100, value: readerName(), autocomplete: "off" });
  readerField.addEventListener("change", () => {
    try {
      localStorage.setItem("ich-reader", readerField.value);
    } catch {
      // not kept until the next visit
    }
  });
  ICH.byId("labels").replaceChildren(
    ICH.element("h2", {}, "Labels of this slice"),
    ICH.element("table", { class: "labels" }, ICH.element("tbody", { id: "label-rows" })),
    ...(ICH.about.marking
      ? [
          ICH.element("label", { class: "field wide" }, ICH.element("span", {}, "Note"), noteField),
          ICH.element("label", { class: "field wide" }, ICH.element("span", {}, "Reader"), readerField),
          ICH.element("p", { id: "mark-count", class: "muted" }),
        ]
      : []),
  );
};

const send = async (mark, undoing) => {
  const { volume, slice } = ICH.state;
  const before = ICH.labelOf(slice, mark.class);
  try {
    const saved = await ICH.source.mark(mark);
    if (!undoing) ICH.marks.undo.push({ ...mark, value: before, note: "undone" });
    ICH.marks.add(saved);
    ICH.toast(`Row ${saved.row}: ${ICH.words(saved.class)} ${LABEL_WORDS.get(saved.value)}. Saved.`);
    noteField.value = "";
    if (volume === ICH.state.volume) showLabels();
    ICH.redraw();
  } catch (error) {
    ICH.toast(`Not saved: ${error.message}`, "error");
  }
};

// Mark a class of the slice: the opposite of what it is now, or unknown.
ICH.mark = (index, unknown = false) => {
  const { volume, slice } = ICH.state;
  const name = ICH.about.classes[index];
  if (!volume || name === undefined) return;
  if (!ICH.about.marking) {
    ICH.toast("This page cannot save marks: open the dataset with `ich-prep view`.");
    return;
  }
  if (!volume.pixels.slice(slice)) {
    ICH.toast("Not marked: this slice is not shown.");
    return;
  }
  const value = unknown ? null : ICH.labelOf(slice, name) === 1 ? 0 : 1;
  send({ row: volume.slices.row[slice], class: name, value, note: noteField.value, reader: readerField.value }, false);
};

ICH.undoMark = () => {
  const last = ICH.marks?.undo.pop();
  if (last) send(last, true);
  else ICH.toast("Nothing to undo.");
};

const labelRow = (name, index) => {
  const { volume, slice } = ICH.state;
  const label = volume.labels[name][slice];
  const mark = ICH.marks.of(volume.slices.row[slice], name);
  const probability = volume.probabilities?.[name][slice];
  const known = probability !== null && probability !== undefined;
  const shown = ICH.labelOf(slice, name);
  const title = mark?.note ? `${mark.note} (${mark.reader || "no name"})` : null;
  return ICH.element(
    "tr", { class: index === ICH.state.classIndex ? "chosen" : null },
    ICH.element("th", { scope: "row" }, ICH.element("kbd", {}, index < 9 ? index + 1 : ""), "\u00a0", ICH.words(name)),
    ICH.element(
      "td", { title: title && ICH.plain(title) },
      ICH.element("span", { class: `state ${LABEL_WORDS.get(shown)}` }, LABEL_WORDS.get(shown)),
      mark ? ICH.element("small", {}, `was ${LABEL_WORDS.get(label)}`) : null,
    ),
    volume.probabilities
      ? ICH.element(
          "td", { class: ICH.isWrong(slice, name) ? "number wrong" : "number" },
          known ? probability.toFixed(3) : "–",
        )
      : null,
    ICH.about.marking
      ? ICH.element(
          "td", {},
          ICH.element("button", { class: "small", onclick: () => ICH.mark(index), "aria-label": `Mark ${ICH.words(name)} ${shown === 1 ? "negative" : "positive"}` }, shown === 1 ? "−" : "+"),
          ICH.element("button", { class: "small", onclick: () => ICH.mark(index, true), "aria-label": `Mark ${ICH.words(name)} unknown` }, "?"),
        )
      : null,
  );
};

const showLabels = () => {
  ICH.byId("label-rows").replaceChildren(...ICH.about.classes.map(labelRow));
  const count = ICH.byId("mark-count");
  if (count) count.textContent = `${ICH.marks.count} ${ICH.marks.count === 1 ? "mark" : "marks"} in ${ICH.plain(ICH.about.corrections)}. The dataset is not changed.`;
};

const factList = (entries) =>
  ICH.element(
    "dl", {},
    entries
      .filter(([, value]) => value !== null && value !== undefined && value !== "" && value.length !== 0)
      .flatMap(([name, value]) => [
        ICH.element("dt", {}, ICH.words(name)),
        ICH.element("dd", {}, Array.isArray(value) ? value.map(ICH.plain).join(", ") : typeof value === "number" ? String(Math.round(value * 1000) / 1000) : value),
      ]),
  );

const showFacts = () => {
  const { volume, slice } = ICH.state;
  const ofSlice = Object.entries(volume.slices).map(([name, values]) => [name, values[slice]]);
  const { problem, trusted } = volume.where;
  ICH.byId("facts").replaceChildren(
    ICH.element("h2", {}, "Slice"), factList(ofSlice),
    ICH.element("h2", {}, "Volume"), factList(Object.entries(volume.known)),
    ...(problem ? [ICH.element("p", { class: "note" }, `No affine: ${problem}.`)] : []),
    ...(trusted ? [] : [ICH.element("p", { class: "note" }, "The distances are not known: reformats may have wrong proportions.")]),
  );
};

ICH.on("slice", () => {
  if (!ICH.state.volume) return;
  showLabels();
  showFacts();
});
