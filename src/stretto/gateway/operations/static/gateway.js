/** The live page of a gateway: workers by site, what the relay and the caches did, and tenants. */
import { $, duration, element, events, headers, refusal } from "./stream.js";

const KEPT = 300;
const LEAST = 60; // seconds that a line covers from the start
const RETRY_MS = 1500;
const THEMES = ["auto", "light", "dark"];
const SPACE = "http://www.w3.org/2000/svg";
const past = [];

const count = (value) => Math.round(value).toLocaleString("en");
const rate = (value) => (value < 10 ? value.toFixed(1) : count(value));
const share = (part, all) => (all ? `${((100 * part) / all).toFixed(1)} %` : "–");
const amount = (value) => (value ? value.toPrecision(3).replace(/\.?0+$/, "") : "–");

/** The tiles: a figure, its unit, and lines over the last minutes. */
const TILES = [
  { title: "Requests", unit: "per second", figure: (now) => rate(now.recently.requests_s), lines: [(now) => now.recently.requests_s] },
  { title: "Tokens", unit: "per second", figure: (now) => rate(now.recently.tokens_s), lines: [(now) => now.recently.tokens_s] },
  { title: "First token", unit: "median", figure: (now) => duration(now.recently.ttft_ms[0]), more: (now) => `${duration(now.recently.ttft_ms[1])} p99`,
    lines: [(now) => now.recently.ttft_ms[0], (now) => now.recently.ttft_ms[1]] },
  { title: "Prediction off by", unit: "median", figure: (now) => duration(now.recently.forecast_error_ms[0]), more: (now) => `${duration(now.recently.forecast_error_ms[1])} p99`,
    lines: [(now) => now.recently.forecast_error_ms[0], (now) => now.recently.forecast_error_ms[1]] },
  { title: "Errors", unit: "per second", figure: (now) => rate(now.recently.errors_s), lines: [(now) => now.recently.errors_s] },
];

function lay() {
  for (const tile of TILES) {
    const box = element("section", "tile");
    const figure = element("p", "", "–");
    const chart = document.createElementNS(SPACE, "svg");
    chart.setAttribute("viewBox", `0 0 ${KEPT} 100`);
    chart.setAttribute("preserveAspectRatio", "none");
    chart.setAttribute("aria-hidden", "true");
    tile.paths = tile.lines.map((_, index) => {
      const path = document.createElementNS(SPACE, "path");
      path.setAttribute("class", index ? "two" : "one");
      return chart.appendChild(path);
    });
    tile.element = figure;
    box.append(element("h3", "", tile.title), figure, chart);
    $("graphs").append(box);
  }
}

/** The path of a line, with a gap wherever there is no value. */
function line(pick, top) {
  let path = "", pen = "M";
  const span = Math.max(LEAST, past.length);
  past.forEach((now, index) => {
    const value = now ? pick(now) : null;
    if (value == null) { pen = "M"; return; }
    path += `${pen}${(KEPT * (span - past.length + index) / (span - 1)).toFixed(1)},${(100 - (100 * value) / top).toFixed(2)}`;
    pen = "L";
  });
  return path;
}

function drawTiles(now) {
  for (const tile of TILES) {
    tile.element.replaceChildren(tile.figure(now), " ", element("small", "", tile.more ? tile.more(now) : tile.unit));
    const top = Math.max(1e-9, ...tile.lines.flatMap((pick) => past.map((each) => (each ? pick(each) ?? 0 : 0))));
    tile.lines.forEach((pick, index) => tile.paths[index].setAttribute("d", line(pick, top)));
  }
}

/** A cell. `name` stands before the value on a narrow screen, where there is no head. */
function cell(value, name = "", className = "") {
  const made = element("td", className, typeof value === "string" ? value : "");
  if (typeof value !== "string") made.append(...[value].flat());
  if (name) made.dataset.name = name;
  return made;
}

const right = (value, name) => cell(value, name, "to-right");

function rows(table, made, columns, nothing) {
  const body = $(table).tBodies[0];
  if (!made.length) {
    const row = document.createElement("tr"), only = element("td", "none", nothing);
    only.colSpan = columns;
    row.append(only);
    made = [row];
  }
  const focus = document.activeElement?.dataset?.worker;
  body.replaceChildren(...made);
  if (focus) body.querySelector(`button[data-worker="${CSS.escape(focus)}"]`)?.focus();
}

function workerRow(worker, now) {
  const row = document.createElement("tr");
  const name = [worker.name];
  if (worker.error) name.push(element("p", "small", worker.error));
  const breaker = worker.breaker === "closed" && worker.weight < 1 ? `closed, ${Math.round(worker.weight * 100)} % load` : worker.breaker.replace("-", " ");
  row.append(
    cell(name), cell(element("span", `state ${worker.state}`, worker.state)), cell(element("span", worker.breaker, breaker), "breaker"),
    right(count(worker.active), "running"), right(duration(worker.waiting_ms), "waiting work"), right(duration(worker.round_trip_ms), "round trip"),
    right(count(now.recently.workers[worker.name] ?? 0), "last 10 s"), cell(worker.models.join(", ") + (worker.plain ? " (another kind of server)" : ""), "", "models"),
  );
  const act = cell("");
  if (now.admin) {
    const change = worker.state === "draining" ? "undrain" : "drain";
    const button = element("button", "quiet", change === "drain" ? "Drain" : "Undrain");
    button.type = "button";
    button.dataset.worker = worker.name;
    button.setAttribute("aria-label", `${button.textContent} ${worker.name}`);
    button.addEventListener("click", () => drain(worker.name, change));
    act.append(button);
  }
  row.append(act);
  return row;
}

function drawWorkers(now) {
  const sites = [...new Set(now.workers.map((worker) => worker.site))].sort();
  const made = sites.flatMap((site) => {
    const held = now.workers.filter((worker) => worker.site === site).map((worker) => workerRow(worker, now));
    if (!site && sites.length === 1) return held;
    const row = element("tr", "site"), head = element("th", "", site || "no site");
    head.colSpan = 9;
    head.scope = "colgroup";
    row.append(head);
    return [row, ...held];
  });
  rows("workers", made, 9, "No workers yet. They join with POST /v1/workers, or are named with --worker.");
  const able = now.workers.filter((worker) => worker.state === "usable").length;
  $("routing").textContent = `${able} of ${now.workers.length} take requests. Chosen by ${now.route}.`;
}

async function drain(name, change) {
  const response = await fetch(`v1/workers/${encodeURIComponent(name)}/${change}`, { method: "POST", headers: headers() }).catch(() => null);
  const problem = !response ? "The gateway cannot be reached." : response.ok ? "" : (await refusal(response)).message;
  $("action").hidden = !problem;
  $("action").textContent = problem;
}

function facts(list, entries) {
  $(list).replaceChildren(...entries.map(([name, value, mark = ""]) => {
    const box = element("div", mark);
    box.append(element("dt", "", name), element("dd", "", value));
    return box;
  }));
}

function drawFacts(now) {
  const counts = now.counts, cut = Object.values(now.rejected).reduce((all, each) => all + each, 0);
  facts("relay", [
    ["Open requests", count(now.open)], ["Failovers", count(counts.failovers)], ["Retries", count(counts.retries)],
    ["Second attempts", count(counts.hedges)], ["of them won", share(counts.hedges_won, counts.hedges)], ["Cut short", count(cut)],
  ]);
  const cache = now.cache, hits = cache.exact_hits + cache.semantic_hits + cache.joined, all = hits + cache.misses;
  facts("cache", all || cache.entries ? [
    ["Hit rate", share(hits, all)], ["Exact", count(cache.exact_hits)], ["Semantic", count(cache.semantic_hits)], ["Joined", count(cache.joined)],
    ["Misses", count(cache.misses)], ["Entries", count(cache.entries)], ["Size", `${(cache.bytes / 2 ** 20).toFixed(1)} MiB`],
    ...(cache.shared === "none" ? [] : [["Redis", cache.shared, cache.shared === "ok" ? "" : "bad"]]),
  ] : [["Off, or not asked yet", "–"]]);
}

function drawTenants(now) {
  rows("tenants", now.tenants.map((each) => {
    const row = document.createElement("tr");
    row.append(cell(each.tenant), right(count(each.recent), "last 10 s"), right(count(each.requests), "requests"), right(count(each.tokens), "tokens"),
      right(amount(each.cost), "cost"), right(each.joules ? `${amount(each.joules)} J` : "–", "energy"));
    return row;
  }), 6, "No requests yet today.");
  $("limits").replaceChildren(...now.limits.map((limit) => {
    const box = element("div", "limit"), bar = document.createElement("meter");
    const resets = limit.resets_s == null ? "" : limit.resets_s ? `, renewed in ${duration(limit.resets_s * 1000)}` : "";
    bar.max = limit.most || 1;
    bar.value = limit.used;
    bar.setAttribute("aria-label", `${limit.owner}: ${limit.limit}`);
    box.append(`${limit.owner}: ${limit.limit}, ${amount(limit.used).replace("–", "0")} used${resets}`, bar);
    return box;
  }));
}

function show(now) {
  $("problems").hidden = !now.problems.length;
  $("problems").replaceChildren(...now.problems.map((each) => element("li", "", each)));
  $("note").textContent = "Rates, medians and 99th percentiles of the last ten seconds.";
  drawTiles(now);
  drawWorkers(now);
  drawFacts(now);
  drawTenants(now);
}

function tell(text, ready) {
  $("status").className = `status ${ready ? "ready" : "down"}`;
  if ($("status-text").textContent !== text) $("status-text").textContent = text;
}

function keep(now) {
  past.push(now);
  if (past.length > KEPT) past.shift();
}

let wake = () => {}, stop = () => {};

async function follow() {
  for (;;) {
    const abort = new AbortController();
    stop = () => abort.abort();
    try {
      const response = await fetch("live", { headers: headers(), signal: abort.signal });
      if (!response.ok) throw await refusal(response);
      for await (const now of events(response)) {
        keep(now);
        show(now);
        const ready = !now.draining && now.workers.some((worker) => worker.state === "usable");
        tell(now.draining ? "shutting down" : ready ? "ready" : "no worker is ready", ready);
      }
      throw new Error("The gateway closed the stream.");
    } catch (error) {
      if (past.at(-1)) keep(null);
      const locked = error.status === 401, away = error instanceof TypeError;
      if (error.name !== "AbortError") {
        $("note").textContent = locked ? "This gateway needs an API key: type it above." : `${away ? "The gateway cannot be reached." : error.message} Trying again.`;
        tell(locked ? "needs a key" : away ? "not reachable" : "trying again", false);
      }
    }
    await new Promise((done) => { wake = done; setTimeout(done, RETRY_MS); });
  }
}

function painted() {
  try { return THEMES.find((theme) => theme === localStorage.getItem("theme")) ?? "auto"; } catch { return "auto"; }
}

function paint(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  try { localStorage.setItem("theme", theme); } catch { /* a private window keeps nothing */ }
}

/** A link cannot send a key, so the page fetches what it leads to. */
async function fetched(event) {
  if (!$("key").value.trim()) return;
  event.preventDefault();
  const link = event.currentTarget;
  const response = await fetch(link.href, { headers: headers() }).catch(() => null);
  const problem = !response ? "The gateway cannot be reached." : response.ok ? "" : (await refusal(response)).message;
  $("action").hidden = !problem;
  $("action").textContent = problem;
  if (problem) return;
  const save = document.createElement("a");
  save.href = URL.createObjectURL(await response.blob());
  save.download = link.dataset.name;
  save.click();
  URL.revokeObjectURL(save.href);
}

for (const link of document.querySelectorAll(".links a")) link.addEventListener("click", fetched);
$("theme").addEventListener("click", () => paint(THEMES[(THEMES.indexOf(painted()) + 1) % THEMES.length]));
$("key").addEventListener("change", () => { stop(); wake(); });
paint(painted());
lay();
follow();
