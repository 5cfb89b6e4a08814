/** One answer's timing: how many tokens were here by when, against how many were due. */
import { spoken } from "./stream.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 132, LEFT = 30, RIGHT = 12, TOP = 14, BOTTOM = 20;

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** When token `index` is due, in ms from the request; null when nothing was asked of it. Without a limit on
 * the first token, gaps count from when it came. */
export function dueOf(index, arrivals, asked) {
  const first = asked.ttft_ms ?? (asked.itl_ms == null ? null : arrivals[0]);
  if (index === 0) return asked.ttft_ms ?? asked.total_ms ?? null;
  const paced = first == null || asked.itl_ms == null ? null : first + index * asked.itl_ms;
  if (paced == null) return asked.total_ms ?? null;
  return Math.min(paced, asked.total_ms ?? Infinity);
}

/** Round steps of 1, 2 or 5 that divide `end` into about four. */
function ticks(end) {
  const rough = end / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  return Array.from({ length: Math.floor(end / step) + 1 }, (_, at) => at * step);
}

/** The graph, `width` pixels wide. Dues far beyond what came are named at its edge instead of squeezing it. */
export function graph(arrivals, asked, width) {
  const dues = arrivals.map((_, index) => dueOf(index, arrivals, asked));
  const isLate = (index) => dues[index] != null && arrivals[index] > dues[index];
  const last = arrivals.at(-1) ?? 0, wanted = Math.max(0, ...dues.filter((due) => due != null));
  const end = Math.max(1, last * 1.08, Math.min(wanted, last * 2.5));
  const x = (at) => LEFT + Math.min(at, end) / end * (width - LEFT - RIGHT);
  const y = (count) => HEIGHT - BOTTOM - count / Math.max(arrivals.length, 1) * (HEIGHT - TOP - BOTTOM);
  const svg = shape("svg", { class: "timing-graph", width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  for (const at of ticks(end)) {
    svg.append(shape("line", { x1: x(at), x2: x(at), y1: TOP, y2: HEIGHT - BOTTOM, class: "rule" }));
    svg.append(shape("text", { x: x(at), y: HEIGHT - 5, class: "tick", "text-anchor": at ? "middle" : "start" }, at ? spoken(at) : "0"));
  }
  svg.append(shape("text", { x: LEFT - 6, y: y(arrivals.length) + 4, class: "tick", "text-anchor": "end" }, `${arrivals.length}`));
  const steps = (times) => times.map((at, index) => `L${x(at).toFixed(1)} ${y(index).toFixed(1)}V${y(index + 1).toFixed(1)}`).join("");
  const base = `M${x(0)} ${y(0)}`;
  svg.append(shape("path", { class: "area", d: `${base}${steps(arrivals)}H${x(end)}V${y(0)}Z` }));
  svg.append(shape("path", { class: "came", d: base + steps(arrivals) }));
  if (dues.some((due) => due != null && due <= end)) {
    svg.append(shape("path", { class: "due", d: base + steps(dues.map((due) => due ?? end)) }));
  }
  if (dues[0] != null && dues[0] > end) {
    svg.append(shape("text", { x: width - RIGHT, y: TOP - 3, class: "tick due-label", "text-anchor": "end" }, `first token due after ${spoken(dues[0])} →`));
  }
  arrivals.forEach((at, index) => svg.append(shape("circle", {
    cx: x(at).toFixed(1), cy: y(index + 1).toFixed(1), r: isLate(index) ? 2.6 : 1.7, class: `mark ${isLate(index) ? "late" : "early"}`,
  })));
  const late = arrivals.filter((_, index) => isLate(index)).length;
  const judged = dues.some((due) => due != null) ? `${late} late by this browser's clock` : "no due time asked";
  const first = arrivals.length ? `, the first after ${arrivals[0].toFixed(0)} ms` : "";
  svg.setAttribute("aria-label", `${arrivals.length} tokens${first}; ${judged}.`);
  return svg;
}
