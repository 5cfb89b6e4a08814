"use strict";

const $ = (id) => document.getElementById(id);
const history = [];
let running = null;

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function turn(who, text) {
  document.querySelector(".hint")?.remove();
  const box = element("article", `turn ${who}`);
  const body = element("p", "text", text);
  box.append(element("p", "who", who === "user" ? "You" : $("model").value || "Model"), body);
  $("log").append(box);
  $("log").scrollTop = $("log").scrollHeight;
  return { box, body };
}

/** The JSON of each server-sent event of a response, until [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function objective() {
  const asked = {};
  for (const name of ["ttft", "itl", "total"]) {
    const value = parseFloat($(name).value);
    if (value > 0) asked[`${name}_ms`] = value;
  }
  return asked;
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

function timing(report, usage, seconds) {
  const parts = [];
  if (report?.on_time != null) parts.push(report.on_time ? "On time" : "Late");
  if (report?.queue_ms != null) parts.push(`waited ${report.queue_ms.toFixed(0)} ms`);
  if (report?.ttft_ms != null) parts.push(`first token ${report.ttft_ms.toFixed(0)} ms`);
  if (report?.itl_p99_ms != null) parts.push(`gaps p99 ${report.itl_p99_ms.toFixed(0)} ms`);
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  if (usage && seconds > 0) parts.push(`${(usage.completion_tokens / seconds).toFixed(0)} tokens/s`);
  return parts.join(" · ");
}

async function answer(shown) {
  const started = performance.now();
  const asked = objective();
  const arrivals = [];
  let drawn = null, drawing = 0;
  const draw = () => {
    const next = strip(arrivals, asked);
    if (drawn) drawn.replaceWith(next); else shown.box.append(next);
    drawn = next;
  };
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  let report = null, usage = null, thought = null, text = "";
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    report = event.stretto ?? report;
    const delta = event.choices[0]?.delta ?? {};
    if (delta.content || delta.reasoning_content) {
      arrivals.push(performance.now() - started);
      if (!drawing) drawing = requestAnimationFrame(() => { drawing = 0; draw(); });
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
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
  }
  cancelAnimationFrame(drawing);
  if (arrivals.length) draw();
  shown.box.append(element("p", "timing", timing(report, usage, (performance.now() - started) / 1000)));
  return text;
}

async function send() {
  const said = $("input").value.trim();
  if (!said || running) return;
  $("input").value = "";
  grow();
  turn("user", said);
  history.push({ role: "user", content: said });
  running = new AbortController();
  $("send").textContent = "Stop";
  const shown = turn("assistant", "");
  try {
    history.push({ role: "assistant", content: await answer(shown) });
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (!stopped) shown.box.classList.add("failed");
    history.push({ role: "assistant", content: shown.body.textContent });
    shown.body.append(stopped ? " …" : error.message);
  } finally {
    running = null;
    $("send").textContent = "Send";
    $("input").focus();
  }
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

async function models() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return;
  const { data } = await response.json();
  const chosen = $("model").value;
  $("model").replaceChildren(...data.map((model) => new Option(model.id)));
  if (data.some((model) => model.id === chosen)) $("model").value = chosen;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send();
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("input").addEventListener("input", grow);
$("temperature").addEventListener("input", () => { $("temperature-value").textContent = $("temperature").value; });
$("key").addEventListener("change", models);
$("clear").addEventListener("click", () => {
  running?.abort();
  history.length = 0;
  $("log").replaceChildren(element("p", "hint", "A new conversation."));
});
$("copy").addEventListener("click", async () => {
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
});
models().catch(() => {});
follow(headers, events, (ready, text) => {
  const kind = `status ${ready ? "ready" : "down"}`;
  if ($("status").className === kind && $("status-text").textContent === text) return;
  $("status").className = kind;
  $("status-text").textContent = text;
  if (ready) models().catch(() => {});
});
