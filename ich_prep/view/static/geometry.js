// Where pixels lie in the patient: millimetres, orientation letters, and reformats in right proportions.
"use strict";

// Patient coordinates grow to the left, to the back (posterior) and to the head (superior): LPS, as in DICOM.
const LETTERS = [["R", "L"], ["A", "P"], ["I", "S"]];
const OBLIQUE = 0.3; // the cosine from which a second letter is given

ICH.letters = (direction) => {
  if (!direction) return "";
  return [0, 1, 2]
    .filter((axis) => Math.abs(direction[axis]) > OBLIQUE)
    .sort((a, b) => Math.abs(direction[b]) - Math.abs(direction[a]))
    .map((axis) => LETTERS[axis][direction[axis] > 0 ? 1 : 0])
    .join("");
};

ICH.opposite = (direction) => direction?.map((value) => -value);

ICH.Geometry = class {
  constructor(volume) {
    const { geometry, slices, known } = volume;
    this.problem = geometry.problem;
    this.grid = geometry.grid ?? null;
    this.axes = geometry.axes ?? null;
    this.count = slices.row.length;
    this.pixel = geometry.pixel_mm ?? null;
    this.offsets = geometry.offsets ?? null;
    const placed = this.offsets?.filter((offset) => offset) ?? [];
    this.middle = placed[placed.length >> 1] ?? [0, 0, 0]; // so that a tilted volume stays inside its reformats
    this.spacing = known.slice_spacing_mm ?? known.slice_thickness_mm ?? null;
    this.distances = this.placeSlices(slices);
  }

  // The distance of each slice along the normal, in mm or, if nothing is known, in pixels; null for a slice without one.
  placeSlices(slices) {
    if (this.offsets) return this.offsets.map((offset) => offset?.[2] ?? null);
    if (slices.position_mm.every((place) => place !== null)) return slices.position_mm.map((p) => p - slices.position_mm[0]);
    const step = this.spacing ?? this.pixel?.[0] ?? 1;
    return slices.row.map((_, index) => index * step);
  }

  get trusted() {
    return Boolean(this.pixel && (this.offsets || this.spacing));
  }

  // LPS mm of a column and row of a slice; null if the slice has no known place.
  mm(column, row, index) {
    const offset = this.offsets?.[index];
    if (!this.grid || !offset) return null;
    const [x, y, z] = [column + offset[0], row + offset[1], offset[2]];
    return [0, 1, 2].map((axis) => {
      const [a, b, c, d] = this.grid[axis];
      return a * x + b * y + c * z + d;
    });
  }

  // How far a slice lies to the right of and below the middle one, in pixels.
  shift(index) {
    const offset = this.offsets?.[index];
    return offset ? [offset[0] - this.middle[0], offset[1] - this.middle[1]] : [0, 0];
  }

  // The slices with pixels in order of distance: [{index, distance}], one for each distance.
  stack(pixels) {
    const placed = [];
    for (let index = 0; index < this.count; index += 1) {
      if (this.distances[index] !== null && pixels.place[index] >= 0) {
        placed.push({ index, distance: this.distances[index] });
      }
    }
    placed.sort((a, b) => a.distance - b.distance);
    return placed.filter((entry, k) => k === 0 || entry.distance - placed[k - 1].distance > 0.01);
  }
};

// A cut through a volume across its slices. `axis` 0: sagittal, at a column; 1: coronal, at a row. Its pixels are square:
// as wide as those of a slice; lines between slices are interpolated.
ICH.Reformat = class {
  constructor(geometry, pixels, axis) {
    this.geometry = geometry;
    this.pixels = pixels;
    this.axis = axis;
    this.stack = geometry.stack(pixels);
    const across = 1 - axis; // the axis of the slice that runs along the cut
    this.pixel = geometry.pixel?.[across] ?? 1;
    const first = this.stack[0]?.distance ?? 0;
    const last = this.stack.at(-1)?.distance ?? 0;
    this.first = first;
    this.width = ICH.about.size;
    this.height = ICH.clamp(Math.round((last - first) / this.pixel) + 1, 1, 2048);
    // The head is at the top.
    this.up = (geometry.axes?.[2]?.[2] ?? 1) >= 0;
    this.right = geometry.axes?.[across] ?? null;
    this.top = geometry.axes ? (this.up ? geometry.axes[2] : ICH.opposite(geometry.axes[2])) : null;
    // A sagittal cut with the face to the left, a coronal one with the right side to the left: as stored.
  }

  distanceOf(line) {
    return this.first + (this.up ? this.height - 1 - line : line) * this.pixel;
  }

  lineOf(distance) {
    const line = (distance - this.first) / this.pixel;
    return this.up ? this.height - 1 - line : line;
  }

  // Return the slices around a distance and the weight of the second; null outside.
  around(distance) {
    const { stack } = this;
    if (!stack.length) return null;
    let low = 0;
    let high = stack.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (stack[middle].distance <= distance) low = middle;
      else high = middle - 1;
    }
    const next = Math.min(low + 1, stack.length - 1);
    const gap = stack[next].distance - stack[low].distance;
    return { a: stack[low].index, b: stack[next].index, weight: gap > 0 ? ICH.clamp((distance - stack[low].distance) / gap, 0, 1) : 0 };
  }

  // The nearest slice to a distance.
  sliceAt(distance) {
    const found = this.around(distance);
    return found ? (found.weight < 0.5 ? found.a : found.b) : -1;
  }

  // Copy one line of a slice, along the cut at `at`, moved to where the slice lies; false while its pixels are not here.
  lineFrom(index, at, channel, out) {
    const slice = this.pixels.slice(index);
    const size = ICH.about.size;
    if (!slice) return false;
    const [right, down] = this.geometry.shift(index);
    const [along, beside] = this.axis === 0 ? [down, right] : [right, down];
    const cut = Math.round(at - beside);
    const air = ICH.about.store === "hu" ? -1024 : 0;
    if (cut < 0 || cut >= size) {
      out.fill(air);
      return true;
    }
    const start = slice.start + channel * this.pixels.area + (this.axis === 0 ? cut : cut * size);
    const step = this.axis === 0 ? size : 1;
    const moved = Math.round(along);
    for (let i = 0; i < size; i += 1) {
      const from = i - moved;
      out[i] = from >= 0 && from < size ? slice.values[start + from * step] : air;
    }
    return true;
  }

  // Draw the cut at a column or row into the 32-bit pixels of an image of width x height.
  paint(image, at, channel, table) {
    const { width } = this;
    const [a, b, line] = [new Float32Array(width), new Float32Array(width), new Int16Array(width)];
    let [inA, inB] = [-1, -1]; // the slices in a and b
    for (let y = 0; y < this.height; y += 1) {
      const found = this.around(this.distanceOf(y));
      const target = image.subarray(y * width, (y + 1) * width);
      if (!found) continue;
      if (inA !== found.a) inA = this.lineFrom(found.a, at, channel, a) ? found.a : -1;
      if (inB !== found.b) inB = this.lineFrom(found.b, at, channel, b) ? found.b : -1;
      if (inA < 0 || inB < 0) {
        target.fill(0xff1a1a1a);
        continue;
      }
      for (let i = 0; i < width; i += 1) line[i] = Math.round(a[i] + (b[i] - a[i]) * found.weight);
      ICH.paint(target, line, 0, table);
    }
  }
};
