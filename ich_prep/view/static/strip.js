// The strip: labels along the volume, probabilities below them, marks; click to jump. Next positive, next error.
"use strict";

const ROW = 18; // height of a class, in pixels
const LABEL = 9; // of its label; the probability is below
const COLORS = {
  positive: "#e8702a", negative: "#4d5a66", unknown: "#262c33", probability: "#4ea3e0", error: "#ff4fa3", mark: "#f7d046", now: "#ffffff",
};

// The label of a class on a slice, as marked by a reader or else as in the dataset: 1, 0 or null.
ICH.labelOf = (index, name) => {
  const { volume } = ICH.state;
  const mark = ICH.marks?.of(volume.slices.row[index], name);
  return mark ? mark.value : volume.labels[name][index];
};

// Whether a run's answer differs from the label of the dataset.
ICH.isWrong = (index, name) => {
  const { volume } = ICH.state;
  const [label, probability] = [volume.labels[name][index], volume.probabilities?.[name][index]];
  if (label === null || probability === null || probability === undefined) return false;
  return label !== Number(probability >= ICH.about.threshold);
};

const chosenClass = () => ICH.about.classes[ICH.state.classIndex];

const nextWhere = (step, test, what) => {
  const { volume, slice } = ICH.state;
  if (!volume) return;
  const count = volume.slices.row.length;
  for (let k = 1; k <= count; k += 1) {
    const index = (slice + step * k + count * k) % count;
    if (test(index)) {
      ICH.go(index);
      return;
    }
  }
  ICH.toast(`No ${what} in this volume.`);
};

ICH.nextPositive = (step) =>
  nextWhere(step, (index) => ICH.labelOf(index, chosenClass()) === 1, `slice is positive for ${ICH.words(chosenClass())}`);

ICH.nextError = (step) =>
  nextWhere(step, (index) => ICH.about.classes.some((name) => ICH.isWrong(index, name)), "slice has a prediction error");

const strip = () => ICH.byId("strip-box");

ICH.buildStrip = () => {
  const names = ICH.about.classes.map((name, index) => {
    const choose = () => ICH.chooseClass(index);
    return ICH.element("button", { class: "strip-name", type: "button", tabindex: "-1", onclick: choose }, ICH.words(name));
  });
  ICH.byId("strip-names").replaceChildren(...names);
  const key = (kind, text) => ICH.element("span", {}, ICH.element("i", { class: `swatch ${kind}` }), text);
  ICH.byId("strip-legend").replaceChildren(
    key("positive", "positive"), key("negative", "negative"), key("unknown", "unknown"),
    ...(ICH.about.run ? [key("probability", "probability"), key("error", "error")] : []),
    ...(ICH.about.marking ? [key("mark", "marked")] : []),
  );
};

const drawStrip = () => {
  const { volume, slice } = ICH.state;
  if (!volume) return;
  const canvas = ICH.byId("strip-canvas");
  const width = strip().clientWidth;
  const height = ROW * ICH.about.classes.length;
  const ratio = devicePixelRatio || 1;
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const count = volume.slices.row.length;
  const step = width / count;
  const gap = step > 4 ? 1 : 0;
  ICH.about.classes.forEach((name, row) => {
    const top = row * ROW;
    for (let index = 0; index < count; index += 1) {
      const label = ICH.labelOf(index, name);
      const [left, wide] = [index * step, Math.max(step - gap, 0.75)];
      context.fillStyle = label === 1 ? COLORS.positive : label === 0 ? COLORS.negative : COLORS.unknown;
      if (!volume.ok[index]) context.globalAlpha = 0.35;
      context.fillRect(left, top + 2, wide, LABEL);
      context.globalAlpha = 1;
      const probability = volume.probabilities?.[name][index];
      if (probability !== null && probability !== undefined) {
        const bar = Math.max(probability * (ROW - LABEL - 2), 0.5);
        context.fillStyle = ICH.isWrong(index, name) ? COLORS.error : COLORS.probability;
        context.fillRect(left, top + ROW - bar, wide, bar);
      }
      if (ICH.marks?.of(volume.slices.row[index], name)) {
        context.fillStyle = COLORS.mark;
        context.fillRect(left, top, wide, 2);
      }
    }
  });
  context.strokeStyle = COLORS.now;
  context.lineWidth = 1.5;
  context.strokeRect(slice * step + 0.5, 0.75, Math.max(step - gap, 2), height - 1.5);
  strip().setAttribute("aria-valuemin", 1);
  strip().setAttribute("aria-valuemax", count);
  strip().setAttribute("aria-valuenow", slice + 1);
  const positive = ICH.about.classes.filter((name) => ICH.labelOf(slice, name) === 1).map(ICH.words);
  strip().setAttribute("aria-valuetext", `slice ${slice + 1} of ${count}, ${positive.join(", ") || "nothing positive"}`);
  ICH.byId("strip-names").childNodes.forEach((button, index) => {
    button.classList.toggle("chosen", index === ICH.state.classIndex);
  });
};

ICH.on("draw", drawStrip);

const jump = (event) => {
  const { volume } = ICH.state;
  if (!volume) return;
  const box = strip().getBoundingClientRect();
  const count = volume.slices.row.length;
  ICH.go(ICH.clamp(Math.floor(((event.clientX - box.left) / box.width) * count), 0, count - 1));
};

strip().addEventListener("pointerdown", (event) => {
  strip().setPointerCapture(event.pointerId);
  jump(event);
});
strip().addEventListener("pointermove", (event) => {
  if (event.buttons) jump(event);
});
strip().addEventListener("wheel", (event) => {
  event.preventDefault();
  ICH.go(ICH.state.slice + Math.sign(event.deltaY));
}, { passive: false });
new ResizeObserver(() => ICH.redraw()).observe(strip());
