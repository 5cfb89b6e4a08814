/** One answer on the page: its text while it grows, reasoning, tool calls, figures and timing. */
import { $, element, duration } from "./stream.js";
import { reason } from "./ladder/reasons.js";
import { show } from "./markdown.js";
import { graph, legend } from "./timing.js";

const SHARE = 8; // Drawing takes at most 1 / (SHARE + 1) of the time, so the stream is read as it arrives.
const open = new Set();
let width = innerWidth;
addEventListener("resize", () => {
  if (width !== innerWidth) open.forEach((draw) => draw());
  width = innerWidth;
});

export function fold(kind, name, body) {
  const box = element("details", kind);
  box.append(element("summary", "", name), body);
  return box;
}

export function bottom() { $("log").scrollTop = $("log").scrollHeight; }

function quantile(values, share) {
  const ordered = [...values].sort((one, other) => one - other);
  return ordered[Math.min(ordered.length - 1, Math.floor(share * ordered.length))];
}

/** The figures below an answer. `report` is the server's; without it they are from this browser's clock. */
export function facts({ report, usage, tier, seconds, arrivals, note }) {
  const list = element("dl", "facts");
  const add = (name, value, kind = "") => {
    const pair = element("div", kind);
    pair.append(element("dt", "", name), element("dd", "", value));
    list.append(pair);
  };
  if (note) add("answer", note);
  if (report?.on_time != null) add("objective", report.on_time ? "On time" : "Late", report.on_time ? "good" : "bad");
  if (tier) add("tier", tier);
  if (report?.queue_ms != null) add("queue time", duration(report.queue_ms));
  const first = report?.ttft_ms ?? arrivals?.[0];
  if (first != null) add("TTFT", duration(first));
  const gaps = (arrivals ?? []).slice(1).map((at, index) => at - arrivals[index]);
  const gap = report ? report.itl_p99_ms : gaps.length ? quantile(gaps, 0.99) : null;
  if (gap != null) add("ITL p99", duration(gap));
  const count = usage?.completion_tokens ?? arrivals?.length;
  if (count) add("tokens", `${count}`);
  if (count && seconds > 0) add("tokens/s", (count / seconds).toFixed(0));
  if (report?.variant && report.variant !== $("model").value) add("variant", report.variant, "variant");
  if (report?.variant_reason) add("why this variant", reason(report.variant_reason), "reason");
  return list;
}

/** An answer that grows. Events only add to it; `paint` shows them, as often as drawing is cheap. */
export function growing(turn, limits) {
  const got = { text: "", thought: "", calls: [], arrivals: [] };
  let timer = 0, thought = null, timing = null, cost = 0;
  const plot = () => timing.querySelector(".plot").replaceChildren(legend(), graph(got.arrivals, limits, Math.max(240, turn.box.clientWidth)));
  const draw = (whole) => {
    timer = 0;
    const started = performance.now(), log = $("log");
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 200;
    if (got.thought && !thought) turn.body.before((thought = fold("thought", "Reasoning", element("div", "words"))));
    if (thought) thought.lastChild.textContent = got.thought;
    if (got.text) show(turn.body, got.text, whole);
    if (timing?.open) plot();
    if (follows) bottom();
    cost = performance.now() - started;
  };
  return {
    got,
    add(at, delta) {
      const piece = delta.content ?? delta.text ?? "";
      if (piece || delta.reasoning_content || delta.tool_calls) {
        got.arrivals.push(at);
        turn.box.classList.remove("awaited");
      }
      got.text += piece;
      got.thought += delta.reasoning_content ?? "";
      for (const part of delta.tool_calls ?? []) {
        const call = (got.calls[part.index] ??= { id: part.id, type: "function", function: { name: "", arguments: "" } });
        call.function.name += part.function?.name ?? "";
        call.function.arguments += part.function?.arguments ?? "";
      }
      if (!timer) timer = setTimeout(draw, Math.max(30, cost * SHARE), false);
    },
    finish() {
      clearTimeout(timer);
      if (got.arrivals.length) {
        timing = fold("timing", "Timing", element("div", "plot"));
        timing.addEventListener("toggle", () => {
          if (!timing.open) { open.delete(plot); return; }
          plot();
          open.add(plot);
          timing.scrollIntoView({ block: "nearest" });
        });
      }
      draw(true);
      for (const call of got.calls) turn.box.append(called(call));
      return timing;
    },
  };
}

export function called(call) {
  const text = element("pre", "", call.function.arguments);
  try { text.textContent = JSON.stringify(JSON.parse(call.function.arguments), null, 2); } catch { /* a cut call is shown as it is */ }
  return fold("call", `Calls ${call.function.name}`, text);
}
