"use strict";

// The server is asked once for everything above this score; the slider only hides.
const ASKED_SCORE = 0.05;
const LONGEST_PX = 2000;

const $ = (id) => document.getElementById(id);
const canvas = $("canvas");

const state = {
  token: "",
  model: null, // what GET model answers
  picture: null, // ImageBitmap, or null where the browser cannot show the file
  found: null, // what POST predict answers
  chosen: -1, // index of the detection that is pointed out
  asking: null, // AbortController of the request under way
};

function headers(more) {
  return state.token ? { ...more, Authorization: `Bearer ${state.token}` } : more;
}

/** JSON of an answer; throws an Error whose message is the server's own words. */
async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: headers(options.headers || {}) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still there?");
  }
  const text = await answer.text();
  if (answer.status === 401) $("entry").hidden = false;
  let content = null;
  try {
    content = JSON.parse(text);
  } catch {
    /* a proxy's own page */
  }
  if (answer.ok && content) return content;
  const said = content && content.error;
  throw new Error(
    said
      ? `${said.where}: expected ${said.expected}, got ${said.got}; ${said.remedy}`
      : `The server answered ${answer.status} ${answer.statusText}`.trim(),
  );
}

/** Far apart for neighbours, and readable under dark text. */
function colour(categoryId) {
  const turn = (categoryId * 0.414214) % 1;
  return `hsl(${Math.round(turn * 360)} ${categoryId % 2 ? 90 : 62}% 66%)`;
}

function threshold() {
  return Number($("score").value);
}

function shown() {
  const all = state.found ? state.found.detections : [];
  return all.map((one, index) => ({ ...one, index })).filter((one) => one.score >= threshold());
}

function say(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

function drawPicture() {
  const { width, height } = state.picture || state.found.image;
  const scale = Math.min(1, LONGEST_PX / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  if (state.picture) {
    context.drawImage(state.picture, 0, 0, canvas.width, canvas.height);
  } else {
    context.fillStyle = "#8884";
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
}

function drawBoxes(boxes) {
  const context = canvas.getContext("2d");
  const { width, height } = state.found.image;
  const [scaleX, scaleY] = [canvas.width / width, canvas.height / height];
  // As thick on the screen whatever the picture's own size.
  const unit = Math.max(0.5, canvas.width / (canvas.clientWidth || canvas.width));
  const fontPx = 11.5 * unit;
  context.font = `600 ${fontPx}px system-ui, sans-serif`;
  context.textBaseline = "top";
  for (const one of [...boxes].reverse()) {
    const [x, y, w, h] = one.bbox_xywh;
    const [left, top, right, bottom] = [x * scaleX, y * scaleY, (x + w) * scaleX, (y + h) * scaleY];
    const faded = state.chosen >= 0 && state.chosen !== one.index;
    context.globalAlpha = faded ? 0.25 : 1;
    context.lineWidth = (state.chosen === one.index ? 7 : 5) * unit;
    context.strokeStyle = "rgb(0 0 0 / 45%)";
    context.strokeRect(left, top, right - left, bottom - top);
    context.lineWidth = (state.chosen === one.index ? 5 : 3) * unit;
    context.strokeStyle = colour(one.category_id);
    context.strokeRect(left, top, right - left, bottom - top);
    const label = `${one.category} ${one.score.toFixed(2)}`;
    const labelWidth = context.measureText(label).width + 8 * unit;
    const labelHeight = fontPx + 5 * unit;
    const labelLeft = Math.max(0, Math.min(left - 1.5 * unit, canvas.width - labelWidth));
    const labelTop = top >= labelHeight ? top - labelHeight : Math.max(0, top);
    context.fillStyle = colour(one.category_id);
    context.fillRect(labelLeft, labelTop, labelWidth, labelHeight);
    context.fillStyle = "#10131a";
    context.fillText(label, labelLeft + 4 * unit, labelTop + 3 * unit);
  }
  context.globalAlpha = 1;
}

function fillList(boxes) {
  const entries = boxes.map((one) => {
    const [button, mark, name, score] = ["button", "i", "span", "b"].map((tag) =>
      document.createElement(tag),
    );
    mark.style.backgroundColor = colour(one.category_id);
    name.textContent = one.category;
    score.textContent = one.score.toFixed(2);
    button.type = "button";
    button.setAttribute("aria-pressed", String(state.chosen === one.index));
    button.append(mark, name, score);
    button.addEventListener("click", () => {
      state.chosen = state.chosen === one.index ? -1 : one.index;
      for (const other of $("list").querySelectorAll("button"))
        other.setAttribute("aria-pressed", String(other === button && state.chosen >= 0));
      paint(shown());
    });
    const entry = document.createElement("li");
    entry.append(button);
    return entry;
  });
  $("list").replaceChildren(...entries);
}

function paint(boxes) {
  drawPicture();
  drawBoxes(boxes);
  canvas.dataset.boxes = String(boxes.length);
}

function show() {
  $("score-shown").textContent = threshold().toFixed(2);
  if (!state.found) return;
  const boxes = shown();
  if (!boxes.some((one) => one.index === state.chosen)) state.chosen = -1;
  paint(boxes);
  fillList(boxes);
  const hidden = state.found.detections.length - boxes.length;
  const number = boxes.length === 1 ? "1 object" : `${boxes.length} objects`;
  $("summary").textContent = boxes.length || hidden ? number : "Nothing found";
  if (hidden) $("summary").textContent += `, ${hidden} below ${threshold().toFixed(2)}`;
  canvas.setAttribute(
    "aria-label",
    `The image with ${number}: ${boxes.map((one) => one.category).join(", ") || "none"}`,
  );
}

async function look(file) {
  if (state.asking) state.asking.abort();
  const asking = new AbortController();
  Object.assign(state, { asking, found: null, picture: null, chosen: -1 });
  say("");
  canvas.dataset.boxes = "";
  $("list").replaceChildren();
  $("timing").textContent = "";
  $("hint").textContent = file.name || "";
  $("summary").textContent = "Looking …";
  $("figure").hidden = true;
  $("drop").classList.add("small");
  try {
    const request = ask(`predict?score=${ASKED_SCORE}`, {
      method: "POST",
      body: file,
      headers: { "Content-Type": file.type.startsWith("image/") ? file.type : "application/octet-stream" },
      signal: asking.signal,
    });
    const picture = await createImageBitmap(file).catch(() => null);
    if (state.asking !== asking) return;
    if (picture) {
      state.picture = picture;
      $("figure").hidden = false;
      $("figure").classList.add("busy");
      drawPicture();
    }
    const found = await request;
    if (state.asking !== asking) return;
    state.found = found;
    $("figure").hidden = false;
    if (!picture) $("hint").textContent += ": this browser cannot show it, so the boxes have no picture.";
    $("timing").textContent = `${found.image.width} × ${found.image.height} pixels, ${Math.round(found.ms)} ms`;
    show();
  } catch (error) {
    if (error.name === "AbortError" || state.asking !== asking) return;
    $("summary").textContent = "No answer";
    say(error.message);
  } finally {
    if (state.asking === asking) $("figure").classList.remove("busy");
  }
}

function take(files) {
  const file = files && files[0];
  if (file) look(file);
  else say("That was no file: drop an image, or choose one.");
}

async function introduce() {
  try {
    state.model = await ask("model", {});
  } catch (error) {
    say(error.message);
    return;
  }
  const model = state.model;
  const names = Object.values(model.classes);
  $("network").textContent = model.network;
  $("about").textContent = `${model.model}, ${names.length} class${names.length === 1 ? "" : "es"}`;
  $("about").title = names.join(", ");
  document.title = `${model.network}: ${names.length} classes`;
  $("score").value = Math.max(ASKED_SCORE, model.default_score);
  show();
}

$("file").addEventListener("change", (event) => {
  if (event.target.files.length) take(event.target.files);
  event.target.value = ""; // the same file may be chosen again
});
$("score").addEventListener("input", show);
$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token").value.trim();
  $("entry").hidden = true;
  say("");
  introduce();
});

// Anywhere on the page: a file that misses the field must not replace the page.
let depth = 0;
document.addEventListener("dragenter", () => {
  depth += 1;
  document.body.classList.add("over");
});
document.addEventListener("dragleave", () => {
  depth = Math.max(0, depth - 1);
  if (!depth) document.body.classList.remove("over");
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("over");
  take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files);
});
window.addEventListener("resize", show);

introduce();
