/* The charts: one for each backbone and task, drawn by Vega from the shown cells. */

const SIDE_BY_SIDE = 0.9; // percentage points between marks of equal cost, as in the figures
const CROWD = 4; // percentage points over which the marks of one k may spread
const NEAR = 1.5; // percentage points within which the guide of a ratio names a point

function spread(points) {
  // marks of equal cost would hide each other's intervals: each moves as little as lets them stand side by side
  const ordered = points.slice().sort((a, b) => a.at - b.at || a.order - b.order);
  const crowd = Math.max(1, ...ordered.map((point) => ordered.filter((other) => Math.abs(other.at - point.at) < 1).length));
  const step = Math.min(SIDE_BY_SIDE, CROWD / crowd);
  const blocks = []; // of neighbours that touch; least squares under a least distance, by pooling
  ordered.forEach((point, i) => {
    blocks.push({ sum: point.at - i * step, members: [i] });
    const mean = (block) => block.sum / block.members.length;
    while (blocks.length > 1 && mean(blocks.at(-2)) >= mean(blocks.at(-1))) {
      const last = blocks.pop();
      blocks.at(-1).sum += last.sum;
      blocks.at(-1).members.push(...last.members);
    }
  });
  for (const { sum, members } of blocks) {
    for (const i of members) ordered[i].x = members.length > 1 ? sum / members.length + i * step : ordered[i].at;
  }
  return points;
}

function onFront(points) {
  // a point is dominated where another is at least as cheap and as good, and better in one of the two
  const ordered = points.slice().sort((a, b) => a.at - b.at || b.y - a.y);
  let best = -Infinity;
  let cheapest = NaN;
  for (const point of ordered) {
    point.front = point.y > best || (point.y === best && point.at === cheapest);
    if (point.y > best) [best, cheapest] = [point.y, point.at];
  }
  return points;
}

class Front {
  constructor(figure, cells, spec, open) {
    this.figure = figure;
    this.cells = cells;
    this.spec = spec;
    this.open = open;
    this.holder = figure.querySelector(".chart");
    this.view = null;
  }

  points(shown, options) {
    const remaining = options.cost === "total" ? "remaining_total" : "remaining";
    const points = this.cells
      .filter((cell) => shown.has(cell.id) && cell.score !== null && cell[remaining] !== null)
      .map((cell, order) => {
        const [low, high] = options.bars === "none" ? [null, null] : [cell[options.bars + "_low"], cell[options.bars + "_high"]];
        return {
          id: cell.id, backbone: cell.backbone, series: cell.series, order, at: cell[remaining], y: cell.score,
          low: low ?? cell.score, high: high ?? cell.score, colour: `var(${cell.colour})`, path: cell.path,
          dashes: cell.dashes, dense: cell.dense, k: cell.k, label: describe(cell), seedScores: cell.seedScores,
        };
      });
    return onFront(spread(points));
  }

  async draw(shown, options) {
    const points = this.points(shown, options);
    this.figure.hidden = !points.length;
    if (!points.length) return;
    const guides = this.guides(points, options);
    for (const point of points) {
      const guide = guides.find((guide) => guide.k === point.k);
      point.mark = point.k && !(guide && Math.abs(guide.x - point.at) <= NEAR) ? `k = ${point.k}` : "";
    }
    const teacher = this.cells.find((cell) => cell.dense && cell.score !== null);
    const data = {
      points: points.sort((a, b) => a.at - b.at),
      seeds: points.flatMap((p) => (p.seedScores.length > 1 ? p.seedScores.map((y) => ({ x: p.x, y, colour: p.colour })) : [])),
      front: points.filter((point) => point.front),
      guides,
      teacher: teacher ? [{ y: teacher.score }] : [],
      // what the axes must hold
      extent: [
        ...points.flatMap(({ x, y, low, high }) => [{ x, y }, { x, y: low }, { x, y: high }]),
        ...guides.map(({ x }) => ({ x, y: points[0].y })),
        ...(teacher ? [{ x: points[0].x, y: teacher.score }] : []),
      ],
    };
    if (!this.view) {
      const setting = { mode: "vega", renderer: "svg", ast: true, actions: false, defaultStyle: false, tooltip: () => {} };
      const spec = { ...this.spec, data: Object.entries(data).map(([name, values]) => ({ name, values })) };
      this.view = (await vegaEmbed(this.holder, spec, setting)).view;
      new ResizeObserver(() => this.resize()).observe(this.holder);
    } else {
      for (const [name, rows] of Object.entries(data)) this.view.data(name, rows);
    }
    this.view.signal("xTitle", options.cost === "total" ? "remaining FLOPs of the whole model, % of dense" : "remaining encoder FLOPs, % of dense");
    this.view.signal("yTitle", this.cells[0].axis);
    this.size();
    await this.view.runAsync();
    this.reach();
  }

  guides(points, options) {
    // what a ratio asks for is a share of the encoder's FLOPs
    if (options.cost === "total") return [];
    const asked = new Map();
    for (const cell of this.cells) {
      if (cell.requested_remaining === null || !points.some((point) => point.k === cell.k)) continue;
      asked.set(cell.k, [...(asked.get(cell.k) ?? []), cell.requested_remaining]);
    }
    return [...asked].map(([k, x]) => ({ k, x: x.reduce((a, b) => a + b) / x.length, text: `k = ${k}` }));
  }

  size() {
    const width = Math.max(240, this.holder.clientWidth);
    this.view.width(width).height(Math.round(Math.min(440, Math.max(270, width * 0.56)))).signal("ticks", width < 420 ? 5 : 8);
  }

  async resize() {
    if (this.figure.hidden || !this.holder.clientWidth) return;
    this.size();
    await this.view.runAsync();
    this.reach();
  }

  reach() {
    // one stop of the Tab key for each chart; arrow keys go from point to point, by cost
    const marks = [...this.holder.querySelectorAll(".cells path")];
    const svg = this.holder.querySelector("svg");
    svg.setAttribute("role", "group");
    svg.setAttribute("aria-label", `${this.figure.querySelector("figcaption").textContent.trim()}: ${marks.length} points. Arrow keys go from point to point, Enter opens one.`);
    marks.forEach((mark, i) => {
      mark.setAttribute("role", "button");
      mark.setAttribute("tabindex", i ? "-1" : "0");
      mark.removeAttribute("aria-roledescription");
      const { id } = mark.__data__.datum;
      mark.dataset.cell = id;
      mark.onclick = () => this.open(id);
      mark.onmouseenter = () => this.hover(mark);
      mark.onfocus = () => this.hover(mark);
      mark.onmouseleave = mark.onblur = () => this.leave();
      mark.onkeydown = (event) => {
        const to = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: marks.length - 1 }[event.key];
        if (event.key === "Enter" || event.key === " ") this.open(id);
        else if (to !== undefined && marks[to]) {
          marks.forEach((other) => other.setAttribute("tabindex", other === marks[to] ? "0" : "-1"));
          marks[to].focus();
        } else return;
        event.preventDefault();
      };
    });
  }

  hover(mark) {
    const cell = this.cells.find((cell) => cell.id === mark.dataset.cell);
    const tip = document.getElementById("tip");
    fillTip(tip, cell);
    tip.hidden = false;
    const at = mark.getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const left = at.right + 10 + box.width > innerWidth ? at.left - 10 - box.width : at.right + 10;
    tip.style.left = `${Math.max(6, Math.min(left, innerWidth - box.width - 6)) + scrollX}px`;
    tip.style.top = `${Math.max(6, Math.min(at.top - box.height / 2, innerHeight - box.height - 6)) + scrollY}px`;
    for (const other of this.holder.querySelectorAll(".cells path, .bars line")) {
      other.classList.toggle("dim", other.__data__.datum.series !== cell.series);
    }
  }

  leave() {
    document.getElementById("tip").hidden = true;
    for (const mark of this.holder.querySelectorAll(".dim")) mark.classList.remove("dim");
  }
}
