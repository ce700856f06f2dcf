"use strict";
const form = document.querySelector("form");
const list = document.querySelector("#items");
const items = [...list.children];
const cells = (item) => [...item.querySelectorAll("figure[data-method]")];

function value(item) {
  const figure = item.querySelector(`figure[data-method="${CSS.escape(form.by.value)}"]`);
  const number = figure ? JSON.parse(figure.dataset.figures)[form.measure.value] : null;
  return number === undefined ? null : number;
}

function apply() {
  const type = form.type.value, text = form.text.value.toLowerCase(), order = form.order.value;
  const hidden = new Set([...form.querySelectorAll("[name=method]")].filter((box) => !box.checked).map((box) => box.value));
  let count = 0;
  for (const item of items) {
    const failed = cells(item).some((cell) => cell.dataset.reason);
    const fits = (!type || item.dataset.type === type) && (!text || item.dataset.text.toLowerCase().includes(text)) &&
      (!form.failed.checked || failed);
    item.hidden = !fits;
    count += fits ? 1 : 0;
    for (const cell of cells(item)) cell.hidden = hidden.has(cell.dataset.method);
  }
  const sign = order === "lowest" ? 1 : -1;
  const sorted = order === "set" ? items : [...items].sort((one, other) => {
    const a = value(one), b = value(other);
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (a - b);
  });
  list.append(...sorted);
  list.classList.toggle("difference", form.view.value === "difference");
  list.classList.toggle("regions", form.regions.checked);
  list.style.setProperty("--cut", form.cut.value);
  document.querySelector("#count").textContent = `${count} shown`;
}

form.addEventListener("input", apply);
form.addEventListener("submit", (event) => event.preventDefault());
list.addEventListener("pointermove", (event) => {
  const frame = event.target.closest(".frame2.pair");
  if (!frame || (event.pointerType === "mouse" && !event.buttons)) return;
  const box = frame.getBoundingClientRect();
  frame.style.setProperty("--cut", Math.max(0, Math.min(100, (100 * (event.clientX - box.left)) / box.width)));
});
list.addEventListener("dragstart", (event) => event.preventDefault());
apply();
