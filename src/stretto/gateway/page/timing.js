"use strict";

const SVG = "http://www.w3.org/2000/svg";

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** When token `index` is due, in ms from the request; null when nothing was asked of it. Without a limit on
 * the first token, gaps count from when it came. */
function dueOf(index, arrivals, asked) {
  const first = asked.ttft_ms ?? (asked.itl_ms == null ? null : arrivals[0]);
  if (index === 0) return asked.ttft_ms ?? asked.total_ms ?? null;
  const paced = first == null || asked.itl_ms == null ? null : first + index * asked.itl_ms;
  if (paced == null) return asked.total_ms ?? null;
  return Math.min(paced, asked.total_ms ?? Infinity);
}

/** The strip: a mark for each token at the time it came, against what was asked. */
function strip(arrivals, asked) {
  const dues = arrivals.map((_, index) => dueOf(index, arrivals, asked));
  const late = arrivals.filter((at, index) => dues[index] != null && at > dues[index]).length;
  const end = Math.max(1, arrivals.at(-1) ?? 0, asked.ttft_ms ?? 0) * 1.02;
  const svg = shape("svg", { class: "strip", viewBox: "0 0 1000 44", preserveAspectRatio: "none", role: "img" });
  const x = (at) => (at / end * 1000).toFixed(1);
  const line = (at, top, bottom, kind) => shape("line", {
    x1: x(at), x2: x(at), y1: top, y2: bottom, class: kind, "vector-effect": "non-scaling-stroke",
  });
  svg.append(shape("line", { x1: 0, x2: 1000, y1: 40, y2: 40, class: "base" }));
  arrivals.forEach((at, index) => {
    const isLate = dues[index] != null && at > dues[index];
    svg.append(line(at, index === 0 ? 8 : isLate ? 14 : 20, 40, `mark ${isLate ? "late" : "early"}`));
  });
  for (const at of [asked.ttft_ms, asked.total_ms]) if (at != null && at <= end) svg.append(line(at, 0, 44, "due"));
  const judged = dues.some((due) => due != null) ? `${late} late by this browser's clock` : "no due time asked";
  const first = arrivals.length ? `, the first after ${arrivals[0].toFixed(0)} ms` : "";
  svg.setAttribute("aria-label", `${arrivals.length} tokens${first}; ${judged}.`);
  return svg;
}
