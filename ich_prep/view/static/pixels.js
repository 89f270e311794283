// Stored pixels of a volume, loaded in pieces around the slice that is shown; windows from HU to grey levels.
"use strict";

// The code of every HU value by LINEAR_EXACT of PS3.3 C.11.2.1.3.2, rounded half to even: as ich-prep stores windows.
ICH.windowTable = ({ center, width }) => {
  const table = new Uint8ClampedArray(65536);
  const lower = center - width / 2;
  for (let bits = 0; bits < 65536; bits += 1) {
    const hu = bits < 32768 ? bits : bits - 65536;
    table[bits] = ((hu - lower) / width) * 255; // a clamped array rounds half to even
  }
  return table;
};

const tables = new Map();
ICH.tableFor = (window) => {
  const key = `${window.center}/${window.width}`;
  if (!tables.has(key)) {
    if (tables.size > 16) tables.clear();
    tables.set(key, ICH.windowTable(window));
  }
  return tables.get(key);
};

// Write one channel of `values`, from `start` on, into the 32-bit pixels of an image.
ICH.paint = (pixels, values, start, table) => {
  const count = pixels.length;
  if (table) {
    for (let i = 0; i < count; i += 1) {
      const code = table[values[start + i] & 0xffff];
      pixels[i] = 0xff000000 | (code << 16) | (code << 8) | code;
    }
  } else {
    for (let i = 0; i < count; i += 1) {
      const code = values[start + i];
      pixels[i] = 0xff000000 | (code << 16) | (code << 8) | code;
    }
  }
};

const REQUESTS = 3; // at a time

ICH.Pixels = class {
  constructor(line, ok) {
    this.line = line;
    this.place = []; // of each slice among those with pixels, -1 for one without
    let count = 0;
    for (const has of ok) this.place.push(has ? count++ : -1);
    this.count = count;
    this.step = ICH.about.slices_per_read;
    this.pieces = new Map(); // first slice -> pixels
    this.waiting = new Set();
    this.failed = new Set();
    this.stopped = false;
    this.wanted = 0;
    this.area = ICH.about.size ** 2;
    this.length = this.area * ICH.about.channels;
  }

  // Return {values, start} of a slice; null while it is not here, or if it has no pixels.
  slice(index) {
    const place = this.place[index] ?? -1;
    if (place < 0) return null;
    const first = place - (place % this.step);
    const values = this.pieces.get(first);
    return values ? { values, start: (place - first) * this.length } : null;
  }

  get complete() {
    return this.pieces.size * this.step >= this.count;
  }

  // Load the piece with a slice first, then its neighbours, outwards.
  want(index) {
    const nearest = this.place[index] >= 0 ? this.place[index] : this.place.slice(0, index).filter((k) => k >= 0).length;
    this.wanted = ICH.clamp(nearest, 0, Math.max(this.count - 1, 0));
    this.fill();
  }

  next() {
    const middle = this.wanted - (this.wanted % this.step);
    for (let away = 0; away < this.count + this.step; away += this.step) {
      for (const first of away ? [middle + away, middle - away] : [middle]) {
        const known = this.pieces.has(first) || this.waiting.has(first) || this.failed.has(first);
        if (first >= 0 && first < this.count && !known) return first;
      }
    }
    return -1;
  }

  fill() {
    while (!this.stopped && this.waiting.size < REQUESTS) {
      const first = this.next();
      if (first < 0) return;
      this.load(first);
    }
  }

  async load(first) {
    this.waiting.add(first);
    try {
      const count = Math.min(this.step, this.count - first);
      const raw = await ICH.source.pixels(this.line, first, count);
      this.pieces.set(first, ICH.about.store === "hu" ? new Int16Array(raw) : new Uint8Array(raw));
    } catch (error) {
      this.failed.add(first);
      ICH.toast(error.message, "error");
    }
    this.waiting.delete(first);
    if (this.stopped) return;
    ICH.redraw();
    this.fill();
  }

  stop() {
    this.stopped = true;
  }
};
