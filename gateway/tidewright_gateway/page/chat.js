"use strict";

const $ = (id) => document.getElementById(id);
const RECONNECTS = 5, PAUSE = 500; // times, and milliseconds before each

let socket = null;
let model = "";
let history = []; // messages of the chat, as the API takes them
let answer = null; // the one that is being written

$("key").value = sessionStorage.getItem("key") || "";
$("key").onchange = () => {
  sessionStorage.setItem("key", $("key").value);
  if (!answer) hangUp();
};

function hangUp() {
  if (socket) { socket.onclose = null; socket.close(); socket = null; }
}

/** A connection that is open, or an error. */
function connect() {
  if (socket && socket.readyState === WebSocket.OPEN) return Promise.resolve();
  return new Promise((resolve, reject) => {
    const opening = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/stream`);
    socket = opening;
    opening.onopen = () => send({ type: "open", token: $("key").value || null });
    opening.onmessage = (event) => {
      const message = JSON.parse(event.data);
      if (message.type === "opened") {
        model = $("model").textContent = message.model;
        opening.onmessage = (next) => take(JSON.parse(next.data));
        resolve();
      } else if (message.type === "error") {
        if (message.status === 401) $("key").focus();
        reject(new Error(message.message));
        hangUp();
      }
    };
    opening.onclose = () => {
      if (socket === opening) socket = null;
      reject(new Error("the server can't be reached"));
      resume();
    };
  });
}

function send(message) { socket.send(JSON.stringify(message)); }

function take(message) {
  if (!answer || (message.id && message.id !== answer.id)) return;
  if (message.type === "started") {
    answer.resumeToken = message.resume_token;
    answer.reconnects = 0;
  } else if (message.type === "token") {
    const now = performance.now();
    if (!answer.firstAt) { answer.firstAt = now; answer.first = message.token_ids.length; }
    answer.lastAt = now;
    answer.seq = message.seq;
    answer.tokens += message.token_ids.length;
    answer.text += message.text;
    inView(() => { answer.line.textContent = answer.text; });
    showSpeed();
  } else if (message.type === "done") {
    finish(message.error);
  } else if (message.type === "error") {
    finish(message);
  }
}

/** Goes on with an answer whose connection broke. */
async function resume() {
  if (!answer || answer.resuming) return;
  answer.resuming = true;
  const mine = answer;
  let error = new Error("the connection broke");
  while (answer === mine && mine.resumeToken && mine.reconnects++ < RECONNECTS) {
    await new Promise((done) => setTimeout(done, PAUSE));
    try {
      await connect();
      send({ type: "resume", id: mine.id, resume_token: mine.resumeToken, received: [mine.seq] });
      mine.resuming = false;
      return;
    } catch (failed) { error = failed; }
  }
  if (answer === mine) finish(error);
}

async function ask(text) {
  showError("");
  const line = add("user", text);
  history.push({ role: "user", content: text });
  answer = { id: crypto.randomUUID ? crypto.randomUUID() : String(Math.random()), text: "", tokens: 0, seq: 0,
    reconnects: 0, askedAt: performance.now(), line: add("assistant", "") };
  answer.line.classList.add("busy");
  const mine = answer;
  setBusy(true);
  try {
    mine.resuming = true; // until there is something to resume
    await connect();
    mine.resuming = false;
    if (answer === mine) send({ type: "generate", id: mine.id, request: { model, messages: history } });
  } catch (error) {
    if (answer !== mine) return;
    finish(error);
    line.remove();
    $("text").value = text;
  }
}

function finish(error) {
  const { line, text } = answer;
  line.classList.remove("busy");
  if (text) history.push({ role: "assistant", content: text });
  else { line.remove(); if (error) history.pop(); }
  answer = null;
  setBusy(false);
  if (error) showError(error.message + (error.retry_after ? ` Try again in ${Math.ceil(error.retry_after)} s.` : ""));
}

function add(role, text) {
  const line = document.createElement("p");
  line.className = role;
  line.textContent = text; // never as HTML
  inView(() => $("chat").append(line));
  return line;
}

/** Stays at the end, unless the reader has scrolled up. */
function inView(change) {
  const chat = $("chat");
  const atEnd = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 60;
  change();
  if (atEnd) chat.scrollTop = chat.scrollHeight;
}

function showSpeed() {
  const first = Math.round(answer.firstAt - answer.askedAt);
  const seconds = (answer.lastAt - answer.firstAt) / 1000;
  const rate = seconds > 0 ? ((answer.tokens - answer.first) / seconds).toFixed(1) : "–";
  $("speed").textContent = `first token ${first} ms · ${rate} tokens/s · ${answer.tokens} tokens`;
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function setBusy(busy) {
  $("send").disabled = busy;
  $("stop").disabled = !busy;
  $("chat").setAttribute("aria-busy", busy);
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || answer) return;
  $("text").value = "";
  ask(text);
};
$("text").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
};
$("stop").onclick = () => {
  if (!answer.resuming && socket && socket.readyState === WebSocket.OPEN) send({ type: "cancel", id: answer.id });
  else finish(null);
};
$("new").onclick = () => {
  if (answer) $("stop").onclick();
  if (answer) finish(null);
  history = [];
  $("chat").replaceChildren();
  $("speed").textContent = "";
  showError("");
  $("text").focus();
};
// So that the page shows the model, or what is missing, before anything is asked.
connect().catch((error) => showError(error.message));
