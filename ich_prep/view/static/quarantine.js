// The quarantine: how many files for which reason, what to do about it, and the files, as pictures where possible.
"use strict";

const LINES = 100; // of a page of the table

const held = { reason: "", first: 0, pictures: [] };

const showPicture = async (number, cell) => {
  cell.replaceChildren("…");
  try {
    const url = await ICH.source.picture(number);
    held.pictures.push(url);
    cell.replaceChildren(ICH.element("img", { src: url, alt: "The quarantined file as a picture" }));
  } catch (error) {
    cell.replaceChildren(ICH.element("span", { class: "muted" }, error.message));
  }
};

const quarantineRow = (line) => {
  const picture = ICH.element("td", { class: "picture" });
  if (ICH.about.pictures) {
    picture.append(ICH.element("button", { class: "small", onclick: () => showPicture(line.number, picture) }, "Show"));
  }
  const jump = () => {
    ICH.tab("viewer");
    ICH.open(line.line, line.row);
  };
  const open = line.line !== null && (!ICH.list.lines || ICH.list.lines.includes(line.line));
  return ICH.element(
    "tr", {},
    ICH.element("td", { class: "path" }, line.path ?? ""),
    ICH.element("td", {}, ICH.element("code", {}, line.reason ?? "")),
    ICH.element("td", { class: "detail" }, line.detail ?? ""),
    ICH.element("td", {}, line.stage ?? ""),
    ICH.element("td", {}, open ? ICH.element("button", { class: "small", onclick: jump }, `Row ${line.row}`) : (line.row ?? "")),
    ICH.about.pictures ? picture : null,
  );
};

const reasonCard = (entry) => {
  const choose = () => {
    Object.assign(held, { reason: held.reason === entry.reason ? "" : entry.reason, first: 0 });
    ICH.showQuarantine();
  };
  return ICH.element(
    "button", { class: "reason", "aria-pressed": String(held.reason === entry.reason), onclick: choose },
    ICH.element("b", {}, ICH.number(entry.files)), ICH.element("code", {}, entry.reason),
    ICH.element("span", {}, entry.meaning), ICH.element("span", { class: "muted" }, entry.action),
  );
};

ICH.showQuarantine = async () => {
  const place = ICH.byId("quarantine");
  let page;
  try {
    page = await ICH.source.quarantine(held.reason, held.first);
  } catch (error) {
    place.replaceChildren(ICH.element("p", { class: "error" }, error.message));
    return;
  }
  for (const url of held.pictures.splice(0)) URL.revokeObjectURL(url);
  const turn = (by) => () => { held.first += by; ICH.showQuarantine(); };
  const last = Math.min(held.first + page.lines.length, page.total);
  const heads = ["File", "Reason", "Detail", "Stage", "Row", ...(ICH.about.pictures ? ["Picture"] : [])];
  const hint = "Start the viewer with --src and the build's sources to see the files.";
  place.replaceChildren(
    ICH.element("h2", {}, "Quarantine"),
    ICH.element("p", { class: "muted" }, page.reasons.length ? "Files and slices that are not in the dataset. Choose a reason to see its files only." : "No file was quarantined."),
    ICH.element("div", { class: "reasons" }, page.reasons.map(reasonCard)),
    ...(page.total
      ? [
          ICH.element("div", { class: "wide-table", tabindex: "0", role: "region", "aria-label": "Quarantined files" }, ICH.element(
            "table", {},
            ICH.element("thead", {}, ICH.element("tr", {}, heads.map((head) => ICH.element("th", { scope: "col" }, head)))),
            ICH.element("tbody", {}, page.lines.map(quarantineRow)),
          )),
          ICH.element(
            "p", { class: "pages" },
            ICH.element("button", { disabled: held.first === 0, onclick: turn(-LINES) }, "Previous"),
            ` ${ICH.number(held.first + 1)} to ${ICH.number(last)} of ${ICH.number(page.total)} `,
            ICH.element("button", { disabled: last >= page.total, onclick: turn(LINES) }, "Next"),
          ),
          page.note ? ICH.element("p", { class: "muted" }, page.note) : null,
          ICH.about.pictures || ICH.about.static ? null : ICH.element("p", { class: "muted" }, hint),
        ].filter(Boolean)
      : []),
  );
};
