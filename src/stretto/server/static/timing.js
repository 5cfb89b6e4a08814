/** Draws the timing of one answer: the tokens that have arrived and their deadlines, over time. */
import { duration, element } from "./stream.js";

const MARKS = 300; // Longer answers are drawn by every so many-th token, so that drawing has a bound.
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 132, LEFT = 30, RIGHT = 12, TOP = 14, BOTTOM = 20;

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** The deadline of token `index`, in ms from the request; null without an objective. Without a TTFT limit, the
 * ITL limit counts from the arrival of the first token. */
export function deadlineOf(index, arrivals, objective) {
  const first = objective.ttft_ms ?? (objective.itl_ms == null ? null : arrivals[0]);
  if (index === 0) return objective.ttft_ms ?? objective.total_ms ?? null;
  const byGaps = first == null || objective.itl_ms == null ? null : first + index * objective.itl_ms;
  if (byGaps == null) return objective.total_ms ?? null;
  return Math.min(byGaps, objective.total_ms ?? Infinity);
}

/** Round steps of 1, 2 or 5 that divide `end` into about four. */
function ticks(end) {
  const rough = end / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  return Array.from({ length: Math.floor(end / step) + 1 }, (_, at) => at * step);
}

/** What the lines and dots mean. */
export function legend() {
  const list = element("ul", "legend");
  const rows = [["arrived", "tokens received"], ["deadline", "deadlines"], ["late", "a late token"]];
  list.append(...rows.map(([kind, text]) => element("li", kind, text)));
  return list;
}

/** The graph, `width` pixels wide. A first deadline far beyond the last token is a label at the edge. */
export function graph(arrivals, objective, width) {
  const deadlines = arrivals.map((_, index) => deadlineOf(index, arrivals, objective));
  const isLate = (index) => deadlines[index] != null && arrivals[index] > deadlines[index];
  const last = arrivals.at(-1) ?? 0, latest = deadlines.reduce((most, deadline) => Math.max(most, deadline ?? 0), 0);
  const end = Math.max(1, last * 1.08, Math.min(latest, last * 2.5));
  const x = (at) => LEFT + Math.min(at, end) / end * (width - LEFT - RIGHT);
  const y = (count) => HEIGHT - BOTTOM - count / Math.max(arrivals.length, 1) * (HEIGHT - TOP - BOTTOM);
  const svg = shape("svg", { class: "timing-graph", width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  for (const at of ticks(end)) {
    svg.append(shape("line", { x1: x(at), x2: x(at), y1: TOP, y2: HEIGHT - BOTTOM, class: "rule" }));
    svg.append(shape("text", { x: x(at), y: HEIGHT - 5, class: "tick", "text-anchor": at ? "middle" : "start" }, at ? duration(at) : "0"));
  }
  svg.append(shape("text", { x: LEFT - 6, y: y(arrivals.length) + 4, class: "tick", "text-anchor": "end" }, `${arrivals.length}`));
  const stride = Math.ceil(arrivals.length / MARKS);
  const drawn = arrivals.map((_, index) => index).filter((index) => index % stride === 0 || index === arrivals.length - 1);
  const steps = (times) => drawn.map((index) => [times[index], index]).map(([at, index]) => `L${x(at).toFixed(1)} ${y(index).toFixed(1)}V${y(index + 1).toFixed(1)}`).join("");
  const base = `M${x(0)} ${y(0)}`;
  svg.append(shape("path", { class: "area", d: `${base}${steps(arrivals)}H${x(end)}V${y(0)}Z` }));
  svg.append(shape("path", { class: "arrived", d: base + steps(arrivals) }));
  if (deadlines.some((deadline) => deadline != null && deadline <= end)) {
    svg.append(shape("path", { class: "deadline", d: base + steps(deadlines.map((deadline) => deadline ?? end)) }));
  }
  if (deadlines[0] != null && deadlines[0] > end) {
    svg.append(shape("text", { x: width - RIGHT, y: TOP - 3, class: "tick deadline-label", "text-anchor": "end" }, `deadline of the first token: ${duration(deadlines[0])} →`));
  }
  drawn.forEach((index) => svg.append(shape("circle", {
    cx: x(arrivals[index]).toFixed(1), cy: y(index + 1).toFixed(1), r: isLate(index) ? 2.6 : 1.7, class: `mark ${isLate(index) ? "late" : "early"}`,
  })));
  const late = arrivals.filter((_, index) => isLate(index)).length;
  const summary = deadlines.some((deadline) => deadline != null) ? `${late} late by this browser's clock` : "no deadline set";
  const first = arrivals.length ? `, the first after ${arrivals[0].toFixed(0)} ms` : "";
  svg.setAttribute("aria-label", `${arrivals.length} tokens${first}; ${summary}.`);
  return svg;
}
