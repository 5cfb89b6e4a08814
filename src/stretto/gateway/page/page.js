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

function request() {
  const system = $("system").value.trim();
  const tokens = parseInt($("tokens").value, 10);
  return {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    temperature: parseFloat($("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
    ...(tokens > 0 && { max_completion_tokens: tokens }),
  };
}

function timing(report, usage, seconds) {
  const parts = [];
  if (report?.ttft_ms != null) parts.push(`first token ${report.ttft_ms.toFixed(0)} ms`);
  if (report?.itl_p99_ms != null) parts.push(`gaps p99 ${report.itl_p99_ms.toFixed(0)} ms`);
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  if (usage && seconds > 0) parts.push(`${(usage.completion_tokens / seconds).toFixed(0)} tokens/s`);
  return parts.join(" · ");
}

async function answer(shown) {
  const started = performance.now();
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

function facts(state) {
  const model = state.models.find((held) => held.name === $("model").value) ?? state.models[0];
  const rows = model
    ? [["Family", model.family], ["Parameters", short(model.parameters)], ["Context", model.context],
       ["Type", model.dtype], ["Device", model.device], ["Running", state.running], ["Waiting", state.waiting]]
    : [];
  $("facts").replaceChildren(...rows.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
}

function short(number) {
  const unit = ["", "K", "M", "B"];
  let at = 0;
  while (number >= 1000 && at < 3) { number /= 1000; at += 1; }
  return `${number.toPrecision(3)} ${unit[at]}`;
}

async function look() {
  let ready = false, text = "not reachable";
  try {
    const response = await fetch("ready");
    ready = response.ok;
    text = ready ? "ready" : (await response.json()).error.message;
    if (!$("model").options.length || !ready) await models();
    const state = await fetch("state", { headers: headers() });
    if (state.ok) facts(await state.json());
  } catch { /* the status line says it */ }
  $("status").className = `status ${ready ? "ready" : "down"}`;
  $("status-text").textContent = text;
}

async function models() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return;
  const { data } = await response.json();
  $("model").replaceChildren(...data.map((model) => new Option(model.id)));
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
look();
setInterval(look, 5000);
