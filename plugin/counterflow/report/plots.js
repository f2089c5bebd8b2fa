// Draws what came of balancing, over micro-batches or steps: a small chart per layer; of the chosen layer lines and heat maps; bars.
(() => {
  const LEFT = 46, RIGHT = 22, TOP = 8, AXIS = 36; // pixels around the large plots
  const SMALL = 84; // height of a layer's small chart
  const ORDER = ["fixed", "eplb", "oracle", "counterflow"]; // the last is drawn on top
  const data = JSON.parse(document.getElementById("data").textContent);
  const { firsts, lasts, steps, size, groups, rows, layers } = data;
  const methods = ORDER.filter((name) => name in data.names);
  const means = unpackAll(data.means), lowest = unpackAll(data.lowest);
  const maps = data.maps.map((map) => ({ ...map, values: unpack(map.values) }));
  const state = { chosen: data.chosen, width: 0 };
  const buttons = [...document.querySelectorAll(".layer")];
  const chooser = document.getElementById("layer");
  const plots = listPlots(), isDark = matchMedia("(prefers-color-scheme: dark)");
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

  function findCell(map, layer, group, row) { return map.values[(layer * groups + group) * rows + row]; }
  function endOf(group) { return Math.min((group + 1) * size, steps); }
  function writeShare(value) { return value.toFixed(3); }

  function nameGroup(group) {
    const from = firsts[group], to = lasts[group];
    return from === to ? `${data.unit} ${from}` : `${data.units} ${from} to ${to}`;
  }

  // ---- places
  function listPlots() {
    const drawings = { lines: { height: 260, draw: drawLines, describe: describeLines } };
    for (const map of maps) drawings[map.name] = { height: heightOfMap(), draw: (plot) => drawMap(plot, map), describe: describeCell };
    for (const bars of data.bars) {
      drawings[bars.name] = { height: 190, draw: (plot) => drawBars(plot, bars), describe: (plot, group) => describeBars(bars, group) };
    }
    return Object.entries(drawings).flatMap(([id, drawing]) => {
      const canvas = document.getElementById(id);
      return canvas ? [{ id, canvas, pen: canvas.getContext("2d"), cursor: canvas.nextElementSibling, ...drawing }] : [];
    });
  }

  /** Rows of 18 pixels, thinner where ranks are many, never less than a pixel. */
  function heightOfMap() { return TOP + Math.max(Math.min(18 * rows, 384), rows) + AXIS; }

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

  /** Where a number of a micro-batch or step is, or the next one that is there, and its number. */
  function findStep(number) {
    const group = lasts.findIndex((last) => last >= number), from = Math.max(number, firsts[group]);
    const share = (from - firsts[group] + 0.5) / (lasts[group] - firsts[group] + 1);
    return { at: group * size + share * (endOf(group) - group * size), label: from };
  }

  function drawSteps({ pen, box }) {
    const first = firsts[0], last = lasts[groups - 1];
    const step = Math.max(1, chooseStep(last - first + 1, (box.right - box.left) / 70));
    pen.textAlign = "center";
    pen.fillStyle = colours.muted;
    for (let n = Math.ceil(first / step) * step, free = -Infinity; n <= last; n += step) {
      const { at, label } = findStep(n), x = toX(box, at);
      if (x < free) continue; // between numbers that are not there, labels would lie on each other
      pen.fillRect(Math.round(x), box.bottom, 1, 4);
      pen.fillText(String(label), x, box.bottom + 12);
      free = x + 40;
    }
    pen.fillText(data.unit, (box.left + box.right) / 2, box.bottom + 27);
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

  /** A map as an image of a pixel a cell; a value has the colour behind the last of the scale's edges that it reaches. */
  function paintMap(map) {
    const tile = document.createElement("canvas");
    tile.width = groups;
    tile.height = rows;
    const pen = tile.getContext("2d"), image = pen.createImageData(groups, rows), shades = map[theme()].map(splitChannels);
    for (let row = 0; row < rows; row++) {
      for (let group = 0; group < groups; group++) {
        image.data.set(shades[findLast(map.edges, findCell(map, state.chosen, group, row)) + 1], 4 * (row * groups + group));
      }
    }
    pen.putImageData(image, 0, 0);
    return tile;
  }

  function drawMap(plot, map) {
    const { pen, box } = plot;
    clear(plot);
    const wide = box.right - box.left, high = box.bottom - box.top, ratio = window.devicePixelRatio || 1;
    pen.save();
    pen.beginPath();
    pen.rect(box.left, box.top, wide, high);
    pen.clip(); // the last group may be shorter than the others
    pen.imageSmoothingEnabled = groups > wide * ratio || rows > high * ratio;
    pen.drawImage(paintMap(map), box.left, box.top, wide * groups * size / steps, high);
    pen.restore();
    drawSteps(plot);
    const step = Math.max(1, chooseStep(rows, Math.max(1, high / 16)));
    pen.textAlign = "right";
    pen.fillStyle = colours.muted;
    for (let row = 0; row < rows; row += step) pen.fillText(String(row), box.left - 6, box.top + (row + 0.5) / rows * high);
    pen.save();
    pen.translate(10, (box.top + box.bottom) / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    if (high >= 40) pen.fillText(data.row, 0, 0);
    pen.restore();
  }

  /** Each series from the ground up, the later before the earlier; what has no colour is for the tooltip alone. */
  function drawBars(plot, { series }) {
    const drawn = series.filter(({ colour }) => colour), highest = Math.max(...drawn.flatMap(({ values }) => values));
    const { pen, box } = plot, high = box.bottom - box.top;
    clear(plot);
    drawSteps(plot);
    drawLevels(plot, listLevels(0, highest, 4), (value) => box.bottom - value / highest * high);
    for (let n = 0; n < groups; n++) {
      const left = toX(box, n * size), width = toX(box, endOf(n)) - left, gap = width > 4 ? 1 : 0;
      for (const { values, colour } of drawn) {
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
    colours = findColours(["ground", "muted", "grid", "up-F", "up-B", ...ORDER]);
  }

  function theme() { return isDark.matches ? "dark" : "light"; }
  function splitChannels(colour) { return [...[1, 3, 5].map((n) => parseInt(colour.slice(n, n + 2), 16)), 255]; }

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

  function describeCell({ box }, group, y) {
    const row = clamp(Math.floor((y - box.top) / (box.bottom - box.top) * rows), 0, rows - 1);
    const lines = maps.map((map) => {
      const value = findCell(map, state.chosen, group, row);
      return `${map.words}: ${map.suffix ? writeShare(value) + map.suffix : Number(writeShare(value))}`;
    });
    return [`${data.row} ${row}, layer ${layers[state.chosen]}, ${nameGroup(group)}`, ...lines];
  }

  function describeBars({ series }, group) {
    return [nameGroup(group), ...series.map(({ values, words }) => `${writeNumber(values[group])} ${words}`)];
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
    isDark.addEventListener("change", () => { readColours(); drawAll(); });
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
