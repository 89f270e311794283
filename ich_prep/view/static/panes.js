// The images: one slice, three windows side by side, or three planes; scrolling, windowing, zoom; what is under the cursor.
"use strict";

const WHEEL_STEP = 40; // pixels of wheel movement for a slice
const DRAG_STEP = 6; // pixels of drag for a slice
const HEAT_ALPHA = 170;

ICH.Pane = class {
  constructor({ kind, window, title }) {
    this.kind = kind; // "axial", "sagittal" or "coronal"
    this.window = window; // its own; null: the one that is chosen
    this.canvas = ICH.element("canvas", { class: "pixels", role: "img" });
    this.overlay = ICH.element("canvas", { class: "overlay", "aria-hidden": "true" });
    this.edges = Object.fromEntries(
      ["left", "right", "top", "bottom"].map((edge) => [edge, ICH.element("span", { class: `edge ${edge}` })]),
    );
    this.title = ICH.element("figcaption", {}, title);
    this.message = ICH.element("p", { class: "message" });
    this.readout = ICH.element("output", { class: "readout" });
    this.frame = ICH.element(
      "figure", { class: `pane ${kind}` },
      this.canvas, this.overlay, ...Object.values(this.edges), this.title, this.message, this.readout,
    );
    this.scale = 1;
    this.left = this.topEdge = 0;
    ICH.follow(this);
  }

  get shown() {
    return this.window ?? ICH.state.window;
  }

  size(width, height) {
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
      this.image = null;
    }
    if (!this.image) {
      this.context = this.canvas.getContext("2d", { willReadFrequently: true });
      this.image = this.context.createImageData(width, height);
      this.bits = new Uint32Array(this.image.data.buffer);
    }
  }

  draw() {
    const { volume, slice } = ICH.state;
    if (!volume) return;
    const drawn = this.kind === "axial" ? this.drawSlice(slice) : this.drawReformat();
    this.canvas.style.visibility = drawn ? "visible" : "hidden";
    if (drawn) this.context.putImageData(this.image, 0, 0);
    this.layout();
    this.drawOverlay();
    this.showEdges();
  }

  drawSlice(index) {
    const size = ICH.about.size;
    this.size(size, size);
    const { pixels, slices } = ICH.state.volume;
    const found = pixels.slice(index);
    const absent = pixels.place[index] < 0;
    const status = ICH.plain(slices.status[index]);
    this.message.textContent = absent ? `No pixels: ${status}` : found ? "" : "Loading…";
    this.canvas.setAttribute("aria-label", `Slice ${index + 1} of ${slices.row.length}, ${ICH.words(this.shown.name)} window`);
    if (!found) return false;
    const start = found.start + this.shown.channel * pixels.area;
    ICH.paint(this.bits, found.values, start, ICH.about.store === "hu" ? ICH.tableFor(this.shown) : null);
    return true;
  }

  drawReformat() {
    const { volume } = ICH.state;
    this.reformat ??= new ICH.Reformat(volume.where, volume.pixels, this.kind === "sagittal" ? 0 : 1);
    if (this.reformat.pixels !== volume.pixels) this.reformat = new ICH.Reformat(volume.where, volume.pixels, this.reformat.axis);
    const { reformat } = this;
    this.message.textContent = volume.pixels.complete ? "" : "Loading…";
    if (!reformat.stack.length) {
      this.message.textContent = "No slices with a position";
      return false;
    }
    this.size(reformat.width, reformat.height);
    this.canvas.setAttribute("aria-label", `${this.kind} reformat`);
    reformat.paint(this.bits, this.cut(), this.shown.channel, ICH.about.store === "hu" ? ICH.tableFor(this.shown) : null);
    return true;
  }

  // Where the reformat cuts, in columns or rows of the middle slice.
  cut() {
    const axis = this.reformat.axis;
    return Math.round(ICH.point()[axis] + ICH.state.volume.where.shift(ICH.state.slice)[axis]);
  }

  layout() {
    const box = this.frame.getBoundingClientRect();
    const { zoom, x, y } = ICH.state.view;
    this.scale = Math.min(box.width / this.canvas.width, box.height / this.canvas.height) * zoom;
    const [width, height] = [this.canvas.width * this.scale, this.canvas.height * this.scale];
    this.left = (box.width - width) / 2 + x * box.width;
    this.topEdge = (box.height - height) / 2 + y * box.height;
    Object.assign(this.canvas.style, {
      width: `${width}px`, height: `${height}px`, left: `${this.left}px`, top: `${this.topEdge}px`,
    });
    const ratio = devicePixelRatio || 1;
    const [across, down] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (this.overlay.width !== across || this.overlay.height !== down) Object.assign(this.overlay, { width: across, height: down });
    this.box = box;
    this.ratio = ratio;
  }

  drawOverlay() {
    const context = this.overlay.getContext("2d");
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.box.width, this.box.height);
    if (this.kind === "axial" && ICH.state.heat) this.drawHeat(context);
    if (ICH.state.mode === "planes") this.drawCuts(context);
    this.drawScale(context);
  }

  drawHeat(context) {
    const map = ICH.heatMap(ICH.state.slice);
    if (!map) return;
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(map, this.left, this.topEdge, this.canvas.width * this.scale, this.canvas.height * this.scale);
  }

  drawCuts(context) {
    const { volume, slice } = ICH.state;
    const [column, row] = ICH.point();
    context.lineWidth = 1;
    context.strokeStyle = "rgba(255, 200, 60, .65)";
    const line = (x0, y0, x1, y1) => {
      context.beginPath();
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
      context.stroke();
    };
    const x = this.left + ((this.kind === "sagittal" ? row : column) + 0.5) * this.scale;
    let at = row;
    if (this.kind !== "axial") at = volume.where.distances[slice] === null ? null : this.reformat?.lineOf(volume.where.distances[slice]);
    if (this.kind !== "axial") {
      const shift = volume.where.shift(slice)[this.kind === "sagittal" ? 1 : 0];
      line(x + shift * this.scale, 0, x + shift * this.scale, this.box.height);
    } else line(x, 0, x, this.box.height);
    if (at !== null && at !== undefined) {
      const y = this.topEdge + (at + 0.5) * this.scale;
      line(0, y, this.box.width, y);
    }
  }

  drawScale(context) {
    const pixel = this.kind === "axial" ? ICH.state.volume.where.pixel?.[0] : this.reformat?.geometry.pixel && this.reformat.pixel;
    if (!pixel) return;
    const length = [100, 50, 20, 10, 5, 2, 1].find((mm) => (mm / pixel) * this.scale < this.box.width / 3) ?? 1;
    const width = (length / pixel) * this.scale;
    const [x, y] = [this.box.width - 14 - width, this.box.height - 14];
    const label = length >= 10 ? `${length / 10} cm` : `${length} mm`;
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    for (const [style, wide] of [["rgba(0, 0, 0, .8)", 4], ["#e8e8e8", 1.5]]) {
      context.strokeStyle = style;
      context.lineWidth = wide;
      context.beginPath();
      context.moveTo(x, y - 4);
      context.lineTo(x, y);
      context.lineTo(x + width, y);
      context.lineTo(x + width, y - 4);
      context.stroke();
    }
    context.strokeStyle = "rgba(0, 0, 0, .8)";
    context.lineWidth = 3;
    context.strokeText(label, x + width / 2, y - 7);
    context.fillStyle = "#e8e8e8";
    context.fillText(label, x + width / 2, y - 7);
  }

  showEdges() {
    const axes = ICH.state.volume.where.axes;
    let [right, down] = axes ? [axes[0], axes[1]] : [null, null];
    if (this.kind !== "axial") [right, down] = [this.reformat?.right, ICH.opposite(this.reformat?.top)];
    this.edges.right.textContent = ICH.letters(right);
    this.edges.left.textContent = ICH.letters(ICH.opposite(right));
    this.edges.bottom.textContent = ICH.letters(down);
    this.edges.top.textContent = ICH.letters(ICH.opposite(down));
  }

  // The pixel under a pointer, [column, line] of this pane's image; null outside.
  at(event) {
    const box = this.frame.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - this.left) / this.scale);
    const line = Math.floor((event.clientY - box.top - this.topEdge) / this.scale);
    return column >= 0 && line >= 0 && column < this.canvas.width && line < this.canvas.height ? [column, line] : null;
  }

  // The [column, row, slice] of the volume at a pixel of this pane.
  voxel([column, line]) {
    const { volume, slice } = ICH.state;
    if (this.kind === "axial") return [column, line, slice];
    const index = this.reformat?.sliceAt(this.reformat.distanceOf(line)) ?? -1;
    if (index < 0) return null;
    const [right, down] = volume.where.shift(index);
    const voxel = this.kind === "sagittal" ? [this.cut() - right, column - down, index] : [column - right, this.cut() - down, index];
    return voxel.map(Math.round);
  }

  read(event) {
    const place = this.at(event);
    const voxel = place && ICH.state.volume && this.voxel(place);
    this.readout.textContent = voxel ? ICH.describe(voxel, this.shown) : "";
  }
};

// What is at a column and row of a slice: the stored value, and where it lies in the patient.
ICH.describe = ([column, row, index], shown) => {
  const { volume } = ICH.state;
  const size = ICH.about.size;
  const found = volume.pixels.slice(index);
  if (!found || column < 0 || row < 0 || column >= size || row >= size) return "";
  const value = found.values[found.start + shown.channel * volume.pixels.area + row * size + column];
  const mm = volume.where.mm(column, row, index);
  const where = mm && `${["L", "P", "S"].map((letter, axis) => `${letter} ${mm[axis].toFixed(1)}`).join("  ")} mm`;
  return [ICH.about.store === "hu" ? `${value} HU` : `${value} (${ICH.words(shown.name)})`, where, `x ${column}, y ${row}`]
    .filter(Boolean)
    .join("\n");
};

ICH.point = () => ICH.state.point ?? [ICH.about.size >> 1, ICH.about.size >> 1];

// --- class activation maps --------------------------------------------------------------------------------------------

const heat = { key: "", canvas: null };

ICH.heatMap = (index) => {
  const { volume, classIndex, line } = ICH.state;
  if (!volume.explained?.[index]) return null;
  const key = `${line}/${index}/${classIndex}`;
  if (heat.key !== key) {
    Object.assign(heat, { key, canvas: null });
    ICH.source.maps(line, index).then((maps) => {
      if (heat.key !== key || !maps) return;
      const image = new ImageData(maps.width, maps.height);
      const start = classIndex * maps.width * maps.height;
      for (let i = 0; i < maps.width * maps.height; i += 1) {
        const value = maps.data[start + i] / 255;
        image.data.set([255, Math.round(220 * (1 - value)), 40, Math.round(HEAT_ALPHA * value)], 4 * i);
      }
      heat.canvas = ICH.element("canvas", { width: maps.width, height: maps.height });
      heat.canvas.getContext("2d").putImageData(image, 0, 0);
      ICH.redraw();
    }, (error) => ICH.toast(error.message, "error"));
  }
  return heat.canvas;
};

// --- pointers ---------------------------------------------------------------------------------------------------------

let wheel = 0;

const turnWheel = (pane, event) => {
  event.preventDefault();
  if (event.ctrlKey || event.metaKey) {
    ICH.zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15);
    return;
  }
  wheel += event.deltaMode === 0 ? event.deltaY : event.deltaY * WHEEL_STEP;
  const steps = Math.trunc(wheel / WHEEL_STEP);
  wheel -= steps * WHEEL_STEP;
  if (!steps) return;
  if (pane.kind === "axial") ICH.go(ICH.state.slice + steps);
  else ICH.movePoint(pane.kind === "sagittal" ? 0 : 1, steps * 2);
};

const toolOf = (event) => {
  if (event.button === 1 || event.ctrlKey || event.metaKey) return "pan";
  if (event.button === 2 || event.shiftKey) return "window";
  return ICH.state.tool;
};

ICH.follow = (pane) => {
  let drag = null;
  pane.frame.addEventListener("wheel", (event) => turnWheel(pane, event), { passive: false });
  pane.frame.addEventListener("contextmenu", (event) => event.preventDefault());
  pane.frame.addEventListener("pointerdown", (event) => {
    if (!ICH.state.volume) return;
    drag = { x: event.clientX, y: event.clientY, rest: 0, moved: false, tool: toolOf(event) };
    pane.frame.setPointerCapture(event.pointerId);
    ICH.byId("stage").focus({ preventScroll: true });
    event.preventDefault();
  });
  pane.frame.addEventListener("pointermove", (event) => {
    if (ICH.state.volume) pane.read(event);
    if (!drag) return;
    const [right, down] = [event.clientX - drag.x, event.clientY - drag.y];
    if (Math.abs(right) + Math.abs(down) > 3) drag.moved = true;
    if (!drag.moved) return;
    Object.assign(drag, { x: event.clientX, y: event.clientY });
    if (drag.tool === "window") ICH.dragWindow(right, down);
    else if (drag.tool === "pan") ICH.pan(right / pane.box.width, down / pane.box.height);
    else {
      drag.rest += down;
      const steps = Math.trunc(drag.rest / DRAG_STEP);
      drag.rest -= steps * DRAG_STEP;
      if (steps) ICH.go(ICH.state.slice + steps);
    }
  });
  const end = (event) => {
    if (drag && !drag.moved && event.type === "pointerup" && ICH.state.mode === "planes") {
      const place = pane.at(event);
      const voxel = place && pane.voxel(place);
      if (voxel) {
        ICH.state.point = [0, 1].map((axis) => ICH.clamp(voxel[axis], 0, ICH.about.size - 1));
        ICH.go(voxel[2]);
        ICH.redraw();
      }
    }
    drag = null;
  };
  pane.frame.addEventListener("pointerup", end);
  pane.frame.addEventListener("pointercancel", end);
  pane.frame.addEventListener("pointerleave", () => { pane.readout.textContent = ""; });
};

// --- the stage --------------------------------------------------------------------------------------------------------

let panes = [];

const paneList = () => {
  if (ICH.state.mode === "windows") {
    return ICH.about.windows.slice(0, 3).map((window, k) => {
      const own = { ...window, channel: ICH.about.store === "hu" ? 0 : k };
      return { kind: "axial", window: own, title: `${ICH.words(window.name)} ${window.center}/${window.width}` };
    });
  }
  const kinds = ICH.state.mode === "planes" ? ["axial", "sagittal", "coronal"] : ["axial"];
  return kinds.map((kind) => ({ kind, window: null, title: ICH.state.mode === "planes" ? kind : "" }));
};

ICH.buildPanes = () => {
  panes = paneList().map((pane) => new ICH.Pane(pane));
  const stage = ICH.byId("stage");
  stage.dataset.mode = ICH.state.mode;
  stage.replaceChildren(...panes.map((pane) => pane.frame));
  ICH.redraw();
};

ICH.on("draw", () => {
  for (const pane of panes) pane.draw();
});

new ResizeObserver(() => ICH.redraw()).observe(ICH.byId("stage"));
