"use strict";
// Tables sort by the column whose head is clicked: numbers by value with the missing ones last.
document.addEventListener("click", (event) => {
  const button = event.target.closest("table.sortable th button");
  if (!button) return;
  const head = button.parentElement;
  const body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  const numeric = head.classList.contains("number");
  const key = (row) => {
    const cell = row.cells[head.cellIndex];
    const text = cell.dataset.value ?? cell.textContent;
    return numeric ? Number.parseFloat(text) : text;
  };
  const order = (a, b) => {
    if (!numeric) return a.localeCompare(b, "en", { numeric: true });
    if (Number.isNaN(a) || Number.isNaN(b)) return 0;
    return a < b ? -1 : a > b ? 1 : 0;
  };
  const rows = [...body.rows].map((row) => [key(row), row]);
  const last = rows.filter(([x]) => numeric && Number.isNaN(x));
  const sorted = rows.filter(([x]) => !(numeric && Number.isNaN(x)));
  sorted.sort(([a], [b]) => (down ? order(b, a) : order(a, b)));
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...sorted, ...last].map(([, row]) => row));
});

// A row is shown if it has every word of the search field and what each menu asks for.
for (const form of document.querySelectorAll("[data-filters]")) {
  const rows = [...document.getElementById(form.dataset.filters).tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const count = form.querySelector("output");
  const update = () => {
    const words = form.querySelector("input").value.toLowerCase().split(/\s+/);
    const menus = [...form.querySelectorAll("select")].filter((menu) => menu.value);
    let shown = 0;
    rows.forEach((row, i) => {
      const fits =
        words.every((word) => texts[i].includes(word)) &&
        menus.every((menu) => row.cells[menu.dataset.column].textContent.trim() === menu.value);
      row.hidden = !fits;
      shown += fits;
    });
    count.value = `${shown} of ${rows.length} rows`;
  };
  form.addEventListener("input", update);
  update();
}
