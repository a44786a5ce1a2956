// The search box over a sample of captions: hides the rows that lack a word, counts the others.
"use strict";
for (const box of document.querySelectorAll("[data-search]")) {
  const field = box.querySelector("input");
  const rows = [...box.querySelectorAll("tbody tr")].map((row) => [row, row.textContent.toLowerCase()]);
  const said = box.querySelector("output");
  box.querySelector("form").hidden = false;
  box.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter((word) => word);
    let found = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      found += row.hidden ? 0 : 1;
    }
    said.textContent = `${found.toLocaleString("en")} of ${rows.length.toLocaleString("en")} captions`;
  });
}
