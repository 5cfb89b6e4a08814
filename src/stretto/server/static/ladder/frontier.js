/** Draws the frontier of a ladder: the measured quality of its variants against the time of a step. */
import { duration } from "../stream.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190, LEFT = 44, RIGHT = 70, TOP = 20, BOTTOM = 36;

/** The milliseconds of a step as text; those of small variants differ by parts of one. */
export const milliseconds = (ms) => (ms == null ? "–" : ms < 10 ? `${ms.toFixed(2)} ms` : duration(ms));

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** Whether no other variant is as good and as fast, and better in one of the two. */
function best(variant, variants) {
  return !variants.some((other) => other.quality >= variant.quality && other.step_ms <= variant.step_ms
    && (other.quality > variant.quality || other.step_ms < variant.step_ms));
}

/** Values of a round step between two ends, about four of them. */
function ticks(from, to) {
  const rough = (to - from) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let at = Math.ceil(from / step); at * step <= to; at++) found.push(at * step);
  return found;
}

/** Where the label of a dot covers no interval and no label in `taken`, to which it is added: [left, top, width, height]. */
function place(x, y, text, width, taken) {
  const wide = text.length * 6.5;
  const sides = [x + 7, x - 7 - wide].filter((left) => left >= LEFT && left + wide <= width);
  const spots = [15, -6, 4, 26, -17, 37].flatMap((down) => sides.map((left) => [left, y + down - 9, wide, 11]));
  const apart = (one, other) => one[0] + one[2] < other[0] || other[0] + other[2] < one[0] || one[1] + one[3] < other[1] || other[1] + other[3] < one[1];
  const clear = (spot) => spot[1] + spot[3] < HEIGHT - BOTTOM + 3 && taken.every((other) => apart(spot, other));
  const spot = spots.find(clear) ?? spots[0] ?? [x + 7, y - 5, wide, 11];
  taken.push(spot);
  return { x: spot[0], y: spot[1] + 9 };
}

/** The graph of the variants whose step time is known, `width` pixels wide; null if there are none. `name` gives the
 * short name of a variant. A variant's `learnt` is its quality after feedback; null: there is none. */
export function frontier(variants, width, name) {
  const known = variants.filter((each) => each.step_ms != null).sort((one, other) => one.step_ms - other.step_ms);
  if (!known.length) return null;
  const end = known.at(-1).step_ms * 1.05 || 1;
  const low = Math.max(0, Math.min(...known.map((each) => Math.min(each.quality_low, each.learnt ?? 1))) - 0.03);
  const high = Math.min(1, Math.max(...known.map((each) => Math.max(each.quality_high, each.learnt ?? 0))) + 0.03);
  const x = (ms) => LEFT + ms / end * (width - LEFT - RIGHT);
  const y = (quality) => HEIGHT - BOTTOM - (quality - low) / (high - low || 1) * (HEIGHT - TOP - BOTTOM);
  const svg = shape("svg", { class: "frontier", width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  for (const at of ticks(0, end)) svg.append(shape("text", { x: x(at), y: HEIGHT - BOTTOM + 15, class: "tick", "text-anchor": "middle" }, at ? duration(at) : "0"));
  for (const at of ticks(low, high)) {
    svg.append(shape("line", { x1: LEFT, x2: width - RIGHT, y1: y(at), y2: y(at), class: "rule" }));
    svg.append(shape("text", { x: LEFT - 6, y: y(at) + 4, class: "tick", "text-anchor": "end" }, `${Math.round(at * 100)} %`));
  }
  svg.append(shape("text", { x: width - RIGHT, y: HEIGHT - 4, class: "tick", "text-anchor": "end" }, "time of a step"));
  svg.append(shape("text", { x: 0, y: 10, class: "tick" }, "right answers, with the 95 % interval"));
  const line = known.filter((each) => best(each, known)).map((each) => `${x(each.step_ms).toFixed(1)} ${y(each.quality).toFixed(1)}`);
  svg.append(shape("path", { class: "line", d: `M${line.join("L")}` }));
  const taken = known.map((each) => {
    const top = y(Math.max(each.quality_high, each.learnt ?? 0)), bottom = y(Math.min(each.quality_low, each.learnt ?? 1));
    return [x(each.step_ms) - 4, top, 8, bottom - top];
  });
  known.forEach((each) => {
    const at = x(each.step_ms), label = place(at, y(each.quality), name(each), width, taken);
    svg.append(shape("line", { x1: at, x2: at, y1: y(each.quality_low), y2: y(each.quality_high), class: "interval" }));
    svg.append(shape("circle", { cx: at, cy: y(each.quality), r: 4, class: "dot" }));
    if (each.learnt != null && Math.abs(each.learnt - each.quality) >= 0.005) {
      svg.append(shape("line", { x1: at, x2: at, y1: y(each.quality), y2: y(each.learnt), class: "shift" }));
      svg.append(shape("circle", { cx: at, cy: y(each.learnt), r: 4, class: "learnt" }));
    }
    svg.append(shape("text", { ...label, class: "tick label" }, name(each)));
  });
  svg.setAttribute("aria-label", `Quality against step time: ${known.map((each) => `${name(each)} ${Math.round(each.quality * 100)} % in ${milliseconds(each.step_ms)}${each.learnt == null ? "" : `, learnt ${Math.round(each.learnt * 100)} %`}`).join(", ")}.`);
  return svg;
}
