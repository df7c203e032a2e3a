// The page: a form that asks the server, its state in the URL, and errors beside what they name.

import { ask, fetchPicture, ServerError } from "./api.js";
import { dataUri, readPicture } from "./picture.js";
import {
  cut, DEFAULTS, FieldError, fromFragment, lines, parseFilter, toFragment,
} from "./query.js";
import { showBars, showHits } from "./results.js";

const FIELDS = Object.keys(DEFAULTS).filter((name) => name !== "mode");
const VERBS = { search: "Search", classify: "Classify", compare: "Compare" };
// The first part of the `param` of an error, and the field that it is shown at.
const FIELD_OF = { image: "picture", images: "picture", templates: "template" };
const SLOW = 1000; // ms until "Stop" is offered
const WORKING = "Working…";

const at = (id) => document.getElementById(id);
const form = at("query");
const list = at("list");
const pictures = new Map(); // of this visit: by their row, or the number in the history's state

let picture = null;
let reading = 0; // the turn of the picture that is read
let pending = null; // whether the file that is read can be used, once that is known
let running = null; // {controller, fragment, picture} of what is asked now
let slow; // the timer of "Stop"

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
form.addEventListener("reset", (event) => {
  event.preventDefault();
  stop();
  fill({ ...DEFAULTS, mode: mode() });
  setPicture(null);
  clearErrors();
  list.replaceChildren();
  say("");
  remember(true);
  at("text").focus();
});
form.addEventListener("change", (event) => event.target.name === "mode" && showMode());
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
at("stop").addEventListener("click", () => {
  stop();
  reading++;
  setBusy(false);
  say("Stopped.");
  at("submit").focus();
});
at("picture").addEventListener("change", () => {
  const [file] = at("picture").files;
  if (file) take(file);
  at("picture").value = ""; // so that the same file can be chosen again
});
at("picture-clear").addEventListener("click", () => {
  setPicture(null);
  at("picture").focus();
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData?.files ?? [];
  if (!file) return;
  event.preventDefault();
  take(file);
});
document.addEventListener("dragover", (event) => {
  if (isText(event)) return;
  event.preventDefault();
  at("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  at("drop").classList.remove("over");
  if (isText(event)) return;
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) take(file);
  else showError(at("picture"), "That is no file; save the picture, then drop its file.");
});
addEventListener("popstate", () => restore());

start();

/** Asks what the server has, then does what the URL says. */
async function start() {
  let models;
  try {
    say("Connecting…");
    models = await ask("v1/models");
  } catch (error) {
    fail(error);
    return;
  }
  const { id, index } = models.data[0];
  const search = index && (index.is_exact ? "exact search" : "approximate search");
  at("about").textContent = [id, search ?? "no index"].join(" · ");
  at("no-index").hidden = Boolean(index);
  form.elements.mode[0].disabled = !index;
  say("");
  await restore();
}

/** Fills the form from the URL, and asks if there is something to ask. */
async function restore() {
  stop();
  clearErrors();
  const { state, row, fileName } = fromFragment(location.hash);
  fill(state);
  const known = pictures.get(row || history.state?.picture);
  if (known || !row) setPicture(known ?? null);
  else if (!(await chooseRow(row))) return;
  if (fileName && !picture) {
    const name = cut(fileName, 80);
    showError(at("picture"), `This link was made with ${name}, which is not in it: choose it.`);
  } else if (location.hash.length > 1) {
    await run(false);
  } else {
    list.replaceChildren();
    say("");
  }
}

/** Asks the server and shows the answer; `isNew` puts the query into the history. */
async function run(isNew = true) {
  if (pending) {
    setBusy(true);
    const isRead = await pending;
    if (!running) setBusy(false);
    if (!isRead) return;
  }
  const state = Object.fromEntries(FIELDS.map((name) => [name, at(name).value]));
  state.mode = mode();
  const fragment = fragmentOf(state);
  if (running?.fragment === fragment && running.picture === picture) return;
  stop();
  clearErrors();
  const mine = { controller: new AbortController(), fragment, picture };
  running = mine;
  const { signal } = mine.controller;
  try {
    const [path, body] = await request(state, picture);
    if (running !== mine) return;
    if (isNew) remember();
    document.title = [state.text || picture?.name, "align"].filter(Boolean).join(" – ");
    setBusy(true);
    const answer = await ask(path, body, signal, say);
    if (running === mine) show(state, answer);
  } catch (error) {
    if (running === mine) fail(error, state, picture);
  } finally {
    if (running === mine) stop();
  }
}

/** The path and body of what is asked. */
async function request(state, picture) {
  const text = state.text.trim();
  if (state.mode === "search") {
    if (!text && !picture) throw new FieldError("text", "Give a text or a picture.");
    const { kind } = state;
    const body = { kind, k: number("k", state.k), filter: parseFilter(state.filter) };
    if (picture) body.image = await dataUri(picture.blob);
    if (text) body.text = text;
    if (state.add.trim()) body.add = [state.add.trim()];
    if (state.remove.trim()) body.remove = [state.remove.trim()];
    if (state.weight.trim() || at("weight").validity.badInput) {
      body.weight = number("weight", state.weight);
    }
    return ["v1/search", body];
  }
  if (state.mode === "classify") {
    if (!picture) throw new FieldError("picture", "Choose a picture.");
    const labels = lines(state.labels);
    if (!labels.length) throw new FieldError("labels", "Give at least one label.");
    if (!state.template.includes("{}")) {
      throw new FieldError("template", "The label takes the place of {}, which is missing.");
    }
    const images = [await dataUri(picture.blob)];
    return ["v1/classify", { images, labels, templates: [state.template] }];
  }
  if (text && picture) throw new FieldError("text", "Give a text or a picture, not both.");
  if (!text && !picture) throw new FieldError("text", "Give a text or a picture.");
  const texts = lines(state.texts);
  if (!texts.length) throw new FieldError("texts", "Give at least one text.");
  const first = picture ? { image: await dataUri(picture.blob) } : { text };
  const input = [first, ...texts.map((one) => ({ text: one }))];
  return ["v1/embeddings", { input, encoding_format: "float" }];
}

function show(state, answer) {
  const hadFocus = list.contains(document.activeElement);
  if (state.mode === "search") {
    const { data, exact, took_ms: took = {} } = answer;
    const time = Object.values(took).reduce((sum, one) => sum + one, 0);
    const count = data.length === 1 ? "1 result" : `${data.length} results`;
    const notes = [count, `${Math.round(time)} ms`];
    if (exact === false) notes.push("approximate");
    showHits(list, data, useHit);
    say(data.length ? notes.join(" · ") : "Nothing was found.");
  } else if (state.mode === "classify") {
    const [{ labels }] = answer.data;
    const percent = (one) => `${(100 * one.probability).toFixed(1)} %`;
    showBars(list, labels.map((one) => [one.label, one.probability, percent(one)]));
    say(`Most likely: ${cut(labels[0].label, 80)}, ${percent(labels[0])}`);
  } else {
    const [query, ...others] = answer.data.map((one) => one.embedding);
    const cosine = (other) => query.reduce((sum, value, i) => sum + value * other[i], 0);
    const rows = lines(state.texts).map((text, i) => [text, cosine(others[i])]);
    rows.sort((a, b) => b[1] - a[1]);
    showBars(list, rows.map(([text, value]) => [text, value, value.toFixed(3)]));
    say("Cosine similarity");
  }
  if (hadFocus) at("status").focus({ preventScroll: true });
  const { top } = at("status").getBoundingClientRect();
  if (top < 0 || top > innerHeight - 120) at("status").scrollIntoView();
}

/** Asks with a row that was found: with its picture, or its text where it has none. */
async function useHit(hit) {
  stop();
  clearErrors();
  for (const name of ["text", "add", "remove"]) at(name).value = "";
  if (hit.image) {
    if (!(await chooseRow(hit.key))) return;
  } else {
    at("text").value = hit.caption;
    setPicture(null);
  }
  await run();
}

/** Takes the picture of a row; says so and returns false where it cannot, or another was taken. */
async function chooseRow(row) {
  const turn = ++reading;
  try {
    setBusy(true);
    const made = await readPicture(await fetchPicture(row), row);
    if (turn === reading) setPicture({ ...made, name: row });
  } catch (error) {
    if (turn === reading) fail(new FieldError("picture", `The row's picture: ${error.message}`));
  } finally {
    setBusy(false);
  }
  return turn + 1 === reading && picture?.row === row;
}

/** Takes the picture of a file; whoever asks meanwhile waits for it. */
function take(file) {
  const work = choose(file);
  pending = work;
  work.then(() => {
    if (pending === work) pending = null;
  });
}

/** Returns whether it is a picture. */
async function choose(file) {
  const turn = ++reading;
  showError(at("picture"), "");
  at("drop").setAttribute("aria-busy", "true");
  try {
    const made = await readPicture(file);
    if (turn === reading) setPicture(made);
    return true;
  } catch (error) {
    if (turn === reading) fail(error);
    return false;
  } finally {
    at("drop").removeAttribute("aria-busy");
  }
}

function setPicture(made) {
  reading++;
  if (picture?.url) URL.revokeObjectURL(picture.url);
  picture = made;
  showError(at("picture"), "");
  at("chosen").hidden = !made;
  at("drop-label").hidden = Boolean(made);
  at("preview").removeAttribute("src");
  if (!made) return;
  made.url = URL.createObjectURL(made.blob);
  at("preview").src = made.url;
  at("preview").alt = "The chosen picture";
  at("picture-name").textContent = cut([made.name, made.note].filter(Boolean).join(", "), 120);
}

/** Puts the form into the URL, as a new page of the history unless it is there already. */
function remember(isEmpty = false) {
  const state = Object.fromEntries(FIELDS.map((name) => [name, at(name).value]));
  const fragment = isEmpty ? "" : fragmentOf({ ...state, mode: mode() });
  let number;
  if (picture) {
    const known = [...pictures].find(([, one]) => one === picture)?.[0];
    number = known ?? (picture.row || pictures.size + 1);
    pictures.set(number, picture);
  }
  if (picture?.row) number = undefined;
  if (location.hash === fragment && history.state?.picture === number) return;
  history.pushState({ picture: number }, "", fragment || location.pathname);
}

function fragmentOf(state) {
  const fileName = picture && !picture.row ? picture.name || "a picture" : "";
  return toFragment(state, picture?.row, fileName);
}

function fill(state) {
  for (const name of FIELDS) at(name).value = state[name];
  const hasIndex = at("no-index").hidden;
  form.elements.mode.value = hasIndex || state.mode !== "search" ? state.mode : "classify";
  const rare = ["filter", "kind", "k", "weight"];
  at("more").open ||= rare.some((name) => state[name] !== DEFAULTS[name]);
  showMode();
}

function mode() {
  return form.elements.mode.value;
}

function showMode() {
  for (const part of document.querySelectorAll("[data-modes]")) {
    part.hidden = !part.dataset.modes.split(" ").includes(mode());
  }
  at("submit").textContent = VERBS[mode()];
}

function number(field, text) {
  const { min, max, validity } = at(field);
  if (text.trim() && validity.valid) return Number(text);
  const what = max ? `a whole number from ${min} to ${max}` : "a number";
  throw new FieldError(field, `Write ${what}.`);
}

/** Shows an error as one line at the field that it names, else above the results. */
function fail(error, state, picture) {
  let field = error.field;
  if (error instanceof ServerError) {
    const [root, index] = error.param.split(/[.[\]]+/);
    field = FIELD_OF[root] ?? root;
    if (field === "input" && state) field = index > 0 ? "texts" : picture ? "picture" : "text";
  }
  say("");
  const input = [...FIELDS, "picture"].includes(field) ? at(field) : null;
  if (!input || input.closest("[hidden]")) {
    at("failure").textContent = cut(error.message, 300);
    return;
  }
  if (at("more").contains(input)) at("more").open = true;
  showError(input, error.message);
  input.focus();
}

function showError(input, message) {
  at(`${input.id}-error`).textContent = cut(message, 300);
  if (message) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
}

function clearErrors() {
  for (const name of [...FIELDS, "picture"]) showError(at(name), "");
  at("failure").textContent = "";
}

function stop() {
  if (!running) return;
  const { controller } = running;
  running = null;
  controller.abort();
  setBusy(false);
}

function setBusy(isBusy) {
  at("results").setAttribute("aria-busy", String(isBusy));
  at("stop").hidden = true;
  clearTimeout(slow);
  if (isBusy) {
    slow = setTimeout(() => { at("stop").hidden = false; }, SLOW);
    say(WORKING);
  } else if (at("status").textContent === WORKING) {
    say("");
  }
}

function say(text) {
  at("status").textContent = text;
}

/** Whether a text is dragged, which its field takes by itself. */
function isText(event) {
  const { types } = event.dataTransfer;
  return !types.includes("Files") && !types.includes("text/uri-list");
}
