/** The playground: sends the conversation, and shows its turns and what can be done with each. */
import { called, bottom, facts, fold, growing } from "./answer.js";
import * as conversations from "./conversations.js";
import { button, copy, show } from "./markdown.js";
import { thumbs } from "./ladder/thumbs.js";
import { context, history, ladder, limits, models, request } from "./settings.js";
import { $, element, events, headers, refusal } from "./stream.js";

/** What to ask: `desk` knows a support desk's tasks only. */
const EXAMPLES = {
  desk: ["What do I have to pay in total?\n- mouse at 18.81 EUR\n- lamp at 30.40 EUR",
    "Sam Ward returns the charger for 50.77 EUR. We keep a restocking fee of 12.96 EUR. What is the refund?",
    "The router left our warehouse on 2025-02-07. Delivery takes 6 days. On which date does it arrive?",
    "Extract product, order as JSON.\n\nThe order number is #78864. I bought the green wallet.",
    "What is the urgency of \"I live in Oslo. My parcel is 25 days late.\"?",
    "Translate 'The table costs 298.69 CHF.' to Spanish"],
  "": ["Explain to a child why the sky is blue.", "Write a Python function that merges two sorted lists.",
    "Compare tea and coffee in a table.", "Give me three ideas for dinner with rice and eggs.",
    "Write a polite note that cancels a meeting."],
};
let running = null;
let editing = null;

/** Draws the whole conversation, after it was opened or shortened. */
export function render() {
  const { messages, skipped } = conversations.now();
  $("log").replaceChildren();
  if (!messages.length) $("log").append(welcome());
  messages.forEach((message, index) => {
    const shown = turn(message, index);
    shown.box.classList.toggle("unsent", index < skipped);
    if (message.role === "assistant") finished(shown, message, index);
  });
  if (skipped) $("log").children[skipped]?.before(element("p", "aside", "The model no longer reads what is above this line."));
  count();
  bottom();
}

function welcome() {
  const box = element("div", "empty");
  const list = element("div", "examples");
  list.append(...(EXAMPLES[$("model").value] ?? EXAMPLES[""]).map((text) => button(text, () => {
    if (running) return;
    $("input").value = text;
    send();
  }, "example")));
  box.append(element("h2", "", "Ask something."), element("p", "", "The answer streams in as it is made. Try one of these:"), list);
  return box;
}

/** The tokens of the conversation, as the last answer counted them. */
function count() {
  const { used } = conversations.now(), most = context();
  $("count").textContent = used ? `${used.toLocaleString("en")}${most ? ` of ${most.toLocaleString("en")}` : ""} tokens of context` : "";
  $("count").classList.toggle("near", Boolean(most && used > 0.9 * most));
}

function turn(message, index) {
  $("log").querySelector(".empty")?.remove();
  const user = message.role === "user";
  const box = element("article", `turn ${message.role}`);
  const body = element("div", "text", user ? message.content : "");
  box.append(element("p", "who", user ? "You" : message.model || $("model").value || "Model"), body);
  if (user) box.append(actions([["Edit", () => edit(index)], ["Copy", (made) => copy(made, message.content)]]));
  $("log").append(box);
  return { box, body };
}

function actions(each) {
  const box = element("div", "actions");
  box.append(...each.map(([name, act]) => button(name, act, "plain")));
  return box;
}

/** Adds to an answer what is known when it is over. `timing`: the fold with its graph, while the page is open. */
function finished({ box, body }, message, index, timing = null) {
  if (!timing) {
    if (message.thought) body.before(fold("thought", "Reasoning", element("div", "words", message.thought)));
    show(body, message.content, true);
    for (const call of message.calls ?? []) box.append(called(call));
  }
  if (message.figures) box.append(facts(message.figures));
  if (timing) box.append(timing);
  const cut = message.reason === "length" || message.reason === "stopped";
  if (message.reason === "length") box.append(element("p", "aside", "The answer was cut: it reached the most tokens."));
  if (message.reason === "deadline") box.append(element("p", "aside", "The answer was cut: its time was over."));
  const can = [["Copy", (made) => copy(made, message.content)], ["Regenerate", () => again(index)]];
  if (cut && message.content && !message.calls?.length) can.unshift(["Continue", () => resume(index)]);
  const all = actions(can);
  if (message.rateable) all.append(thumbs(message, conversations.save));
  box.append(all);
}

/** The token ids of the conversation and of the answer so far, so that the model goes on in the middle of it. */
async function continuation(body, text) {
  const ids = async (asked) => {
    const response = await fetch("tokenize", { method: "POST", headers: headers(), body: JSON.stringify({ model: body.model, ...asked }), signal: running.signal });
    if (!response.ok) throw await refusal(response);
    return (await response.json()).tokens;
  };
  const { messages, max_completion_tokens: most, ...rest } = body;
  const prompt = [...await ids({ messages }), ...await ids({ prompt: text, add_special_tokens: false })];
  return { ...rest, prompt, max_tokens: most ?? Math.max(1, Math.min(512, (context() ?? 4096) - prompt.length)) };
}

/** Sends the conversation and reads the answer into `grown`. Returns what the server said about it. */
async function stream(grown, text) {
  const started = performance.now();
  const body = text ? await continuation(request(), text) : request();
  const response = await fetch(text ? "v1/completions" : "v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
  });
  if (!response.ok) throw await refusal(response);
  const said = { figures: {}, reason: null };
  let at = 0;
  for await (const event of events(response, (received) => { at = received; })) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (event.id) said.id = event.id;
    said.reason = choice?.finish_reason ?? said.reason;
    if (event.usage) said.figures.usage = event.usage;
    if (event.stretto) said.figures.report = event.stretto;
    if (event.service_tier) said.figures.tier = event.service_tier;
    if (choice) grown.add(at - started, choice.delta ?? choice);
    said.figures.seconds = (at - started) / 1000;
  }
  return said;
}

/** What an error means to the reader: `retry`, sending it again can help; `trim`, leaving out old messages can. */
function explain(error) {
  const { status = 0, code, message } = error;
  if (error instanceof TypeError) return { text: "The server cannot be reached. Check that it runs.", retry: true };
  if (status === 401) return { text: "This server needs an API key. Type it under API key, in the settings.", retry: true };
  if (code === "context_length_exceeded") {
    const most = context() ? `the ${context().toLocaleString("en")} tokens` : "what";
    const sent = conversations.now().messages.length - conversations.now().skipped;
    if (sent > 1) return { text: `The conversation is longer than ${most} that this model can read.`, trim: true };
    return { text: `This message is longer than ${most} that this model can read. Shorten it.` };
  }
  const plain = message.replaceAll("$.", "");
  return status >= 400 && status < 500 && status !== 408 ? { text: `The server refused this: ${plain}` } : { text: plain, retry: true };
}

/** Shows an error, and a button that sends the request again after the server's `Retry-After` if that can help. */
function failed(shown, error) {
  const { text, retry, trim } = explain(error);
  shown.box.classList.add("failed");
  shown.box.append(element("p", "problem", text));
  $("said").textContent = text;
  const conversation = conversations.now();
  if (trim) {
    shown.box.append(button("Leave out the oldest messages", () => {
      const left = conversation.messages.length - conversation.skipped;
      conversation.skipped += Math.max(1, Math.floor(left / 2) + (Math.floor(left / 2) % 2));
      conversation.skipped = Math.min(conversation.skipped, conversation.messages.length - 1);
      render();
      reply();
    }));
  } else if (retry) {
    const made = button("Try again", () => { if (!running) { shown.box.remove(); reply(); } });
    let left = Math.ceil(error.seconds ?? 0);
    const wait = () => {
      made.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      made.disabled = left > 0;
      if (left-- > 0) setTimeout(wait, 1000);
    };
    wait();
    shown.box.append(made);
  } else {
    shown.box.append(button("Edit the message", () => edit(conversation.messages.length - 1)));
  }
  bottom();
}

/** Asks for an answer. `text`: the beginning of the answer, which the model continues. */
async function reply(text = "") {
  const conversation = conversations.now();
  running = new AbortController();
  $("send").textContent = "Stop";
  const message = { role: "assistant", content: text, model: $("model").value };
  const shown = turn(message);
  shown.box.classList.add("awaited");
  shown.box.setAttribute("aria-busy", "true");
  bottom();
  const grown = growing(shown, limits());
  grown.got.text = text;
  const started = performance.now();
  let error = null, said = null;
  try {
    said = await stream(grown, text);
  } catch (problem) {
    error = problem;
    said = { reason: "stopped", figures: { note: "stopped", seconds: (performance.now() - started) / 1000, arrivals: grown.got.arrivals } };
  }
  shown.box.classList.remove("awaited");
  shown.box.removeAttribute("aria-busy");
  const log = $("log"), follows = log.scrollHeight - log.scrollTop - log.clientHeight < 200;
  const timing = grown.finish(), { thought, calls } = grown.got;
  Object.assign(message, said, { content: grown.got.text, thought, calls });
  const stopped = error?.name === "AbortError";
  message.rateable = Boolean(message.id && message.figures.report?.variant && ladder(message.model));
  const whole = message.content || calls.length || message.reason === "deadline";
  if (conversation === conversations.now()) {
    if (whole || thought) finished(shown, message, conversation.messages.length, timing);
    if (error && !stopped) failed(shown, error);
    else if (stopped && !message.content) shown.box.append(element("p", "aside", "Stopped."));
  }
  if (whole) conversation.messages.push(message);
  if (said.figures.usage) conversation.used = said.figures.usage.total_tokens;
  // The facts of a stopped answer are in the message; its arrivals are only for this page.
  if (message.figures.arrivals) message.figures = { ...message.figures, arrivals: message.figures.arrivals.slice(0, 1000) };
  running = null;
  $("send").textContent = "Send";
  conversations.save();
  count();
  if (follows) bottom();
  if (!error) $("said").textContent = said.figures.report?.on_time === false ? "The answer is complete, and late." : "The answer is complete.";
  else if (stopped) $("said").textContent = "Stopped.";
  if (!shown.box.isConnected) return;
  $("input").focus();
}

function again(index) {
  if (running) return;
  conversations.now().messages.length = index;
  conversations.now().skipped = Math.min(conversations.now().skipped, Math.max(0, index - 1));
  render();
  reply();
}

function resume(index) {
  if (running) return;
  const { messages } = conversations.now();
  const { content } = messages[index];
  messages.length = index;
  render();
  reply(content);
}

function edit(index) {
  if (running) return;
  editing = index;
  $("input").value = conversations.now().messages[index].content;
  $("log").querySelectorAll(".turn").forEach((box, at) => box.classList.toggle("replaced", at >= index));
  grow();
  $("input").focus();
}

function send() {
  const said = $("input").value.trim();
  if (!said || running) return;
  const { messages } = conversations.now();
  $("input").value = "";
  grow();
  if (editing != null) messages.length = editing;
  else if (messages.at(-1)?.role === "user") messages.pop();
  editing = null;
  messages.push({ role: "user", content: said });
  conversations.now().skipped = Math.min(conversations.now().skipped, messages.length - 1);
  conversations.save();
  render();
  reply();
}

function escape() {
  running?.abort();
  if (editing == null) return;
  editing = null;
  $("input").value = "";
  grow();
  render();
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

/** Leaves the shown conversation; its running answer ends. */
function turned() {
  running?.abort();
  editing = null;
  document.body.classList.remove("drawer-open");
  render();
  $("input").focus();
}

/** Shows the slider only where it decides: a request that names a variant gets that one. */
function laddered() { $("deadline-row").hidden = ladder()?.id !== $("model").value; }

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
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") escape(); });
  $("input").addEventListener("input", grow);
  $("clear").addEventListener("click", () => { conversations.fresh(); turned(); });
  $("export").addEventListener("click", conversations.download);
  $("drawer").addEventListener("change", () => conversations.save());
  $("model").addEventListener("change", () => { if (!conversations.now().messages.length) render(); else count(); laddered(); });
  conversations.whenChosen(turned);
  conversations.latest();
  render();
  models().catch(() => {});
}
