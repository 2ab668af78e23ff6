/* Filters, sorting, and the two schemes. */

const data = JSON.parse(document.getElementById("data").textContent);
const panel = new Panel(data);
const chosen = { task: new Set(), backbone: new Set(), method: new Set(), k: new Set(), options: new Set() };
const rows = [...document.querySelectorAll("#cells tbody tr")];
const left = [...document.querySelectorAll("#left tbody tr")];
const cellOf = new Map(data.cells.map((cell) => [cell.id, cell]));
const readingOrder = new Map(rows.map((row, i) => [row, i]));
const options = { cost: "encoder", bars: "example" };

function announce(text) {
  document.getElementById("said").textContent = text;
}

function passes(values) {
  // a method's name tells its options, and runs without a score are few: neither is asked for them
  const asked = Object.entries(chosen).filter(([key]) => key in values && !(key === "options" && chosen.method.size));
  return asked.every(([key, wanted]) => !wanted.size || wanted.has(values[key]));
}

/* ---- charts ---- */

const fronts = [...document.querySelectorAll("figure.front")].map((figure) => {
  const cells = data.cells.filter((cell) => cell.backbone === figure.dataset.backbone && cell.task === figure.dataset.task);
  return new Front(figure, cells, data.spec, (id) => panel.cell(id));
});

let drawing = 0;
async function draw(shown) {
  const mine = ++drawing;
  for (const front of fronts) {
    if (mine !== drawing) return; // a later choice has been made
    await front.draw(shown, options);
  }
  document.documentElement.dataset.drawn = mine;
}

/* ---- filters ---- */

function update() {
  const shown = new Set();
  for (const row of rows) {
    const cell = cellOf.get(row.dataset.cell);
    const visible = passes({ task: cell.task, backbone: cell.backbone, method: cell.series, k: cell.k, options: cell.options });
    row.hidden = !visible;
    if (visible) shown.add(cell.id);
  }
  let unscored = 0;
  for (const row of left) {
    const { task, backbone, method, k } = row.dataset;
    row.hidden = !passes({ task, backbone, method, k });
    unscored += !row.hidden;
  }
  const any = Object.values(chosen).some((wanted) => wanted.size);
  const text = `${shown.size} of ${rows.length} cells shown` + (left.length ? `, ${unscored} of ${left.length} runs without a score` : "");
  document.getElementById("count").textContent = text;
  document.getElementById("clear").disabled = !any;
  document.getElementById("none").hidden = shown.size > 0 || !rows.length;
  draw(shown);
}

for (const chip of document.querySelectorAll(".chip[data-key]")) {
  if (chip.getAttribute("aria-pressed") === "true") chosen[chip.dataset.key].add(chip.dataset.value);
  chip.onclick = () => {
    const wanted = chosen[chip.dataset.key];
    const { value } = chip.dataset;
    wanted.has(value) ? wanted.delete(value) : wanted.add(value);
    chip.setAttribute("aria-pressed", wanted.has(value));
    update();
  };
}

document.getElementById("clear").onclick = () => {
  for (const wanted of Object.values(chosen)) wanted.clear();
  for (const chip of document.querySelectorAll(".chip[data-key]")) chip.setAttribute("aria-pressed", "false");
  update();
};

for (const input of document.querySelectorAll("input[name=cost], input[name=bars]")) {
  input.checked = input.defaultChecked; // some browsers keep a choice over a reload, and the page would not know
  input.onchange = () => {
    options[input.name] = input.value;
    update();
  };
}

/* ---- table ---- */

const headings = [...document.querySelectorAll("#cells thead th")];

function sortBy(index) {
  const { key, first } = data.columns[index];
  const now = headings[index].getAttribute("aria-sort");
  const other = first === "ascending" ? "descending" : "ascending";
  const direction = now === first ? other : first;
  headings.forEach((heading, i) => (i === index ? heading.setAttribute("aria-sort", direction) : heading.removeAttribute("aria-sort")));
  const sign = direction === "ascending" ? 1 : -1;
  const value = (row) => cellOf.get(row.dataset.cell)[key];
  const missing = (it) => it === null || it === "";
  const ordered = rows.slice().sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    // what is missing comes last in both directions
    if (missing(x) || missing(y)) return missing(x) - missing(y) || readingOrder.get(a) - readingOrder.get(b);
    const order = typeof x === "number" ? x - y : x < y ? -1 : x > y ? 1 : 0;
    return sign * order || readingOrder.get(a) - readingOrder.get(b);
  });
  document.querySelector("#cells tbody").append(...ordered);
  announce(`Sorted by ${headings[index].innerText.replace(/\s+/g, " ").trim()}, ${direction}.`);
}

headings.forEach((heading, i) => (heading.querySelector("button").onclick = () => sortBy(i)));
for (const button of document.querySelectorAll("#cells tbody button")) {
  button.onclick = () => panel.cell(button.closest("tr").dataset.cell);
}
for (const button of document.querySelectorAll("#left tbody button")) {
  button.onclick = () => panel.run(button.closest("tr").dataset.run);
}

/* ---- schemes ---- */

const scheme = document.getElementById("scheme");
const system = matchMedia("(prefers-color-scheme: dark)");

function kept(value) {
  try {
    if (value) localStorage.setItem("scheme", value);
    return localStorage.getItem("scheme");
  } catch {
    return null; // some browsers keep nothing for a file
  }
}

function isDark() {
  return (document.documentElement.dataset.scheme ?? (system.matches ? "dark" : "light")) === "dark";
}

function showScheme() {
  scheme.setAttribute("aria-pressed", isDark());
}

scheme.onclick = () => {
  document.documentElement.dataset.scheme = isDark() ? "light" : "dark";
  kept(document.documentElement.dataset.scheme);
  showScheme();
};
if (["light", "dark"].includes(kept())) document.documentElement.dataset.scheme = kept();
system.addEventListener("change", showScheme);
showScheme();

document.documentElement.classList.add("ready");
update();
panel.fromAddress();
addEventListener("hashchange", () => panel.fromAddress());
addEventListener("keydown", (event) => event.key === "Escape" && (document.getElementById("tip").hidden = true));
