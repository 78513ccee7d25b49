"use strict";
// Tables whose columns can be sorted: a click or Enter on a heading sorts, a second one turns the order round.
(() => {
  const number = (cell) => {
    const plain = cell.textContent.replace(/[\u2212\u2013]/g, "-").replace(/(\d),(?=\d{3})/g, "$1");
    const found = plain.match(/[-+]?\d*\.?\d+(e[-+]?\d+)?/i);
    return found ? Number(found[0]) : NaN;
  };
  const sort = (table, column, descending) => {
    const body = table.tBodies[0];
    const numeric = table.tHead.rows[0].cells[column].classList.contains("number");
    const rows = [...body.rows].map((row) => {
      const cell = row.cells[column];
      return { row, key: numeric ? number(cell) : cell.textContent.trim() };
    });
    const missing = (key) => key === "" || key === "\u2013" || Number.isNaN(key);
    rows.sort((one, other) => {
      if (missing(one.key) || missing(other.key)) return missing(one.key) - missing(other.key);
      const order = numeric ? one.key - other.key : one.key.localeCompare(other.key, undefined, { numeric: true });
      return descending ? -order : order;
    });
    body.append(...rows.map((entry) => entry.row));
  };
  for (const table of document.querySelectorAll("table")) {
    if (table.tBodies[0].rows.length < 2) continue;
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      if (!heading.textContent) return;
      const button = document.createElement("button");
      button.type = "button";
      button.title = "Sort by this column";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const descending = heading.getAttribute("aria-sort") === "ascending";
        headings.forEach((each) => each.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sort(table, column, descending);
      });
    });
  }
})();
