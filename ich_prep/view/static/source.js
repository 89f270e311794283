// Where the data come from: the server that sent this page, or files beside it.
"use strict";

ICH.ServerSource = class {
  constructor(token) {
    this.headers = { "X-Ich-Token": token };
  }

  async ask(path, options = {}) {
    let response;
    try {
      response = await fetch(path, { cache: "no-store", ...options, headers: { ...this.headers, ...options.headers } });
    } catch {
      throw new Error("The server does not answer. Is `ich-prep view` still running?");
    }
    if (!response.ok) {
      const text = await response.text();
      let message = text;
      try {
        message = JSON.parse(text).error;
      } catch {
        // plain text
      }
      throw new Error(message || `The server answered ${response.status}.`);
    }
    return response;
  }

  async json(path, options) {
    return (await this.ask(path, options)).json();
  }

  about() { return this.json("api/about"); }
  volumes() { return this.json("api/volumes"); }
  volume(line) { return this.json(`api/volumes/${line}`); }
  where(text) { return this.json(`api/where?filter=${encodeURIComponent(text)}`); }
  corrections() { return this.json("api/corrections"); }

  async pixels(line, first, count) {
    return (await this.ask(`api/volumes/${line}/pixels/${first}/${count}`)).arrayBuffer();
  }

  async maps(line, index) {
    const response = await this.ask(`api/volumes/${line}/maps/${index}`);
    const [width, height] = ["X-Width", "X-Height"].map((name) => Number(response.headers.get(name)));
    return { width, height, data: new Uint8Array(await response.arrayBuffer()) };
  }

  quarantine(reason, first) {
    return this.json(`api/quarantine?reason=${encodeURIComponent(reason)}&first=${first}`);
  }

  async picture(number) {
    return URL.createObjectURL(await (await this.ask(`api/quarantine/${number}.png`)).blob());
  }

  mark(mark) {
    const headers = { "Content-Type": "application/json" };
    return this.json("api/corrections", { method: "POST", body: JSON.stringify(mark), headers });
  }
};

// A page that was opened from disk may load scripts, and nothing else: each file of data is a call of put().
ICH.StaticSource = class {
  static arrived = new Map();

  static put(name, value) {
    ICH.StaticSource.arrived.set(name, value);
  }

  load(name) {
    return new Promise((resolve, reject) => {
      const taken = () => {
        const value = ICH.StaticSource.arrived.get(name);
        ICH.StaticSource.arrived.delete(name);
        return value;
      };
      if (ICH.StaticSource.arrived.has(name)) {
        resolve(taken());
        return;
      }
      const script = ICH.element("script", { src: `data/${name}.js` });
      script.onload = () => { script.remove(); resolve(taken()); };
      script.onerror = () => { script.remove(); reject(new Error(`data/${name}.js is missing beside this page.`)); };
      document.head.append(script);
    });
  }

  async bytes(name) {
    const packed = Uint8Array.from(atob(await this.load(name)), (character) => character.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(unpacked).arrayBuffer();
  }

  about() { return this.load("about"); }
  volumes() { return this.load("volumes"); }
  volume(line) { return this.load(`volume-${line}`); }
  pixels(line, first) { return this.bytes(`pixels-${line}-${first}`); }
  async corrections() { return []; }

  async maps(line, index) {
    const { width, height, maps } = await this.load(`maps-${line}`);
    ICH.StaticSource.put(`maps-${line}`, { width, height, maps });
    const data = maps[index];
    return data ? { width, height, data: Uint8Array.from(atob(data), (character) => character.charCodeAt(0)) } : null;
  }

  async quarantine(reason, first) {
    const all = await this.load("quarantine");
    ICH.StaticSource.put("quarantine", all);
    const lines = reason ? all.lines.filter((line) => line.reason === reason) : all.lines;
    return { ...all, total: lines.length, lines: lines.slice(first, first + 100) };
  }
};
