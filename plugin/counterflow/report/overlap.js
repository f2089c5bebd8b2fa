// Draws each device's lanes on its canvas. All canvases share one time axis, in milliseconds, and one phase or kind that is shown alone.
(() => {
  const GUTTER = 170, MARGIN = 16, AXIS = 24, ROW = 20, FOOT = 6; // pixels
  const LABELLED = 34; // pixels from which on a kernel has its name
  const data = JSON.parse(document.getElementById("data").textContent);
  const milliseconds = data.tick / 1e6;
  const shadeNames = [...new Set(data.shades)], AWAY = shadeNames.length; // one more: what is not shown
  const shadeOfKind = Uint8Array.from(data.shades, (name) => shadeNames.indexOf(name));
  const EXPOSED = data.kinds.indexOf("exposed communication"), exposedShade = shadeOfKind[EXPOSED];
  const view = { from: 0, to: 0 }, alone = { what: null, number: 0 };
  const stats = { blocks: 0, columns: 0, frames: 0, milliseconds: 0, opened: 0 };
  const sheet = document.createElement("canvas"), sheetPen = sheet.getContext("2d");
  let colours = {}, inks = [], width = 0, waiting = false, drag = null, image = null;

  // ---- data

  /** Numbers of one, two or four bytes each, little end first. */
  function unpack({ bytes, bits }) {
    const text = atob(bits), raw = new Uint8Array(text.length);
    for (let n = 0; n < raw.length; n++) raw[n] = text.charCodeAt(n);
    return bytes === 1 ? raw : new (bytes === 2 ? Uint16Array : Uint32Array)(raw.buffer);
  }

  function unpackDevice(raw, index) {
    const canvas = document.querySelectorAll("canvas")[index];
    const device = { canvas, pen: canvas.getContext("2d"), cursor: canvas.nextElementSibling, stale: true };
    device.from = raw.begin / 1e6;
    device.to = (raw.begin + raw.length) / 1e6;
    device.lanes = raw.lanes.map(unpackLane);
    device.height = AXIS + device.lanes.length * ROW + FOOT;
    return device;
  }

  /** A lane's columns; ``reach`` is the latest end so far, so that what reaches into a view is found by halving. */
  function unpackLane(raw) {
    const lane = { title: raw.title, detail: raw.detail };
    for (const name of ["starts", "lengths", "kinds", "names", "phases"]) lane[name] = unpack(raw[name]);
    const count = lane.starts.length, starts = new Float64Array(count);
    lane.ends = new Float64Array(count);
    lane.reach = new Float64Array(count);
    let latest = 0;
    for (let n = 0; n < count; n++) {
      starts[n] = lane.starts[n] * milliseconds;
      lane.ends[n] = starts[n] + lane.lengths[n] * milliseconds;
      lane.reach[n] = latest = Math.max(latest, lane.ends[n]);
    }
    lane.starts = starts;
    shadeLane(lane);
    return lane;
  }

  /** Each kernel's shade, and for each shade the time before each kernel: what a pixel holds is a difference of two sums. */
  function shadeLane(lane) {
    const { starts, ends, kinds } = lane, count = starts.length;
    const chosen = alone.what === null || lane.title === data.devices[0].lanes[0].title ? null : lane[alone.what];
    lane.shades = Uint8Array.from(kinds, (kind) => shadeOfKind[kind]);
    if (chosen) for (let n = 0; n < count; n++) if (chosen[n] !== alone.number) lane.shades[n] = AWAY;
    lane.present = [...new Set(lane.shades)].sort((one, two) => one - two);
    lane.before = lane.present.map(() => new Float64Array(count + 1));
    lane.present.forEach((shade, place) => {
      const sums = lane.before[place];
      for (let n = 0; n < count; n++) sums[n + 1] = sums[n] + (lane.shades[n] === shade ? ends[n] - starts[n] : 0);
    });
  }

  /** How long a lane had a shade before a time, kernel ``n`` being the last to start by then. */
  function measureBefore(lane, place, n, time) {
    if (n < 0) return 0;
    const sums = lane.before[place], own = lane.shades[n] === lane.present[place];
    return sums[n] + (own ? Math.min(time, lane.ends[n]) - lane.starts[n] : 0);
  }

  function measureExposed(device, from, to) {
    const lane = device.lanes[0], place = lane.present.indexOf(exposedShade);
    if (place < 0) return 0;
    return measureBefore(lane, place, findLast(lane.starts, to), to) - measureBefore(lane, place, findLast(lane.starts, from), from);
  }

  // ---- time axis
  const devices = data.devices.map(unpackDevice);
  const total = Math.max(...devices.map((device) => device.to)) || 1;
  function toX(time) { return GUTTER + (time - view.from) / (view.to - view.from) * (width - GUTTER - MARGIN); }
  function toTime(x) { return view.from + (x - GUTTER) / (width - GUTTER - MARGIN) * (view.to - view.from); }

  function setView(from, length) {
    const shown = clamp(length, Math.min(total, 1e-4), total);
    view.from = clamp(from, 0, total - shown);
    view.to = view.from + shown;
    requestDrawing();
  }

  /** Shows ``factor`` times as much time; ``time`` stays where it is on the screen. */
  function zoomAt(time, factor) {
    const length = clamp((view.to - view.from) * factor, Math.min(total, 1e-4), total);
    setView(time - (time - view.from) / (view.to - view.from) * length, length);
  }

  function zoomMiddle(factor) { zoomAt((view.from + view.to) / 2, factor); }
  function pan(time) { setView(view.from + time, view.to - view.from); }
  function reset() { setView(0, total); }

  // ---- drawing

  function requestDrawing() {
    for (const device of devices) device.stale = true;
    requestFrame();
  }

  function requestFrame() {
    if (!waiting) requestAnimationFrame(() => { waiting = false; drawVisible(); });
    waiting = true;
  }

  /** Draws what changed and can be seen; the rest once it is scrolled to. */
  function drawVisible() {
    const began = performance.now();
    stats.blocks = stats.columns = 0;
    for (const device of devices) {
      const place = device.canvas.getBoundingClientRect();
      if (!device.stale || place.bottom < 0 || place.top > innerHeight) continue;
      drawDevice(device);
      device.stale = false;
    }
    stats.frames += 1;
    stats.milliseconds = performance.now() - began;
  }

  function fitCanvases() {
    width = Math.max(340, document.querySelector(".plot").clientWidth);
    image = sheetPen.createImageData(width - GUTTER - MARGIN, ROW - 4);
    sheet.width = image.width;
    sheet.height = image.height;
    for (const device of devices) {
      fitCanvas(device.canvas, width, device.height);
      device.stale = true;
    }
    drawVisible();
  }

  function readColours() {
    colours = findColours(["ground", "ink", "muted", "grid", "idle", "hatch", ...shadeNames]);
    const parse = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    const pack = ([red, green, blue]) => (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
    inks = [...shadeNames, "hatch"].map((name) => pack(parse(colours[name])));
    for (const device of devices) device.stale = true;
  }

  function nameShade(shade) { return shade === AWAY ? colours.hatch : colours[shadeNames[shade]]; }

  function drawDevice(device) {
    const { pen, lanes, height } = device;
    pen.globalAlpha = 1;
    pen.fillStyle = colours.ground;
    pen.fillRect(0, 0, width, height);
    drawAxis(device);
    drawNames(device);
    pen.save();
    pen.beginPath();
    pen.rect(GUTTER, 0, width - GUTTER - MARGIN, height);
    pen.clip();
    drawIdle(device);
    drawExposed(device);
    lanes.forEach((lane, row) => drawLane(device, lane, AXIS + row * ROW + 2));
    pen.restore();
  }

  function drawAxis({ pen, height }) {
    const step = chooseStep(view.to - view.from, (width - GUTTER - MARGIN) / 90);
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (let n = Math.ceil(view.from / step - 1e-9); n * step <= view.to * (1 + 1e-12); n++) {
      const x = Math.round(toX(n * step)) + 0.5;
      pen.fillStyle = colours.grid;
      pen.fillRect(x - 0.5, AXIS - 6, 1, height - AXIS);
      pen.fillStyle = colours.muted;
      if (x < width - MARGIN - 24) pen.fillText(`${Number((n * step).toPrecision(9))} ms`, x, AXIS / 2 - 2);
    }
  }

  function drawNames({ pen, lanes }) {
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    lanes.forEach(({ title, detail }, row) => {
      pen.font = `${row ? "" : "600 "}12px system-ui, sans-serif`;
      pen.fillStyle = row ? colours.muted : colours.ink;
      const words = detail ? `${title}, ${detail}` : title;
      pen.fillText(words.length > 28 ? `${words.slice(0, 27)}…` : words, GUTTER - 8, AXIS + (row + 0.5) * ROW, GUTTER - 12);
    });
  }

  /** The ground of the first lane, where nothing runs. */
  function drawIdle({ pen, from, to }) {
    pen.fillStyle = colours.idle;
    pen.fillRect(toX(from), AXIS + 2, toX(to) - toX(from), ROW - 4);
  }

  /** A pale band through all lanes wherever communication is exposed: paler where it is a part of a pixel. */
  function drawExposed(device) {
    const { pen, lanes, height } = device, lane = lanes[0], place = lane.present.indexOf(exposedShade);
    if (place < 0) return;
    pen.fillStyle = nameShade(exposedShade);
    const paint = (left, right, share) => {
      pen.globalAlpha = 0.22 * Math.max(0.15, share);
      pen.fillRect(left, AXIS + ROW, right - left, height - AXIS - ROW - FOOT);
    };
    const [first, end] = findVisible(lane);
    if (end - first <= image.width) {
      for (let n = first; n < end; n++) if (lane.shades[n] === exposedShade) paint(toX(lane.starts[n]), toX(lane.ends[n]), 1);
    } else {
      const shares = shareColumns(lane)[place];
      for (let x = 0; x < image.width; x++) if (shares[x] > 0) paint(GUTTER + x, GUTTER + x + 1, shares[x]);
    }
    pen.globalAlpha = 1;
  }

  /** The first of a lane's kernels that reaches into the view, and the first that starts behind it. */
  function findVisible({ starts, reach }) { return [findLast(reach, view.from) + 1, findLast(starts, view.to) + 1]; }

  function drawLane(device, lane, top) {
    const [first, end] = findVisible(lane);
    if (end - first > image.width / 2) drawColumns(device, lane, top);
    else for (let n = first; n < end; n++) drawKernel(device, lane, n, top);
  }

  function drawKernel({ pen }, lane, n, top) {
    const left = Math.max(toX(lane.starts[n]), GUTTER - 2), right = Math.min(toX(lane.ends[n]), width - MARGIN + 2);
    const gap = right - left > 4 ? 1 : 0;
    pen.fillStyle = nameShade(lane.shades[n]);
    pen.fillRect(left, top, Math.max(right - left - gap, 0.75), ROW - 4);
    stats.blocks += 1;
    if (right - left >= LABELLED && lane.names[n]) drawLabel(pen, lane, n, left, right, top);
  }

  function drawLabel(pen, lane, n, left, right, top) {
    const start = Math.max(left, GUTTER) + 3, room = Math.min(right, width - MARGIN) - 3 - start;
    const text = shortenName(data.names[lane.names[n]]).slice(0, Math.floor(room / 5.8));
    if (text.length < 4) return;
    pen.fillStyle = ["products", "notify"].includes(shadeNames[lane.shades[n]]) ? "#ffffff" : lane.shades[n] === AWAY ? colours.muted : "#14161a";
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "left";
    pen.textBaseline = "middle";
    pen.fillText(text, start, top + (ROW - 4) / 2 + 0.5, room);
  }

  /** A kernel's function: without return type, namespaces and arguments. */
  function shortenName(name) {
    const head = name.replace(/^void /, "").split(/[<(]/)[0];
    return head.split("::").pop() || name;
  }

  /** For each shade of a lane its share of each pixel's time. */
  function shareColumns(lane) {
    const count = image.width, step = (view.to - view.from) / count;
    const shares = lane.present.map(() => new Float64Array(count)), last = lane.present.map(() => 0);
    for (let x = 0; x <= count; x++) {
      const time = view.from + x * step, n = findLast(lane.starts, time);
      for (let place = 0; place < last.length; place++) {
        const sum = measureBefore(lane, place, n, time);
        if (x) shares[place][x - 1] = (sum - last[place]) / step;
        last[place] = sum;
      }
    }
    return shares;
  }

  /** Many kernels on a pixel: a column of their shades, as high as their shares of its time; none that is exposed is lost. */
  function drawColumns({ pen }, lane, top) {
    const shares = shareColumns(lane), { width: across, height: high } = image, pixels = new Uint32Array(image.data.buffer);
    pixels.fill(0);
    for (let x = 0; x < across; x++) {
      let sum = 0, bottom = high;
      for (let place = 0; place < shares.length; place++) {
        sum += Math.max(0, shares[place][x]);
        let upto = high - Math.round(Math.min(1, sum) * high);
        if (lane.present[place] === exposedShade && shares[place][x] > 0) upto = Math.min(upto, bottom - 1);
        for (let y = Math.max(0, upto); y < bottom; y++) pixels[y * across + x] = inks[lane.present[place]];
        bottom = Math.min(bottom, Math.max(0, upto));
      }
    }
    sheetPen.putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(sheet, GUTTER, top);
    stats.columns += across;
  }

  // ---- what is under the pointer

  function findTarget(device, x, y) {
    const row = Math.floor((y - AXIS) / ROW), lane = device.lanes[row];
    if (!lane || x < GUTTER || x > width - MARGIN) return null;
    const time = toTime(x), near = (view.to - view.from) / (width - GUTTER - MARGIN);
    // What runs now, or starts within the pixel.
    let n = findLast(lane.starts, time);
    for (let back = 0; back < 64 && n - back >= 0; back++) if (lane.ends[n - back] >= time) return { device, lane, n: n - back };
    n = findLast(lane.starts, time + near);
    return n >= 0 && lane.ends[n] >= time - near ? { device, lane, n } : null;
  }

  function writeTime(time) { return time >= 1 ? `${Number(time.toPrecision(6))} ms` : `${Number((time * 1000).toPrecision(6))} µs`; }

  /** The tooltip's lines. */
  function describeTarget({ device, lane, n }) {
    const kind = data.kinds[lane.kinds[n]], [start, end] = [lane.starts[n], lane.ends[n]];
    const times = `start ${writeTime(start)}, duration ${writeTime(end - start)}`;
    if (lane === device.lanes[0]) return [kind, times];
    const lines = [data.names[lane.names[n]], `${kind}, ${lane.detail || lane.title}`, `phase ${data.phases[lane.phases[n]]}`, times];
    if (lane.title === "communication") lines.push(`exposed ${writeTime(measureExposed(device, start, end))}`);
    return lines;
  }

  /** Shows one phase or kind alone; all of them where it is shown alone already, or for null. */
  function showAlone(what, number) {
    const same = alone.what === what && alone.number === number;
    alone.what = same ? null : what;
    alone.number = number;
    for (const device of devices) device.lanes.forEach(shadeLane);
    for (const row of document.querySelectorAll("tr[data-pin]")) row.classList.toggle("pinned", isAlone(row));
    requestDrawing();
  }

  function numberRow({ dataset }) { return (dataset.pin === "kind" ? data.kinds : data.phases).indexOf(dataset.name); }
  function isAlone(row) { return alone.what === `${row.dataset.pin}s` && alone.number === numberRow(row); }

  // ---- pointer and keys

  function placePointer({ canvas }, event) {
    const place = canvas.getBoundingClientRect();
    return [event.clientX - place.left, event.clientY - place.top];
  }

  function hover(device, event) {
    const [x, y] = placePointer(device, event), target = findTarget(device, x, y);
    if (target) showTooltip(describeTarget(target), event.clientX, event.clientY); else tooltip.hidden = true;
    moveCursors(x);
  }

  /** The line at the pointer's time, through all canvases. */
  function moveCursors(x) {
    for (const { cursor } of devices) {
      cursor.hidden = x === null || x < GUTTER || x > width - MARGIN;
      cursor.style.left = `${x}px`;
    }
  }

  function leave() {
    tooltip.hidden = true;
    moveCursors(null);
  }

  function startDrag(device, event) {
    if (event.button !== 0) return;
    drag = { x: event.clientX, y: event.clientY, moved: false };
    device.canvas.setPointerCapture(event.pointerId);
  }

  function moveDrag(event) {
    const [right, down] = [event.clientX - drag.x, event.clientY - drag.y];
    if (!drag.moved && Math.hypot(right, down) < 4) return;
    if (!drag.moved) leave();
    Object.assign(drag, { x: event.clientX, y: event.clientY, moved: true });
    pan(-right / (width - GUTTER - MARGIN) * (view.to - view.from));
    if (event.pointerType === "mouse") window.scrollBy(0, -down);
  }

  function endDrag(device, event) {
    const clicked = drag && !drag.moved;
    drag = null;
    const target = clicked ? findTarget(device, ...placePointer(device, event)) : null;
    if (target && target.lane !== device.lanes[0]) showAlone("phases", target.lane.phases[target.n]);
  }

  function turnWheel(device, event) {
    const [x] = placePointer(device, event);
    if (x < GUTTER || x > width - MARGIN) return; // beside the lanes the wheel scrolls the page
    event.preventDefault();
    const scale = event.deltaMode === 1 ? 16 : 1;
    const across = event.shiftKey ? event.deltaY || event.deltaX : Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : 0;
    if (across) pan(across * scale / (width - GUTTER - MARGIN) * (view.to - view.from));
    else zoomAt(toTime(x), Math.exp(clamp(event.deltaY * scale, -400, 400) * 0.002));
  }

  function pressKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && alone.what !== null) showAlone(alone.what, alone.number);
    if (event.key === "Escape") leave();
    const row = event.target.closest?.("tr[data-pin]"), choose = row ? { Enter: () => showAlone(`${row.dataset.pin}s`, numberRow(row)) } : {};
    const step = (view.to - view.from) / 8, closer = () => zoomMiddle(0.7), farther = () => zoomMiddle(1 / 0.7);
    const moves = { ArrowLeft: () => pan(-step), ArrowRight: () => pan(step) };
    const actions = { "+": closer, "=": closer, "-": farther, Home: reset, ...moves, ...choose };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  }

  function listen() {
    for (const device of devices) {
      const { canvas } = device;
      canvas.addEventListener("wheel", (event) => turnWheel(device, event), { passive: false });
      canvas.addEventListener("pointerdown", (event) => startDrag(device, event));
      canvas.addEventListener("pointermove", (event) => (drag ? moveDrag(event) : hover(device, event)));
      canvas.addEventListener("pointerup", (event) => endDrag(device, event));
      canvas.addEventListener("pointercancel", () => { drag = null; });
      canvas.addEventListener("pointerleave", leave);
      canvas.addEventListener("dblclick", reset);
    }
    for (const row of document.querySelectorAll("tr[data-pin]")) {
      row.addEventListener("click", () => showAlone(`${row.dataset.pin}s`, numberRow(row)));
    }
    document.addEventListener("keydown", pressKey);
    document.addEventListener("scroll", requestFrame, { passive: true });
    document.getElementById("zoom-in").addEventListener("click", () => zoomMiddle(0.7));
    document.getElementById("zoom-out").addEventListener("click", () => zoomMiddle(1 / 0.7));
    document.getElementById("reset").addEventListener("click", reset);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); drawVisible(); });
    new ResizeObserver(fitCanvases).observe(document.querySelector("main"));
  }

  view.to = total;
  readColours();
  fitCanvases();
  listen();
  stats.opened = performance.now();

  // For tests: what is shown, and where on the screen a time of a lane is.
  window.counterflow = {
    view, alone, stats, total, lanes: devices.map(({ lanes }) => lanes.map(({ title, detail }) => [title, detail])),
    setView, locate(index, row, time) {
      const place = devices[index].canvas.getBoundingClientRect();
      return { x: place.left + toX(time), y: place.top + AXIS + (row + 0.5) * ROW };
    },
  };
})();
