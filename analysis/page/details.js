/* The panel of one point: its numbers, its runs with their provenance, and the commands that make them again. */

function make(tag, attributes = {}, ...children) {
  // text is set as text and never parsed: what stands in a result cannot become markup
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function named(cell) {
  return cell.k ? `${cell.series}, k = ${cell.k}` : cell.series;
}

function place(cell) {
  return `${cell.task === "average" ? `average over ${cell.tasks} tasks` : cell.task} · ${cell.backboneName}`;
}

function show(value, digits = 1) {
  return value === null ? "n/a" : value.toFixed(digits).replace("-", "−");
}

function describe(cell) {
  const range = cell.example_low === null ? "" : `, 95 % over examples ${show(cell.example_low)} to ${show(cell.example_high)}`;
  return `${named(cell)}: score ${show(cell.score)}${range}; ${show(cell.remaining)} % of the encoder FLOPs remain`;
}

function facts(pairs) {
  const list = make("dl", { class: "facts" });
  for (const [name, value] of pairs) list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  return list;
}

function swatch(cell) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "-1.6 -1.6 3.2 3.2");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", cell.path);
  path.setAttribute("fill", `var(${cell.colour})`);
  svg.append(path);
  return svg;
}

function fillTip(tip, cell) {
  const over = (low, high) => (low === null ? "no interval" : `${show(low)} to ${show(high)}`);
  const lines = [
    ["Score", show(cell.score, 2)],
    ["95 % over examples", over(cell.example_low, cell.example_high)],
    ["95 % over seeds", cell.seed_low === null ? `none (${cell.seeds ?? 0} seed)` : over(cell.seed_low, cell.seed_high)],
    ["Remaining encoder FLOPs", `${show(cell.remaining)} %`],
    ["… of the whole model", `${show(cell.remaining_total)} %`],
  ];
  if (!cell.dense) lines.push(["Asked for", `${show(cell.requested_remaining)} %`], ["Drop, points", show(cell.drop, 2)]);
  tip.replaceChildren(make("strong", {}, swatch(cell), named(cell)), make("span", { class: "where" }, place(cell)), facts(lines));
}

function grid(head, rows, caption) {
  const cells = (row, tag) => row.map((text, i) => make(i ? tag : "th", tag === "th" ? { scope: "col" } : i ? {} : { scope: "row" }, text));
  return make(
    "table", { class: "plain" }, make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...cells(head, "th"))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells(row, "td")))),
  );
}

function commandOf(id, run) {
  // lines break between options, and not at the hyphens of one
  const options = run.command.split(/ (?=--)/).map((option) => make("span", {}, option));
  const code = make("code", {}, ...options.flatMap((option, i) => (i ? [" ", option] : [option])));
  const button = make("button", { type: "button", class: "copy" }, "Copy");
  button.onclick = async () => {
    let copied = true;
    try {
      await navigator.clipboard.writeText(run.command);
    } catch {
      // no clipboard without a secure context: the text is selected in place of that
      getSelection().selectAllChildren(code);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Selected: press Ctrl+C";
    announce(copied ? "The command is on the clipboard." : "The command is selected.");
  };
  return make("div", { class: "command" }, make("pre", { tabindex: "0", role: "region", "aria-label": `Command of run ${id}` }, code), button);
}

function folded(title, ...children) {
  return make("details", {}, make("summary", {}, title), ...children);
}

function runOf(id, run, open) {
  const section = make("section", { class: "run", "aria-label": `Run ${id}` });
  section.append(make("h3", {}, `Run ${id}`, make("span", { class: `status ${run.status}` }, run.status), run.seed === "" ? "" : ` seed ${run.seed}`));
  if (run.reason) section.append(make("p", { class: "reason" }, run.reason));
  section.append(make("h4", {}, "Make it again"), commandOf(id, run));
  if (run.notes.length) section.append(make("h4", {}, "Notes"), make("ul", {}, ...run.notes.map((note) => make("li", {}, note))));
  section.append(make("h4", {}, "Where it came from"), facts(run.provenance));
  const numbers = facts(run.numbers);
  if (run.numbers.length) section.append(open ? make("div", {}, make("h4", {}, "Measured"), numbers) : folded("Measured", numbers));
  section.append(folded("Every setting", facts(run.setting)));
  if (run.traceback) section.append(folded("Traceback", make("pre", { tabindex: "0", role: "region", "aria-label": `Traceback of run ${id}` }, run.traceback)));
  const files = [["Result", `runs/${encodeURIComponent(id)}.json`], ["Predictions", run.predictions]];
  const links = files.filter(([, path]) => path).map(([text, path]) => make("a", { href: `./${path}` }, text));
  section.append(make("p", { class: "files" }, "Files beside this page: ", ...links.flatMap((link, i) => (i ? [", ", link] : [link]))));
  return section;
}

class Panel {
  constructor(data) {
    this.data = data;
    this.dialog = document.getElementById("panel");
    this.body = this.dialog.querySelector(".body");
    this.dialog.querySelector(".close").onclick = () => this.dialog.close();
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("close", () => history.replaceState(null, "", "#"));
  }

  cell(id) {
    const cell = this.data.cells.find((cell) => cell.id === id);
    const runs = cell.runs.map((run) => runOf(run, this.data.runs[run], cell.runs.length === 1));
    const parts = (cell.parts ?? []).map((part) => this.data.cells.find((cell) => cell.id === part));
    const content = [facts(cell.facts)];
    if (cell.against.length) {
      const head = ["Other method", "Difference, points [95 %, paired]", "p", "p after Holm"];
      content.push(folded(`Against ${cell.against.length} other methods at k = ${cell.k}`, grid(head, cell.against, "This method minus the other, on the same examples and seeds")));
    }
    if (parts.length) {
      const buttons = parts.map((part) => {
        const button = make("button", { type: "button", class: "link" }, `${part.task}: ${show(part.score)}`);
        button.onclick = () => this.cell(part.id);
        return make("li", {}, button);
      });
      content.push(make("h3", {}, "Averaged over"), make("ul", {}, ...buttons));
    } else if (!runs.length) {
      content.push(make("p", {}, "This teacher was evaluated beside the methods that start from it, and is no run of its own."));
    }
    this.show(make("span", {}, swatch(cell), named(cell)), place(cell), [...content, ...runs], cell.runs[0]);
  }

  run(id) {
    const run = this.data.runs[id];
    this.show(run.k ? `${run.title}, k = ${run.k}` : run.title, "a run without a score", [runOf(id, run, true)], id);
  }

  show(title, where, content, run) {
    this.dialog.querySelector("h2").replaceChildren(title);
    this.dialog.querySelector(".where").textContent = where;
    this.body.replaceChildren(...content);
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.querySelector(".scroll").scrollTop = 0;
    if (run) history.replaceState(null, "", `#${run}`);
  }

  fromAddress() {
    const id = location.hash.slice(1);
    const cell = this.data.cells.find((cell) => cell.runs.includes(id));
    if (cell) this.cell(cell.id);
    else if (Object.hasOwn(this.data.runs, id)) this.run(id);
  }
}
