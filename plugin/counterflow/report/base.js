"use strict";
// What the scripts of all pages use.
const tooltip = document.getElementById("tooltip");

function clamp(value, low, high) { return Math.min(Math.max(value, low), high); }
function writeNumber(value) { return String(Number(value.toPrecision(5))); }

/** Index of the last entry of a rising array that is at most the value; -1 where none is. */
function findLast(values, value) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= value) low = middle + 1; else high = middle;
  }
  return low - 1;
}

/** The distance of axis ticks, 1, 2 or 5 times a power of ten, so that a length has at most so many of them. */
function chooseStep(length, most) {
  const least = length / most;
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= least * 0.999999);
}

/** The theme's colours by name, as they are now. */
function findColours(names) {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** Sizes a canvas in CSS pixels, sharp on any screen. */
function fitCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
}

function showTooltip(lines, x, y) {
  tooltip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
  tooltip.hidden = false;
  const { width: wide, height: high } = tooltip.getBoundingClientRect();
  tooltip.style.left = `${x + 16 + wide > innerWidth ? Math.max(4, x - wide - 12) : x + 16}px`;
  tooltip.style.top = `${y + 16 + high > innerHeight ? Math.max(4, y - high - 12) : y + 16}px`;
}
