// Draws a balance replay: a small chart per layer, and of the chosen layer its lines and its loads before and after; moves.
(() => {
  const LEFT = 46, RIGHT = 22, TOP = 8, AXIS = 36; // pixels around the large plots
  const SMALL = 84; // height of a layer's small chart
  const ORDER = ["fixed", "eplb", "oracle", "counterflow"]; // the last is drawn on top
  const data = JSON.parse(document.getElementById("data").textContent);
  const { first, steps, size, groups, ranks, layers, root } = data;
  const methods = ORDER.filter((name) => name in data.names);
  const means = unpackAll(data.means), lowest = unpackAll(data.lowest), loads = unpackAll(data.loads);
  const state = { chosen: data.chosen, width: 0 };
  const buttons = [...document.querySelectorAll(".layer")];
  const chooser = document.getElementById("layer");
  const plots = listPlots();
  let colours = {};

  // ---- data
  function unpackAll(columns) {
    return Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, unpack(column)]));
  }

  /** Numbers of sixteen bits, low byte first, times a scale. */
  function unpack({ scale, bits }) {
    const bytes = atob(bits), values = new Float32Array(bytes.length / 2);
    for (let n = 0; n < values.length; n++) values[n] = (bytes.charCodeAt(2 * n) + 256 * bytes.charCodeAt(2 * n + 1)) * scale;
    return values;
  }

  function findLoad(name, layer, group, rank) { return loads[name][(layer * groups + group) * ranks + rank]; }
  function endOf(group) { return Math.min((group + 1) * size, steps); }
  function writeShare(value) { return value.toFixed(3); }

  function nameGroup(group) {
    const from = first + group * size, to = first + endOf(group) - 1;
    return from === to ? `micro-batch ${from}` : `micro-batches ${from} to ${to}`;
  }

  // ---- places
  function listPlots() {
    const drawings = {
      lines: { height: 260, draw: drawLines, describe: describeLines },
      before: { height: heightOfMap(), draw: (plot) => drawMap(plot, "fixed"), describe: describeLoads },
      after: { height: heightOfMap(), draw: (plot) => drawMap(plot, "counterflow"), describe: describeLoads },
      moves: { height: 190, draw: drawMoves, describe: describeMoves },
    };
    return Object.entries(drawings).flatMap(([id, drawing]) => {
      const canvas = document.getElementById(id);
      return canvas ? [{ id, canvas, pen: canvas.getContext("2d"), cursor: canvas.nextElementSibling, ...drawing }] : [];
    });
  }

  /** Rows of 18 pixels, thinner where ranks are many, never less than a pixel. */
  function heightOfMap() { return TOP + Math.max(Math.min(18 * ranks, 384), ranks) + AXIS; }

  function placePlot(plot) {
    const width = Math.max(200, plot.canvas.parentElement.clientWidth);
    fitCanvas(plot.canvas, width, plot.height);
    plot.width = width;
    plot.box = { left: LEFT, right: width - RIGHT, top: TOP, bottom: plot.height - AXIS };
  }

  function toX(box, step) { return box.left + step / steps * (box.right - box.left); }
  function toY(box, value) { return box.bottom - (value - data.floor) / (1 - data.floor) * (box.bottom - box.top); }
  function middleOf(group) { return (group * size + endOf(group)) / 2; }

  function findGroup(box, x) {
    if (x < box.left || x > box.right) return null;
    return clamp(Math.floor((x - box.left) / (box.right - box.left) * steps / size), 0, groups - 1);
  }

  // ---- drawing
  function clear({ pen, width, height }) {
    pen.globalAlpha = 1;
    pen.fillStyle = colours.ground;
    pen.fillRect(0, 0, width, height);
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
  }

  function drawSteps({ pen, box }) {
    const step = Math.max(1, chooseStep(steps, (box.right - box.left) / 70));
    pen.textAlign = "center";
    pen.fillStyle = colours.muted;
    for (let n = Math.ceil(first / step) * step; n < first + steps; n += step) {
      const x = toX(box, n - first + 0.5);
      pen.fillRect(Math.round(x), box.bottom, 1, 4);
      pen.fillText(String(n), x, box.bottom + 12);
    }
    pen.fillText("micro-batch", (box.left + box.right) / 2, box.bottom + 27);
  }

  /** A thin line and a label at each value of the vertical axis. */
  function drawLevels({ pen, box }, values, place) {
    pen.textAlign = "right";
    for (const value of values) {
      const y = place(value);
      pen.fillStyle = colours.grid;
      pen.fillRect(box.left, Math.round(y), box.right - box.left, 1);
      pen.fillStyle = colours.muted;
      pen.fillText(writeNumber(value), box.left - 6, y);
    }
  }

  function listLevels(from, to, most) {
    const step = chooseStep(to - from, most), levels = [];
    for (let n = Math.ceil(from / step - 1e-9); n * step <= to + 1e-9; n++) levels.push(n * step);
    return levels;
  }

  function drawLines(plot) {
    clear(plot);
    drawSteps(plot);
    drawLevels(plot, listLevels(data.floor, 1, 6), (value) => toY(plot.box, value));
    for (const name of methods) drawMethod(plot, name, state.chosen, name === "counterflow" ? 2 : 1.5);
  }

  function drawMethod({ pen, box }, name, layer, thickness) {
    const from = layer * groups;
    pen.strokeStyle = pen.fillStyle = colours[name];
    if (lowest[name]) {
      pen.beginPath();
      for (let n = 0; n < groups; n++) pen.lineTo(toX(box, middleOf(n)), toY(box, means[name][from + n]));
      for (let n = groups - 1; n >= 0; n--) pen.lineTo(toX(box, middleOf(n)), toY(box, lowest[name][from + n]));
      pen.globalAlpha = 0.18;
      pen.fill();
      pen.globalAlpha = 1;
    }
    pen.beginPath();
    for (let n = 0; n < groups; n++) pen.lineTo(toX(box, middleOf(n)), toY(box, means[name][from + n]));
    pen.lineWidth = thickness;
    pen.lineJoin = "round";
    pen.setLineDash(name === "oracle" ? [5, 3] : []);
    pen.stroke();
    pen.setLineDash([]);
    if (groups > 1) return;
    pen.beginPath(); // a single point makes no line
    pen.arc(toX(box, middleOf(0)), toY(box, means[name][from]), 2 * thickness, 0, 7);
    pen.fill();
  }

  function boxOfSmall(width) { return { left: 24, right: width - 4, top: 7, bottom: SMALL - 7 }; }

  function drawSmall(button, layer) {
    const canvas = button.querySelector("canvas"), width = button.clientWidth - 12;
    fitCanvas(canvas, width, SMALL);
    const box = boxOfSmall(width), plot = { pen: canvas.getContext("2d"), width, height: SMALL, box };
    clear(plot);
    plot.pen.font = "10px system-ui, sans-serif";
    drawLevels(plot, [data.floor, 1], (value) => toY(box, value));
    for (const name of methods) drawMethod(plot, name, layer, 1);
  }

  /** Five shades for 0, 1/2, 1, the root and its square, mixed between. */
  function mixColour(load) {
    const place = Math.min(load <= 1 ? 2 * load : 2 + Math.log(load) / Math.log(root), 4);
    const lower = Math.min(Math.floor(place), 3), share = place - lower;
    const [one, other] = [colours.shades[lower], colours.shades[lower + 1]];
    return one.map((value, n) => Math.floor(value + (other[n] - value) * share + 0.5));
  }

  function paintMap(name) {
    const tile = document.createElement("canvas");
    tile.width = groups;
    tile.height = ranks;
    const pen = tile.getContext("2d"), image = pen.createImageData(groups, ranks);
    for (let rank = 0; rank < ranks; rank++) {
      for (let group = 0; group < groups; group++) {
        image.data.set([...mixColour(findLoad(name, state.chosen, group, rank)), 255], 4 * (rank * groups + group));
      }
    }
    pen.putImageData(image, 0, 0);
    return tile;
  }

  function drawMap(plot, name) {
    const { pen, box } = plot;
    clear(plot);
    const wide = box.right - box.left, high = box.bottom - box.top, ratio = window.devicePixelRatio || 1;
    pen.save();
    pen.beginPath();
    pen.rect(box.left, box.top, wide, high);
    pen.clip(); // the last group may be shorter than the others
    pen.imageSmoothingEnabled = groups > wide * ratio || ranks > high * ratio;
    pen.drawImage(paintMap(name), box.left, box.top, wide * groups * size / steps, high);
    pen.restore();
    drawSteps(plot);
    const step = Math.max(1, chooseStep(ranks, Math.max(1, high / 16)));
    pen.textAlign = "right";
    pen.fillStyle = colours.muted;
    for (let rank = 0; rank < ranks; rank += step) pen.fillText(String(rank), box.left - 6, box.top + (rank + 0.5) / ranks * high);
    pen.save();
    pen.translate(10, (box.top + box.bottom) / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    if (high >= 40) pen.fillText("rank", 0, 0);
    pen.restore();
  }

  function drawMoves(plot) {
    const { pen, box } = plot, highest = Math.max(...data.moves), high = box.bottom - box.top;
    clear(plot);
    drawSteps(plot);
    drawLevels(plot, listLevels(0, highest, 4), (value) => box.bottom - value / highest * high);
    for (let n = 0; n < groups; n++) {
      const left = toX(box, n * size), width = toX(box, endOf(n)) - left, gap = width > 4 ? 1 : 0;
      for (const [values, colour] of [[data.moves, "up-F"], [data.far, "up-B"]]) {
        const bar = values[n] / highest * high;
        pen.fillStyle = colours[colour];
        pen.fillRect(left + gap / 2, box.bottom - bar, width - gap, bar);
      }
    }
    pen.fillStyle = colours.muted;
    pen.fillRect(box.left, box.bottom, box.right - box.left, 1);
  }

  function drawChosen() {
    for (const plot of plots) plot.draw(plot);
  }

  function drawAll() {
    state.width = document.querySelector("main").clientWidth;
    plots.forEach(placePlot);
    drawChosen();
    buttons.forEach(drawSmall);
  }

  function readColours() {
    const shades = [0, 1, 2, 3, 4].map((shade) => `load-${shade}`);
    colours = findColours(["ground", "muted", "grid", "up-F", "up-B", ...ORDER, ...shades]);
    colours.shades = shades.map((name) => [1, 3, 5].map((n) => parseInt(colours[name].slice(n, n + 2), 16)));
  }

  function choose(layer) {
    state.chosen = clamp(layer, 0, layers.length - 1);
    chooser.value = String(state.chosen);
    buttons.forEach((button, n) => button.setAttribute("aria-pressed", String(n === state.chosen)));
    for (const name of document.querySelectorAll(".chosen")) name.textContent = layers[state.chosen];
    drawChosen();
  }

  // ---- what is under the pointer; the tooltip's lines
  function writeMethod(name, layer, group) {
    const n = layer * groups + group, least = lowest[name] ? `, lowest ${writeShare(lowest[name][n])}` : "";
    return `${data.names[name]} ${writeShare(means[name][n])}${least}`;
  }

  function describeLayer(layer, group) {
    const lines = Object.keys(data.names).map((name) => writeMethod(name, layer, group));
    return [`layer ${layers[layer]}, ${nameGroup(group)}`, ...lines];
  }

  function describeLines(plot, group) { return describeLayer(state.chosen, group); }

  function describeLoads({ box }, group, y) {
    const rank = clamp(Math.floor((y - box.top) / (box.bottom - box.top) * ranks), 0, ranks - 1);
    const lines = Object.keys(loads).map((name) => `${data.names[name]}: ${writeShare(findLoad(name, state.chosen, group, rank))} × the mean`);
    return [`rank ${rank}, layer ${layers[state.chosen]}, ${nameGroup(group)}`, ...lines];
  }

  function describeMoves(plot, group) {
    const unit = size > 1 ? "clones per micro-batch" : "clones";
    const far = data.far.some((count) => count > 0) ? [`${writeNumber(data.far[group])} of them from another node`] : [];
    return [nameGroup(group), `${writeNumber(data.moves[group])} ${unit}`, ...far];
  }

  function hover(plot, event) {
    const place = plot.canvas.getBoundingClientRect(), y = event.clientY - place.top;
    const group = findGroup(plot.box, event.clientX - place.left);
    if (group === null || y < plot.box.top || y > plot.box.bottom) return leave();
    showTooltip(plot.describe(plot, group, y), event.clientX, event.clientY);
    for (const { cursor, box } of plots) {
      cursor.hidden = false;
      cursor.style.left = `${toX(box, middleOf(group))}px`;
      Object.assign(cursor.style, { top: `${box.top}px`, height: `${box.bottom - box.top}px`, bottom: "auto" });
    }
    return undefined;
  }

  function hoverSmall(button, layer, event) {
    const place = button.querySelector("canvas").getBoundingClientRect();
    const group = findGroup(boxOfSmall(place.width), event.clientX - place.left);
    if (group === null) leave(); else showTooltip(describeLayer(layer, group), event.clientX, event.clientY);
  }

  function leave() {
    tooltip.hidden = true;
    for (const { cursor } of plots) cursor.hidden = true;
  }

  function listen() {
    for (const plot of plots) {
      plot.canvas.addEventListener("pointermove", (event) => hover(plot, event));
      plot.canvas.addEventListener("pointerleave", leave);
    }
    buttons.forEach((button, layer) => {
      button.addEventListener("click", () => choose(layer));
      button.addEventListener("pointermove", (event) => hoverSmall(button, layer, event));
      button.addEventListener("pointerleave", leave);
    });
    chooser?.addEventListener("change", () => choose(Number(chooser.value)));
    document.getElementById("previous")?.addEventListener("click", () => choose(state.chosen - 1));
    document.getElementById("next")?.addEventListener("click", () => choose(state.chosen + 1));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); drawAll(); });
    const main = document.querySelector("main");
    new ResizeObserver(() => { if (main.clientWidth !== state.width) drawAll(); }).observe(main);
  }

  readColours();
  drawAll();
  listen();

  // For tests: what is chosen, and where on the screen a share of a group's width and of a plot's height is.
  window.counterflow = {
    state,
    locate(id, group, down) {
      const { canvas, box } = plots.find((plot) => plot.id === id), place = canvas.getBoundingClientRect();
      return { x: place.left + toX(box, middleOf(group)), y: place.top + box.top + down * (box.bottom - box.top) };
    },
  };
})();
