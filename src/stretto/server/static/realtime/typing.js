/** One session of /v1/realtime: what is typed goes to the server as it is typed, and is read there meanwhile. */

const $ = (id) => document.getElementById(id);
const FIRST_PAUSE_MS = 500, LONGEST_PAUSE_MS = 15000;

let socket = null, pause = FIRST_PAUSE_MS;
let typed = [];  // what the server has of the message, in Unicode characters, as the protocol counts
let read = 0;  // characters of it that the model has read
let running = null;  // the answer that comes
let sent = 0;

function key() {
  try { return sessionStorage.getItem("key") ?? ""; } catch { return ""; }
}

function connect() {
  const url = new URL(`v1/realtime${location.search}`, document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  const protocols = key() ? ["realtime", `openai-insecure-api-key.${key()}`] : ["realtime"];
  socket = new WebSocket(url, protocols);
  socket.addEventListener("message", ({ data }) => handle(JSON.parse(data)));
  socket.addEventListener("close", () => {
    show("down", "not connected; trying again");
    if (running) end("the connection was lost");
    setTimeout(connect, pause);
    pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
  });
}

function send(type, fields = {}) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type, ...fields }));
}

function show(state, text) {
  $("status").className = `status ${state}`;
  $("status-text").textContent = text;
  $("send").disabled = state !== "ready";
}

function handle(event) {
  switch (event.type) {
    case "session.created":
      pause = FIRST_PAUSE_MS;
      show("ready", event.session.model);
      typed = [];
      tell();  // what was typed while there was no connection
      break;
    case "input_text.read": count(event.characters, event.tokens); break;
    case "response.created": running = turn("assistant", ""); break;
    case "response.output_text.delta": say(event.delta); break;
    case "response.done": done(event.response); break;
    case "error": problem(event.error.message); break;
  }
}

/** Sends how the message differs from what the server has of it. */
function tell() {
  const now = Array.from($("input").value);
  let same = 0;
  while (same < typed.length && typed[same] === now[same]) same += 1;
  const rest = now.slice(same).join("");
  if (same < typed.length) send("input_text.replace", { start: same, text: rest });
  else if (rest) send("input_text.append", { text: rest });
  typed = now;
  count(now.length ? read : 0);
}

function count(characters, tokens) {
  read = characters;
  if (tokens) $("read").textContent = `${tokens} tokens of the prompt are read`;
  else if (!typed.length) $("read").textContent = "nothing read yet";
  const part = typed.length ? Math.min(1, read / typed.length) : 0;
  $("meter").style.width = `${Math.round(100 * part)}%`;
}

function commit() {
  const text = $("input").value;
  if (!text.trim() || $("send").disabled) return;
  tell();
  send("input_text.commit");
  sent = performance.now();
  turn("user", text);
  $("input").value = "";
  typed = [];
  count(0);
}

function turn(role, text) {
  $("hint")?.remove();
  const made = document.createElement("article");
  made.className = `turn ${role}`;
  for (const [name, content] of [["who", role === "user" ? "You" : "Model"], ["text", text], ["facts", ""]]) {
    const part = document.createElement(name === "text" ? "div" : "p");
    part.className = name;
    part.textContent = content;
    made.append(part);
  }
  $("log").append(made);
  made.scrollIntoView({ block: "end" });
  return made;
}

function say(text) {
  if (!running) return;
  const part = running.querySelector(".text");
  if (!part.textContent) running.first = performance.now() - sent;
  part.textContent += text;
  $("log").scrollTop = $("log").scrollHeight;
}

function done(response) {
  const usage = response.usage, first = running?.first;
  const cached = usage?.input_token_details.cached_tokens;
  const times = first === undefined ? "" : `first token ${Math.round(first)} ms after it was sent · `;
  const tokens = usage ? `${cached} of ${usage.input_tokens} tokens were read before` : "";
  const ends = { cancelled: "interrupted · ", incomplete: "cut · ", failed: "failed · " };
  end(`${ends[response.status] ?? ""}${times}${tokens}`);
}

function end(facts) {
  if (running) running.querySelector(".facts").textContent = facts;
  running = null;
}

function problem(message) {
  turn("assistant", "").querySelector(".facts").textContent = message;
}

$("input").addEventListener("input", tell);
$("form").addEventListener("submit", (event) => { event.preventDefault(); commit(); });
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    commit();
  }
  if (event.key === "Escape" && running) send("response.cancel");
});
connect();
