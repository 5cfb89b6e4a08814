/** The live view: the statistics of the server's stream, now and over the last minutes. */
import { $, element, events, headers, refusal, duration } from "./stream.js";

const KEPT = 600;
const RETRY_MS = 1500;
const TIERS = ["priority", "default", "flex"];
const times = [];
const past = [];
let plotly = null, seen = null, told = null, drawing = 0;

const number = (value) => (value == null ? "–" : value >= 10_000 ? `${(value / 1000).toFixed(0)}k`
  : value < 10 && value % 1 ? value.toFixed(1) : value.toFixed(0));
const percent = (share) => (share == null ? "–" : `${+(share * 100).toFixed(share > 0.99 ? 2 : 1)} %`);
const line = (name, pick, colour, rest = {}) => ({ name, pick, colour, ...rest });

/** The graphs: title, a summary in words, and lines over time. `x` replaces time. */
const GRAPHS = [
  { id: "ttft", title: "Time to first token", unit: "ms", words: (now) => pair(now.ttft_ms),
    lines: [line("p50", (now) => now.ttft_ms[0], "one"), line("p99", (now) => now.ttft_ms[1], "two")] },
  { id: "itl", title: "Inter-token latency", unit: "ms", words: (now) => pair(now.itl_ms),
    lines: [line("p50", (now) => now.itl_ms[0], "one"), line("p99", (now) => now.itl_ms[1], "two")] },
  { id: "tokens", title: "Tokens per second", words: (now) => `${number(now.tokens_s)} out, ${number(now.prefill_s)} read`,
    lines: [line("out", (now) => now.tokens_s, "one", { fill: true }), line("read", (now) => now.prefill_s, "two")] },
  { id: "queue", title: "Sequences", words: (now) => `${now.running} running, ${now.waiting} waiting`,
    lines: [line("running", (now) => now.running, "one", { fill: true }), line("waiting", (now) => now.waiting, "bad")] },
  { id: "blocks", title: "KV blocks in use", words: (now) => (now.blocks_total ? `${number(now.blocks_used)} of ${number(now.blocks_total)}` : "none"),
    lines: [line("in use", (now) => now.blocks_used, "one", { fill: true })] },
  { id: "steps", title: "Tokens in a step", words: (now) => `${number(now.step_tokens[0])} decode, ${number(now.step_tokens[1])} prefill; ${duration(now.step_ms[0])}`,
    lines: [line("decode", (now) => now.step_tokens[0], "one", { stack: "step" }), line("prefill", (now) => now.step_tokens[1], "two", { stack: "step" })] },
  { id: "error", title: "Step-time model's error", unit: "%", words: (now) => (now.model_error == null ? "nothing to compare" : `${percent(now.model_error)}, median`),
    lines: [line("median", (now) => (now.model_error == null ? null : now.model_error * 100), "one")] },
  { id: "model", title: "Step time, predicted and actual", unit: "ms", words: (now) => (now.steps.length ? `the last ${now.steps.length} steps` : "nothing predicted"), scatter: true },
  { id: "goodput", title: "Goodput, requests per second", words: (now) => `${number(sum(now, "goodput"))} in all`,
    lines: TIERS.map((tier) => line(tier, (now) => now.tiers[tier]?.goodput ?? 0, tier, { stack: "tier", tier })) },
];

const sum = (now, field) => Object.values(now.tiers).reduce((all, tier) => all + tier[field], 0);
const pair = (values) => (values[0] == null ? "no data" : `${duration(values[0])} p50, ${duration(values[1])} p99`);

function lay() {
  for (const tier of TIERS) {
    const box = element("section", `tier ${tier}`);
    box.id = `tier-${tier}`;
    const bar = document.createElement("meter");
    bar.max = 1;
    bar.setAttribute("aria-label", `${tier} requests on time, since the start`);
    box.append(element("h2", "", tier), element("p", "share", "–"), bar, element("p", "small", "no requests yet"));
    $("tiers").append(box);
  }
  for (const graph of GRAPHS) {
    const box = element("section", "graph");
    box.id = `graph-${graph.id}`;
    const plot = element("div", "plot");
    plot.setAttribute("aria-hidden", "true");
    box.append(element("h2", "", graph.title), element("p", "words", "–"), plot);
    $("graphs").append(box);
  }
  $("load").textContent = `stretto bench serve ${location.origin} --concurrency 8 --requests 200`;
}

function words(now) {
  for (const tier of TIERS) {
    const box = $(`tier-${tier}`), kept = now.tiers[tier];
    const share = kept ? kept.on_time / kept.judged : null;
    box.querySelector(".share").textContent = percent(share);
    box.querySelector("meter").value = share ?? 0;
    box.querySelector(".small").textContent = !kept ? "no requests yet"
      : `on time, of ${kept.judged.toLocaleString("en")}` + (kept.recent_judged ? `; last 10 s ${percent(kept.recent_on_time / kept.recent_judged)}` : "");
  }
  for (const graph of GRAPHS) $(`graph-${graph.id}`).querySelector(".words").textContent = graph.words(now);
  const refused = Object.entries(now.refused).map(([reason, count]) => `${count} ${reason.replaceAll("_", " ")}`).join(", ");
  const parts = ["Medians and rates of the last ten seconds"];
  if (refused) parts.push(`refused: ${refused}`);
  if (now.restarts) parts.push(`the engine was started again ${now.restarts} ${now.restarts > 1 ? "times" : "time"}`);
  $("live-note").textContent = `${parts.join(". ")}.`;
  $("idle").hidden = now.ended > 0 || now.running > 0;
  $("graphs").hidden = !$("idle").hidden;
}

const hues = () => {
  const style = getComputedStyle(document.documentElement);
  const canvas = document.createElement("span");
  document.body.append(canvas);
  const read = (name) => { canvas.style.color = style.getPropertyValue(name); return getComputedStyle(canvas).color; };
  const found = { one: read("--accent"), two: read("--second"), bad: read("--bad"), priority: read("--accent"), default: read("--second"),
    flex: read("--third"), ink: read("--faint"), rule: read("--line") };
  canvas.remove();
  return found;
};
const thin = (colour) => colour.replace("rgb(", "rgba(").replace(")", ", 0.16)");

function traces(graph, hue) {
  if (graph.scatter) {
    if (!seen.steps.length) return [];
    const steps = seen.steps, top = Math.max(1e-3, ...steps.flat());
    return [
      { x: [0, top], y: [0, top], mode: "lines", line: { color: hue.rule, width: 1 }, hoverinfo: "skip" },
      { x: steps.map((step) => step[1]), y: steps.map((step) => step[0]), mode: "markers", name: "step",
        marker: { color: hue.one, size: 5, opacity: 0.55 }, hovertemplate: "predicted %{x:.2f} ms, took %{y:.2f} ms<extra></extra>" },
    ];
  }
  return graph.lines.filter((each) => !each.tier || seen.tiers[each.tier]).map((each) => ({
    x: times, y: past.map((now) => (now ? each.pick(now) : null)), name: each.name, mode: "lines", connectgaps: false,
    line: { color: hue[each.colour], width: 1.6 }, stackgroup: each.stack, fill: each.fill ? "tozeroy" : undefined,
    fillcolor: each.fill || each.stack ? thin(hue[each.colour]) : undefined,
    hovertemplate: `%{y:.4~g}${graph.unit ? ` ${graph.unit}` : ""}`,
  }));
}

function draw() {
  drawing = 0;
  if (!plotly || !seen || $("live").hidden || $("graphs").hidden) return;
  const hue = hues();
  const axis = { color: hue.ink, gridcolor: hue.rule, zeroline: false, ticklen: 5, tickcolor: "rgba(0,0,0,0)", visible: true, tickfont: { size: 10 }, fixedrange: true };
  for (const graph of GRAPHS) {
    const layout = {
      height: 150, margin: { l: 40, r: 8, t: 20, b: 26 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      showlegend: (graph.lines?.length ?? 0) > 1, hovermode: graph.scatter ? "closest" : "x unified",
      legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom", font: { size: 10, color: hue.ink }, bgcolor: "rgba(0,0,0,0)" },
      font: { family: "inherit", color: hue.ink },
      xaxis: { ...axis, showgrid: false, ...(graph.scatter ? { rangemode: "tozero" } : { tickformat: "%H:%M:%S", nticks: 4, type: "date" }) },
      yaxis: { ...axis, rangemode: "tozero", nticks: 4 },
      hoverlabel: { font: { size: 11 } },
    };
    if (graph.scatter && !seen.steps.length) layout.xaxis.visible = layout.yaxis.visible = false;
    plotly.react($(`graph-${graph.id}`).querySelector(".plot"), traces(graph, hue), layout, { displayModeBar: false, responsive: true });
  }
}

function later() {
  if (!drawing) drawing = requestAnimationFrame(draw);
}

/** Loads plotly.js, which is large, when the view is first shown. The numbers do not wait for it. */
export function open() {
  if (told === null) {
    told = "loading";
    const script = document.createElement("script");
    script.src = "page/plotly.min.js";
    script.addEventListener("load", () => { plotly = window.Plotly; later(); });
    script.addEventListener("error", () => { told = null; $("live-note").textContent = "The graphs' library did not load; the numbers are right."; });
    document.head.append(script);
  }
  later();
}

export const redraw = later;

function keep(now, ago = 0) {
  times.push(new Date(Date.now() - ago * 1000));
  past.push(now);
  if (times.length > KEPT) { times.shift(); past.shift(); }
}

let wake = () => {};
/** Connects again now, and not after the pause. */
export const hurry = () => wake();

/** Reads the stream while the page is open, and reconnects after an error. Each event and each error calls
 * `report(now, problem)`. */
export async function follow(report) {
  lay();
  for (;;) {
    try {
      const response = await fetch("live", { headers: headers() });
      if (!response.ok) throw await refusal(response);
      for await (const now of events(response)) {
        if (now.history && !past.length) now.history.forEach((each) => keep(each.live, each.ago_s));
        seen = now;
        keep(now);
        words(now);
        later();
        report(now, null);
      }
      throw new Error("The server closed the stream.");
    } catch (error) {
      const problem = error instanceof TypeError ? new Error("The server cannot be reached.") : error;
      if (error.status === 401) problem.message = "This server needs an API key: type it in the playground's settings.";
      if (past.at(-1)) keep(null);
      $("live-note").textContent = `${problem.message} Trying again.`;
      report(null, problem);
    }
    await new Promise((done) => { wake = done; setTimeout(done, RETRY_MS); });
  }
}
