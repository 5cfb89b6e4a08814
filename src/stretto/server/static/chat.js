/** The playground: a conversation, the objective of each answer, and its timing. */
import { $, element, events, headers, refusal, duration } from "./stream.js";
import { graph } from "./timing.js";

const history = [];
const drawn = [];
let running = null;
let objectives = {};

/** The default objective of each tier, from the live stream. */
export function learn(tiers) {
  objectives = tiers;
  const usual = objectives[$("tier").value] ?? {};
  for (const name of ["ttft", "itl", "total"]) {
    $(name).placeholder = usual[`${name}_ms`] == null ? "no limit" : `${usual[`${name}_ms`]} ms`;
  }
}

function turn(who, text) {
  $("log").querySelector(".empty")?.remove();
  const box = element("article", `turn ${who}`);
  const body = element("p", "text", text);
  box.append(element("p", "who", who === "user" ? "You" : $("model").value || "Model"), body);
  $("log").append(box);
  $("log").scrollTop = $("log").scrollHeight;
  return { box, body };
}

function objective() {
  const limits = {};
  for (const name of ["ttft", "itl", "total"]) {
    const value = parseFloat($(name).value);
    if (value > 0) limits[`${name}_ms`] = value;
  }
  if ($("miss").value) limits.on_miss = $("miss").value;
  return limits;
}

function request() {
  const system = $("system").value.trim();
  const tokens = parseInt($("tokens").value, 10);
  return {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    temperature: parseFloat($("temperature").value),
    service_tier: $("tier").value,
    ...(Object.keys(objective()).length && { objective: objective() }),
    stream: true,
    stream_options: { include_usage: true },
    ...(tokens > 0 && { max_completion_tokens: tokens }),
  };
}

/** The facts below an answer: its timing, its tokens, and whether it was on time. */
function facts(report, usage, tier, seconds) {
  const list = element("dl", "facts");
  const add = (name, value, kind = "") => {
    const pair = element("div", kind);
    pair.append(element("dt", "", name), element("dd", "", value));
    list.append(pair);
  };
  if (report?.on_time != null) add("objective", report.on_time ? "On time" : "Late", report.on_time ? "good" : "bad");
  if (tier) add("tier", tier);
  if (report?.queue_ms != null) add("queue time", duration(report.queue_ms));
  if (report?.ttft_ms != null) add("first token", duration(report.ttft_ms));
  if (report?.itl_p99_ms != null) add("gap, p99", duration(report.itl_p99_ms));
  if (usage) add("tokens", `${usage.completion_tokens}`);
  if (usage && seconds > 0) add("tokens/s", (usage.completion_tokens / seconds).toFixed(0));
  return list;
}

/** Draws an answer's timing as it grows, at most once a frame, and again when the page changes its width. */
function plotter(shown) {
  const limits = { ...objectives[$("tier").value], ...objective() };
  const arrivals = [];
  let now = null, frame = 0;
  const draw = () => {
    frame = 0;
    const next = graph(arrivals, limits, Math.max(240, shown.box.clientWidth));
    if (now) now.replaceWith(next); else shown.body.after(next);
    now = next;
  };
  drawn.push(draw);
  return {
    add(at) {
      arrivals.push(at);
      if (!frame) frame = requestAnimationFrame(draw);
    },
    finish() {
      cancelAnimationFrame(frame);
      if (arrivals.length) draw();
    },
  };
}

async function answer(shown) {
  const started = performance.now();
  const plot = plotter(shown);
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal,
  });
  if (!response.ok) throw await refusal(response);
  let report = null, usage = null, tier = null, thought = null, reason = null, text = "";
  try {
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      report = event.stretto ?? report;
      tier = event.service_tier ?? tier;
      reason = event.choices[0]?.finish_reason ?? reason;
      const delta = event.choices[0]?.delta ?? {};
      if (delta.content || delta.reasoning_content) {
        plot.add(performance.now() - started);
        shown.box.classList.remove("awaited");
      }
      if (delta.reasoning_content) {
        if (!thought) shown.body.before((thought = element("p", "thought")));
        thought.append(delta.reasoning_content);
      }
      if (delta.content) {
        text += delta.content;
        shown.body.append(delta.content);
      }
      const log = $("log");
      if (log.scrollHeight - log.scrollTop - log.clientHeight < 200) log.scrollTop = log.scrollHeight;
    }
  } finally {
    plot.finish();
  }
  if (reason === "deadline") shown.body.append(element("span", "aside", " (its time was over)"));
  shown.box.append(facts(report, usage, tier, (performance.now() - started) / 1000));
  $("said").textContent = report?.on_time === false ? "The answer is complete, and late." : "The answer is complete.";
  $("log").scrollTop = $("log").scrollHeight;
  return text;
}

/** Shows an error, and a button that sends the request again after the server's `Retry-After`. */
function failed(shown, error) {
  shown.box.classList.add("failed");
  const note = element("p", "problem", error instanceof TypeError ? "The server cannot be reached." : error.message);
  const retry = element("button", "quiet", "Try again");
  retry.type = "button";
  let left = Math.ceil(error.seconds ?? 0);
  const wait = () => {
    retry.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    retry.disabled = left > 0;
    if (left-- > 0) setTimeout(wait, 1000);
  };
  wait();
  retry.addEventListener("click", () => {
    if (running) return;
    history.length = shown.turnsBefore;
    shown.box.remove();
    reply();
  });
  shown.box.append(note, retry);
  $("said").textContent = note.textContent;
  $("log").scrollTop = $("log").scrollHeight;
}

async function reply() {
  running = new AbortController();
  $("send").textContent = "Stop";
  const shown = turn("assistant", "");
  shown.turnsBefore = history.length;
  shown.box.classList.add("awaited");
  shown.box.setAttribute("aria-busy", "true");
  try {
    history.push({ role: "assistant", content: await answer(shown) });
  } catch (error) {
    if (error.name === "AbortError") {
      history.push({ role: "assistant", content: shown.body.textContent });
      shown.body.append(" …");
      $("said").textContent = "Stopped.";
    } else failed(shown, error);
  } finally {
    shown.box.classList.remove("awaited");
    shown.box.removeAttribute("aria-busy");
    running = null;
    $("send").textContent = "Send";
    $("input").focus();
  }
}

function send() {
  const said = $("input").value.trim();
  if (!said || running) return;
  $("input").value = "";
  grow();
  if (history.at(-1)?.role === "user") history.pop();
  turn("user", said);
  history.push({ role: "user", content: said });
  reply();
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function clear() {
  running?.abort();
  history.length = drawn.length = 0;
  const empty = element("div", "empty");
  empty.append(element("h2", "", "A new conversation."), element("p", "", "Nothing of the last one is sent again."));
  $("log").replaceChildren(empty);
  $("input").focus();
}

async function copy() {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const body = request();
  const said = $("input").value.trim();
  if (said) body.messages.push({ role: "user", content: said });
  const key = $("key").value.trim() ? ' -H "Authorization: Bearer $STRETTO_KEY"' : "";
  const url = new URL("v1/chat/completions", document.baseURI);
  const text = `curl -N ${url} -H 'Content-Type: application/json'${key} -d ${quote(JSON.stringify(body))}`;
  let done = "Copied";
  try { await navigator.clipboard.writeText(text); } catch { done = "The browser refused to copy"; }
  $("copy").textContent = done;
  setTimeout(() => { $("copy").textContent = "Copy as curl"; }, 2000);
}

export async function models() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return;
  const { data } = await response.json();
  const chosen = $("model").value;
  $("model").replaceChildren(...data.map((model) => new Option(model.id)));
  if (data.some((model) => model.id === chosen)) $("model").value = chosen;
}

export function start() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort(); else send();
  });
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  $("input").addEventListener("input", grow);
  $("tier").addEventListener("change", () => learn(objectives));
  $("temperature").addEventListener("input", () => { $("temperature-value").textContent = $("temperature").value; });
  $("key").addEventListener("change", () => models().catch(() => {}));
  $("clear").addEventListener("click", clear);
  $("copy").addEventListener("click", copy);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width !== innerWidth) drawn.forEach((draw) => draw());
    width = innerWidth;
  });
  models().catch(() => {});
}
