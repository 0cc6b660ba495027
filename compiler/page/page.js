"use strict";

let drawings;

// Makes elements of the drawings of a site, once.
function draw(details) {
  for (const place of details.querySelectorAll("[data-drawing]:empty")) {
    drawings ??= JSON.parse(document.getElementById("drawings").textContent);
    const xml = drawings[place.dataset.drawing];
    place.append(new DOMParser().parseFromString(xml, "image/svg+xml").documentElement);
  }
}

// Opens the site that a link of the table, or the address, leads to.
function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
  }
}

// Compares cells of one column: numbers by data-value, text as people count; empty ones come last.
function comparison(column, kind, direction) {
  const collator = new Intl.Collator("en", { numeric: true });
  const read =
    kind === "number"
      ? (row) => row.cells[column].dataset.value ?? ""
      : (row) => row.cells[column].textContent.trim();
  // Python writes inf where JavaScript reads Infinity; what is no number is worse than all.
  const number = (text) => (text === "nan" ? Infinity : Number(text.replace("inf", "Infinity")));
  const compare = kind === "number" ? (a, b) => number(a) - number(b) || 0 : collator.compare;
  return (a, b) => {
    const [left, right] = [read(a), read(b)];
    if (!left || !right) return !left - !right;
    return direction * compare(left, right);
  };
}

function makeSortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((each) => each.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort(comparison(column, heading.dataset.kind, ascending ? 1 : -1));
      table.tBodies[0].append(...rows);
    });
  });
}

function makeFilter(table) {
  const [controls, filter, decision, shown] = ["controls", "filter", "decision", "shown"].map(
    (id) => document.getElementById(id),
  );
  const entries = [...table.tBodies[0].rows].map((row) => ({
    row,
    text: row.textContent.toLowerCase(),
    drawing: document.querySelector(row.querySelector("a").hash),
  }));
  const apply = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { row, text, drawing } of entries) {
      const fits =
        words.every((word) => text.includes(word)) &&
        (!decision.value || decision.value === row.dataset.decision);
      row.hidden = drawing.hidden = !fits;
      count += fits;
    }
    shown.textContent = `${count} of ${entries.length} shown`;
  };
  filter.addEventListener("input", apply);
  decision.addEventListener("change", apply);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.hidden = false;
  apply();
}

const table = document.getElementById("sites");
if (table) {
  makeSortable(table);
  makeFilter(table);
}
// Of details, this event does not bubble.
addEventListener("toggle", (event) => event.target.open && draw(event.target), true);
addEventListener("hashchange", openTarget);
openTarget();
