"use strict";
// A click on a heading sorts by it, the largest first; the page is whole without this.
const number = (text) => (/^[<-]?[\d,]*\.?\d/.test(text) ? parseFloat(text.replace(/[,<]/g, "")) : NaN);

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const cell = (row, place) => row.cells[place].textContent.trim();
  [...table.tHead.rows[0].cells].forEach((heading, place) => {
    if (body.rows.length < 2) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = heading.ariaSort === "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.ariaSort = up ? "ascending" : "descending";
      const compare = (a, b) => {
        const [x, y] = [cell(a, place), cell(b, place)];
        const [m, n] = [number(x), number(y)];
        if (Number.isNaN(m) !== Number.isNaN(n)) return Number.isNaN(m) ? 1 : -1; // what has no figure comes last
        const order = Number.isNaN(m) ? x.localeCompare(y) : m - n;
        return up ? order : -order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
