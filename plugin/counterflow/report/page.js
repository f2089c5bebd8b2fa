// Draws each picture of the page's data on its canvas. All canvases share one time axis and one highlighted micro-batch.
(() => {
  const GUTTER = 60, MARGIN = 100, AXIS = 24, HEADING = 30, FOOT = 6, STRIP = 4; // pixels around the plots
  const PAIR = "X".charCodeAt(0);
  const DIMMED = 0.16, AWAY = 0.28; // opacity: of another micro-batch than the highlighted; of a part that does not have its rank
  const DETAILED = 24; // pixels from which on a block shows how its parts shared the rank
  const pictures = JSON.parse(document.getElementById("data").textContent).pictures.map(unpackPicture);
  const total = Math.max(...pictures.map((picture) => picture.makespan)) || 1;
  const highest = Math.max(1, ...pictures.flatMap((picture) => picture.peakActivations.concat(picture.peakQueued)));
  const field = document.getElementById("microbatch");
  const view = { from: 0, to: total };
  const lit = { hovered: null, pinned: null };
  const stats = { blocks: 0, frames: 0, milliseconds: 0 };
  let colours = {}, hatch = null, stripes = null, width = 0, waiting = false, drag = null;

  // ---- data
  function unpackPicture(raw, index) {
    const canvas = document.querySelectorAll("canvas")[index];
    const picture = { ...raw, canvas, pen: canvas.getContext("2d"), cursor: canvas.nextElementSibling, stale: true };
    picture.rows = raw.rows.map(unpackRow);
    picture.idle = raw.idle.map((idle) => ({ ...idle, starts: Float64Array.from(idle.starts), lengths: Float64Array.from(idle.lengths) }));
    picture.sharing = raw.sharing.map(unpackSharing);
    const ranks = raw.rows.length;
    picture.rowHeight = clamp(Math.floor(480 / ranks), 9, 32);
    picture.stripHeight = clamp(Math.floor(320 / ranks), 14, 32);
    picture.memoryTop = AXIS + ranks * picture.rowHeight + HEADING;
    picture.height = picture.memoryTop + ranks * picture.stripHeight + FOOT;
    return picture;
  }

  function unpackRow(raw) {
    const row = { starts: Float64Array.from(raw.starts), lengths: Float64Array.from(raw.lengths), pairs: {} };
    row.kinds = Uint8Array.from(raw.kinds, (kind) => kind.charCodeAt(0));
    row.stages = Int32Array.from(raw.stages);
    row.microbatches = Int32Array.from(raw.microbatches);
    row.backs = new Int32Array(row.kinds.length); // where a pair's B is in the two columns of B's
    let back = 0;
    row.kinds.forEach((kind, n) => { row.backs[n] = kind === PAIR ? back++ : -1; });
    row.backStages = Int32Array.from(raw.backStages);
    row.backMicrobatches = Int32Array.from(raw.backMicrobatches);
    return row;
  }

  function unpackSharing(raw) {
    const sharing = { ...raw, starts: Float64Array.from(raw.starts) };
    for (const name of ["computes", "underWay", "waits"]) {
      const { starts, lengths, parts } = raw[name];
      sharing[name] = { starts: Float64Array.from(starts), lengths: Float64Array.from(lengths), parts: Uint8Array.from(parts) };
    }
    return sharing;
  }

  /** Where in a rank's sharing the block is that begins then; -1 where nothing is recorded of it. */
  function findShared(sharing, start) {
    const n = findLast(sharing.starts, start);
    return n >= 0 && sharing.starts[n] === start ? n : -1;
  }

  /** Calls with start, end and part of each interval that begins within a block; none reaches beyond its block. */
  function visitWithin({ starts, lengths, parts }, from, to, visit) {
    let n = findLast(starts, from);
    while (n > 0 && starts[n - 1] >= from) n -= 1;
    if (n < 0 || starts[n] < from) n += 1;
    for (; n < starts.length && starts[n] < to; n++) visit(starts[n], starts[n] + lengths[n], parts[n]);
  }

  /** The single actions of block n of a row: one, or the F and the B of an overlapped pair. */
  function listParts(row, n) {
    const first = { kind: String.fromCharCode(row.kinds[n]), stage: row.stages[n], microbatch: row.microbatches[n] };
    if (row.kinds[n] !== PAIR) return [first];
    const back = row.backs[n];
    return [{ ...first, kind: "F" }, { kind: "B", stage: row.backStages[back], microbatch: row.backMicrobatches[back] }];
  }

  function nameDirection(picture, part) {
    const down = picture.firstDown === null ? picture.stagesDown[part.stage] : part.microbatch >= picture.firstDown;
    return down ? "down" : "up";
  }

  // ---- time axis
  function toX(time) { return GUTTER + (time - view.from) / (view.to - view.from) * (width - GUTTER - MARGIN); }
  function toTime(x) { return view.from + (x - GUTTER) / (width - GUTTER - MARGIN) * (view.to - view.from); }

  function setView(from, length) {
    const shown = clamp(length, total * 1e-6, total);
    view.from = clamp(from, 0, total - shown);
    view.to = view.from + shown;
    requestDrawing();
  }

  /** Shows ``factor`` times as much time; ``time`` stays where it is on the screen. */
  function zoomAt(time, factor) {
    const length = clamp((view.to - view.from) * factor, total * 1e-6, total);
    setView(time - (time - view.from) / (view.to - view.from) * length, length);
  }

  function zoomMiddle(factor) { zoomAt((view.from + view.to) / 2, factor); }
  function pan(time) { setView(view.from + time, view.to - view.from); }
  function reset() { setView(0, total); }

  // ---- drawing

  function requestDrawing() {
    pictures.forEach((picture) => { picture.stale = true; });
    requestFrame();
  }

  function requestFrame() {
    if (!waiting) requestAnimationFrame(() => { waiting = false; drawVisible(false); });
    waiting = true;
  }

  /** Draws what changed and can be seen; the rest once it is scrolled to. */
  function drawVisible(everything) {
    const began = performance.now();
    stats.blocks = 0;
    for (const picture of pictures) {
      const place = picture.canvas.getBoundingClientRect();
      if (!everything && (!picture.stale || place.bottom < 0 || place.top > innerHeight)) continue;
      drawPicture(picture);
      picture.stale = false;
    }
    stats.frames += 1;
    stats.milliseconds = performance.now() - began;
  }

  function fitCanvases() {
    width = Math.max(360, document.querySelector(".plot").clientWidth);
    for (const { canvas, height } of pictures) fitCanvas(canvas, width, height);
    drawVisible(true);
  }

  function readColours() {
    const names = ["ground", "ink", "muted", "grid", "frame", "idle", "hatch", "activations", "queued", "reduction", "communication", "waiting"];
    for (const way of ["up", "down"]) for (const kind of "FBIW") names.push(`${way}-${kind}`);
    colours = findColours(names);
    hatch = makeHatch(colours.idle, colours.hatch);
    stripes = makeHatch(colours.ground, colours.waiting);
  }

  function makeHatch(ground, line) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 6;
    const pen = tile.getContext("2d");
    pen.fillStyle = ground;
    pen.fillRect(0, 0, 6, 6);
    pen.strokeStyle = line;
    pen.beginPath();
    for (const shift of [-6, 0, 6]) { pen.moveTo(shift - 1, 7); pen.lineTo(shift + 7, -1); }
    pen.stroke();
    return pen.createPattern(tile, "repeat");
  }

  function drawPicture(picture) {
    const { pen, rowHeight, stripHeight, height } = picture;
    pen.globalAlpha = 1;
    pen.fillStyle = colours.ground;
    pen.fillRect(0, 0, width, height);
    drawAxis(picture);
    drawNames(picture);
    pen.save();
    pen.beginPath();
    pen.rect(GUTTER, 0, width - GUTTER - MARGIN, height);
    pen.clip();
    picture.rows.forEach((row, rank) => {
      const top = AXIS + rank * rowHeight;
      drawIdle(picture, rank, top);
      drawRow(picture, row, rank, top);
      drawReductions(picture, rank, top);
      drawMemory(picture, rank, picture.memoryTop + rank * stripHeight);
    });
    drawEnd(picture);
    pen.restore();
  }

  function drawAxis({ pen, height }) {
    const step = chooseStep(view.to - view.from, (width - GUTTER - MARGIN) / 80);
    pen.font = `11px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (let n = Math.ceil(view.from / step - 1e-9); n * step <= view.to * (1 + 1e-12); n++) {
      const x = Math.round(toX(n * step)) + 0.5;
      pen.fillStyle = colours.grid;
      pen.fillRect(x - 0.5, AXIS - 6, 1, height - AXIS);
      pen.fillStyle = colours.muted;
      pen.fillText(writeNumber(n * step), x, AXIS / 2 - 2);
    }
  }

  function drawNames({ pen, rows, rowHeight, stripHeight, memoryTop, peakActivations, peakQueued }) {
    pen.textBaseline = "middle";
    pen.fillStyle = colours.muted;
    pen.font = `12px system-ui, sans-serif`;
    pen.textAlign = "left";
    const heading = "memory per rank" + (width > 640 ? ", in micro-batches of 1/P of the model" : "");
    pen.fillText(heading, GUTTER, memoryTop - HEADING / 2 + 2);
    pen.fillText("peaks", width - MARGIN + 8, memoryTop - HEADING / 2 + 2);
    for (let rank = 0; rank < rows.length; rank++) {
      const strip = memoryTop + (rank + 0.5) * stripHeight;
      pen.fillStyle = colours.ink;
      pen.textAlign = "right";
      pen.font = `${Math.min(12, rowHeight)}px system-ui, sans-serif`;
      pen.fillText(`rank ${rank}`, GUTTER - 8, AXIS + (rank + 0.5) * rowHeight);
      pen.font = `${Math.min(12, stripHeight - 2)}px system-ui, sans-serif`;
      pen.fillText(`rank ${rank}`, GUTTER - 8, strip);
      pen.textAlign = "left";
      pen.fillStyle = colours.activations;
      pen.fillText(writeNumber(peakActivations[rank]), width - MARGIN + 8, strip);
      pen.fillStyle = colours.queued;
      pen.fillText(writeNumber(peakQueued[rank]), width - MARGIN + 54, strip);
    }
  }

  function drawIdle(picture, rank, top) {
    const { starts, lengths } = picture.idle[rank];
    const { pen, rowHeight } = picture;
    pen.globalAlpha = 1;
    pen.fillStyle = hatch;
    for (let n = Math.max(0, findLast(starts, view.from)); n < starts.length && starts[n] < view.to; n++) {
      const left = Math.max(toX(starts[n]), GUTTER);
      const right = Math.min(toX(starts[n] + lengths[n]), width - MARGIN);
      if (right - left > 0.3) pen.fillRect(left, top + 1, right - left, rowHeight - 2);
    }
  }

  /** A strip along the bottom of the row: reductions run beside what the rank computes. */
  function drawReductions(picture, rank, top) {
    const { starts, lengths } = picture.reductions[rank];
    const { pen, rowHeight } = picture;
    pen.globalAlpha = 1;
    pen.fillStyle = colours.reduction;
    for (let n = Math.max(0, findLast(starts, view.from)); n < starts.length && starts[n] < view.to; n++) {
      const left = Math.max(toX(starts[n]), GUTTER);
      const right = Math.min(toX(starts[n] + lengths[n]), width - MARGIN);
      if (right > left) pen.fillRect(left, top + rowHeight - STRIP, right - left - (right - left > 4 ? 1 : 0), STRIP);
    }
  }

  function drawRow(picture, row, rank, top) {
    const shown = lit.pinned ?? lit.hovered;
    let painted = -Infinity, skipped = false;
    for (let n = Math.max(0, findLast(row.starts, view.from)); n < row.starts.length && row.starts[n] < view.to; n++) {
      const left = toX(row.starts[n]), right = toX(row.starts[n] + row.lengths[n]);
      if (right < GUTTER) continue;
      // Of many blocks on a pixel one is drawn, and each that is highlighted. Uneven picks: an even stride would meet
      // the same of two alternating kinds again and again.
      const thin = right - painted < 0.4 + 0.6 * ((n * 0.618034) % 1);
      skipped ||= thin;
      if (thin && (shown === null || !listParts(row, n).some((part) => part.microbatch === shown))) continue;
      const isShared = right - left >= DETAILED && findShared(picture.sharing[rank], row.starts[n]) >= 0;
      if (isShared) drawShared(picture, listParts(row, n), rank, row.starts[n], row.starts[n] + row.lengths[n], top, shown);
      else drawBlock(picture, listParts(row, n), skipped && left - painted < 1.2 ? painted : left, right, top, shown);
      painted = right;
      skipped = false;
      stats.blocks += 1;
    }
  }

  /** A single action fills its block; an overlapped pair has its F above, its B below and a frame around both. */
  function drawBlock(picture, parts, left, right, top, shown) {
    const { pen, rowHeight } = picture;
    const gap = right - left > 4 ? 1 : 0;
    const partHeight = (rowHeight - 2) / parts.length;
    parts.forEach((part, n) => {
      const matches = shown === null || part.microbatch === shown;
      pen.globalAlpha = matches ? 1 : DIMMED;
      pen.fillStyle = colours[`${nameDirection(picture, part)}-${part.kind}`];
      pen.fillRect(left, top + 1 + n * partHeight, Math.max(right - left - gap, matches && shown !== null ? 1.5 : 0.5), partHeight);
      drawLabel(pen, part, left, right - gap, top + 1 + n * partHeight, partHeight);
    });
    drawFrame(picture, parts, left, right, top, shown);
  }

  /** A recorded block: a part is pale where it does not have the rank, stripes are waits, a line is a communication under way. */
  function drawShared(picture, parts, rank, start, end, top, shown) {
    const { pen, rowHeight } = picture, { computes, underWay, waits } = picture.sharing[rank];
    const left = toX(start), right = toX(end), height = (rowHeight - 2) / parts.length, line = clamp(height / 5, 1, 3);
    const foot = parts.length > 1 ? 1.5 : 0; // the frame's
    const alphas = parts.map((part) => (shown === null || part.microbatch === shown ? 1 : DIMMED)), widest = parts.map(() => [0, 0]);
    const fill = (from, to, y, high) => {
      const near = Math.max(toX(from), GUTTER), far = Math.min(toX(to), width - MARGIN);
      if (far > near) pen.fillRect(near, y, far - near, high);
      return [near, far];
    };
    const paint = (from, to, n, alpha) => {
      pen.globalAlpha = alphas[n] * alpha;
      pen.fillStyle = colours[`${nameDirection(picture, parts[n])}-${parts[n].kind}`];
      const [near, far] = fill(from, to, top + 1 + n * height, height);
      if (alpha === 1 && far - near > widest[n][1] - widest[n][0]) widest[n] = [near, far];
    };
    parts.forEach((_, n) => paint(start, end, n, AWAY));
    visitWithin(computes, start, end, (from, to, n) => paint(from, to, n, 1));
    pen.globalAlpha = Math.max(...alphas);
    pen.fillStyle = stripes;
    visitWithin(waits, start, end, (from, to) => fill(from, to, top + 1, rowHeight - 2));
    pen.fillStyle = colours.communication;
    visitWithin(underWay, start, end, (from, to, n) => fill(from, to, top + 1 + (n + 1) * height - foot - line, line));
    parts.forEach((part, n) => {
      pen.globalAlpha = alphas[n];
      drawLabel(pen, part, ...widest[n], top + 1 + n * height, height);
    });
    drawFrame(picture, parts, left, right, top, shown);
  }

  function drawFrame({ pen, rowHeight }, parts, left, right, top, shown) {
    if (parts.length < 2 || right - left < 4) return;
    const gap = right - left > 4 ? 1 : 0;
    pen.globalAlpha = shown === null || parts.some((part) => part.microbatch === shown) ? 1 : DIMMED;
    pen.strokeStyle = colours.frame;
    pen.lineWidth = right - left < 8 ? 0.75 : 1.5;
    pen.strokeRect(left + pen.lineWidth / 2, top + 1.75, right - left - gap - pen.lineWidth, rowHeight - 3.5);
  }

  function drawLabel(pen, part, left, right, top, height) {
    const text = part.kind + part.microbatch;
    // Part of a block that begins left of the view: its label stays in view.
    const start = Math.max(left, GUTTER), end = Math.min(right, width - MARGIN);
    // One size for numbers of one and two digits in blocks of one width; a W is wide.
    const letters = Math.max(3, text.length) + (part.kind === "W" ? 0.5 : 0);
    const size = Math.min(12, height - 4, (end - start - 4) / (letters * 0.6));
    if (size < 7) return;
    pen.fillStyle = part.kind === "B" ? "#ffffff" : "#14161a";
    pen.font = `${size}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillText(text, (start + end) / 2, top + height / 2 + 0.5);
  }

  function drawEnd({ pen, makespan, memoryTop }) {
    pen.globalAlpha = 1;
    pen.fillStyle = colours.ink;
    pen.fillRect(toX(makespan) - 0.75, AXIS - 6, 1.5, memoryTop - HEADING - AXIS + 8);
  }

  function drawMemory(picture, rank, top) {
    const { pen, stripHeight, memory } = picture;
    const base = top + stripHeight - 2;
    const scale = (stripHeight - 5) / highest;
    pen.globalAlpha = 1;
    pen.fillStyle = colours.grid;
    pen.fillRect(GUTTER, base, width - GUTTER - MARGIN, 1);
    for (const [name, shade] of [["activations", 0.22], ["queued", 0]]) {
      traceSteps(picture, memory[rank].times, memory[rank][name], base, scale);
      pen.strokeStyle = pen.fillStyle = colours[name];
      pen.globalAlpha = 1;
      pen.lineWidth = 1.25;
      pen.stroke();
      pen.lineTo(toX(picture.makespan), base);
      pen.lineTo(toX(0), base);
      pen.globalAlpha = shade;
      pen.fill();
    }
  }

  /** Steps from level to level; of many changes on one pixel the highest is drawn, so that no peak is lost. */
  function traceSteps({ pen, makespan }, times, levels, base, scale) {
    let n = findLast(times, view.from);
    let level = n < 0 ? 0 : levels[n], highestHere = level, x = toX(Math.max(view.from, 0));
    pen.beginPath();
    pen.moveTo(x, base - level * scale);
    for (n += 1; n < times.length && times[n] <= view.to; n++) {
      const next = toX(times[n]);
      if (next - x >= 0.75) {
        pen.lineTo(x, base - highestHere * scale);
        pen.lineTo(x, base - level * scale);
        pen.lineTo(next, base - level * scale);
        x = next;
        highestHere = levels[n];
      }
      level = levels[n];
      highestHere = Math.max(highestHere, level);
    }
    pen.lineTo(x, base - highestHere * scale);
    pen.lineTo(x, base - level * scale);
    pen.lineTo(toX(Math.min(view.to, makespan)), base - level * scale);
  }

  // ---- what is under the pointer

  function findTarget(picture, x, y) {
    const time = toTime(x), ranks = picture.rows.length;
    if (x < GUTTER || x > width - MARGIN || time > picture.makespan) return null;
    const rank = Math.floor((y - AXIS) / picture.rowHeight);
    if (rank >= 0 && rank < ranks) {
      const reduction = (y - AXIS) % picture.rowHeight >= picture.rowHeight - STRIP ? findReduction(picture, rank, time) : null;
      return reduction ?? findBlock(picture, rank, time, y) ?? findIdle(picture, rank, time);
    }
    const strip = Math.floor((y - picture.memoryTop) / picture.stripHeight);
    return strip >= 0 && strip < ranks ? { type: "memory", rank: strip, time } : null;
  }

  function findBlock({ rows, rowHeight }, rank, time, y) {
    const row = rows[rank], n = findLast(row.starts, time);
    if (n < 0 || time > row.starts[n] + row.lengths[n]) return null;
    const parts = listParts(row, n);
    const lower = (y - AXIS) % rowHeight >= rowHeight / 2;
    const part = parts[parts.length > 1 && lower ? 1 : 0];
    return { type: "action", rank, parts, part, start: row.starts[n], length: row.lengths[n], time };
  }

  function findReduction({ reductions }, rank, time) {
    const { starts, lengths, stages } = reductions[rank], n = findLast(starts, time);
    if (n < 0 || time > starts[n] + lengths[n]) return null;
    return { type: "reduction", rank, stage: stages[n], start: starts[n], length: lengths[n] };
  }

  function findIdle({ idle }, rank, time) {
    const { starts, lengths, reasons } = idle[rank], n = findLast(starts, time);
    if (n < 0 || time > starts[n] + lengths[n]) return null;
    return { type: "idle", rank, reason: reasons[n], start: starts[n], length: lengths[n] };
  }

  /** The tooltip's lines. */
  function describeTarget(picture, target) {
    if (target.type === "memory") return describeMemory(picture, target);
    const times = `start ${writeNumber(target.start)}, end ${writeNumber(target.start + target.length)}, duration ${writeNumber(target.length)}`;
    if (target.type === "reduction") return [`gradient reduction of stage ${target.stage}`, `rank ${target.rank}, beside what it computes`, times];
    if (target.type === "idle") return [`rank ${target.rank} is idle`, target.reason, times];
    const names = target.parts.map((part) => part.stage + part.kind + part.microbatch);
    const words = target.parts.map((part) => `${part.kind}: stage ${part.stage}, micro-batch ${part.microbatch}, ${nameDirection(picture, part)}`);
    const shared = describeShared(picture.sharing[target.rank], target);
    return [names.join(" & ") + (names.length > 1 ? " overlapped" : ""), ...words, `rank ${target.rank}`, times, ...shared];
  }

  /** What is recorded of how a block's parts shared the rank, in all and under the pointer. */
  function describeShared(sharing, { parts, start, length, time }) {
    const n = findShared(sharing, start), here = [];
    if (n < 0) return [];
    const look = (intervals, words) => visitWithin(intervals, start, start + length, (from, to, part) => {
      if (from <= time && time <= to) here.push(`${parts[part].kind} ${words}`);
    });
    look(sharing.computes, "computes");
    look(sharing.waits, "waits for its communication");
    look(sharing.underWay, "has a communication under way");
    const [waiting, hidden] = [sharing.waiting[n], sharing.hidden[n]];
    const sums = `computation ${writeNumber(length - waiting)}, waiting ${writeNumber(waiting)}, communication hidden ${writeNumber(hidden)}`;
    return here.length ? [sums, `here: ${[...new Set(here)].join(", ")}`] : [sums];
  }

  function describeMemory({ memory }, { rank, time }) {
    const { times, activations, queued } = memory[rank], n = findLast(times, time);
    const levels = n < 0 ? [0, 0] : [activations[n], queued[n]];
    return [`rank ${rank} at ${writeNumber(time)}`, `live activations ${writeNumber(levels[0])}`, `queued weight gradients ${writeNumber(levels[1])}`];
  }

  function light(changes) {
    const before = lit.pinned ?? lit.hovered;
    Object.assign(lit, changes);
    if ((lit.pinned ?? lit.hovered) !== before) requestDrawing();
  }

  function pin(microbatch) {
    field.value = microbatch ?? "";
    light({ pinned: microbatch });
  }

  // ---- pointer and keys

  function placePointer(picture, event) {
    const place = picture.canvas.getBoundingClientRect();
    return [event.clientX - place.left, event.clientY - place.top];
  }

  function hover(picture, event) {
    const [x, y] = placePointer(picture, event);
    const target = findTarget(picture, x, y);
    light({ hovered: target?.part?.microbatch ?? null });
    if (target) showTooltip(describeTarget(picture, target), event.clientX, event.clientY); else tooltip.hidden = true;
    moveCursors(x);
  }

  /** The line at the pointer's time, through all pictures. */
  function moveCursors(x) {
    for (const { cursor } of pictures) {
      cursor.hidden = x === null || x < GUTTER || x > width - MARGIN;
      cursor.style.left = `${x}px`;
    }
  }

  function leave() {
    tooltip.hidden = true;
    moveCursors(null);
    light({ hovered: null });
  }

  function startDrag(picture, event) {
    if (event.button !== 0) return;
    drag = { x: event.clientX, y: event.clientY, moved: false };
    picture.canvas.setPointerCapture(event.pointerId);
  }

  function moveDrag(event) {
    const [right, down] = [event.clientX - drag.x, event.clientY - drag.y];
    if (!drag.moved && Math.hypot(right, down) < 4) return;
    if (!drag.moved) leave();
    Object.assign(drag, { x: event.clientX, y: event.clientY, moved: true });
    pan(-right / (width - GUTTER - MARGIN) * (view.to - view.from));
    if (event.pointerType === "mouse") window.scrollBy(0, -down);
  }

  function endDrag(picture, event) {
    const clicked = drag && !drag.moved;
    drag = null;
    if (!clicked) return;
    const microbatch = findTarget(picture, ...placePointer(picture, event))?.part?.microbatch ?? null;
    pin(microbatch === lit.pinned ? null : microbatch);
  }

  function turnWheel(picture, event) {
    const [x] = placePointer(picture, event);
    if (x < GUTTER || x > width - MARGIN) return; // beside the plot the wheel scrolls the page
    event.preventDefault();
    const scale = event.deltaMode === 1 ? 16 : 1;
    const across = event.shiftKey ? event.deltaY || event.deltaX : Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : 0;
    if (across) pan(across * scale / (width - GUTTER - MARGIN) * (view.to - view.from));
    else zoomAt(toTime(x), Math.exp(clamp(event.deltaY * scale, -400, 400) * 0.002));
  }

  function pressKey(event) {
    if (event.key === "Escape") { pin(null); leave(); }
    if (event.target === field || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = (view.to - view.from) / 8, closer = () => zoomMiddle(0.7), farther = () => zoomMiddle(1 / 0.7);
    const moves = { ArrowLeft: () => pan(-step), ArrowRight: () => pan(step) };
    const actions = { "+": closer, "=": closer, "-": farther, Home: reset, ...moves };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  }

  function listen() {
    for (const picture of pictures) {
      const { canvas } = picture;
      canvas.addEventListener("wheel", (event) => turnWheel(picture, event), { passive: false });
      canvas.addEventListener("pointerdown", (event) => startDrag(picture, event));
      canvas.addEventListener("pointermove", (event) => (drag ? moveDrag(event) : hover(picture, event)));
      canvas.addEventListener("pointerup", (event) => endDrag(picture, event));
      canvas.addEventListener("pointercancel", () => { drag = null; });
      canvas.addEventListener("pointerleave", leave);
      canvas.addEventListener("dblclick", reset);
    }
    document.addEventListener("keydown", pressKey);
    document.addEventListener("scroll", requestFrame, { passive: true });
    document.getElementById("zoom-in").addEventListener("click", () => zoomMiddle(0.7));
    document.getElementById("zoom-out").addEventListener("click", () => zoomMiddle(1 / 0.7));
    document.getElementById("reset").addEventListener("click", reset);
    field.addEventListener("input", () => light({ pinned: field.value === "" ? null : Number(field.value) }));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); drawVisible(true); });
    new ResizeObserver(fitCanvases).observe(document.querySelector("main"));
  }

  field.max = Math.max(...pictures.map((picture) => picture.microbatches)) - 1;
  readColours();
  fitCanvases();
  listen();

  // For tests: what is shown, and where on the screen a time of a rank is (in memory: its strip).
  window.counterflow = {
    view, lit, stats, colours: () => colours,
    locate(index, rank, time, share = 0.5, inMemory = false) {
      const { canvas, rowHeight, stripHeight, memoryTop } = pictures[index];
      const place = canvas.getBoundingClientRect();
      const y = inMemory ? memoryTop + (rank + share) * stripHeight : AXIS + (rank + share) * rowHeight;
      return { x: place.left + toX(time), y: place.top + y };
    },
  };
})();
